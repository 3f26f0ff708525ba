"""Optimised HLO text -> the collectives of the program, its copies, and the TPU compiler's cycles.

This file decides what a line of HLO moves, over which mesh axes, and how often; it needs no JAX. Whether that is what
a layout planned is `program.py`'s question; what it costs is `cost.py`'s. In three layers: `parse` makes text into
instructions; `_walk` visits them as often as they run (loops, calls, branches, fusions); `read`, `copies` and
`estimated_cycles` say what was found. What cannot be read raises `HloError` with its line: never a silent zero.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, get_args

Kind = Literal[
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
]


class HloError(ValueError):
    """HLO text that cannot be read; `line` is the 1-based line at fault."""

    def __init__(self, line: int, why: str):
        super().__init__(f"HLO text, line {line}: {why}")
        self.line = line


# ---------------------------------------------------------------------------------------------- text -> instructions

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
_TRIPS = re.compile(r'known_trip_count\\?":\s*{\\?"n\\?":\\?"(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"?(-?\d+)')


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One array: dtype as HLO spells it, dims in elements, the layout's text (`1,0:T(8,128)(2,1)S(1)`)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def n_elements(self) -> int:
        return prod(self.dims)

    def n_bytes(self, line: int) -> int:
        """Bytes of the values alone: the padding of a TPU's tiles is not counted; 4-bit values are packed."""
        digits = re.search(r"\d+", self.dtype)
        if self.dtype not in _ODD_BITS and not (digits and self.dtype[0] in "sufc"):
            raise HloError(line, f"dtype {self.dtype!r} has no known size")
        return -(-self.n_elements * (_ODD_BITS[self.dtype] if self.dtype in _ODD_BITS else int(digits[0])) // 8)  # type: ignore[index]

    @property
    def space(self) -> int:
        """Memory space: 0 is the device's main memory; TPU fast memory has other numbers."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of HLO. Attributes, metadata and backend configuration are read when they are asked for."""

    name: str
    line: int
    opcode: str
    shape_text: str
    operand_text: str
    rest: str  # everything behind the operands
    is_root: bool

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result; a tuple's leaves in order."""
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
        """Attribute -> its text, `metadata` and `backend_config` included."""
        found: dict[str, str] = {}
        last = ""
        for part in _split(self.rest, self.line):
            key, equals, value = part.partition("=")
            if key == "device_ids" and equals:  # the tail of replica_groups=mesh[..], device_ids=(..) {..}
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
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls; a reduction's `to_apply` only where it is a real call."""
        keys = ["calls", "called_computations", "condition", "body", "branch_computations"]
        keys += ["true_computation", "false_computation"] + (["to_apply"] if self.opcode == "call" else [])
        if self.opcode in ("async-update", "async-done") or not any(f"{key}=" in self.rest for key in keys):
            return ()  # the first two repeat what their async-start calls
        attributes = self.attributes
        return tuple(n.strip(" %") for k in keys if k in attributes for n in attributes[k].strip("{}").split(",") if n)


@dataclass(frozen=True, kw_only=True)
class Computation:
    """A named list of instructions, in the order of the text (which is the schedule, once scheduled)."""

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

    def operand(self, instruction: Instruction, index: int = 0) -> Instruction:
        try:
            return self.by_name[instruction.operands[index]]
        except (IndexError, KeyError) as error:
            raise HloError(instruction.line, f"operand {index} of {instruction.name} is not in {self.name}") from error


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    n_replicas: int
    n_partitions: int
    entry: Computation
    computations: Mapping[str, Computation]

    def called(self, instruction: Instruction) -> tuple[Computation, ...]:
        try:
            return tuple(self.computations[name] for name in instruction.called)
        except KeyError as error:
            raise HloError(instruction.line, f"{instruction.name} calls {error}, which is not in the text") from error


def _shape(found: re.Match[str], line: int) -> Shape:
    try:
        dims = tuple(int(d.strip().lstrip("<=")) for d in found[2].split(",") if d.strip())
    except ValueError as error:
        raise HloError(line, f"shape {found[0]!r} has a size that is no number") from error
    return Shape(dtype=found[1], dims=dims, layout=found[3] or "")


def _split(text: str, line: int) -> list[str]:
    """Parts between the commas that stand in no bracket and no string."""
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
    """Position behind the parenthesis that closes the one at `start`; -1 when it stays open."""
    depth = 0
    for token in _PARENTHESIS.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return -1


def _instruction(text: str, line: int) -> Instruction | None:
    """One instruction; None for a constant whose literal goes on in the next line."""
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
        HloError: a line that is not HLO, no ENTRY, a name twice, an end of the text inside a computation.

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


# ------------------------------------------------------------------------------------ replica groups -> mesh axes

Groups = tuple[tuple[int, ...], ...]


def _order(dims: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Row-major ids of an array of `dims`, its axes transposed to the order `axes`, flattened."""
    ids = [0]
    for axis in axes:
        stride = prod(dims[axis + 1 :])
        ids = [i + j * stride for i in ids for j in range(dims[axis])]
    return ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _chunks(ids: list[int], size: int) -> Groups:
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))


_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"\{\s*(?:\{[\d,\s]*\}\s*,?\s*)*\}")
_MESH = re.compile(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\)(?= ?\{))? ?\{(.*?)\}")
_AXIS = re.compile(r"\s*'?([^',:=]+?)'?(?:=(\d+)|:\((\d+)\)(\d+))?\s*")


def _iota(text: str) -> list[int]:
    """`[2,4]T(1,0)`: ids of a [2,4] array, transposed, flattened."""
    found = _IOTA.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not dims, or dimsT(permutation)")
    dims = _numbers(found[1])
    axes = _numbers(found[2]) if found[2] else tuple(range(len(dims)))
    if sorted(axes) != list(range(len(dims))):
        raise ValueError(f"{text!r}: the permutation does not fit the dims")
    return _order(dims, axes)


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`, also with sub-axes `'b':(1)2` = (size before)size, and with a device order."""
    found = _MESH.fullmatch(text)
    if not found:
        raise ValueError("not mesh[axes] {axes}")
    axes = [_AXIS.fullmatch(a) for a in found[1].split(",")]
    sizes = {a[1]: int(a[2]) for a in axes if a and a[2]}
    wanted: dict[str, list[tuple[int, int]]] = {}  # axis -> its ranges [before, before * size)
    for ref in [_AXIS.fullmatch(a) for a in found[3].split(",") if a.strip()]:
        if not ref or ref[1] not in sizes or ref[2]:
            raise ValueError(f"{found[3]!r} names an axis that the mesh does not have")
        before, size = (int(ref[3]), int(ref[4])) if ref[3] else (1, sizes[ref[1]])
        wanted.setdefault(ref[1], []).append((before, before * size))
    if len(sizes) != len(axes):
        raise ValueError(f"{found[1]!r} is not a list of axis=size")
    dims: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(c for r in wanted.get(name, []) for c in r)})
        if any(high % low for low, high in pairwise(cuts)) or cuts[-1] != size:
            raise ValueError(f"the parts of axis {name!r} do not divide its size {size}")
        for low, high in pairwise(cuts):
            inside += [len(dims)] if any(a <= low and high <= b for a, b in wanted.get(name, [])) else []
            dims.append(high // low)
    outside = [d for d in range(len(dims)) if d not in inside]
    ids = _order(tuple(dims), (*outside, *inside))
    if found[2]:  # position in the mesh -> device
        devices = _iota(found[2]) if found[2].startswith("[") else list(_numbers(found[2]))
        if sorted(devices) != sorted(ids):
            raise ValueError(f"device_ids=({found[2]}) is no order of {len(ids)} devices")
        ids = [devices[i] for i in ids]
    return _chunks(ids, prod(dims[d] for d in inside))


def replica_groups(text: str, n: int) -> Groups:
    """The groups of ids that `replica_groups=` spells, in any of its spellings; `{}` is all `n` ids in one group.

    Raises:
        ValueError: a spelling that is not known, or that does not divide its ids into equal groups.

    Example:
        >>> replica_groups("{{0,2},{1,3}}", 4) == replica_groups("[2,2]<=[2,2]T(1,0)", 4)
        True
        >>> replica_groups("mesh['x'=2,'y'=2] {'x'}", 4)
        ((0, 2), (1, 3))
    """
    text = text.strip()
    if _LISTED.fullmatch(text):
        groups = tuple(_numbers(g) for g in re.findall(r"\{([\d,\s]*)\}", text[1:-1]))
        groups = tuple(g for g in groups if g) or (tuple(range(n)),)
    elif "<=" in text and text.startswith("["):
        shape, _, order = text.partition("<=")
        found = _IOTA.fullmatch(shape)
        ids = _iota(order)
        if not found or found[2] or len(_numbers(found[1])) != 2 or prod(_numbers(found[1])) != len(ids):
            raise ValueError(f"{shape!r} is not [groups,size] of {len(ids)} ids")
        groups = _chunks(ids, _numbers(found[1])[1])
    elif "mesh" in text[:5]:
        groups = _mesh_groups(text)
    else:
        raise ValueError("a spelling of replica groups that is not known")
    if len({len(g) for g in groups}) != 1 or len({i for g in groups for i in g}) != sum(len(g) for g in groups):
        raise ValueError("groups of different sizes, or an id in two groups")
    return groups


_Mode = Literal["flat", "replicas", "partitions", "replicas with all partitions"]


def _mode(i: Instruction) -> _Mode:
    """What the ids in its text count: XLA's four group modes."""
    if i.attributes.get("use_global_device_ids") == "true":
        return "flat"
    if "channel_id" not in i.attributes:
        return "replicas"
    moves = i.opcode.startswith(("all-to-all", "ragged-all-to-all", "collective-"))
    return "partitions" if moves else "replicas with all partitions"


def _devices(mode: _Mode, n_r: int, n_p: int) -> list[list[list[int]]]:
    """For each repetition of the groups: id -> flat device ids, which are replica * n_p + partition."""
    if mode == "flat":
        return [[[d] for d in range(n_r * n_p)]]
    if mode == "replicas":  # each partition for itself
        return [[[r * n_p + p] for r in range(n_r)] for p in range(n_p)]
    if mode == "partitions":  # each replica for itself
        return [[[r * n_p + p] for p in range(n_p)] for r in range(n_r)]
    return [[[r * n_p + p for p in range(n_p)] for r in range(n_r)]]


@lru_cache(maxsize=1024)
def _locate(
    text: str, mode: _Mode, n_r: int, n_p: int, mesh: tuple[tuple[str, int], ...], partial_axes: bool
) -> tuple[tuple[str, ...], int]:
    """The mesh axes that replica groups run over, and K."""
    devices = _devices(mode, n_r, n_p)
    n = len(devices[0])
    groups = replica_groups(text, n)
    if sorted(i for g in groups for i in g) != list(range(n)):
        raise ValueError(f"not the {n} ids of the program, once each")
    flat = tuple(tuple(d for i in group for d in ids[i]) for ids in devices for group in groups)
    axes, whole = _axes(flat, dict(mesh))
    if not whole and not partial_axes:
        raise ValueError(f"groups like {flat[0][:16]} are not a product of whole axes of the mesh {dict(mesh)}")
    return axes, len(flat[0])


def _permuted(text: str, mode: _Mode, n_r: int, n_p: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which a permute moves anything."""
    devices = _devices(mode, n_r, n_p)
    pairs = [_numbers(p) for p in re.findall(r"\{([\d,\s]*)\}", text[1:-1])]
    if not _LISTED.fullmatch(text) or any(len(p) != 2 or max(p) >= len(devices[0]) for p in pairs):
        raise ValueError("not pairs of this program's ids")
    axes, stride = [], prod(mesh.values())
    for name, size in mesh.items():
        stride //= size
        if any(ids[a][0] // stride % size != ids[b][0] // stride % size for ids in devices for a, b in pairs):
            axes.append(name)
    return tuple(axes)


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """The mesh axes of size > 1 along which ids of a group differ, and whether the groups are their whole product."""
    places, stride = [], prod(mesh.values())
    for name, size in mesh.items():
        stride //= size
        places.append((name, stride, size))
    varying = [tuple(n for n, s, k in places if len({d // s % k for d in group}) > 1) for group in groups]
    axes = tuple(name for name in mesh if any(name in names for names in varying))
    whole = all(names == axes for names in varying) and prod(mesh[n] for n in axes) == len(groups[0])
    return axes, whole


# ---------------------------------------------------------------------------------- what runs, and how many times

_SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "optimization-barrier")
_ARITHMETIC = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """One computation as it runs: who called it, and how many times in one execution of the program."""

    module: Module
    computation: Computation
    caller: Instruction | None = None
    parent: _Frame | None = None
    trips: int = 1
    asynchronous: bool = False
    branch: str | None = None

    @property
    def is_fused(self) -> bool:
        if not self.caller or not self.parent:
            return False
        return self.caller.opcode == "fusion" or self.parent.is_fused

    def child(self, caller: Instruction, computation: Computation, **changes: Any) -> _Frame:
        return replace(self, computation=computation, caller=caller, parent=self, **changes)


@dataclass(frozen=True, kw_only=True)
class _Carried:
    """The value that element `index` of a loop's state had when the iteration began, plus `offset`."""

    index: int
    offset: int


def _index(i: Instruction) -> int:
    return int(i.attributes["index"])


def _parameter(computation: Computation, number: int, line: int) -> Instruction:
    for i in computation.instructions:
        if i.opcode == "parameter" and i.operand_text.strip() == str(number):
            return i
    raise HloError(line, f"computation {computation.name} has no parameter {number}")


def _value(i: Instruction, frame: _Frame) -> int | _Carried | None:
    """The integer that a scalar instruction computes, if the text alone says it."""
    here = frame.computation
    if i.opcode == "constant":
        text = i.operand_text.strip(" {}")
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if i.opcode in _SAME:
        return _value(here.operand(i), frame)
    if i.opcode == "get-tuple-element":
        return _element(here.operand(i), _index(i), frame)
    if i.opcode == "fusion":
        (inner,) = frame.module.called(i)
        return _value(inner.root, frame.child(i, inner))
    if i.opcode == "parameter" and frame.caller and frame.parent and frame.caller.opcode in ("fusion", "call"):
        return _value(frame.parent.computation.operand(frame.caller, int(i.operand_text)), frame.parent)
    if i.opcode in _ARITHMETIC:
        a, b = (_value(here.operand(i, n), frame) for n in (0, 1))
        if isinstance(a, int) and isinstance(b, int):
            return _ARITHMETIC[i.opcode](a, b)
        if isinstance(b, _Carried) and i.opcode == "add":
            a, b = b, a
        if isinstance(a, _Carried) and isinstance(b, int) and i.opcode != "multiply":
            return _Carried(index=a.index, offset=_ARITHMETIC[i.opcode](a.offset, b))
    return None


def _element(i: Instruction, index: int, frame: _Frame) -> int | _Carried | None:
    """The same for one element of a tuple."""
    here = frame.computation
    if i.opcode == "tuple":
        return _value(here.operand(i, index), frame)
    if i.opcode in _SAME:
        return _element(here.operand(i), index, frame)
    if i.opcode == "while":
        return _element(here.operand(i), index, frame) if _is_invariant(i, index, frame.module) else None
    if i.opcode == "parameter" and frame.caller and frame.parent:
        above, caller = frame.parent, frame.caller
        if caller.opcode in ("fusion", "call"):
            return _element(above.computation.operand(caller, int(i.operand_text)), index, above)
        if caller.opcode == "while" and not _is_invariant(caller, index, frame.module):
            return _Carried(index=index, offset=0)
        if caller.opcode == "while":
            return _element(above.computation.operand(caller), index, above)
        if caller.opcode == "conditional":
            n = [c.name for c in frame.module.called(caller)].index(here.name)
            return _element(above.computation.operand(caller, n + 1), index, above)
    return None


def _is_invariant(loop: Instruction, index: int, module: Module) -> bool:
    """Whether the loop's body hands element `index` of its state on as it came."""
    body = module.computations[loop.attributes["body"].lstrip("%")]
    i, at = body.root, index  # at: the element wanted of i; -1 when i itself is wanted
    while True:
        if i.opcode == "tuple" and at >= 0:
            i, at = body.operand(i, at), -1
        elif i.opcode == "get-tuple-element":
            i, at = body.operand(i), _index(i)
        elif i.opcode in _SAME or (i.opcode == "while" and at >= 0 and _is_invariant(i, at, module)):
            i = body.operand(i)
        else:
            return i.opcode == "parameter" and at == index


def _compare(loop: Instruction, frame: _Frame) -> tuple[Instruction, _Frame] | None:
    """The comparison that keeps the loop going, seen through fusions."""
    condition = frame.module.computations[loop.attributes["condition"].lstrip("%")]
    inner = frame.child(loop, condition)
    i = condition.root
    while i.opcode in ("fusion", *_SAME):
        if i.opcode == "fusion":
            inner = inner.child(i, frame.module.called(i)[0])
            i = inner.computation.root
        else:
            i = inner.computation.operand(i)
    return (i, inner) if i.opcode == "compare" else None


def _trips(loop: Instruction, frame: _Frame) -> int | None:
    """Trip count of a while loop: the compiler's, or from `counter < limit`, its first value and its step."""
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
    body = frame.module.computations[loop.attributes["body"].lstrip("%")]
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


def _visit(frame: _Frame, holds: frozenset[str], unknown_trips: int | None) -> Iterator[tuple[_Frame, Instruction]]:
    """Every instruction that runs, in order, descending only into the computations in `holds`."""
    for i in frame.computation.instructions:
        yield frame, i
        names = i.called
        if not any(name in holds for name in names):
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
                is_condition = c.name == i.attributes["condition"].lstrip("%")
                changes["trips"] = frame.trips * (trips + is_condition)
            elif i.opcode == "conditional":
                changes["branch"] = "/".join([*([frame.branch] if frame.branch else []), f"{i.name}[{n}]"])
            yield from _visit(frame.child(i, c, **changes), holds, unknown_trips)


def _walk(module: Module, lines: set[int], unknown_trips: int | None) -> Iterator[tuple[_Frame, Instruction]]:
    """Visits the instructions on the given lines as they run; all of them must be met."""
    holds = {c.name for c in module.computations.values() if any(i.line in lines for i in c.instructions)}
    calls = [(c.name, n) for c in module.computations.values() for i in c.instructions for n in i.called]
    while more := {above for above, name in calls if name in holds} - holds:
        holds |= more
    met: set[int] = set()
    for frame, i in _visit(_Frame(module=module, computation=module.entry), frozenset(holds), unknown_trips):
        if i.line in lines:
            met.add(i.line)
            yield frame, i
    if missed := sorted(lines - met):
        raise HloError(missed[0], "stands in a computation that nothing seems to call")


# -------------------------------------------------------------------------------------------------- the collectives

_KINDS = get_args(Kind)
_LIKE_ONE = re.compile(r"all-|reduce-scatter|collective|ragged-all|send$|recv$")
_LIKE_ONE_CALL = re.compile(r"all.?gather|all.?reduce|reduce.?scatter|all.?to.?all|collective", re.IGNORECASE)
_ASYNC_MARKS = ("AsyncCollectiveStart", "AsyncCollectiveDone")
_MOVED = ("copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "slice", "dynamic-slice", "concatenate")
_NARROW = {"bf16", "f16"}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program. One that the compiler merged out of several is several: one for each tensor."""

    kind: Kind
    axes: tuple[str, ...]  # mesh axes of size > 1 that it runs over, in mesh order; a permute's: where any pair differs
    bytes: int  # what ONE chip must receive in one execution, rounded up; padding that the compiler added moves too
    dtype: str  # what moves
    logical_dtype: str  # what the program asked for: bf16 where XLA:CPU widened to f32 and narrows again
    scope: str  # op_name, in full; "" where the compiler dropped it (then see `near`)
    near: tuple[str, ...]  # op_names of its reduction and of what computes its operand
    trips: int  # executions in one execution of the program
    group_size: int  # K, the chips in one group: the product of `axes`, but for `partial_axes`
    asynchronous: bool  # a start/done pair, or a TPU async collective fusion
    sliced: bool  # an all-reduce of which only 1/K is used: a reduce-scatter that was not made
    strategy: str | None  # TPU: the ring strategy that the compiler names
    emitter: str | None  # TPU: the code generator it names, there also where `strategy` is not
    branch: str | None  # "conditional.1[0]" when it stands in a branch: it may not run; all branches are reported
    line: int  # in the text, from 1
    part: int  # which of the tensors, when merged
    n_merged: int  # tensors that share this instruction

    @property
    def logical_bytes(self) -> int:
        """`bytes`, had the collective run in `logical_dtype`."""
        logical, real = (Shape(dtype=d, dims=(8,)).n_bytes(self.line) for d in (self.logical_dtype, self.dtype))
        return -(-self.bytes * logical // real)


def _is_collective(i: Instruction) -> bool:
    """Raises for what looks like a collective and is none that is known."""
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


def _key(i: Instruction) -> tuple[str, ...]:
    a = i.attributes
    return (i.opcode, *(a.get(k, "") for k in ("channel_id", "replica_groups", "frontend_attributes")))


def _feeds(i: Instruction, computation: Computation, target: str) -> bool:
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


_Place = tuple[Instruction, _Frame]


def _users(i: Instruction, frame: _Frame) -> list[_Place] | None:
    """Who uses it, seen through fusions: out of the one it is the root of, into those it enters. None: it escapes."""
    found: list[_Place] = []
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
        (inner,) = frame.module.called(user)
        for n in [n for n, name in enumerate(user.operands) if name == i.name]:
            through = _users(_parameter(inner, n, user.line), frame.child(user, inner))
            if through is None:
                return None
            found += through
    return found


def _parts(i: Instruction, frame: _Frame, part: int, n_merged: int) -> list[_Place]:
    """The instructions that are element `part` of the result."""
    users = _users(i, frame) or []
    if len(users) == 1 and users[0][0].opcode.endswith("-done"):
        return _parts(*users[0], part, n_merged)
    if n_merged == 1:
        return [(i, frame)]
    return [(u, f) for u, f in users if u.opcode == "get-tuple-element" and _index(u) == part]


def _is_sliced(i: Instruction, frame: _Frame, n_elements: int) -> bool:
    """Whether all that is ever used of it is a dynamic-slice of `n_elements`."""
    users = _users(i, frame) or []
    return bool(users) and all(
        u.shapes[0].n_elements == n_elements
        if u.opcode == "dynamic-slice"
        else u.opcode in ("transpose", *_SAME) and _is_sliced(u, f, n_elements)
        for u, f in users
    )


def _producer(i: Instruction, frame: _Frame) -> _Place:
    """What computed it, seen through fusions and through what only moves it."""
    while True:
        if i.opcode in _MOVED:
            i = frame.computation.operand(i)
        elif i.opcode == "fusion" and len(i.shapes) == 1:
            frame = frame.child(i, frame.module.called(i)[0])
            i = frame.computation.root
        elif i.opcode == "parameter" and frame.caller and frame.parent and frame.caller.opcode == "fusion":
            i, frame = frame.parent.computation.operand(frame.caller, int(i.operand_text)), frame.parent
        else:
            return i, frame


def _narrowed(i: Instruction, frame: _Frame) -> set[str]:
    """The dtypes of what first uses it for more than moving it."""
    found: set[str] = set()
    for u, f in _users(i, frame) or [(i, frame)]:
        moves = u is not i and (u.opcode == "get-tuple-element" or u.opcode in _MOVED)
        found |= _narrowed(u, f) if moves else {u.shapes[0].dtype if u.shapes else ""}
    return found


def _logical_dtype(i: Instruction, operand: _Place, parts: list[_Place]) -> str:
    """The dtype before XLA:CPU widened: it marks reductions `_promoted`, and converts around what only moves."""
    dtype = operand[0].shapes[0].dtype
    if dtype != "f32":
        return dtype
    source, inside = _producer(*operand)
    before = inside.computation.operand(source).shapes[0].dtype if source.opcode == "convert" else dtype
    after = {d for p, f in parts for d in _narrowed(p, f)}
    if "to_apply" in i.attributes:
        promoted = re.search(r"_promoted(\.|$)", i.attributes["to_apply"])
        candidates = {before, *after} & _NARROW if promoted else set()
        return candidates.pop() if len(candidates) == 1 else dtype
    return before if before in _NARROW and after == {before} else dtype


def _near(i: Instruction, frame: _Frame, operand: Instruction) -> tuple[str, ...]:
    found: list[str] = []
    reduction = frame.module.computations.get(i.attributes.get("to_apply", "").lstrip("%"))
    if reduction:
        found += [p.op_name for p in reduction.instructions if p.opcode == "parameter"]
    while True:
        if operand.opcode == "parameter" and frame.caller and frame.parent and frame.caller.opcode == "fusion":
            operand = frame.parent.computation.operand(frame.caller, int(operand.operand_text))
            frame = frame.parent
        elif not operand.op_name and operand.operands:
            operand = frame.computation.operand(operand)
        else:
            return tuple(dict.fromkeys(n for n in (*found, operand.op_name) if n))


def _where(i: Instruction, module: Module, mesh: Mapping[str, int], partial_axes: bool) -> tuple[tuple[str, ...], int]:
    """Mesh axes, and the size of a group."""
    permutes = i.opcode.startswith("collective-permute")
    text = i.attributes.get("source_target_pairs" if permutes else "replica_groups", "" if permutes else "{}")
    try:
        if permutes:
            axes = _permuted(text, _mode(i), module.n_replicas, module.n_partitions, mesh)
            return axes, prod(mesh[a] for a in axes)
        return _locate(text, _mode(i), module.n_replicas, module.n_partitions, tuple(mesh.items()), partial_axes)
    except ValueError as error:
        raise HloError(i.line, f"{i.name}, over {text[:80] or 'nothing'}: {error}") from error


def _received(kind: str, size: int, k: int) -> int:
    """Bytes that one of `k` chips must receive, for `size` bytes of operand, rounded up."""
    if k == 1:
        return 0
    if kind == "all-gather":
        return size * (k - 1)
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return -(-size * (k - 1) * (2 if kind == "all-reduce" else 1) // k)


def _tensors(i: Instruction, frame: _Frame, k: int) -> list[tuple[Instruction, int]]:
    """Each tensor that it moves: the (first) instruction that computes it, and its bytes."""
    operands = [frame.computation.operand(i, n) for n in range(len(i.operands))]
    if not operands or any(len(o.shapes) != 1 for o in operands) or "slice_sizes" in i.attributes:
        raise HloError(i.line, f"operands of {i.name} are not one array each")
    tensors = [(o, o.shapes[0].n_bytes(i.line)) for o in operands]
    kind = i.opcode.removesuffix("-start")
    if kind == "ragged-all-to-all":  # the first operand is the data, the others say how much of it moves
        return tensors[:1]
    if kind == "all-to-all" and len(operands) > 1:
        if len(operands) != k:
            raise HloError(i.line, f"{i.name} has {len(operands)} pieces for groups of {k}")
        return [(operands[0], sum(size for _, size in tensors))]
    if i.opcode == kind:  # a start's result also holds its operands and its state
        factor = {"all-gather": (k, 1), "reduce-scatter": (1, k)}.get(kind, (1, 1))
        fits = [s.n_elements * factor[1] == o.shapes[0].n_elements * factor[0] for s, o in zip(i.shapes, operands)]  # noqa: B905
        if not all(fits) or len(fits) != len(i.shapes) or len(fits) != len(operands):
            raise HloError(i.line, f"{i.name}: its shapes in and out do not fit a {kind} in groups of {k}")
    return tensors


def _collectives(
    i: Instruction, frame: _Frame, axes: tuple[str, ...], k: int, asynchronous: bool
) -> Iterator[Collective]:
    tensors = _tensors(i, frame, k)
    kind = i.opcode.removesuffix("-start")
    hidden = kind == "all-reduce" and frame.is_fused and frame.computation.name.startswith("all-reduce-scatter")
    around = frame.caller if frame.is_fused and frame.caller else i
    named = next((s for s in (i, around) if '"collective_algorithm_config"' in s.rest), None)
    algorithm = named.backend_config["collective_algorithm_config"] if named else {}
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
            scope=i.op_name or (around.op_name if hidden else ""),
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


def read(
    text: str | Module, mesh: Mapping[str, int], *, unknown_trips: int | None = None, partial_axes: bool = False
) -> list[Collective]:
    """The collectives of an optimised program, in the order in which they run.

    Bytes are those that one chip must receive in one execution, with K chips in a group: all-gather output (K-1)/K,
    reduce-scatter and all-to-all input (K-1)/K, all-reduce twice its size (K-1)/K, permute and broadcast the operand;
    a ragged all-to-all at most input (K-1)/K.

    Args:
        text: `compiled.as_text()`, or what `parse` made of it.
        mesh: axis name -> size, in mesh order; device ids are row-major over it.
        unknown_trips: counted for a loop whose trip count the text does not tell; None: such a loop is an error
            when it holds a collective.
        partial_axes: name the axes also for groups that are only a part of them, as XLA's sort makes them; then
            `group_size` is less than the product of `axes`. False: such groups are an error.

    Returns:
        One `Collective` per tensor and call site; `trips` is not multiplied in. Collectives over axes of size 1 are
        there, with no axes and 0 bytes. Those of every branch of a conditional are there, each once. Not seen: what
        a custom kernel sends on its own.

    Raises:
        HloError: anything that cannot be read for certain, with its line.

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
    lines = {i.line for c in module.computations.values() for i in c.instructions if _is_collective(i)}
    found: list[Collective] = []
    begun: set[tuple[str, ...]] = set()
    ended: list[Instruction] = []
    for frame, i in _walk(module, lines, unknown_trips):
        inside = frame.is_fused
        begins = inside and _feeds(i, frame.computation, "AsyncCollectiveStart")
        if begins:
            begun.add(_key(i))
        elif inside and _feeds(i, frame.computation, "AsyncCollectiveDone"):
            ended.append(i)
            continue
        elif inside and frame.computation.name.startswith("async_collective_fusion") and _key(i) in begun:
            continue  # a step of one that has begun, overlapped with the rest of this fusion
        axes, k = _where(i, module, mesh, partial_axes)
        found += _collectives(i, frame, axes, k, frame.asynchronous or i.opcode.endswith("-start") or begins)
    for i in ended:
        if _key(i) not in begun:
            raise HloError(i.line, f"{i.name} ends an async collective fusion that nothing began")
    return found


# --------------------------------------------------------------------------------------------- copies, and cycles


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
        HloError: as `read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    large = {
        i.line
        for c in module.computations.values()
        for i in c.instructions
        if i.opcode in ("copy", "copy-start") and any(s.n_bytes(i.line) >= min_bytes for s in i.shapes)
    }
    found = []
    for frame, i in _walk(module, large, unknown_trips):
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
        HloError: as `read` does.
    """
    module = parse(text) if isinstance(text, str) else text
    every = [(c, i) for c in module.computations.values() for i in c.instructions]
    fused = {name for _, i in every if i.opcode == "fusion" for name in i.called}  # their fusion carries the estimate
    cycles = {i.line: int(e[1]) for c, i in every if c.name not in fused and (e := _CYCLES.search(i.rest))}
    if not cycles:
        return None
    by_branch: dict[str, dict[str, int]] = {"": {}}
    for frame, i in _walk(module, set(cycles), unknown_trips):
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
