"""The text of an optimised HLO module -> its computations and instructions.

This file reads names, shapes, operands and attributes, but gives them no meaning: the other files of this room do.
Attributes are split only when they are asked for, because most lines of a program never are. It imports no JAX.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

_ODD_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_COMMENT = re.compile(r"/\*.*?\*/")
_LEAF = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_MODULE = re.compile(r"HloModule ([^\s,]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([^\s=]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([^\s,(){}]+)")
_TABLES = re.compile(r"(?:FileNames|FunctionNames|FileLocations|StackFrames)$|\d+ [\"{]")
_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(_STRING + r"|@mesh<[^>]*>|[{}()\[\],]")
_PARENTHESIS = re.compile(_STRING + r"|[()]")
_OP_NAME = re.compile(rf"[{{ ]op_name=({_STRING})")


class HloError(ValueError):
    """HLO text that cannot be read. `line` is the line at fault, from 1."""

    def __init__(self, line: int, why: str):
        super().__init__(f"HLO text, line {line}: {why}")
        self.line = line


@dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """One array: its dtype as HLO writes it, its dims in elements, and the text of its layout in memory, such as
    `1,0:T(8,128)(2,1)S(1)`."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def n_elements(self) -> int:
        return prod(self.dims)

    def n_bytes(self, line: int) -> int:
        """Bytes of the values, 4-bit values packed. The padding of a TPU's tiles is not included."""
        sized = re.match(r"[sufc]\D*(\d+)", self.dtype)
        bits = _ODD_BITS.get(self.dtype, int(sized[1]) if sized else None)
        if bits is None:
            raise HloError(line, f"dtype {self.dtype!r} has no known size")
        return -(-self.n_elements * bits // 8)

    @property
    def space(self) -> int:
        """Memory space: 0 is the device's main memory. A TPU's fast memory has other numbers."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction, which is one line of HLO but for constants that span several."""

    name: str
    line: int
    opcode: str
    shape_text: str
    operand_text: str
    rest: str  # everything after the operands: attributes, metadata, backend configuration
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[ArrayShape, ...]:
        """The arrays of the result; those of a tuple in order."""
        return tuple(_shape(m, self.line) for m in _LEAF.finditer(self.shape_text))

    @cached_property
    def operands(self) -> tuple[str, ...]:
        if self.opcode in ("parameter", "constant", "iota"):
            return ()
        text = _COMMENT.sub("", self.operand_text)
        if "%" in text:
            return tuple(_NAME.findall(text))
        return tuple(part.split()[-1] for part in _split(text, self.line))

    @cached_property
    def attributes(self) -> Mapping[str, str]:
        """Attribute -> its text, including `metadata` and `backend_config`."""
        found: dict[str, str] = {}
        last = ""
        for part in _split(self.rest, self.line):
            key, equals, value = part.partition("=")
            if key == "device_ids" and equals:  # the rest of replica_groups=mesh[..], device_ids=(..) {..}
                found[last] += f", {part}"
            elif equals and re.fullmatch(r"[\w\-]+", key):
                found[last := key] = value
            else:
                raise HloError(self.line, f"attribute {part[:60]!r} of {self.name} is not key=value")
        return found

    @property
    def op_name(self) -> str:
        found = _OP_NAME.search(self.rest)
        return re.sub(r"\\([\\'\"])", r"\1", found[1][1:-1]) if found else ""

    @cached_property
    def backend_config(self) -> Mapping[str, Any]:
        text = self.attributes.get("backend_config", "{}")
        try:
            loaded = json.loads(text)
            loaded = json.loads(loaded) if isinstance(loaded, str) else loaded
        except json.JSONDecodeError as error:
            raise HloError(self.line, f"backend_config of {self.name} is not JSON: {error}") from error
        return loaded

    @property
    def tuple_index(self) -> int:
        """The element that a get-tuple-element takes."""
        return int(self.attributes["index"])

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls. The `to_apply` of a reduction is none."""
        keys = ["calls", "called_computations", "condition", "body", "branch_computations"]
        keys += ["true_computation", "false_computation"] + (["to_apply"] if self.opcode == "call" else [])
        if self.opcode in ("async-update", "async-done") or not any(f"{key}=" in self.rest for key in keys):
            return ()  # async-update and async-done repeat what their async-start calls
        attributes = self.attributes
        return tuple(n.strip(" %") for k in keys if k in attributes for n in attributes[k].strip("{}").split(",") if n)


@dataclass(frozen=True, kw_only=True)
class Computation:
    """A named list of instructions, in the order of the text; in an optimised module this is the schedule."""

    name: str
    line: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions:
            for operand in dict.fromkeys(i.operands):
                found.setdefault(operand, []).append(i)
        return {name: tuple(users) for name, users in found.items()}

    @property
    def root(self) -> Instruction:
        roots = [i for i in self.instructions if i.is_root] or list(self.instructions[-1:])
        if len(roots) != 1:
            raise HloError(self.line, f"computation {self.name} has {len(roots)} roots")
        return roots[0]

    def parameter(self, number: int, line: int) -> Instruction:
        for i in self.instructions:
            if i.opcode == "parameter" and i.operand_text.strip() == str(number):
                return i
        raise HloError(line, f"computation {self.name} has no parameter {number}")

    def operand(self, instruction: Instruction, index: int = 0) -> Instruction:
        try:
            return self.by_name[instruction.operands[index]]
        except (IndexError, KeyError) as error:
            raise HloError(instruction.line, f"operand {index} of {instruction.name} is not in {self.name}") from error


@dataclass(frozen=True, kw_only=True)
class Module:
    """A program: its computations by name, and the one that runs first."""

    name: str
    n_replicas: int
    n_partitions: int
    entry: Computation
    computations: Mapping[str, Computation]

    @property
    def instructions(self) -> Iterator[Instruction]:
        """The instructions of all computations, in the order of the text."""
        return (i for c in self.computations.values() for i in c.instructions)

    def called(self, instruction: Instruction) -> tuple[Computation, ...]:
        return tuple(self._computation(instruction, name) for name in instruction.called)

    def callee(self, instruction: Instruction, attribute: str) -> Computation:
        """The computation that `attribute` names: a loop's `condition` or `body`."""
        return self._computation(instruction, instruction.attributes.get(attribute, "").lstrip("%"))

    def _computation(self, caller: Instruction, name: str) -> Computation:
        if name not in self.computations:
            raise HloError(caller.line, f"{caller.name} calls {name!r}, which is not in the text")
        return self.computations[name]


def _shape(found: re.Match[str], line: int) -> ArrayShape:
    try:
        dims = tuple(int(d.strip().lstrip("<=")) for d in found[2].split(",") if d.strip())
    except ValueError as error:
        raise HloError(line, f"shape {found[0]!r} has a size that is no number") from error
    return ArrayShape(dtype=found[1], dims=dims, layout=found[3] or "")


def _split(text: str, line: int) -> list[str]:
    """The parts of `text` between commas, except commas inside brackets and strings."""
    depth, start, parts = 0, 0, []
    for token in _TOKEN.finditer(text):
        if token[0] in "{([":
            depth += 1
        elif token[0] in "})]":
            depth -= 1
        elif token[0] == "," and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    if depth:
        raise HloError(line, "brackets do not close")
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _close(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`; -1 if none does."""
    depth = 0
    for token in _PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return -1


def _instruction(text: str, line: int) -> Instruction | None:
    """One instruction; None for a constant that continues on the next line."""
    head = _INSTRUCTION.match(text)
    if not head:
        raise HloError(line, f"neither an instruction nor a closing brace: {text.strip()[:80]!r}")
    start = head.end()
    end = _close(text, start) if text.startswith("(", start) else text.find(" ", start)
    opcode = _OPCODE.match(text, end) if end > 0 else None
    close = _close(text, opcode.end() - 1) if opcode else -1
    if opcode and opcode[1] == "constant" and close < 0:
        return None
    if not opcode or close < 0:
        raise HloError(line, f"no shape, opcode and operands: {text.strip()[:80]!r}")
    return Instruction(
        name=head[1],
        line=line,
        opcode=opcode[1],
        shape_text=text[start:end],
        operand_text=text[opcode.end() : close - 1],
        rest=text[close:].lstrip(", "),
        is_root=head[0].lstrip().startswith("ROOT "),
    )


def parse(text: str) -> Module:
    """Reads the text of one HLO module, as `compiled.as_text()` prints it.

    Raises:
        HloError: a line that is not HLO, a module without ENTRY, a name that occurs twice, or text that ends inside a
            computation.

    Example:
        >>> parse("HloModule m\\n\\nENTRY %main (a: f32[2]) -> f32[2] {\\n  ROOT %a = f32[2]{0} parameter(0)\\n}").name
        'm'
    """
    module: re.Match[str] | None = None
    counts = {"replica_count": 1, "num_partitions": 1}
    computations: dict[str, Computation] = {}
    entry = header = None
    header_line, body, pending, pending_line = 0, [], "", 0
    number = 0
    for number, line in enumerate(text.split("\n"), 1):
        if header is None:
            if header := _COMPUTATION.match(line):
                header_line, body = number, []
            elif found := _MODULE.match(line):
                if module:
                    raise HloError(number, "a second HloModule in one text")
                module = found
                for key in counts:
                    if count := re.search(rf", {key}=(\d+)", line):
                        counts[key] = int(count[1])
            elif line.strip() and not _TABLES.match(line):
                raise HloError(number, f"not HLO text: {line.strip()[:80]!r}")
        elif line.startswith("}") and not pending:
            if header[2] in computations:
                raise HloError(header_line, f"computation {header[2]} is there twice")
            done = Computation(name=header[2], line=header_line, instructions=tuple(body))
            if len(done.by_name) != len(body):
                raise HloError(header_line, f"computation {header[2]} has a name twice")
            computations[header[2]] = done
            entry = done if header[1] else entry
            header = None
        elif line.strip():
            pending, pending_line = (f"{pending} {line.strip()}", pending_line) if pending else (line, number)
            if instruction := _instruction(pending, pending_line):
                body.append(instruction)
                pending = ""
            elif number - pending_line > 1000:
                raise HloError(pending_line, f"a constant that does not end: {pending.strip()[:80]!r}")
    if header or pending:
        raise HloError(pending_line or header_line, "the text ends inside a computation")
    if not module or not entry:
        raise HloError(number, "no HloModule line" if not module else "no ENTRY computation")
    return Module(
        name=module[1],
        n_replicas=counts["replica_count"],
        n_partitions=counts["num_partitions"],
        entry=entry,
        computations=computations,
    )
