"""Looped collective einsums: a collective taken to pieces, each on its way while another is multiplied.

Two forms, on every chip's own shards under `jax.shard_map`: an all-gather of one of a matmul's sides (`gather_matmul`)
and a reduce-scatter of what comes out (`matmul_scatter`), as rings of `lax.ppermute`. Pope et al. 2022, section 3.5,
after Wang et al. 2023 (overlap of communication with dependent computation).

One way round, a ring of K chips sends K-1 whole shards, each to the next chip. Both ways round, shards travel to both
neighbours at once and meet at the opposite chip: K//2 steps instead of K-1, the same bytes. With K even the opposite
chip's shard comes half from either side, split at n//2 of its n; a half without elements is not sent. Two chips are
neighbours on one cable only: there, both ways are one. Over several axes the rings are nested, the minor axis inside,
so that every send goes along one axis of the mesh; the bytes are those of the one collective all the same.

A step's send and its matmul do not depend on each other; the next step waits for both, so that no more than two shards
stand in memory beside the chip's own (and one of each outer ring).

Decides how a ring runs and what it sends. Which moves run so is the layout's (`Layout.rings`) and `loops`'.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from partitioning.collectives import Move, moves
from partitioning.layouts import LOOPED, Axes, Ladder, Layout, entries

Side = Literal["x", "w", "out"]
"""What is on its way: the rows' side of a matmul x @ w, the weight, or the sums that come out."""
Step = Callable[[jax.Array | None, jax.Array, jax.Array | int, int], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A collective of a matmul [t, n] @ [n, m], looped.

    Args:
        side: what travels.
        dim: along which of its two dimensions it is gathered or scattered.
        axes: of the group, major first.
        ways: 1 or 2 directions.
        scopes: names for the sends and for the matmuls, as `jax.named_scope`s.
    """

    side: Side
    dim: int
    axes: Axes
    ways: int
    scopes: tuple[str, str] = ("sends", "matmuls")

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The matmul of two shards with its collective, inside `jax.shard_map`."""
        if self.side == "out":
            return matmul_scatter(x, w, self)
        return gather_matmul(x, w, self)


def gather_matmul(x: jax.Array, w: jax.Array, ring: Ring) -> jax.Array:
    """`x @ w`, one of the two gathered over `ring.axes` along `ring.dim`: its shards come by, one after the other.

    A shard of the contracted dimension (x along 1, w along 0) is multiplied with the part of the other side that it
    belongs to and added up, in float32; any other yields rows or columns of the result. The gathered whole never
    stands in memory. Shards of int8 travel as such, and are converted to x's dtype where they arrive.
    """
    n = (x if ring.side == "x" else w).shape[ring.dim]
    k = math.prod(lax.axis_size(a) for a in ring.axes)
    contracts = (ring.side, ring.dim) in (("x", 1), ("w", 0))
    rows, columns = x.shape[0], w.shape[1]
    shape = (rows * k, columns) if ring.side == "x" else (rows, columns * k)

    def step(acc, shard, index, offset):
        at, width = index * n + offset, shard.shape[ring.dim]
        with jax.named_scope(ring.scopes[1]):
            if contracts:
                other = _cut(w, at, width, 0) if ring.side == "x" else _cut(x, at, width, 1)
                part = _product(shard, other) if ring.side == "x" else _product(other, shard)
                return part if acc is None else acc + part
            part = (_product(shard, w) if ring.side == "x" else _product(x, shard)).astype(x.dtype)
            if acc is None:
                acc = jnp.zeros(shape, x.dtype)
            return lax.dynamic_update_slice_in_dim(acc, part, at, axis=ring.dim)

    return _fold(step, None, x if ring.side == "x" else w, ring, ring.axes).astype(x.dtype)


def matmul_scatter(x: jax.Array, w: jax.Array, ring: Ring) -> jax.Array:
    """The chip's part, along `ring.dim`, of `x @ w` summed over `ring.axes`.

    The sum for a chip starts at the farthest and gathers terms on its way; each chip works out its term for it while
    the sum is under way. Terms are added in float32, sums travel in x's dtype.
    """
    k = math.prod(lax.axis_size(a) for a in ring.axes)
    whole = x.shape[0] if ring.dim == 0 else w.shape[1]
    if whole % k:
        raise ValueError(f"a result of {whole} along dimension {ring.dim} cannot be scattered over {k} chips")

    def part(index):
        with jax.named_scope(ring.scopes[1]):
            at, width = index * (whole // k), whole // k
            return _product(_cut(x, at, width, 0), w) if ring.dim == 0 else _product(x, _cut(w, at, width, 1))

    return _sum(part, ring, ring.axes, x.dtype).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` in float32."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _cut(array: jax.Array, at: jax.Array | int, width: int, dim: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, at, width, axis=dim)


def _send(array: jax.Array, axis: str, by: int, ring: Ring) -> jax.Array:
    """What the chip `by` places before this one holds."""
    k = lax.axis_size(axis)
    with jax.named_scope(ring.scopes[0]):
        return lax.ppermute(array, axis, [(i, (i + by) % k) for i in range(k)])


def _fold(step: Step, acc: jax.Array | None, shard: jax.Array, ring: Ring, axes: Axes, offset: int = 0, index=0):
    """`step(acc, shard, index, offset)` for every shard of the group, the chip's own first, in the order of arrival.

    `index`: whose shard it is, row-major over `ring.axes`; `offset`: where in that shard a part of it begins.
    """
    if not axes:
        return step(acc, shard, index, offset)
    axis, k = axes[0], lax.axis_size(axes[0])
    here = lax.axis_index(axis)

    def visit(acc, piece, by, skip=0):
        owner = index * k + (here - by) % k
        return _fold(step, acc, piece, ring, axes[1:], offset + skip, owner)

    if _is_one_way(k, ring.ways):
        for n in range(k - 1):
            coming = _send(shard, axis, 1, ring)
            acc = visit(acc, shard, n)
            shard, acc = lax.optimization_barrier((coming, acc))
        return visit(acc, shard, k - 1)
    legs, waiting = {1: shard, -1: shard}, [(shard, 0, 0)]
    for n in range(1, k // 2 + 1):
        offsets = dict.fromkeys(legs, 0)
        if 2 * n == k:
            legs, offsets = _halves(legs[1], legs[-1], ring.dim)
        coming = {by: _send(leg, axis, by, ring) for by, leg in legs.items()}
        for piece in waiting:
            acc = visit(acc, *piece)
        legs, acc = lax.optimization_barrier((coming, acc))
        waiting = [(leg, by * n, offsets[by]) for by, leg in legs.items()]
    for piece in waiting:
        acc = visit(acc, *piece)
    return acc


def _sum(part: Callable, ring: Ring, axes: Axes, dtype, index: jax.Array | int = 0) -> jax.Array:
    """This chip's part of the sums over `axes`; `part(index)` is the chip's own term for chip `index`."""
    if not axes:
        return part(index)
    axis, k = axes[0], lax.axis_size(axes[0])
    here = lax.axis_index(axis)

    def term(by: int) -> jax.Array:
        """For the chip `by` places after this one."""
        return _sum(part, ring, axes[1:], dtype, index * k + (here + by) % k)

    def add(mine: jax.Array, come: jax.Array | None, at: int = 0) -> jax.Array:
        """Its own terms and those that have come, which may be a part of them that begins at `at`."""
        if come is None:
            return mine
        edges = [(0, 0, 0)] * mine.ndim
        edges[ring.dim] = (at, mine.shape[ring.dim] - come.shape[ring.dim] - at, 0)
        return mine + lax.pad(come.astype(mine.dtype), jnp.zeros((), mine.dtype), edges)

    def onward(total: jax.Array, by: int) -> jax.Array:
        return _send(total.astype(dtype), axis, by, ring)

    if _is_one_way(k, ring.ways):
        total = term(k - 1)
        for n in range(k - 2, -1, -1):
            total = add(term(n), onward(total, 1))
        return total
    far = k // 2
    legs, offsets = {1: term(far), -1: term(-far)} if k % 2 else {}, {1: 0, -1: 0}
    if not legs:
        opposite = term(far)
        legs, offsets = _halves(opposite, opposite, ring.dim)
    for n in range(far - 1, 0, -1):
        come = {by: onward(leg, by) for by, leg in legs.items()}
        legs = {by: add(term(by * n), come.get(by), offsets.get(by, 0)) for by in (1, -1)}
        offsets = dict.fromkeys(legs, 0)
    total = term(0)
    for by, leg in legs.items():
        total = add(total, onward(leg, by), offsets[by])
    return total


def _halves(right: jax.Array, left: jax.Array, dim: int) -> tuple[dict[int, jax.Array], dict[int, int]]:
    """The first half of one and the second of the other, and where they begin, by direction; without empty ones."""
    n = right.shape[dim]
    half = n // 2
    legs = {1: lax.slice_in_dim(right, 0, half, axis=dim), -1: lax.slice_in_dim(left, half, n, axis=dim)}
    return {by: leg for by, leg in legs.items() if leg.size}, {1: 0, -1: half}


def _is_one_way(k: int, ways: int) -> bool:
    return ways == 1 or k == 2


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A move that a layout loops with a matmul: step `rung` of ladder `name`."""

    name: str
    rung: int
    move: Move

    def before(self, ladder: Ladder) -> Ladder:
        """What is left to follow before the matmul."""
        return ladder[: self.rung + 1]

    def after(self, ladder: Ladder) -> Ladder:
        """What is left to follow after it."""
        return ladder[self.rung + 1 :]


@functools.lru_cache(maxsize=4096)
def loops(layout: Layout) -> Mapping[str, Loop]:
    """What comes out of a matmul -> the move that the layout loops with it; see `layouts.LOOPED`.

    A gather is looped if it is the last step of its ladder, a reduce-scatter if it is the first.
    """
    found: dict[str, Loop] = {}
    for target, names in LOOPED.items() if layout.rings else ():
        for name in names:
            steps = moves(getattr(layout, name))
            rung = 0 if name == target else len(steps) - 1
            wanted = "reduce-scatter" if name == target else "all-gather"
            if target not in found and steps and steps[rung].kind == wanted:
                found[target] = Loop(name=name, rung=rung, move=steps[rung])
    return found


def sends(kind: str, axes: Axes, sizes: Mapping[str, int], n: int, ways: int) -> Iterator[tuple[str, int]]:
    """What one looped collective sends: for each send the mesh axis, and how many of the shard's `n` elements along its
    gathered (scattered) dimension.

    Args:
        kind: `all-gather` or `reduce-scatter`; they differ in what goes round an inner ring: the halves of an outer
            one arrive apart, but their terms are worked out together.
        axes: of the group, major first.
        sizes: of the mesh axes.
        n: extent of one shard along that dimension.
        ways: 1 or 2.

    Example: both ways round four chips, shards of 5.
        >>> list(sends("all-gather", ("x",), {"x": 4}, 5, 2))
        [('x', 5), ('x', 5), ('x', 2), ('x', 3)]
    """
    if not axes:
        return
    axis, k = axes[0], sizes[axes[0]]
    parts = [n] * (k - 1)
    if k % 2 == 0 and not _is_one_way(k, ways):
        parts = parts[:-1] + [part for part in (n // 2, n - n // 2) if part]
    yield from ((axis, part) for part in parts)
    for part in [n, *parts] if kind == "all-gather" else [n] * k:
        yield from sends(kind, axes[1:], sizes, part, ways)
