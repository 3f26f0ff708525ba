"""What layout, block, slice and mesh decide about a pass' cost whatever its sizes: splits, collectives, rates of rings.

Worked out once for each of them, so that pricing many passes is arithmetic on arrays. Touches no device.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from toruslab.partitioning.cost.measured import splits
from toruslab.partitioning.layouts.layout import Axes, Layout, axes_of, entries
from toruslab.partitioning.layouts.rings import Loop, before, loops, sends
from toruslab.partitioning.plan.plan import stages
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.links import permute_rate, rate
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice

Where = str | tuple[str, str]


WEIGHT = {"w_in": "w_in", "h": "w_in", "w_kv": "w_kv", "w_out": "w_out", "g": "w_out", "out": "w_out"}
"""A ladder that can be looped -> the weight of the matmul that it is looped with."""
SUFFIX = {"layer": "", "attention": "", "mlp": "_mlp"}
"""A block's scope -> the suffix of its letters."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A collective of the plan with its sizes left open: bytes = factor x product of `dims` x element size.

    `under`: weight and suffix of the matmul that a looped one runs under; `starts`: 1 if it has a fixed cost, else 0:
    one that shares another's instruction has none, and of a looped collective's sends the first has it for all.
    """

    scope: str
    kind: str
    axes: Axes
    dims: tuple[str, ...]
    dtype: str
    factor: float
    in_layer: bool
    is_weight: bool
    s_per_byte: float
    hops: float
    n_group: int
    under: tuple[str, str] | None = None
    starts: int = 1


@dataclass(frozen=True, kw_only=True)
class LoopedMatmul:
    """A matmul with a looped collective: what of the latter its pieces can hide, and what the pieces cost.

    Args:
        hides: share of the matmul that is done while something is on its way.
        inputs, sums: how often the pieces together read the rows' side; write and read again the sums (in float32).
    """

    hides: float
    inputs: int
    sums: int


@functools.lru_cache(maxsize=4096)
def _entries_of(
    layout: Layout, block: str, slice_: Slice, mesh: Shape, chip_: Chip, overlap: bool
) -> tuple[Entry, ...]:
    sizes = dict(zip(AXES, mesh, strict=True))
    dims = _torus(slice_, chip_)
    parts = _parts(entries(layout.logits[-1])[1], sizes)
    found = []
    for stage in stages(layout, block, 1, True):
        first = True
        for kind, axes, share, move in stage.collectives(sizes):
            is_weight = stage.dtype == "weight"
            k = move.group(sizes)
            held = move.dst if move.kind == "all-gather" else move.src
            split = math.prod(sizes[a] for entry in entries(held) for a in axes_of(entry))
            sent = kind == "collective-permute"
            if sent:
                per_byte, hops = permute_rate(axes[0], mesh, chip_, dims, ways=stage.ways)
            else:
                per_byte, hops = rate(
                    move.kind, axes, mesh, chip_, dims, one_way=is_weight and overlap and not layout.prefetch
                )
            found.append(
                Entry(
                    scope=stage.scope,
                    kind=kind,
                    axes=axes,
                    dims=tuple(d for d in stage.dims if d != "n"),
                    dtype=stage.dtype,
                    factor=(2 if move.kind == "all-reduce" else 1)
                    * (k - 1)
                    / k
                    / split
                    * (parts if "n" in stage.dims else 1)
                    * float(share),
                    in_layer=stage.in_layer,
                    is_weight=is_weight,
                    s_per_byte=per_byte,
                    hops=0 if stage.rides else hops,
                    n_group=k,
                    under=(WEIGHT[stage.scope.rsplit("/", 1)[-1]], SUFFIX[stage.scope.split("/")[0]]) if sent else None,
                    starts=int(not stage.rides and (first or not sent)),
                )
            )
            first = first and not sent
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What layout, block, slice and mesh decide about the cost, worked out once.

    Args:
        chip: the data sheet.
        splits: (field, rung) -> into how many parts each dimension of that tensor is split.
        gathered: weight -> the share of it that a chip holds while it is gathered: before and after the last step; 0
            where it is not.
        entries: the collectives.
        moving: (where, dtype, dims) -> seconds per element at full bandwidth, where `where` is `outside` the layers,
            `exposed` in a layer, `hidden` under its matmuls, or a weight and suffix: looped with that matmul.
        fixed: where -> (collectives, hops, messages of all-to-alls).
        looped: (weight, suffix) -> how that matmul is taken to pieces.
    """

    chip: Chip
    splits: Mapping[tuple[str, int], tuple[int, ...]]
    gathered: Mapping[str, float]
    entries: tuple[Entry, ...]
    moving: Mapping[tuple[Where, str, tuple[str, ...]], float]
    fixed: Mapping[Where, tuple[int, float, int]]
    looped: Mapping[tuple[str, str], LoopedMatmul]


@functools.lru_cache(maxsize=65536)
def coefficients(layout: Layout, block: str, slice_: Slice, mesh: Shape, overlap: bool) -> Coefficients:
    """Of a layout on a mesh.

    Raises:
        ValueError: `auto`, a chip without a data sheet, or a slice that it does not have.
    """
    if not layout.explicit:
        raise ValueError("layout='auto' has no plan: what XLA chooses is seen in the compiled program only")
    chip_ = chip(slice_.chip)
    chip_.check_slice(slice_.dims)
    sizes = dict(zip(AXES, mesh, strict=True))
    overlap = layout.prefetch or (overlap and not layout.rings)
    gathered = {}
    loop_of = {loop.name: loop for loop in loops(layout).values()}
    for name in ("w_in", "w_kv", "w_out"):
        ladder = before(layout, name)
        shares = [1 / math.prod(_parts(e, sizes) for e in entries(spec)) for spec in ladder]
        gathered[name] = max((held + made for held, made in pairwise(shares)), default=0.0)
        if layout.prefetch:
            gathered[name] = 2 * shares[-1] if len(shares) > 1 else 0.0
        if name in loop_of:  # what it has, and of every ring what is in use and what is coming
            gathered[name] = max(gathered[name], shares[-1] * (2 + len(loop_of[name].move.axes)))
    found = _entries_of(layout, block, slice_, mesh, chip_, overlap)
    moving: dict[tuple[Where, str, tuple[str, ...]], float] = {}
    fixed: dict[Where, tuple[int, float, int]] = {"outside": (0, 0, 0), "exposed": (0, 0, 0)}
    for e in found:
        where = e.under or ("outside" if not e.in_layer else "hidden" if e.is_weight and overlap else "exposed")
        key = (where, e.dtype, e.dims)
        moving[key] = moving.get(key, 0.0) + e.factor * e.s_per_byte
        where = e.under or ("exposed" if e.in_layer else "outside")
        n, hops, messages = fixed.get(where, (0, 0, 0))
        fixed[where] = (n + e.starts, hops + e.hops, messages + (e.n_group if e.kind == "all-to-all" else 0))
    looped = {
        (WEIGHT[loop.name], suffix): _looped(loop, layout.rings, sizes)
        for suffix in (("",) if block == "parallel" else ("", "_mlp"))
        for loop in loop_of.values()
        if (loop.name, suffix) != ("w_kv", "_mlp")
    }
    return Coefficients(
        chip=chip_,
        splits=splits(layout, mesh),
        gathered=gathered,
        entries=found,
        moving=moving,
        fixed=fixed,
        looped=looped,
    )


def _looped(loop: Loop, ways: int, sizes: Mapping[str, int]) -> LoopedMatmul:
    k = loop.move.group(sizes)
    if loop.move.kind == "reduce-scatter":  # halves, and the weight's columns (or x's rows) cut
        pieces = len(list(sends("reduce-scatter", loop.move.axes, sizes, 2 ** len(AXES), ways))) + 2
        return LoopedMatmul(hides=1 - 1 / pieces, inputs=pieces if loop.move.target == 1 else 1, sums=0)
    pieces = len(list(sends("all-gather", loop.move.axes, sizes, 2 ** len(AXES), ways))) + 1
    contracts = (loop.name == "g") == (loop.move.source == 1)
    return LoopedMatmul(hides=1 - 1 / k, inputs=1 if contracts else pieces, sums=pieces - 1 if contracts else 0)


def _torus(slice_: Slice, chip_: Chip) -> tuple[int, ...] | None:
    return None if chip_.wrap == "switch" else (*slice_.dims, 1, 1)[: max(3, len(slice_.dims))]


def _parts(entry: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[a] for a in axes_of(entry))
