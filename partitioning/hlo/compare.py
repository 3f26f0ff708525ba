"""The compiled program compared with the plan, collective by collective.

Two collectives are the same if scope, axes, kind, bytes and executions are equal. `Verdict` lists the ways in which a
compiler may depart from that. Every collective of both sides is in the result, those without a match too.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from toruslab.partitioning.hlo.collectives import Collective
from toruslab.partitioning.layouts.layout import Axes
from toruslab.partitioning.plan.plan import Planned
from toruslab.partitioning.plan.scopes import scope_of

Verdict = Literal[
    "as planned",
    "merged",
    "split",
    "widened to f32",
    "narrowed to bf16",
    "padded",
    "all-reduce instead of reduce-scatter",
    "all-reduce instead of all-gather",
    "extra",
    "missing",
]
"""How a collective of the program relates to the plan.

- as planned: same scope, kind, axes, bytes and count.
- merged: the same, but the compiler joined it with others in one instruction.
- split: several collectives together move the planned bytes over the planned axes. Our own program does this for TPUs
  over three axes.
- widened to f32: XLA:CPU moves bfloat16 as float32.
- narrowed to bf16: XLA:TPU moves float32 weights as bfloat16.
- padded: a slightly larger reduce-scatter, of whole tiles, and a shift between neighbours that removes the padding.
- all-reduce instead: the compiler has no such collective for these sizes; an all-reduce moves about twice the bytes.
- extra: in the program, but not planned.
- missing: planned, but not in the program.
"""

PADDING, SHIFTED_PADDING, TILE_BYTES = 1.035, 1.1, 4096
"""Bytes count as padded if they are at most `PADDING` times those planned, or one tile more for each chip of the group;
or `SHIFTED_PADDING` times, if a shift between neighbours moves exactly the bytes added. Seen with libtpu: up to 1.2%
for activations on v5e; for gradients of weights on v4 up to 3.2%, and 9.4% with such a shift."""
MOST_PARTS = 12
"""A split is searched among so many collectives of a scope."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One collective of the program, or a planned one that is missing.

    Args:
        scope: the planned scope if it matches, else its own.
        kind, bytes: of the program's collective; None if it is missing. Bytes are those that one chip receives in one
            execution.
        axes: mesh axes.
        count: executions in one pass; with several steps in a call, in one step (a fraction if not every step has it).
        planned_kind, planned_bytes: of the plan; None if it is extra. If several collectives match a planned one, the
            first has its bytes and the others 0.
        verdict: how the two relate.
        algorithm: the strategy and code generator that the compiler names.
        asynchronous: other work may run meanwhile.
        line: in the program's text.
    """

    scope: str
    kind: str | None
    axes: Axes
    bytes: int | None
    count: int | float
    planned_kind: str | None
    planned_bytes: int | None
    verdict: Verdict
    algorithm: str | None = None
    asynchronous: bool = False
    line: int | None = None

    @property
    def explained(self) -> bool:
        """Whether the plan accounts for it."""
        return self.verdict not in ("extra", "missing")


def compare(planned: Sequence[Planned], compiled: Iterable[Collective], *, steps: int = 1) -> list[Matched]:
    """Matches compiled collectives with planned ones.

    Two passes over the rules: an exact match first, then one departure of `Verdict` after another. Pass 1 matches
    within a scope; a collective without a name takes the scope of its operand. Pass 2 lets the remaining nameless ones
    match any scope.

    Args:
        planned: the plan of one step.
        compiled: the collectives of the program.
        steps: decode steps in one call; each collective must run `steps` times as often. A program that may stop early
            must be read with `unknown_trips=steps`, as if no row stopped.

    Returns:
        The matches, then the extra collectives, then the missing ones.
    """
    rest, left = list(compiled), list(planned)
    scopes = {c: _scope(c) for c in rest}
    matched: list[Matched] = []

    def take(p: Planned, parts: Sequence[Collective], verdict: Verdict) -> None:
        for n, c in enumerate(parts):
            rest.remove(c)
            matched.append(_matched(p.scope, c, steps, verdict, p.kind, 0 if n else p.bytes))

    shifted = frozenset(c.bytes for c in rest if c.kind == "collective-permute")
    padded = functools.partial(_padded, shifted=shifted)
    for anywhere in (False, True):
        for rule in (_exact, _widened, _narrowed, _instead, _split, padded):
            for p in list(left):
                near = [c for c in rest if c.trips == p.count * steps]
                near = [c for c in near if scopes[c] == p.scope or (anywhere and _is_nameless(c, scopes[c], p))]
                if found := rule(p, near):
                    left.remove(p)
                    take(p, *found)
    for m in [m for m in matched if m.verdict == "padded" and m.planned_bytes]:
        added = (m.bytes or 0) - (m.planned_bytes or 0)
        for c in list(rest):  # the shift may have the scope of its reader
            if c.kind == "collective-permute" and c.bytes == added and c.trips == m.count * steps:
                rest.remove(c)
                matched.append(_matched(m.scope, c, steps, "padded", m.planned_kind, 0))
                break
    return [
        *matched,
        *(_matched(scopes[c], c, steps, "extra", None, None) for c in rest),
        *(
            Matched(
                scope=p.scope,
                kind=None,
                axes=p.axes,
                bytes=None,
                count=p.count,
                planned_kind=p.kind,
                planned_bytes=p.bytes,
                verdict="missing",
            )
            for p in left
        ),
    ]


_INSTEAD: dict[str, Verdict] = {
    "reduce-scatter": "all-reduce instead of reduce-scatter",
    "all-gather": "all-reduce instead of all-gather",
}
Found = tuple[Sequence[Collective], Verdict] | None
"""The collectives that match a planned one, and how."""


def _scope(c: Collective) -> str:
    return next((s for s in map(scope_of, (c.scope, *c.near)) if s), "")


def _matched(
    scope: str, c: Collective, steps: int, verdict: Verdict, planned_kind: str | None, planned_bytes: int | None
) -> Matched:
    return Matched(
        scope=scope,
        kind=c.kind,
        axes=c.axes,
        bytes=c.bytes,
        count=c.trips / steps if c.trips % steps else c.trips // steps,
        planned_kind=planned_kind,
        planned_bytes=planned_bytes,
        verdict=verdict,
        algorithm=" ".join(filter(None, (c.strategy, c.emitter))) or None,
        asynchronous=c.asynchronous,
        line=c.line,
    )


def _is_nameless(c: Collective, scope: str, p: Planned) -> bool:
    """Whether it may belong to another scope: it has no name, or it is a gradient, which XLA:TPU may join with others
    under the name of one."""
    return not c.scope or all(s.startswith("gradients/") for s in (scope, p.scope))


def _padded_bytes(n: int, c: Collective) -> float:
    return max(PADDING * n, n + TILE_BYTES * c.group_size)


def _same_kind(p: Planned, near: Sequence[Collective]) -> list[Collective]:
    return [c for c in near if (c.kind, c.axes) == (p.kind, p.axes)]


def _exact(p: Planned, near: Sequence[Collective]) -> Found:
    same = [c for c in _same_kind(p, near) if c.bytes == p.bytes]
    same = [c for c in same if p.itemsize == 4 or c.dtype != "f32" or c.logical_dtype == "f32"]  # not widened
    return (same[:1], "merged" if same[0].n_merged > 1 and not p.merged else "as planned") if same else None


def _widened(p: Planned, near: Sequence[Collective]) -> Found:
    wide = [c for c in _same_kind(p, near) if c.dtype == "f32" and c.logical_dtype != "f32" and c.bytes == 2 * p.bytes]
    return (wide[:1], "widened to f32") if wide else None


def _narrowed(p: Planned, near: Sequence[Collective]) -> Found:
    narrow = [c for c in _same_kind(p, near) if p.itemsize == 4 and c.dtype == "bf16" and 2 * c.bytes == p.bytes]
    return (narrow[:1], "narrowed to bf16") if narrow else None


def _instead(p: Planned, near: Sequence[Collective]) -> Found:
    def twice(c: Collective) -> int:
        return p.bytes if p.itemsize == 4 and c.dtype == "bf16" else 2 * p.bytes  # narrowed as well

    whole = [c for c in near if c.kind == "all-reduce" and c.axes == p.axes]
    whole = [c for c in whole if twice(c) - 2 <= c.bytes <= _padded_bytes(twice(c), c)]
    return (whole[:1], _INSTEAD[p.kind]) if whole and p.kind in _INSTEAD else None


def _split(p: Planned, near: Sequence[Collective]) -> Found:
    """Several collectives over the same axes, or over one part of the axes after another; some may be all-reduces."""
    by_axes = [c for c in near if c.kind in (p.kind, "all-reduce") and set(c.axes) < set(p.axes)]
    several = [parts for n in (2, 3) for parts in itertools.combinations(by_axes[:MOST_PARTS], n)]
    several = [parts for parts in several if sorted(a for c in parts for a in c.axes) == sorted(p.axes)]
    for parts in (_same_kind(p, near), *(several if p.kind != "all-reduce" else [])):
        halved = any(c.kind != p.kind for c in parts)
        moved = sum(c.bytes if c.kind == p.kind else c.bytes // 2 for c in parts)
        if len(parts) > 1 and abs(moved - p.bytes) <= len(parts):
            return parts, _INSTEAD[p.kind] if halved else "split"
    return None


def _padded(p: Planned, near: Sequence[Collective], *, shifted: frozenset[int]) -> Found:
    def most(c: Collective) -> float:
        return SHIFTED_PADDING * p.bytes if c.bytes - p.bytes in shifted else _padded_bytes(p.bytes, c)

    larger = [c for c in _same_kind(p, near) if p.bytes < c.bytes <= most(c)]
    if not larger or p.kind != "reduce-scatter":
        return None
    shifts = [c for c in near if c.kind == "collective-permute" and set(c.axes) <= set(p.axes)]
    shifts = [c for c in shifts if c.bytes <= larger[0].bytes - p.bytes]
    return larger[:1] + shifts[:1], "padded"
