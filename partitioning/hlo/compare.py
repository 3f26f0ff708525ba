"""The plan held against the compiled program, collective by collective.

Decides what counts as the same collective: scope, axes, kind and bytes, executed as often; and in which ways a
compiler may depart from that. Neither side is changed: what does not match stays in the list, with a verdict.
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
"""How a collective of the program stands to the plan.

- as planned: same scope, kind, axes, bytes and count; merged: the same, sharing an instruction with others.
- split: several that together move the planned bytes over the planned axes, as our program for TPUs does over three.
- widened, narrowed: XLA:CPU moves bfloat16 as float32; XLA:TPU moves float32 weights as bfloat16.
- padded: a reduce-scatter of whole tiles, a little larger, and the shift between neighbours that undoes it.
- all-reduce instead: the compiler had no such collective for these sizes, and moves about twice the bytes.
- extra: nobody planned it; missing: planned, but not in the program.
"""

PADDING, SHIFTED_PADDING, TILE_BYTES = 1.035, 1.1, 4096
"""Padded bytes are the plan's if they are at most so many times it (the second where a shift between neighbours moves
just what was added), or a tile more for each chip of the group; libtpu pads activations by up to 1.2% on v5e, and the
gradients of weights by up to 3.2% on v4, or 9.4% with such a shift."""
MOST_PARTS = 12
"""Of so many collectives of a scope is tried which of them together are a planned one."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One collective of the program, or one that it should have had.

    `bytes`: what one chip receives in one execution; `count`: executions in one pass, of several steps in a call those
    of one step (a fraction, where it does not run in every step). `kind` and `bytes` are None
    where the collective is missing from the program, `planned_kind` and `planned_bytes` where it has no plan; of a
    planned one that was split, `planned_bytes` stands with the first part, and 0 with the others.
    `algorithm` is what the compiler says of how it runs, `asynchronous` whether other work may run meanwhile, `line`
    where it stands in the program's text.
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
    """Matches every compiled collective to a planned one; what is left of either side comes after.

    A program of several `steps` must run each collective of the plan in every one of them: `steps` times as often. A
    program that may stop early has to be read with `unknown_trips=steps`, as if no row stopped.

    Twice through the rules, an exact match first, then the departures that `Verdict` names, in their order: first
    within a scope, where a collective whose name the compiler dropped has the scope of what it reads; then, for what
    is left of those without a name, in any scope.
    """
    rest = [(_scope(c), c) for c in compiled]
    left = list(planned)
    matched: list[Matched] = []

    def take(p: Planned, parts: list[tuple[str, Collective]], verdict: Verdict) -> None:
        left.remove(p)
        for n, (scope, c) in enumerate(parts):
            rest.remove((scope, c))
            matched.append(_row(p.scope, c, steps, verdict, planned_kind=p.kind, planned_bytes=0 if n else p.bytes))

    shifted = frozenset(c.bytes for _, c in rest if c.kind == "collective-permute")
    padded = functools.partial(_padded, shifted=shifted)
    for anywhere in (False, True):
        for rule in (_exact, _widened, _narrowed, _instead, _split, padded):
            for p in list(left):
                near = [(s, c) for s, c in rest if c.trips == p.count * steps]
                near = [(s, c) for s, c in near if s == p.scope or (anywhere and _nameless(s, c, p))]
                if found := rule(p, near):
                    take(p, *found)
    for p in [m for m in matched if m.verdict == "padded" and m.planned_bytes]:
        added = (p.bytes or 0) - (p.planned_bytes or 0)
        for scope, c in list(rest):  # the shift of a padded one may stand under who reads it
            if c.kind == "collective-permute" and c.bytes == added and c.trips == p.count * steps:
                rest.remove((scope, c))
                matched.append(_row(p.scope, c, steps, "padded", planned_kind=p.planned_kind, planned_bytes=0))
                break
    return [
        *matched,
        *(_row(scope, c, steps, "extra", planned_kind=None, planned_bytes=None) for scope, c in rest),
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
Near = list[tuple[str, Collective]]
Found = tuple[Near, Verdict] | None


def _scope(c: Collective) -> str:
    return next((s for s in map(scope_of, (c.scope, *c.near)) if s), "")


def _row(scope: str, c: Collective, steps: int, verdict: Verdict, *, planned_kind, planned_bytes) -> Matched:
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


def _nameless(scope: str, c: Collective, p: Planned) -> bool:
    """Whether it may be of another scope: its name is gone, or XLA:TPU joined several gradients under one's name."""
    return not c.scope or all(s.startswith("gradients/") for s in (scope, p.scope))


def _padded_bytes(n: int, c: Collective) -> float:
    return max(PADDING * n, n + TILE_BYTES * c.group_size)


def _same_kind(p: Planned, near: Near) -> Near:
    return [(s, c) for s, c in near if (c.kind, c.axes) == (p.kind, p.axes)]


def _exact(p: Planned, near: Near) -> Found:
    same = [(s, c) for s, c in _same_kind(p, near) if c.bytes == p.bytes]
    same = [(s, c) for s, c in same if p.itemsize == 4 or c.dtype != "f32" or c.logical_dtype == "f32"]  # not widened
    return (same[:1], "merged" if same[0][1].n_merged > 1 and not p.merged else "as planned") if same else None


def _widened(p: Planned, near: Near) -> Found:
    wide = [(s, c) for s, c in _same_kind(p, near) if c.dtype == "f32" and c.logical_dtype != "f32"]
    wide = [(s, c) for s, c in wide if c.bytes == 2 * p.bytes]
    return (wide[:1], "widened to f32") if wide else None


def _narrowed(p: Planned, near: Near) -> Found:
    narrow = [(s, c) for s, c in _same_kind(p, near) if p.itemsize == 4 and c.dtype == "bf16"]
    narrow = [(s, c) for s, c in narrow if 2 * c.bytes == p.bytes]
    return (narrow[:1], "narrowed to bf16") if narrow else None


def _instead(p: Planned, near: Near) -> Found:
    whole = [(s, c) for s, c in near if c.kind == "all-reduce" and c.axes == p.axes]

    def twice(c: Collective) -> int:
        return p.bytes if p.itemsize == 4 and c.dtype == "bf16" else 2 * p.bytes  # narrowed as well

    whole = [(s, c) for s, c in whole if twice(c) - 2 <= c.bytes <= _padded_bytes(twice(c), c)]
    return (whole[:1], _INSTEAD[p.kind]) if whole and p.kind in _INSTEAD else None


def _split(p: Planned, near: Near) -> Found:
    """In several pieces over the same axes, or axes by axes; some of these may have become all-reduces."""
    whole = _same_kind(p, near)
    by_axes = [(s, c) for s, c in near if c.kind in (p.kind, "all-reduce") and set(c.axes) < set(p.axes)]
    several = [list(parts) for n in (2, 3) for parts in itertools.combinations(by_axes[:MOST_PARTS], n)]
    several = [parts for parts in several if sorted(a for _, c in parts for a in c.axes) == sorted(p.axes)]
    for parts in (whole, *(several if p.kind != "all-reduce" else [])):
        halved = [c for _, c in parts if c.kind != p.kind]
        moved = sum(c.bytes // 2 if c in halved else c.bytes for _, c in parts)
        if len(parts) > 1 and abs(moved - p.bytes) <= len(parts):
            return parts, _INSTEAD[p.kind] if halved else "split"
    return None


def _padded(p: Planned, near: Near, *, shifted: frozenset[int]) -> Found:
    def most(c: Collective) -> float:
        return SHIFTED_PADDING * p.bytes if c.bytes - p.bytes in shifted else _padded_bytes(p.bytes, c)

    larger = [(s, c) for s, c in _same_kind(p, near) if p.bytes < c.bytes <= most(c)]
    if not larger or p.kind != "reduce-scatter":
        return None
    added = larger[0][1].bytes - p.bytes
    shifts = [
        (s, c) for s, c in near if c.kind == "collective-permute" and set(c.axes) <= set(p.axes) and c.bytes <= added
    ]
    return larger[:1] + shifts[:1], "padded"
