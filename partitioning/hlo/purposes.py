"""The purpose of each operation of a compiled program: its scope in the decoder, and one of five kinds of work.

An operation without a name gets the scope of a neighbour. This file reads the program's text only. A profile adds the
times (`benchmarks.measure.profiling`).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from toruslab.partitioning.hlo.collectives import Collective, read
from toruslab.partitioning.hlo.text import Computation, Instruction, Module, parse
from toruslab.partitioning.layouts.layout import WEIGHTS
from toruslab.partitioning.plan.scopes import is_stack, scope_of

Purpose = Literal["matmul", "attention", "collective", "weights", "other"]
"""- matmul: operations with a matrix product, except those of attention;
- attention: everything in the scope `attend`: RoPE, cache update, scores, softmax;
- collective: collectives of any form;
- weights: weights that are cut out of the array of all layers, copied, given a new memory layout, widened or
  dequantised, but not multiplied by the same operation;
- other: the rest.
"""

_CONTAINERS = ("while", "conditional", "call")
_NOTHING = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")
_MOVES = (*_NOTHING, "copy", "copy-start", "copy-done", "convert", "reshape", "transpose", "slice", "dynamic-slice")
_PRODUCTS = ("dot", "convolution", "ragged-dot")
_PRODUCT_CALL = re.compile(r"gemm|matmul|dot|conv", re.IGNORECASE)
_ALIASED = re.compile(r"\((\d+), \{\}, \w+-alias\)")
_INT8 = ("s8", "u8", "s4", "u4")
_FAR = 6  # how many operations away the scope of a nameless one is looked for


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One instruction and its purpose.

    Args:
        scope: in the decoder; that of its first user if it has none; `stack` for the weights of all layers at once.
        purpose: the kind of work.
        collective, axes: kind and mesh axes of a collective.
        contains: it runs other operations, which have times of their own.
        ends: it is the end of an asynchronous operation, which counts at its start.
    """

    scope: str
    purpose: Purpose
    collective: str | None = None
    axes: tuple[str, ...] = ()
    contains: bool = False
    ends: bool = False


UNKNOWN = Operation(scope="", purpose="other", contains=True)
"""For operations that a trace names and the program's text does not. Known operations inside them keep their times."""


def operations(text: str, mesh: Mapping[str, int]) -> dict[str, Operation]:
    """Name of an instruction -> its purpose, for all instructions that run by themselves (none inside fusions).

    Args:
        text: the optimised program, as `Compiled.text`.
        mesh: mesh axis -> size, in mesh order.

    Raises:
        HloError: text that cannot be read, or that belongs to another mesh.
    """
    module = parse(text)
    found = read(module, mesh, unknown_trips=1, partial_axes=True)
    reader = _Reader(module, {c.line: c for c in reversed(found)}, _weights(text, module))
    fused = {name for i in module.instructions if i.opcode in ("fusion", "async-start") for name in i.called}
    return {
        i.name: reader.operation(i, c)
        for c in module.computations.values()
        if c.name not in fused
        for i in c.instructions
        if i.opcode not in _NOTHING
    }


def _weights(text: str, module: Module) -> frozenset[str]:
    """The program's parameters that are matrices and not donated. The cache is donated, and tokens are integers."""
    start = text.find("HloModule")
    donated = set(_ALIASED.findall(text[start : text.find("\n", start)]))
    return frozenset(
        i.name
        for i in module.entry.instructions
        if i.opcode == "parameter" and i.operand_text.strip() not in donated and _is_matrix(i)
        if i.shapes[0].dtype[0] in "fb" or i.shapes[0].dtype in _INT8
    )


class _Reader:
    def __init__(self, module: Module, collectives: Mapping[int, Collective], weights: frozenset[str]):
        self.module, self.collectives, self.weights = module, collectives, weights

    def operation(self, i: Instruction, at: Computation) -> Operation:
        inside = tuple(self.inside(i))
        ends = i.opcode.endswith(("-done", "-update"))
        if collective := self.collective(i, at, inside):
            names = (collective.scope, *collective.near)
            scope = next((s for s in map(scope_of, names) if s), "")
            return Operation(
                scope=scope, purpose="collective", collective=collective.kind, axes=collective.axes, ends=ends
            )
        contains = i.opcode in _CONTAINERS
        scope = "" if contains else self.scope(i, at)
        if not scope and not contains and (not i.op_name or is_stack(i.op_name)):
            scope = self.wanted_by(i, at)
        if scope.rsplit("/", 1)[-1] == "attend":
            return Operation(scope=scope, purpose="attention", ends=ends)
        if not contains and any(map(_is_product, (i, *inside))):
            return Operation(scope=scope, purpose="matmul", ends=ends)
        if not contains and self.moves_weights(i, at, inside, scope):
            return Operation(scope=scope or "stack", purpose="weights", ends=ends)
        return Operation(scope=scope, purpose="other", contains=contains, ends=ends)

    def inside(self, i: Instruction) -> Iterator[Instruction]:
        """The instructions that run as a part of it."""
        if i.opcode in ("fusion", "async-start"):
            for computation in self.module.called(i):
                for inner in computation.instructions:
                    yield inner
                    yield from self.inside(inner)

    def collective(self, i: Instruction, at: Computation, inside: tuple[Instruction, ...]) -> Collective | None:
        while i.opcode.endswith(("-done", "-update")) and i.operands and i.operands[0] in at.by_name:
            i = at.operand(i)
            inside = tuple(self.inside(i))
        return next((self.collectives[x.line] for x in (i, *inside) if x.line in self.collectives), None)

    def scope(self, i: Instruction, at: Computation, far: int = _FAR) -> str:
        """Its own scope; without a name, that of an operation inside, or of the operation that it reads."""
        if i.op_name:
            return scope_of(i.op_name)
        inside = tuple(self.inside(i))
        named = sorted((x for x in inside if x.op_name), key=lambda x: (not _is_product(x), not x.is_root))
        if scope := next((s for s in (scope_of(x.op_name) for x in named) if s), ""):
            return scope
        if any(is_stack(x.op_name) for x in named) or not far:
            return ""
        read = (at.by_name[name] for name in i.operands if name in at.by_name)
        sources = (x for x in read if x.opcode not in ("parameter", "constant", *_CONTAINERS))
        return next((s for s in (self.scope(x, at, far - 1) for x in sources) if s), "")

    def wanted_by(self, i: Instruction, at: Computation, far: int = _FAR) -> str:
        """The scope of the first operation that uses it."""
        for user in at.users.get(i.name, ()):
            if user.opcode in (*_CONTAINERS, "tuple"):
                continue
            if scope := self.scope(user, at, 0) or (self.wanted_by(user, at, far - 1) if far else ""):
                return scope
        return ""

    def moves_weights(self, i: Instruction, at: Computation, inside: tuple[Instruction, ...], scope: str) -> bool:
        if scope.rsplit("/", 1)[-1] in WEIGHTS:
            return True
        if any(x.opcode == "dynamic-slice" and is_stack(x.op_name) and _is_matrix(x) for x in (i, *inside)):
            return True
        steps = inside or (i,)
        if any(x.opcode not in _MOVES and x.shapes and x.shapes[0].n_elements > 1 for x in steps):
            return False
        read = [at.by_name[name] for name in i.operands if name in at.by_name]
        return any(x.name in self.weights or (_is_matrix(x) and x.shapes[0].dtype in _INT8) for x in read)


@functools.cache
def _is_product(i: Instruction) -> bool:
    if i.opcode == "custom-call":
        return bool(_PRODUCT_CALL.search(i.attributes.get("custom_call_target", "")))
    return i.opcode in _PRODUCTS


def _is_matrix(i: Instruction) -> bool:
    """Whether it is one array with at least two dimensions longer than 1."""
    return len(i.shapes) == 1 and sum(d > 1 for d in i.shapes[0].dims) >= 2
