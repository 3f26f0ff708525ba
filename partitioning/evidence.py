"""The plan held against the compiled program, collective by collective.

Decides what counts as the same collective: scope, axes, kind and bytes, executed as often. Neither side is changed:
what does not match stays in the list, with a verdict.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from partitioning.dataflow import Planned
from partitioning.hlo import Collective
from partitioning.layouts import Axes

Verdict = Literal[
    "as planned", "merged", "widened to f32", "all-reduce instead of reduce-scatter", "split", "extra", "missing"
]

SCOPES = frozenset(
    [
        "embed",
        "layer",
        "attention",
        "mlp",
        "x",
        "norm",
        "w_in",
        "h",
        "kv",
        "w_kv",
        "q",
        "attend",
        "o",
        "g",
        "w_out",
        "out",
        "rows",
        "logits",
        "sample",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One collective of the program, or one that it should have had.

    `bytes`: what one chip receives in one execution; `count`: executions in one pass. `kind` and `bytes` are None
    where the collective is missing from the program, `planned_kind` and `planned_bytes` where it has no plan.
    """

    scope: str
    kind: str | None
    axes: Axes
    bytes: int | None
    count: int
    planned_kind: str | None
    planned_bytes: int | None
    verdict: Verdict

    @property
    def explained(self) -> bool:
        """Whether the plan accounts for it."""
        return self.verdict in ("as planned", "merged", "widened to f32")


def scope_of(op_name: str) -> str:
    """The decoder's own scopes out of an op's full name.

    Example:
        >>> scope_of("jit(run)/while/body/closed_call/layer/h/shard_map/unreduced_reduce_scatter")
        'layer/h'
    """
    return "/".join(part for part in op_name.split("/") if part in SCOPES)


def compare(planned: Sequence[Planned], compiled: Iterable[Collective]) -> list[Matched]:
    """Matches every compiled collective to a planned one; what is left of either side comes after.

    An exact match takes precedence, then one of twice the bytes that moves float32 (XLA:CPU widens bfloat16); then,
    within a scope and axes, an all-reduce where a reduce-scatter was planned, and several collectives that together
    move what one was to move.
    """
    found = [(scope_of(c.scope), c) for c in compiled]
    left = list(planned)
    matched: list[Matched] = []

    def match(p: Planned, scope: str, c: Collective, verdict: Verdict) -> None:
        matched.append(
            Matched(
                scope=scope,
                kind=c.kind,
                axes=c.axes,
                bytes=c.bytes,
                count=c.trips,
                planned_kind=p.kind,
                planned_bytes=p.bytes,
                verdict=verdict,
            )
        )

    rest: list[tuple[str, Collective]] = []
    for scope, c in found:
        same = [
            p for p in left if (p.scope, p.kind, p.axes, p.bytes, p.count) == (scope, c.kind, c.axes, c.bytes, c.trips)
        ]
        wide = [p for p in left if (p.scope, p.kind, p.axes, p.count) == (scope, c.kind, c.axes, c.trips)]
        wide = [p for p in wide if c.dtype == "f32" and c.bytes == 2 * p.bytes]
        if same:
            left.remove(same[0])
            match(same[0], scope, c, "merged" if c.n_merged > 1 else "as planned")
        elif wide:
            left.remove(wide[0])
            match(wide[0], scope, c, "widened to f32")
        else:
            rest.append((scope, c))

    for p in list(left):
        near = [(s, c) for s, c in rest if (s, c.axes, c.trips) == (p.scope, p.axes, p.count)]
        whole = [(s, c) for s, c in near if c.kind == "all-reduce" and p.kind == "reduce-scatter"]
        parts = [(s, c) for s, c in near if c.kind == p.kind]
        if whole:
            left.remove(p)
            rest.remove(whole[0])
            match(p, *whole[0], "all-reduce instead of reduce-scatter")
        elif len(parts) > 1 and sum(c.bytes for _, c in parts) == p.bytes:
            left.remove(p)
            for part in parts:
                rest.remove(part)
                match(p, *part, "split")

    return [
        *matched,
        *(
            Matched(
                scope=scope,
                kind=c.kind,
                axes=c.axes,
                bytes=c.bytes,
                count=c.trips,
                planned_kind=None,
                planned_bytes=None,
                verdict="extra",
            )
            for scope, c in rest
        ),
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
