"""What layout, block, slice and mesh decide about the cost of a pass, whatever its sizes.

- `transfers`: the collectives of a pass, with their sizes left open.
- `splits`: into how many parts every tensor is split.
- `coefficients`: the factors by which the data sheet turns sizes into seconds. They are computed once for a layout on
  a mesh, so that pricing many passes is arithmetic on arrays.

The seconds themselves are in `partitioning.cost.forward` and `partitioning.cost.measured`. Touches no device.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from toruslab.partitioning.layouts.layout import Axes, Layout, axes_of, entries
from toruslab.partitioning.layouts.rings import LoopedStep, before, looped_steps, sends
from toruslab.partitioning.plan.tensors import forward_tensors
from toruslab.partitioning.torus.calibrated import DIMENSIONS
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.links import permute_rate, rate
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape

PERMUTE = "collective-permute"
Where = str | tuple[str, str]
"""`outside` the layers, `exposed` in a layer, `hidden` under its matmuls, or (weight, suffix) of the one matmul that a
looped collective overlaps."""
WEIGHT = {"w_in": "w_in", "h": "w_in", "w_kv": "w_kv", "w_out": "w_out", "g": "w_out", "out": "w_out"}
"""A ladder that can be looped -> the weight of the matmul that it is looped with."""
SUFFIX = {"layer": "", "attention": "", "mlp": "_mlp"}
"""A block's scope -> the suffix of its letters."""
SPLIT_FIELDS = ("table", "cache", "w_in", "w_kv", "w_out", "x", "x_kv", "h", "g", "q", "out", "rows", "embed", "logits")


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """A collective of the plan with its price.

    Args:
        scope, kind, axes: as in the plan.
        in_layer: whether it runs in every layer.
        bytes: that one chip receives in one execution.
        count: executions in a pass.
        seconds: of one execution.

    `bytes`, `count` and `seconds` are arrays where many passes are priced together.
    """

    scope: str
    kind: str
    axes: Axes
    in_layer: bool
    bytes: Any
    count: Any
    seconds: Any

    def to_json(self) -> dict[str, Any]:
        """As in a row of results."""
        return {k: v for k, v in vars(self).items() if k != "in_layer"} | {"axes": list(self.axes)}


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective of the plan with its sizes left open: bytes = factor x product of `dims` x bytes of an element.

    Args:
        scope, kind, axes: as in the plan. A looped collective is a sequence of collective-permutes.
        dims: letters of the tensor.
        dtype: `act`, `weight`, `f32` or `i32`.
        factor: of the bytes that a chip receives; the parts that the tensor is split into are divided out.
        in_layer: whether it runs in every layer.
        n_group: chips in the group.
        at: whether `rows` or `columns` are gathered or scattered.
        column_parts: parts that the columns are split into while the collective runs.
        fused: this tensor shares the collective of another tensor in the same scope.
        starts: 1 where it pays the fixed cost of a collective, else 0. A fused one does not. Of the permutes of one
            looped collective the first pays for all.
        ways: ring directions of a permute, 1 or 2.
    """

    scope: str
    kind: str
    axes: Axes
    dims: tuple[str, ...]
    dtype: str
    factor: float
    in_layer: bool
    n_group: int
    at: str
    column_parts: int
    fused: bool
    starts: int
    ways: int

    def cost(self, n_bytes: Any, seconds: Any, n_layers: Any) -> CollectiveCost:
        """With its price."""
        return CollectiveCost(
            scope=self.scope,
            kind=self.kind,
            axes=self.axes,
            in_layer=self.in_layer,
            bytes=n_bytes,
            count=n_layers if self.in_layer else 1,
            seconds=seconds,
        )


@functools.lru_cache(maxsize=4096)
def transfers(layout: Layout, block: str, mesh: Shape) -> tuple[Transfer, ...]:
    """The collectives of a pass of `layout`, made for `mesh`, in the order of the plan."""
    sizes = dict(zip(AXES, mesh, strict=True))
    vocabulary_parts = _parts(entries(layout.logits[-1])[1:2], sizes)
    found = []
    for tensor in forward_tensors(layout, block, 1, True):
        first = True
        for kind, axes, share, move in tensor.collectives(sizes):
            k = move.group(sizes)
            held = entries(move.dst if move.kind == "all-gather" else move.src)
            dim = move.source if move.kind == "all-gather" else move.target
            phases = 2 if move.kind == "all-reduce" else 1
            repeats = vocabulary_parts if "n" in tensor.dims else 1
            looped = kind == PERMUTE
            found.append(
                Transfer(
                    scope=tensor.scope,
                    kind=kind,
                    axes=axes,
                    dims=tuple(d for d in tensor.dims if d != "n"),
                    dtype=tensor.dtype,
                    factor=phases * (k - 1) / k / _parts(held, sizes) * repeats * float(share),
                    in_layer=tensor.in_layer,
                    n_group=sizes[axes[0]] if looped else k,
                    at=DIMENSIONS[min(max(dim, 0), 1)],
                    column_parts=_parts(held[1:2], sizes),
                    fused=tensor.fused,
                    starts=int(not tensor.fused and (first or not looped)),
                    ways=tensor.ways,
                )
            )
            first = first and not looped
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def splits(layout: Layout, mesh: Shape) -> Mapping[tuple[str, int], tuple[int, ...]]:
    """(field of the layout, step of its ladder) -> into how many parts each dimension is split; steps 0, 1 and -1."""
    sizes = dict(zip(AXES, mesh, strict=True))
    found = {}
    for name in SPLIT_FIELDS:
        value = getattr(layout, name)
        ladder = value if isinstance(value, tuple) else (value,)
        for step, spec in ((0, ladder[0]), (1, ladder[min(1, len(ladder) - 1)]), (-1, ladder[-1])):
            found[name, step] = tuple(_parts([e], sizes) for e in entries(spec))
    return found


@dataclass(frozen=True, kw_only=True)
class LoopedMatmul:
    """A matmul that runs in pieces while a looped collective is on its way.

    Args:
        hides: share of the matmul that runs while data is on its way.
        inputs: how often the pieces together read the rows' side.
        sums: how often they write the sums and read them again, in float32.
    """

    hides: float
    inputs: int
    sums: int


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What a data sheet, a layout and a mesh decide about the cost.

    Args:
        layout, block, mesh: what they are of.
        chip: the data sheet.
        splits: see `splits`.
        gathered: weight -> the share of it that a chip holds while it is gathered, before and after the last step
            together; 0 where it is not gathered.
        rates: the transfers, each with seconds per byte at full bandwidth and hops.
        moving: (where, dtype, dims) -> seconds per element at full bandwidth.
        fixed: where -> (number of collectives, hops, messages of all-to-alls).
        looped: (weight, suffix) -> how that matmul is cut.
    """

    layout: Layout
    block: str
    mesh: Shape
    chip: Chip
    splits: Mapping[tuple[str, int], tuple[int, ...]]
    gathered: Mapping[str, float]
    rates: tuple[tuple[Transfer, float, float], ...]
    moving: Mapping[tuple[Where, str, tuple[str, ...]], float]
    fixed: Mapping[Where, tuple[int, float, int]]
    looped: Mapping[tuple[str, str], LoopedMatmul]


@functools.lru_cache(maxsize=65536)
def coefficients(layout: Layout, block: str, slice_: Slice, mesh: Shape, overlap: bool) -> Coefficients:
    """The coefficients of a layout that was made for `mesh`.

    Args:
        block: `parallel` or `serial`.
        overlap: see `partitioning.cost.estimate.estimate`.

    Raises:
        ValueError: `auto`, a chip without a data sheet, or a slice that it does not have.
    """
    if not layout.explicit:
        raise ValueError("layout='auto' has no plan: what XLA chooses is seen in the compiled program only")
    chip_ = chip(slice_.chip)
    chip_.check_slice(slice_.dims)
    sizes = dict(zip(AXES, mesh, strict=True))
    overlap = layout.prefetch or (overlap and not layout.rings)
    rates = []
    moving: dict[tuple[Where, str, tuple[str, ...]], float] = {}
    fixed: dict[Where, tuple[int, float, int]] = {"outside": (0, 0, 0), "exposed": (0, 0, 0)}
    for t in transfers(layout, block, mesh):
        is_weight = t.dtype == "weight"
        one_way = is_weight and overlap and not layout.prefetch
        per_byte, hops = collective_rate(t.kind, t.axes, mesh, slice_, chip_, ways=t.ways, one_way=one_way)
        hops = 0 if t.fused else hops
        rates.append((t, per_byte, hops))
        looped_with = _looped_with(t)
        where = looped_with or ("outside" if not t.in_layer else "hidden" if is_weight and overlap else "exposed")
        key = (where, t.dtype, t.dims)
        moving[key] = moving.get(key, 0.0) + t.factor * per_byte
        where = looped_with or ("exposed" if t.in_layer else "outside")
        n, all_hops, messages = fixed.get(where, (0, 0, 0))
        fixed[where] = (n + t.starts, all_hops + hops, messages + n_messages(t))
    return Coefficients(
        layout=layout,
        block=block,
        mesh=mesh,
        chip=chip_,
        splits=splits(layout, mesh),
        gathered=_gathered(layout, sizes),
        rates=tuple(rates),
        moving=moving,
        fixed=fixed,
        looped={
            (WEIGHT[loop.name], suffix): _looped_matmul(loop, layout.rings, sizes)
            for suffix in (("",) if block == "parallel" else ("", "_mlp"))
            for loop in looped_steps(layout).values()
            if (loop.name, suffix) != ("w_kv", "_mlp")
        },
    )


def collective_rate(
    kind: str, axes: Axes, mesh: Shape, slice_: Slice, chip_: Chip, *, ways: int, one_way: bool
) -> tuple[float, float]:
    """Seconds per byte and hops of a collective, or of one permute of a looped collective with so many `ways`."""
    if kind == PERMUTE:
        return permute_rate(axes[0], mesh, chip_, mesh_shape(slice_), ways=ways)
    return rate(kind, axes, mesh, chip_, mesh_shape(slice_), one_way=one_way)


def n_messages(t: Transfer) -> int:
    """The number of messages that each chip of an all-to-all sends one by one; 0 for other collectives."""
    return t.n_group if t.kind == "all-to-all" else 0


def _gathered(layout: Layout, sizes: Mapping[str, int]) -> dict[str, float]:
    found = {}
    loop_of = {loop.name: loop for loop in looped_steps(layout).values()}
    for name in ("w_in", "w_kv", "w_out"):
        shares = [1 / _parts(entries(spec), sizes) for spec in before(layout, name)]
        found[name] = max((held + made for held, made in pairwise(shares)), default=0.0)
        if layout.prefetch:
            found[name] = 2 * shares[-1] if len(shares) > 1 else 0.0
        if name in loop_of:  # what it has, and for every ring what is in use and what is coming
            found[name] = max(found[name], shares[-1] * (2 + len(loop_of[name].move.axes)))
    return found


def _looped_with(t: Transfer) -> tuple[str, str] | None:
    """Weight and suffix of the matmul that hides a permute."""
    return (WEIGHT[t.scope.rsplit("/", 1)[-1]], SUFFIX[t.scope.split("/")[0]]) if t.kind == PERMUTE else None


def _looped_matmul(loop: LoopedStep, ways: int, sizes: Mapping[str, int]) -> LoopedMatmul:
    k = loop.move.group(sizes)
    if loop.move.kind == "reduce-scatter":  # the weight's columns (or x's rows) are cut, each piece in halves
        pieces = len(list(sends("reduce-scatter", loop.move.axes, sizes, 2 ** len(AXES), ways))) + 2
        return LoopedMatmul(hides=1 - 1 / pieces, inputs=pieces if loop.move.target == 1 else 1, sums=0)
    pieces = len(list(sends("all-gather", loop.move.axes, sizes, 2 ** len(AXES), ways))) + 1
    contracts = (loop.name == "g") == (loop.move.source == 1)
    return LoopedMatmul(hides=1 - 1 / k, inputs=1 if contracts else pieces, sums=pieces - 1 if contracts else 0)


def _parts(spec: Sequence[Any], sizes: Mapping[str, int]) -> int:
    """Into how many parts the entries of a spec split a tensor."""
    return math.prod(sizes[a] for entry in spec for a in axes_of(entry))
