"""Which instructions of an HLO module run, in which order and how many times: loops, calls, branches, fusions.

`walk` visits instructions as they run. The trip count of a loop is taken from the compiler's note or derived from the
loop's counter. If the text does not give it, the caller's number counts, or else it is an error; it is never assumed.
What is counted on the way is up to `collectives` and `cycles`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from toruslab.partitioning.hlo.text import Computation, HloError, Instruction, Module

SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "optimization-barrier")
"""Opcodes whose result has the value of their operand."""
_TRIPS = re.compile(r'known_trip_count\\?":\s*{\\?"n\\?":\\?"(\d+)')
_ARITHMETIC = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One computation at one call site.

    Args:
        module, computation: the program, and the computation in it.
        caller: the instruction that calls the computation; None for the entry.
        parent: the frame of the caller.
        trips: executions in one execution of the program.
        asynchronous: an async-start calls it, or a caller of the caller.
        loops: number of loops around it.
        branch: the branches of conditionals around it, such as `conditional.1[0]`.
    """

    module: Module
    computation: Computation
    caller: Instruction | None = None
    parent: Frame | None = None
    trips: int = 1
    asynchronous: bool = False
    loops: int = 0
    branch: str | None = None

    @property
    def is_fused(self) -> bool:
        return bool(self.caller and self.parent and (self.caller.opcode == "fusion" or self.parent.is_fused))

    def child(self, caller: Instruction, computation: Computation, **changes: Any) -> Frame:
        return replace(self, computation=computation, caller=caller, parent=self, **changes)

    def inside(self, fusion: Instruction) -> Frame:
        called = self.module.called(fusion)
        if len(called) != 1:
            raise HloError(fusion.line, f"{fusion.name} calls {len(called)} computations, not one")
        return self.child(fusion, called[0])

    def argument(self, i: Instruction, *callers: str) -> Place | None:
        """The instruction outside that gives parameter `i` its value, if the caller's opcode is one of `callers`."""
        if i.opcode != "parameter" or not self.caller or not self.parent or self.caller.opcode not in callers:
            return None
        return self.parent.computation.operand(self.caller, int(i.operand_text)), self.parent


Place = tuple[Instruction, Frame]
"""An instruction at one call site."""


@dataclass(frozen=True, kw_only=True)
class _Carried:
    """The value of element `index` of a loop's state at the start of the iteration, plus `offset`."""

    index: int
    offset: int = 0


def _value(i: Instruction, frame: Frame) -> int | _Carried | None:
    """The integer that a scalar instruction computes; None if the text does not give it."""
    here = frame.computation
    if i.opcode == "constant":
        text = i.operand_text.strip(" {}")
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if i.opcode in SAME:
        return _value(here.operand(i), frame)
    if i.opcode == "get-tuple-element":
        return _element(here.operand(i), i.tuple_index, frame)
    if i.opcode == "fusion":
        inner = frame.inside(i)
        return _value(inner.computation.root, inner)
    if place := frame.argument(i, "fusion", "call"):
        return _value(*place)
    if i.opcode in _ARITHMETIC:
        a, b = (_value(here.operand(i, n), frame) for n in (0, 1))
        if isinstance(a, int) and isinstance(b, int):
            return _ARITHMETIC[i.opcode](a, b)
        if isinstance(b, _Carried) and i.opcode == "add":
            a, b = b, a
        if isinstance(a, _Carried) and isinstance(b, int) and i.opcode != "multiply":
            return _Carried(index=a.index, offset=_ARITHMETIC[i.opcode](a.offset, b))
    return None


def _element(i: Instruction, index: int, frame: Frame) -> int | _Carried | None:
    """`_value` for element `index` of a tuple."""
    here = frame.computation
    if i.opcode == "tuple":
        return _value(here.operand(i, index), frame)
    if i.opcode in SAME:
        return _element(here.operand(i), index, frame)
    if i.opcode == "while":
        return _element(here.operand(i), index, frame) if _is_invariant(i, index, frame.module) else None
    if place := frame.argument(i, "fusion", "call"):
        return _element(place[0], index, place[1])
    if i.opcode == "parameter" and frame.caller and frame.parent:
        above, caller = frame.parent, frame.caller
        if caller.opcode == "while":
            invariant = _is_invariant(caller, index, frame.module)
            return _element(above.computation.operand(caller), index, above) if invariant else _Carried(index=index)
        if caller.opcode == "conditional":
            n = [c.name for c in frame.module.called(caller)].index(here.name)
            return _element(above.computation.operand(caller, n + 1), index, above)
    return None


def _is_invariant(loop: Instruction, index: int, module: Module) -> bool:
    """Whether the loop's body leaves element `index` of its state as it is."""
    body = module.callee(loop, "body")
    i, at = body.root, index  # at: the element of i that is followed; -1 for i itself
    while True:
        if i.opcode == "tuple" and at >= 0:
            i, at = body.operand(i, at), -1
        elif i.opcode == "get-tuple-element":
            i, at = body.operand(i), i.tuple_index
        elif i.opcode in SAME or (i.opcode == "while" and at >= 0 and _is_invariant(i, at, module)):
            i = body.operand(i)
        else:
            return i.opcode == "parameter" and at == index


def _compare(loop: Instruction, frame: Frame) -> tuple[Instruction, Frame] | None:
    """The comparison by which the loop continues, also inside fusions."""
    inner = frame.child(loop, frame.module.callee(loop, "condition"))
    i = inner.computation.root
    while i.opcode in ("fusion", *SAME):
        if i.opcode == "fusion":
            inner = inner.inside(i)
            i = inner.computation.root
        else:
            i = inner.computation.operand(i)
    return (i, inner) if i.opcode == "compare" else None


def _trips(loop: Instruction, frame: Frame) -> int | None:
    """Trip count of a while loop: the compiler's, or what follows from its comparison, first value and step."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    compare = _compare(loop, frame)
    if not compare:
        return None
    i, inner = compare
    a, b = (_value(inner.computation.operand(i, n), inner) for n in (0, 1))
    direction = i.attributes["direction"]
    if isinstance(a, int) and isinstance(b, _Carried):
        a, b, direction = b, a, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if not isinstance(a, _Carried) or not isinstance(b, int):
        return None
    body = frame.module.callee(loop, "body")
    first = _element(frame.computation.operand(loop), a.index, frame)
    after = _element(body.root, a.index, frame.child(loop, body))
    if not isinstance(first, int) or not isinstance(after, _Carried) or after.index != a.index:
        return None
    step, distance = after.offset, b - a.offset - first
    if direction == "NE":
        meets = distance == 0 or (step != 0 and distance % step == 0 and distance // step > 0)
        return distance // (step or 1) if meets else None
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    if direction in ("GT", "GE"):
        step, distance = -step, -distance
    elif direction not in ("LT", "LE"):
        return None
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None


def _visit(frame: Frame, holds: frozenset[str], unknown_trips: int | None) -> Iterator[Place]:
    """Every instruction that runs, in order. Of the computations, only those in `holds` are entered."""
    for i in frame.computation.instructions:
        yield i, frame
        if holds.isdisjoint(i.called):
            continue
        trips = 1
        if i.opcode == "while":
            trips = _trips(i, frame)
            trips = unknown_trips if trips is None else trips
            if trips is None:
                raise HloError(i.line, f"the trip count of {i.name}, which holds what is to be counted, is not there")
        for n, c in enumerate(frame.module.called(i)):
            if c.name not in holds:
                continue
            changes: dict[str, Any] = {"asynchronous": frame.asynchronous or i.opcode == "async-start"}
            if i.opcode == "while":
                changes["trips"] = frame.trips * (trips + (c is frame.module.callee(i, "condition")))
                changes["loops"] = frame.loops + 1
            elif i.opcode == "conditional":
                changes["branch"] = "/".join([*([frame.branch] if frame.branch else []), f"{i.name}[{n}]"])
            yield from _visit(frame.child(i, c, **changes), holds, unknown_trips)


def walk(module: Module, lines: set[int], unknown_trips: int | None) -> Iterator[Place]:
    """Visits the instructions on the given lines as they run, once for each call site, with their frames.

    Args:
        module: the program, from `text.parse`.
        lines: lines of the instructions to visit. Computations without such lines are not entered.
        unknown_trips: see `collectives.read`.

    Raises:
        HloError: an instruction that nothing calls, or an unknown trip count of a loop around one of them.
    """
    holds = {c.name for c in module.computations.values() if any(i.line in lines for i in c.instructions)}
    calls = [(c.name, n) for c in module.computations.values() for i in c.instructions for n in i.called]
    while more := {above for above, name in calls if name in holds} - holds:
        holds |= more
    met: set[int] = set()
    for i, frame in _visit(Frame(module=module, computation=module.entry), frozenset(holds), unknown_trips):
        if i.line in lines:
            met.add(i.line)
            yield i, frame
    if missed := sorted(lines - met):
        raise HloError(missed[0], "stands in a computation that nothing seems to call")
