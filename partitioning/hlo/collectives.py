"""Optimised HLO text -> the collectives of the program: bytes, mesh axes, executions and scope of each.

The other files of this room do the parts of this: `text` reads instructions, `groups` finds the axes, `loops` counts
executions. `compare` matches the result with the plan. Anything that cannot be read raises `HloError` with its line; no
collective is skipped in silence. Imports no JAX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from toruslab.partitioning.hlo.cycles import async_key, feeds
from toruslab.partitioning.hlo.groups import mesh_axes
from toruslab.partitioning.hlo.loops import SAME, Frame, Place, walk
from toruslab.partitioning.hlo.text import ArrayShape, HloError, Instruction, Module, parse

CompiledKind = Literal[
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
]
_KINDS = get_args(CompiledKind)
_LIKE_ONE = re.compile(r"all-|reduce-scatter|collective|ragged-all|send$|recv$")
_LIKE_ONE_CALL = re.compile(r"all.?gather|all.?reduce|reduce.?scatter|all.?to.?all|collective", re.IGNORECASE)
_ASYNC_MARKS = ("AsyncCollectiveStart", "AsyncCollectiveDone")
_MOVED = ("copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "slice", "dynamic-slice", "concatenate")
_NARROW = {"bf16", "f16"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program. A merged collective, which moves several tensors, is one of these per tensor."""

    kind: CompiledKind
    axes: tuple[str, ...]  # of size > 1, in mesh order; of a permute, those along which any pair differs
    bytes: int  # that ONE chip must receive in one execution, rounded up; including the compiler's padding
    dtype: str  # of what moves
    logical_dtype: str  # of what the program asked for: bf16 where XLA:CPU widened it to f32
    scope: str  # the whole op_name; "" if the compiler dropped it (then see `near`)
    near: tuple[str, ...]  # op_names of its reduction and of the instruction that computes its operand
    trips: int  # executions in one execution of the program
    group_size: int  # K, the chips in one group: the product of `axes`, except with `partial_axes`
    asynchronous: bool  # a start/done pair, or a TPU async collective fusion
    sliced: bool  # an all-reduce of which each chip uses only 1/K: it could have been a reduce-scatter
    strategy: str | None  # TPU: the ring strategy that the compiler names
    emitter: str | None  # TPU: the code generator that the compiler names, even without a strategy
    branch: str | None  # such as "conditional.1[0]"; a branch may not run, and all branches are reported
    line: int  # in the text, from 1
    part: int  # number of the tensor in a merged collective, from 0
    n_merged: int  # tensors that share this instruction

    @property
    def logical_bytes(self) -> int:
        """`bytes` if the collective ran in `logical_dtype`."""
        logical, real = (ArrayShape(dtype=d, dims=(8,)).n_bytes(self.line) for d in (self.logical_dtype, self.dtype))
        return -(-self.bytes * logical // real)


def _is_collective(i: Instruction) -> bool:
    """Whether it is a collective; raises `HloError` if it looks like one that this reader does not know."""
    if i.opcode.removesuffix("-start") in _KINDS:
        return True
    if i.opcode == "custom-call":
        target = i.attributes.get("custom_call_target", "").strip('"')
        if _LIKE_ONE_CALL.search(target) and target not in _ASYNC_MARKS:
            raise HloError(i.line, f"custom-call {target!r} looks like a collective that this reader does not know")
    elif _LIKE_ONE.match(i.opcode) and re.sub("-(done|update)$", "", i.opcode) not in _KINDS:
        if i.attributes.get("is_host_transfer") == "true":
            return False
        raise HloError(i.line, f"opcode {i.opcode!r} looks like a collective that this reader does not know")
    return False


def _users(i: Instruction, frame: Frame) -> list[Place] | None:
    """The instructions that use it, also outside a fusion whose root it is, and inside fusions that take it.

    None if it is the result of a computation other than a fusion, whose users are not known.
    """
    found: list[Place] = []
    if i.is_root:
        if not frame.caller or not frame.parent or frame.caller.opcode != "fusion":
            return None
        above = _users(frame.caller, frame.parent)
        if above is None:
            return None
        found += above
    for user in frame.computation.users.get(i.name, ()):
        if user.opcode != "fusion":
            found.append((user, frame))
            continue
        inner = frame.inside(user)
        for n in [n for n, name in enumerate(user.operands) if name == i.name]:
            through = _users(inner.computation.parameter(n, user.line), inner)
            if through is None:
                return None
            found += through
    return found


def _parts(i: Instruction, frame: Frame, part: int, n_merged: int) -> list[Place]:
    """The instructions whose value is element `part` of the result."""
    users = _users(i, frame) or []
    if len(users) == 1 and users[0][0].opcode.endswith("-done"):
        return _parts(*users[0], part, n_merged)
    if n_merged == 1:
        return [(i, frame)]
    return [(u, f) for u, f in users if u.opcode == "get-tuple-element" and u.tuple_index == part]


def _is_sliced(i: Instruction, frame: Frame, n_elements: int) -> bool:
    """Whether its only uses are dynamic-slices of `n_elements`."""
    users = _users(i, frame) or []
    return bool(users) and all(
        u.shapes[0].n_elements == n_elements
        if u.opcode == "dynamic-slice"
        else u.opcode in ("transpose", *SAME) and _is_sliced(u, f, n_elements)
        for u, f in users
    )


def _producer(i: Instruction, frame: Frame) -> Place:
    """The instruction that computed it, also inside fusions, and before instructions that only move it."""
    while True:
        if i.opcode in _MOVED:
            i = frame.computation.operand(i)
        elif i.opcode == "fusion" and len(i.shapes) == 1:
            frame = frame.inside(i)
            i = frame.computation.root
        elif place := frame.argument(i, "fusion"):
            i, frame = place
        else:
            return i, frame


def _narrowed(i: Instruction, frame: Frame) -> set[str]:
    """The dtypes of its first uses, not counting instructions that only move it."""
    found: set[str] = set()
    for u, f in _users(i, frame) or [(i, frame)]:
        moves = u is not i and (u.opcode == "get-tuple-element" or u.opcode in _MOVED)
        found |= _narrowed(u, f) if moves else {u.shapes[0].dtype if u.shapes else ""}
    return found


def _logical_dtype(i: Instruction, operand: Place, parts: list[Place]) -> str:
    """The dtype before XLA:CPU widened it.

    XLA:CPU marks a widened reduction of one operand as `_promoted`. Around other collectives it converts to f32 and
    back.
    """
    dtype = operand[0].shapes[0].dtype
    if dtype != "f32":
        return dtype
    source, inside = _producer(*operand)
    before = inside.computation.operand(source).shapes[0].dtype if source.opcode == "convert" else dtype
    after = {d for p, f in parts for d in _narrowed(p, f)}
    if "to_apply" in i.attributes:
        promoted = re.search(r"_promoted(\.|$)", i.attributes["to_apply"])
        candidates = {before, *after} & _NARROW if promoted or len(i.operands) > 1 else set()
        return candidates.pop() if len(candidates) == 1 else dtype
    return before if before in _NARROW and before in after else dtype


def _near(i: Instruction, frame: Frame, operand: Instruction) -> tuple[str, ...]:
    found: list[str] = []
    reduction = frame.module.computations.get(i.attributes.get("to_apply", "").lstrip("%"))
    if reduction:
        found += [p.op_name for p in reduction.instructions if p.opcode == "parameter"]
    while True:
        if place := frame.argument(operand, "fusion"):
            operand, frame = place
        elif not operand.op_name and operand.operands:
            operand = frame.computation.operand(operand)
        else:
            return tuple(dict.fromkeys(n for n in (*found, operand.op_name) if n))


def _received(kind: str, size: int, k: int) -> int:
    """Bytes that one of `k` chips must receive for an operand of `size` bytes, rounded up."""
    if k == 1:
        return 0
    if kind == "all-gather":
        return size * (k - 1)
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return -(-size * (k - 1) * (2 if kind == "all-reduce" else 1) // k)


def _tensors(i: Instruction, frame: Frame, k: int) -> list[tuple[Instruction, int]]:
    """The tensors that a collective moves: the (first) operand of each, and its bytes."""
    operands = [frame.computation.operand(i, n) for n in range(len(i.operands))]
    if not operands or any(len(o.shapes) != 1 for o in operands) or "slice_sizes" in i.attributes:
        raise HloError(i.line, f"operands of {i.name} are not one array each")
    tensors = [(o, o.shapes[0].n_bytes(i.line)) for o in operands]
    kind = i.opcode.removesuffix("-start")
    if kind == "ragged-all-to-all":  # the first operand is the data, the others its offsets and sizes
        return tensors[:1]
    if kind == "all-to-all" and len(operands) > 1:
        if len(operands) != k:
            raise HloError(i.line, f"{i.name} has {len(operands)} pieces for groups of {k}")
        return [(operands[0], sum(size for _, size in tensors))]
    if i.opcode == kind:  # a start's result also holds its operands and its state
        grows, shrinks = {"all-gather": (k, 1), "reduce-scatter": (1, k)}.get(kind, (1, 1))
        pairs = zip(i.shapes, (o.shapes[0] for o in operands), strict=False)
        fits = [out.n_elements * shrinks == into.n_elements * grows for out, into in pairs]
        if not all(fits) or len(i.shapes) != len(operands):
            raise HloError(i.line, f"{i.name}: its shapes in and out do not fit a {kind} in groups of {k}")
    return tensors


def _collectives(
    i: Instruction, frame: Frame, axes: tuple[str, ...], k: int, asynchronous: bool
) -> Iterator[Collective]:
    tensors = _tensors(i, frame, k)
    kind = i.opcode.removesuffix("-start")
    hidden = kind == "all-reduce" and frame.is_fused and frame.computation.name.startswith("all-reduce-scatter")
    around = frame.caller if frame.is_fused and frame.caller else i
    named = next((s for s in (i, around) if '"collective_algorithm_config"' in s.rest), None)
    algorithm = named.backend_config["collective_algorithm_config"] if named else {}
    names = _op_names(i.op_name or (around.op_name if hidden else ""), len(tensors))
    for part, (operand, size) in enumerate(tensors):
        parts = _parts(i, frame, part, len(tensors))
        n_sliced = operand.shapes[0].n_elements // k
        sliced = kind == "all-reduce" and k > 1 and bool(parts) and all(_is_sliced(*p, n_sliced) for p in parts)
        if hidden and not sliced:
            raise HloError(i.line, f"{frame.computation.name} does not slice its all-reduce by {k}")
        yield Collective(
            kind="reduce-scatter" if hidden else kind,  # type: ignore[arg-type]
            axes=axes,
            bytes=_received("reduce-scatter" if hidden else kind, size, k),
            dtype=operand.shapes[0].dtype,
            logical_dtype=_logical_dtype(i, (operand, frame), parts),
            scope=names[part],
            near=_near(i, frame, operand),
            trips=frame.trips,
            group_size=k,
            asynchronous=asynchronous,
            sliced=sliced and not hidden,
            strategy=algorithm.get("strategy"),
            emitter=algorithm.get("emitter"),
            branch=frame.branch,
            line=i.line,
            part=part,
            n_merged=len(tensors),
        )


def _op_names(op_name: str, n: int) -> list[str]:
    """The op_name of each of `n` merged tensors: XLA's combiner writes `a/(b/psum:c/psum)`.

    Example:
        >>> _op_names("jit(f)/(clip/psum:jvp(loss)/psum)", 2)
        ['jit(f)/clip/psum', 'jit(f)/jvp(loss)/psum']
    """
    before, bracket, names = op_name.partition("/(")
    found = names.removesuffix(")").split(":")
    return [f"{before}/{name}" for name in found] if bracket and len(found) == n else [op_name] * n


def read(
    text: str | Module, mesh: Mapping[str, int], *, unknown_trips: int | None = None, partial_axes: bool = False
) -> list[Collective]:
    """The collectives of an optimised program, in the order in which they run.

    Bytes are those that one chip must receive in one execution. With K chips in a group:

    - all-gather: output (K-1)/K
    - reduce-scatter, all-to-all: input (K-1)/K; of a ragged all-to-all this is the most that it can be
    - all-reduce: twice its size (K-1)/K
    - permute, broadcast: the operand

    Args:
        text: `compiled.as_text()`, or the `Module` that `parse` returns for it.
        mesh: mesh axis -> size, in mesh order; device ids are row-major over the mesh.
        unknown_trips: trip count of loops for which the text gives none. If None, such a loop with a collective in it
            is an error.
        partial_axes: allow groups that are only a part of their axes, as XLA's sort has them. `group_size` is then
            less than the product of `axes`. If False, such groups are an error.

    Returns:
        One `Collective` for each tensor and call site, not multiplied by `trips`. Collectives over axes of size 1 are
        included, with no axes and 0 bytes, and so are those of every branch of a conditional. Transfers inside custom
        kernels are not.

    Raises:
        HloError: anything that cannot be read with certainty, with its line.

    Example:
        >>> text = '''HloModule m, num_partitions=4
        ...
        ... ENTRY %main (a: f32[8]) -> f32[16] {
        ...   %a = f32[8]{0} parameter(0)
        ...   ROOT %g = f32[16]{0} all-gather(%a), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, USE
        ... }'''.replace("USE", 'use_global_device_ids=true, metadata={op_name="jit(f)/gather"}')
        >>> [(c.kind, c.axes, c.bytes, c.scope) for c in read(text, {"x": 2, "y": 2})]
        [('all-gather', ('x',), 32, 'jit(f)/gather')]
    """
    module = parse(text) if isinstance(text, str) else text
    if module.n_replicas * module.n_partitions != prod(mesh.values()):
        raise HloError(1, f"{module.n_replicas} x {module.n_partitions} devices are not those of the mesh {dict(mesh)}")
    lines = {i.line for i in module.instructions if _is_collective(i)}
    found: list[Collective] = []
    begun: set[tuple[str, ...]] = set()
    ended: list[Instruction] = []
    for i, frame in walk(module, lines, unknown_trips):
        inside = frame.is_fused
        begins = inside and feeds(i, frame.computation, "AsyncCollectiveStart")
        if begins:
            begun.add(async_key(i))
        elif inside and feeds(i, frame.computation, "AsyncCollectiveDone"):
            ended.append(i)
            continue
        elif inside and frame.computation.name.startswith("async_collective_fusion") and async_key(i) in begun:
            continue  # a part of one that has begun, which overlaps the rest of this fusion
        axes, k = mesh_axes(i, module, mesh, partial_axes)
        found += _collectives(i, frame, axes, k, frame.asynchronous or i.opcode.endswith("-start") or begins)
    for i in ended:
        if async_key(i) not in begun:
            raise HloError(i.line, f"{i.name} ends an async collective fusion that nothing began")
    return found
