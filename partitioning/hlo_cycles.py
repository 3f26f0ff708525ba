"""What an HLO module spends beside its collectives: tensors that it copies, and the TPU compiler's cycles.

Decides which copies are large enough to report and which estimates count: no estimate inside a fusion, of a
conditional only the slowest branch. Leaves trip counts to `hlo_loops`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from partitioning.hlo_loops import walk
from partitioning.hlo_text import Module, parse

_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor copied as it is. Between memory spaces it is a prefetch; within space 0 it is traffic for nothing."""

    bytes: int  # written in one execution
    dtype: str
    dims: tuple[int, ...]
    scope: str  # op_name, or that of the fusion around it
    trips: int
    fused: bool  # inside a fusion: it may never be stored
    asynchronous: bool
    from_space: int
    to_space: int
    line: int


def copies(text: str | Module, min_bytes: int, *, unknown_trips: int | None = None) -> list[Copy]:
    """The copies of at least `min_bytes` (values per chip, one execution), those inside fusions included.

    Raises:
        HloError: as `hlo.read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    large = {
        i.line
        for i in module.instructions
        if i.opcode in ("copy", "copy-start") and any(s.n_bytes(i.line) >= min_bytes for s in i.shapes)
    }
    found = []
    for i, frame in walk(module, large, unknown_trips):
        sources = frame.computation.operand(i).shapes
        for shape, source in zip(i.shapes[: len(sources)], sources, strict=True):
            if shape.n_bytes(i.line) < min_bytes:
                continue
            around = frame.caller.op_name if frame.is_fused and frame.caller else ""
            found.append(
                Copy(
                    bytes=shape.n_bytes(i.line),
                    dtype=shape.dtype,
                    dims=shape.dims,
                    scope=i.op_name or around,
                    trips=frame.trips,
                    fused=frame.is_fused,
                    asynchronous=i.opcode == "copy-start" or frame.asynchronous,
                    from_space=source.space,
                    to_space=shape.space,
                    line=i.line,
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """What XLA:TPU's own cost model estimates, in core clocks of one execution; collectives carry no estimate."""

    total: int
    by_scope: Mapping[str, int]  # op_name -> clocks; "" is what has none


def estimated_cycles(text: str | Module, *, unknown_trips: int | None = None) -> Cycles | None:
    """Sum of `estimated_cycles` times trips. Of a conditional's branches the slowest counts. None: there are none.

    Raises:
        HloError: as `hlo.read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    fused = {name for i in module.instructions if i.opcode == "fusion" for name in i.called}  # theirs is the fusion's
    counted = [c for c in module.computations.values() if c.name not in fused]
    cycles = {i.line: int(found[1]) for c in counted for i in c.instructions if (found := _CYCLES.search(i.rest))}
    if not cycles:
        return None
    by_branch: dict[str, dict[str, int]] = {"": {}}
    for i, frame in walk(module, set(cycles), unknown_trips):
        scopes = by_branch.setdefault(frame.branch or "", {})
        scopes[i.op_name] = scopes.get(i.op_name, 0) + cycles[i.line] * frame.trips
    while len(by_branch) > 1:  # the innermost conditional first: its slowest branch joins what is around it
        innermost = max(by_branch, key=lambda branch: branch.count("["))
        conditional = innermost.rpartition("[")[0]
        rivals = [by_branch.pop(b) for b in list(by_branch) if b.rpartition("[")[0] == conditional and b]
        around = by_branch.setdefault(conditional.rpartition("/")[0], {})
        for scope, n in max(rivals, key=lambda scopes: sum(scopes.values())).items():
            around[scope] = around.get(scope, 0) + n
    return Cycles(total=sum(by_branch[""].values()), by_scope=by_branch[""])
