"""What an HLO module costs besides collectives: tensors that it copies, and the cycle estimates of the TPU compiler.

An estimate inside a fusion does not count, because the fusion has its own. Of a conditional the slowest branch counts.
Trip counts come from `loops`.
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
    """A tensor that is copied unchanged. Between memory spaces this is a prefetch; within space 0 it is waste."""

    bytes: int  # that one execution writes
    dtype: str
    dims: tuple[int, ...]
    scope: str  # op_name of the copy, or else of the fusion around it
    trips: int
    fused: bool  # inside a fusion, where it may never be stored
    asynchronous: bool
    from_space: int
    to_space: int
    line: int


def copies(text: str | Module, min_bytes: int, *, unknown_trips: int | None = None) -> list[Copy]:
    """The copies of at least `min_bytes` on one chip in one execution, including those inside fusions.

    Raises:
        HloError: as in `collectives.read`.
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
    """Estimates of XLA:TPU's own cost model, in core clocks of one execution. Collectives have none."""

    total: int
    by_scope: Mapping[str, int]  # op_name -> clocks; "" for instructions without op_name
    in_loops: Mapping[str, int]  # the part of `by_scope` inside loops
    n_unknown: int  # instructions whose estimate is unusable; they count as 0


def estimated_cycles(text: str | Module, *, unknown_trips: int | None = None, outer_loops: int = 0) -> Cycles | None:
    """The sum of `estimated_cycles` times trips, with the slowest branch of each conditional.

    Args:
        text: the program.
        unknown_trips: see `collectives.read`.
        outer_loops: loops around the whole pass, such as that over decode steps; they do not count for `in_loops`.

    Returns:
        None if the program has no estimates: only XLA:TPU gives them.

    Raises:
        HloError: as in `collectives.read`.
    """
    module = parse(text) if isinstance(text, str) else text
    cycles, n_unknown = _estimates(module)
    if not cycles:
        return None
    by_branch: dict[str, dict[tuple[str, bool], int]] = {"": {}}  # branch -> (op_name, whether in a loop) -> clocks
    for i, frame in walk(module, set(cycles), unknown_trips):
        scopes = by_branch.setdefault(frame.branch or "", {})
        key = (i.op_name, frame.loops > outer_loops)
        scopes[key] = scopes.get(key, 0) + cycles[i.line] * frame.trips
    while (
        len(by_branch) > 1
    ):  # from the innermost conditional outwards: its slowest branch is added to the code around it
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
    """Core clocks of computation that the compiler scheduled while each asynchronous collective runs, in one execution.

    These are the instructions between its start and its done. If several collectives run at once, the same instructions
    count for each of them.

    Returns:
        Line of the collective (`Collective.line`) -> clocks. Synchronous collectives are left out.

    Raises:
        HloError: as in `collectives.read`.
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
    """A key that the parts of one TPU async collective fusion share: start, steps beside other work, done."""
    a = i.attributes
    return (i.opcode, *(a.get(k, "") for k in ("channel_id", "replica_groups", "frontend_attributes")))


def feeds(i: Instruction, computation: Computation, target: str) -> bool:
    """Whether a custom-call to `target` uses the instruction. This is how a TPU async collective fusion is marked."""
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
    """Line -> estimated clocks, without those inside fusions; and how many lines have an unusable estimate, which is
    negative or the largest integer."""
    fused = {name for i in module.instructions if i.opcode == "fusion" for name in i.called}
    counted = [c for c in module.computations.values() if c.name not in fused]
    said = {i.line: int(found[1]) for c in counted for i in c.instructions if (found := _CYCLES.search(i.rest))}
    known = {line: n for line, n in said.items() if 0 <= n < _NO_ESTIMATE}
    return known, len(said) - len(known)
