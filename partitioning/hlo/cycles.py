"""What an HLO module spends beside its collectives: tensors that it copies, and the TPU compiler's cycles.

Decides which copies are large enough to report and which estimates count: no estimate inside a fusion, of a
conditional only the slowest branch. Leaves trip counts to `hlo_loops`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from toruslab.partitioning.hlo.loops import walk
from toruslab.partitioning.hlo.text import Computation, Instruction, Module, parse

_NO_ESTIMATE = 2**62
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
    in_loops: Mapping[str, int]  # the part of it that is in loops, but for those around all
    n_unknown: int  # instructions on which the compiler gives no usable estimate: they count as nothing


def estimated_cycles(text: str | Module, *, unknown_trips: int | None = None, outer_loops: int = 0) -> Cycles | None:
    """Sum of `estimated_cycles` times trips. Of a conditional's branches the slowest counts. None: there are none.

    `outer_loops`: how many loops stand around those that `in_loops` is about.

    Raises:
        HloError: as `hlo.read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    cycles, n_unknown = _estimates(module)
    if not cycles:
        return None
    by_branch: dict[str, dict[tuple[str, bool], int]] = {"": {}}  # of (op_name, whether in a loop)
    for i, frame in walk(module, set(cycles), unknown_trips):
        scopes = by_branch.setdefault(frame.branch or "", {})
        key = (i.op_name, frame.loops > outer_loops)
        scopes[key] = scopes.get(key, 0) + cycles[i.line] * frame.trips
    while len(by_branch) > 1:  # the innermost conditional first: its slowest branch joins what is around it
        innermost = max(by_branch, key=lambda branch: branch.count("["))
        conditional = innermost.rpartition("[")[0]
        rivals = [by_branch.pop(b) for b in list(by_branch) if b.rpartition("[")[0] == conditional and b]
        around = by_branch.setdefault(conditional.rpartition("/")[0], {})
        for scope, n in max(rivals, key=lambda scopes: sum(scopes.values())).items():
            around[scope] = around.get(scope, 0) + n
    by_scope: dict[str, int] = {}
    for (name, _), n in by_branch[""].items():
        by_scope[name] = by_scope.get(name, 0) + n
    in_loops = {name: n for (name, in_loop), n in by_branch[""].items() if in_loop}
    return Cycles(total=sum(by_scope.values()), by_scope=by_scope, in_loops=in_loops, n_unknown=n_unknown)


def cycles_meanwhile(text: str | Module, *, unknown_trips: int | None = None) -> dict[int, int]:
    """What is computed while each asynchronous collective is under way, in core clocks of one execution.

    Between its start and its done, in the order in which the compiler has put the instructions: the same work counts
    for every collective that is under way.

    Returns:
        line of the collective (as `hlo.Collective.line`) -> clocks. Synchronous ones are not there.

    Raises:
        HloError: as `hlo.read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    estimates, _ = _estimates(module)
    found: dict[int, int] = {}

    def between(computation: Computation, start: Instruction, done: Instruction) -> int:
        order = computation.instructions
        lines = [i.line for i in order[order.index(start) + 1 : order.index(done)]]
        return sum(estimates.get(line, 0) for line in lines)

    begun: dict[tuple[str, ...], tuple[int, Instruction, Computation]] = {}
    for computation in module.computations.values():
        for i in computation.instructions:
            if i.opcode.endswith("-start"):
                ends = [u for u in computation.users.get(i.name, ()) if u.opcode == f"{i.opcode[:-6]}-done"]
                if ends:
                    found[i.line] = between(computation, i, ends[0])
            for called in module.called(i) if i.opcode == "fusion" else ():
                for inner in called.instructions:
                    key = async_key(inner)
                    if feeds(inner, called, "AsyncCollectiveStart"):
                        begun[key] = (inner.line, i, computation)
                    elif feeds(inner, called, "AsyncCollectiveDone") and key in begun:
                        line, start, around = begun[key]
                        found[line] = between(around, start, i) if around is computation else 0
    return found


def async_key(i: Instruction) -> tuple[str, ...]:
    """What the steps of one asynchronous collective fusion have in common."""
    a = i.attributes
    return (i.opcode, *(a.get(k, "") for k in ("channel_id", "replica_groups", "frontend_attributes")))


def feeds(i: Instruction, computation: Computation, target: str) -> bool:
    """Whether a custom-call to `target` consumes the instruction (a TPU async collective fusion's mark)."""
    behind, seen = [i], {i.name}
    while behind:
        for user in computation.users.get(behind.pop().name, ()):
            if f'custom_call_target="{target}"' in user.rest:
                return True
            if user.name not in seen:
                seen.add(user.name)
                behind.append(user)
    return False


def _estimates(module: Module) -> tuple[dict[int, int], int]:
    """Line -> estimated clocks, and how many lines have an estimate that cannot be one (the largest integer, a negative
    one); an estimate inside a fusion is the fusion's and not counted."""
    fused = {name for i in module.instructions if i.opcode == "fusion" for name in i.called}
    counted = [c for c in module.computations.values() if c.name not in fused]
    said = {i.line: int(found[1]) for c in counted for i in c.instructions if (found := _CYCLES.search(i.rest))}
    known = {line: n for line, n in said.items() if 0 <= n < _NO_ESTIMATE}
    return known, len(said) - len(known)
