"""One move, one collective: what it takes to go from one spec to the next, run and priced by the same record.

Decides which collective a step of a ladder is, how it runs, and how many bytes it moves. What moves when is the
layout's (`partitioning.layouts.layout`, `partitioning.plan.plan`), how long it takes the cost model's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.layout import Axes, Ladder, axes_of, entries
from toruslab.partitioning.torus.mesh import AXES

LANES, SUBLANES, INT8_SUBLANES = 128, 8, 32
"""A TPU's tile: columns and rows; rows of int8."""
MoveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "slice"]


@dataclass(frozen=True, kw_only=True)
class Move:
    """The step from spec `src` to spec `dst`.

    Args:
        kind: the collective; `slice` keeps a part of what is already there and moves nothing.
        axes: mesh axes of the group, major first.
        source: the dimension that is gathered or that an all-to-all takes the axes from; -1: none.
        target: the dimension that is scattered, sliced, or that an all-to-all gives the axes to; -1: none.
    """

    kind: MoveKind
    axes: Axes
    source: int
    target: int
    src: P
    dst: P

    def group(self, sizes: Mapping[str, int]) -> int:
        """K, the number of chips in a group."""
        return math.prod(sizes[a] for a in self.axes)

    def bytes(self, shape: Sequence[int], itemsize: int, sizes: Mapping[str, int]) -> int:
        """Bytes that one chip must receive, for a tensor of global `shape`.

        With K chips in a group: all-gather, the output times (K-1)/K; reduce-scatter and all-to-all, the input times
        (K-1)/K; all-reduce, twice the tensor times (K-1)/K; slice, none. Paper, appendix A.

        Example: an all-gather over x of a [16, 32] float32 tensor whose second dimension is split over x.
            >>> classify(P(None, "x"), P(None, None)).bytes((16, 32), 4, {"x": 4, "y": 2, "z": 1})
            1536
        """
        if self.kind == "slice":
            return 0
        held = self.dst if self.kind == "all-gather" else self.src
        local = math.prod(shape) // math.prod(sizes[a] for entry in entries(held) for a in axes_of(entry))
        k = self.group(sizes)
        return -(-(2 if self.kind == "all-reduce" else 1) * local * itemsize * (k - 1) // k)

    def __call__(self, array: jax.Array) -> jax.Array:
        """Runs the move on a global array, inside `jax.jit` on a mesh of Explicit axes; or, where the program is one
        chip's already (`on_a_chip`), on its shard."""
        if on_a_chip():
            return _ON_A_CHIP[self.kind](self, array)
        if self.kind == "slice":  # the chip has it all: XLA only cuts, and partial sums may be cut as well
            return jax.sharding.reshard(array, self.dst)
        return jax.shard_map(functools.partial(_RUN[self.kind], self), in_specs=self.src, out_specs=self.dst)(array)


@functools.lru_cache(maxsize=65536)
def classify(src: P, dst: P) -> Move:
    """The one collective that leads from `src` to `dst`.

    Raises:
        ValueError: a step that takes more than one collective; a ladder has to spell it as several.

    Example:
        >>> classify(P(None, "y", unreduced=frozenset("x")), P(None, ("y", "x"))).kind
        'reduce-scatter'
    """
    before, after = [tuple(map(axes_of, entries(s))) for s in (src, dst)]
    partial = src.unreduced - dst.unreduced
    lost = [(d, b[len(a) :]) for d, (b, a) in enumerate(zip(before, after, strict=True)) if len(b) > len(a)]
    gained = [(d, a[len(b) :]) for d, (b, a) in enumerate(zip(before, after, strict=True)) if len(a) > len(b)]
    tails = all(b[: len(a)] == a[: len(b)] for b, a in zip(before, after, strict=True))
    in_order = tuple(a for a in AXES if a in partial)

    def move(kind: MoveKind, axes: Axes, source: int = -1, target: int = -1) -> Move:
        return Move(kind=kind, axes=axes, source=source, target=target, src=src, dst=dst)

    if tails and dst.unreduced <= src.unreduced and len(lost) <= 1 and len(gained) <= 1:
        if partial and not lost and not gained:
            return move("all-reduce", in_order)
        if partial and not lost and set(gained[0][1]) == partial:
            return move("reduce-scatter", gained[0][1], target=gained[0][0])
        if not partial and lost and not gained:
            return move("all-gather", lost[0][1], source=lost[0][0])
        if not partial and gained and not lost:
            return move("slice", gained[0][1], target=gained[0][0])
        if not partial and lost and gained and lost[0][1] == gained[0][1]:
            return move("all-to-all", lost[0][1], source=lost[0][0], target=gained[0][0])
    raise ValueError(f"{src} -> {dst} is not one collective; spell it as several steps")


def moves(ladder: Ladder) -> list[Move]:
    """The moves of a ladder, in order."""
    return [classify(src, dst) for src, dst in pairwise(ladder)]


def follow(array: jax.Array, ladder: Ladder) -> jax.Array:
    """`array`, taken from the first spec of the ladder to the last. An empty ladder constrains nothing."""
    for move in moves(ladder):
        array = move(array)
    return array


def follow_together(arrays: Sequence[jax.Array], ladders: Sequence[Ladder]) -> list[jax.Array]:
    """Several arrays down their ladders, whose first moves are all-reduces over the same axes: one collective."""
    first = [moves(ladder)[0] for ladder in ladders]
    if len({(move.kind, move.axes) for move in first}) != 1 or first[0].kind != "all-reduce":
        raise ValueError(f"{first} are not one all-reduce")

    def reduce(*shards: jax.Array) -> tuple[jax.Array, ...]:
        return lax.psum(shards, first[0].axes)

    if on_a_chip():
        summed = reduce(*arrays)
        return [follow(array, ladder[1:]) for array, ladder in zip(summed, ladders, strict=True)]
    ins, outs = tuple(m.src for m in first), tuple(m.dst for m in first)
    summed = jax.shard_map(reduce, in_specs=ins, out_specs=outs)(*arrays)
    return [follow(array, ladder[1:]) for array, ladder in zip(summed, ladders, strict=True)]


def on_a_chip() -> bool:
    """Whether the program being traced is that of one chip, inside one `jax.shard_map` around all of it: arrays are
    shards then, and what a spec says of them is for the reader. Training is differentiated there (`models.training`).
    """
    return jax.sharding.get_abstract_mesh().are_all_axes_manual


def tpu() -> Any:
    """What the devices of the ambient mesh are (`device_kind`, `num_cores`), if TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform == "tpu" else None


def local(function: Callable, in_specs: Sequence[Ladder | P], out_specs: Sequence[Ladder | P]) -> Callable:
    """`function` on every chip's own shards, with no communication.

    Args:
        function: takes and returns as many arrays as there are specs, and returns a tuple.
        in_specs: per argument a spec, or the ladder that it has come to the end of.
        out_specs: per result a spec, or the ladder that it sets out on. Axes in `unreduced` are partial sums.

    Returns:
        A function of global arrays; `function` itself where a ladder is empty, for a layout without constraints, and
        where the program is one chip's already (`on_a_chip`).
    """
    if on_a_chip() or any(not isinstance(s, P) and not s for s in (*in_specs, *out_specs)):
        return function
    ins = tuple(s if isinstance(s, P) else s[-1] for s in in_specs)
    outs = tuple(s if isinstance(s, P) else s[0] for s in out_specs)

    def on_shards(*arrays):
        results = function(*arrays)
        return tuple(
            lax.pcast(r, tuple(s.unreduced), to="unreduced") if s.unreduced else r
            for r, s in zip(results, outs, strict=True)
        )

    return jax.shard_map(on_shards, in_specs=ins, out_specs=outs)


def _slice(move: Move, shard: jax.Array) -> jax.Array:
    part = shard.shape[move.target] // lax.axis_size(move.axes)
    return lax.dynamic_slice_in_dim(shard, lax.axis_index(move.axes) * part, part, move.target)


def _all_gather(move: Move, shard: jax.Array, to: Literal["varying", "invarying"] = "invarying") -> jax.Array:
    for axes in reversed(_steps(move.axes, 3)):
        shard = lax.all_gather(shard, axes, axis=move.source, tiled=True, to=to)
    return shard


def _reduce_scatter(move: Move, shard: jax.Array) -> jax.Array:
    for axes in _steps(move.axes, 2):
        shard = _scatter(shard, axes, move.target)
    return shard


def _scatter(shard: jax.Array, axes: Axes, at: int) -> jax.Array:
    """Where a chip's part is not whole tiles for each core of a TPU, the parts become a dimension of their own:
    XLA:TPU makes an all-reduce and a slice of it otherwise."""
    k = lax.axis_size(axes)
    part = shard.shape[at] // k
    device = tpu()
    if not device or part % (LANES * device.num_cores if at == shard.ndim - 1 else SUBLANES) == 0:
        return lax.psum_scatter(shard, axes, scatter_dimension=at, tiled=True)
    parts = shard.reshape(*shard.shape[:at], k, part, *shard.shape[at + 1 :])
    return lax.psum_scatter(parts, axes, scatter_dimension=at, tiled=False)


def _steps(axes: Axes, least: int) -> list[Axes]:
    """On a TPU, all axes but the last at once, then the last, the same bytes in all, where there are `least` of them:
    over a whole slice of more than 8 chips XLA:TPU has no reduce-scatter, and over three axes no all-gather, and makes
    an all-reduce, of twice the bytes."""
    whole = lax.axis_size(axes) == jax.sharding.get_abstract_mesh().size > 8
    return [axes[:-1], axes[-1:]] if len(axes) >= least and whole and tpu() else [axes]


def _all_reduce(move: Move, shard: jax.Array) -> jax.Array:
    return lax.psum(shard, move.axes)


def _all_to_all(move: Move, shard: jax.Array) -> jax.Array:
    return lax.all_to_all(shard, move.axes, split_axis=move.target, concat_axis=move.source, tiled=True)


_RUN: dict[MoveKind, Callable[[Move, jax.Array], jax.Array]] = {
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
    "slice": _slice,
}
_ON_A_CHIP = _RUN | {"all-gather": functools.partial(_all_gather, to="varying")}
"""As `_RUN`, in the program of one chip: an invarying gather's transpose is a slice, of cotangents summed before."""
