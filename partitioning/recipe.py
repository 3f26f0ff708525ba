"""What layout, block, slice and mesh decide about a pass' cost whatever its sizes: splits, collectives, rates of rings.

Worked out once for each of them, so that pricing many passes is arithmetic on arrays. Touches no device.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from partitioning.chips import Chip, chip
from partitioning.collectives import moves
from partitioning.dataflow import stages
from partitioning.interconnect import rate
from partitioning.layouts import Axes, Layout, axes_of, entries
from partitioning.measured_cost import splits
from partitioning.mesh import AXES, Shape, Slice


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A collective of the plan with its sizes left open: bytes = factor x product of `dims` x element size.

    One that `rides` shares another's instruction: its bytes cost, its start does not.
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
    hops: int
    n_group: int
    rides: bool


@functools.lru_cache(maxsize=4096)
def _entries_of(
    layout: Layout, block: str, slice_: Slice, mesh: Shape, chip_: Chip, overlap: bool
) -> tuple[Entry, ...]:
    sizes = dict(zip(AXES, mesh, strict=True))
    dims = _torus(slice_, chip_)
    parts = _parts(entries(layout.logits[-1])[1], sizes)
    found = []
    for stage in stages(layout, block, 1, True):
        for move in moves(stage.ladder):
            if move.kind == "slice":
                continue
            axes = tuple(a for a in AXES if a in move.axes)
            is_weight = stage.dtype == "weight"
            k = move.group(sizes)
            held = move.dst if move.kind == "all-gather" else move.src
            split = math.prod(sizes[a] for entry in entries(held) for a in axes_of(entry))
            per_byte, hops = rate(move.kind, axes, mesh, chip_, dims, one_way=is_weight and overlap)
            found.append(
                Entry(
                    scope=stage.scope,
                    kind=move.kind,
                    axes=axes,
                    dims=tuple(d for d in stage.dims if d != "n"),
                    dtype=stage.dtype,
                    factor=(2 if move.kind == "all-reduce" else 1)
                    * (k - 1)
                    / k
                    / split
                    * (parts if "n" in stage.dims else 1),
                    in_layer="/" in stage.scope,
                    is_weight=is_weight,
                    s_per_byte=per_byte,
                    hops=0 if stage.rides else hops,
                    n_group=k,
                    rides=stage.rides,
                )
            )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What layout, block, slice and mesh decide about the cost, worked out once.

    Args:
        chip: the data sheet.
        splits: (field, rung) -> into how many parts each dimension of that tensor is split.
        gathered: weight -> the share of it that a chip holds while it is gathered: before and after the last step; 0
            where it is not.
        entries: the collectives.
        moving: (where, dtype, dims) -> seconds per element at full bandwidth, where `where` is `outside` the layers,
            `exposed` in a layer, or `hidden` under its matmuls.
        fixed: where -> (collectives, hops, messages of all-to-alls).
    """

    chip: Chip
    splits: Mapping[tuple[str, int], tuple[int, ...]]
    gathered: Mapping[str, float]
    entries: tuple[Entry, ...]
    moving: Mapping[tuple[str, str, tuple[str, ...]], float]
    fixed: Mapping[str, tuple[int, int, int]]


@functools.lru_cache(maxsize=65536)
def recipe(layout: Layout, block: str, slice_: Slice, mesh: Shape, overlap: bool) -> Recipe:
    """Of a layout on a mesh.

    Raises:
        ValueError: `auto`, a chip without a data sheet, or a slice that it does not have.
    """
    if not layout.explicit:
        raise ValueError("layout='auto' has no plan: what XLA chooses is seen in the compiled program only")
    chip_ = chip(slice_.chip)
    chip_.check_slice(slice_.dims)
    sizes = dict(zip(AXES, mesh, strict=True))
    gathered = {}
    for name in ("w_in", "w_kv", "w_out"):
        shares = [1 / math.prod(_parts(e, sizes) for e in entries(spec)) for spec in getattr(layout, name)]
        gathered[name] = max((before + after for before, after in pairwise(shares)), default=0.0)
    found = _entries_of(layout, block, slice_, mesh, chip_, overlap)
    moving: dict[tuple[str, str, tuple[str, ...]], float] = {}
    fixed = {"outside": (0, 0, 0), "exposed": (0, 0, 0)}
    for e in found:
        where = "outside" if not e.in_layer else "hidden" if e.is_weight and overlap else "exposed"
        key = (where, e.dtype, e.dims)
        moving[key] = moving.get(key, 0.0) + e.factor * e.s_per_byte
        where = "exposed" if e.in_layer else "outside"
        n, hops, messages = fixed[where]
        fixed[where] = (n + (not e.rides), hops + e.hops, messages + (e.n_group if e.kind == "all-to-all" else 0))
    return Recipe(chip=chip_, splits=splits(layout, mesh), gathered=gathered, entries=found, moving=moving, fixed=fixed)


def _torus(slice_: Slice, chip_: Chip) -> tuple[int, ...] | None:
    return None if chip_.wrap == "switch" else (*slice_.dims, 1, 1)[: max(3, len(slice_.dims))]


def _parts(entry: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[a] for a in axes_of(entry))
