"""Steps of a ladder as collectives: which one leads from a spec to the next, how it runs, and how many bytes it moves.

One record, `Move`, both runs the collective in the decoder and counts its bytes for the plan. Which tensor takes which
steps is in `catalogue` and `partitioning.plan`, and how long they take in `partitioning.cost`.
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
        kind: the collective. `slice` is none: each chip keeps a part of what it has.
        axes: mesh axes of the group, major first.
        source: the dimension that is gathered, or that an all-to-all takes the axes from; -1 for none.
        target: the dimension that is scattered or sliced, or that an all-to-all gives the axes to; -1 for none.
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
        """Bytes that one chip must receive. Paper, appendix A.

        With K chips in a group and a chip's own bytes:

        - all-gather: output (K-1)/K
        - reduce-scatter, all-to-all: input (K-1)/K
        - all-reduce: twice the tensor (K-1)/K
        - slice: none

        Args:
            shape: of the global tensor.
            itemsize: bytes of one element.
            sizes: mesh axis -> size.

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
        """Runs the move inside `jax.jit`: on a global array over a mesh of Explicit axes, or on one chip's shard if the
        program is one chip's (`on_a_chip`)."""
        if on_a_chip():
            return _ON_A_CHIP[self.kind](self, array)
        if self.kind == "slice":  # each chip has all of it, so XLA only cuts, also where these are partial sums
            return jax.sharding.reshard(array, self.dst)
        return jax.shard_map(functools.partial(_RUN[self.kind], self), in_specs=self.src, out_specs=self.dst)(array)


@functools.lru_cache(maxsize=65536)
def classify(src: P, dst: P) -> Move:
    """The one collective that leads from `src` to `dst`.

    Raises:
        ValueError: the step takes more than one collective, and the ladder must write it as several.

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
    """Takes `array` from the first spec of the ladder to the last. An empty ladder changes nothing."""
    for move in moves(ladder):
        array = move(array)
    return array


def follow_together(arrays: Sequence[jax.Array], ladders: Sequence[Ladder]) -> list[jax.Array]:
    """Takes several arrays down their ladders. The first step of all ladders, an all-reduce, is one collective.

    Raises:
        ValueError: the first steps are not all-reduces over the same axes.
    """
    first = [moves(ladder)[0] for ladder in ladders]
    if len({(move.kind, move.axes) for move in first}) != 1 or first[0].kind != "all-reduce":
        raise ValueError(f"{first} are not one all-reduce")

    def reduce(*shards: jax.Array) -> tuple[jax.Array, ...]:
        return lax.psum(shards, first[0].axes)

    ins, outs = tuple(m.src for m in first), tuple(m.dst for m in first)
    run = reduce if on_a_chip() else jax.shard_map(reduce, in_specs=ins, out_specs=outs)
    summed = run(*arrays)
    return [follow(array, ladder[1:]) for array, ladder in zip(summed, ladders, strict=True)]


def on_a_chip() -> bool:
    """Whether the traced program is that of one chip, inside a `jax.shard_map` around all of it.

    Its arrays are shards, and specs do not constrain them. Training is differentiated there
    (`models.programs.training`).
    """
    return jax.sharding.get_abstract_mesh().are_all_axes_manual


def tpu() -> Any:
    """The device of the ambient mesh (`device_kind`, `num_cores`) if it is a TPU, else None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform == "tpu" else None


def local(function: Callable, in_specs: Sequence[Ladder | P], out_specs: Sequence[Ladder | P]) -> Callable:
    """`function`, run by every chip on its own shards, without communication.

    Args:
        function: takes one array for each of `in_specs` and returns a tuple with one for each of `out_specs`.
        in_specs: for each argument a spec, or the ladder whose last spec it has.
        out_specs: for each result a spec, or the ladder whose first spec it has. `unreduced` axes are partial sums.

    Returns:
        A function of global arrays. It is `function` itself for a layout without constraints (an empty ladder), and
        in the program of one chip (`on_a_chip`).
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
    """A reduce-scatter over `axes` along dimension `at`.

    If a chip's part is not a whole number of tiles for each core of a TPU, the parts become a dimension of their own.
    Otherwise XLA:TPU would run an all-reduce and a slice.
    """
    k = lax.axis_size(axes)
    part = shard.shape[at] // k
    device = tpu()
    if not device or part % (LANES * device.num_cores if at == shard.ndim - 1 else SUBLANES) == 0:
        return lax.psum_scatter(shard, axes, scatter_dimension=at, tiled=True)
    parts = shard.reshape(*shard.shape[:at], k, part, *shard.shape[at + 1 :])
    return lax.psum_scatter(parts, axes, scatter_dimension=at, tiled=False)


def _steps(axes: Axes, least: int) -> list[Axes]:
    """The axes in one group, or on a TPU with at least `least` axes in two: all but the last, then the last.

    Over a whole slice of more than 8 chips, XLA:TPU has no reduce-scatter, and no all-gather over three axes; it would
    run an all-reduce of twice the bytes. Two steps move the same bytes as one.
    """
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
"""As `_RUN`, but gathers give `varying` values: the transpose is then a reduce-scatter. That of an `invarying` one is a
slice, which takes cotangents that are already summed."""
