"""Looped collective einsums: a matmul and its collective in pieces, one piece on its way while another is multiplied.

There are two forms, both on each chip's own shards under `jax.shard_map`, and both as rings of `lax.ppermute`:

- `gather_matmul`: an all-gather of one side of the matmul;
- `matmul_scatter`: a reduce-scatter of the result.

Pope et al. 2022, section 3.5, after Wang et al. 2023 (overlap of communication with dependent computation).

In one direction, a ring of K chips sends K-1 whole shards, each to the next chip. In both directions:

- Gathered shards travel to both neighbours at once, in K//2 steps instead of K-1. If K is even, half the shard of the
  opposite chip arrives from each side.
- Sums are cut into two halves that travel against each other, in K-1 steps of half the size. The term for one half is
  computed and added while the other half is on its way.

Halves of n elements have n//2 and the rest; an empty half is not sent. Two chips are neighbours on one cable, so that
both directions are one. Over several axes the rings are nested, with the minor axis inside, so that every send uses
one axis of the mesh. The bytes always equal those of the plain collective.

A send and the matmul beside it do not depend on each other. A shard is sent on only after the shard before it has been
multiplied, so that each ring holds at most two shards in memory beside the chip's own.

Not in this file: which steps a layout loops (`Layout.rings`, `variants.LOOPED`), and what a ring costs
(`partitioning.cost`).
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from toruslab.partitioning.layouts.layout import Axes, Ladder, Layout
from toruslab.partitioning.layouts.moves import Move, moves, on_a_chip
from toruslab.partitioning.layouts.precision import exact
from toruslab.partitioning.layouts.variants import LOOPED

OnArrival = Callable[[jax.Array | None, jax.Array, jax.Array | int, int], jax.Array]
"""(result so far, arrived shard, index of its chip, offset in that chip's shard) -> result."""


@dataclass(frozen=True, kw_only=True)
class RingMatmul:
    """A matmul x @ w, [t, n] @ [n, m], looped with a collective.

    Args:
        side: what travels: shards of `x`, shards of `w`, or sums of the result, `out`.
        dim: the dimension, 0 or 1, along which that is gathered or scattered.
        axes: mesh axes of the group, major first.
        ways: ring directions, 1 or 2.
        scopes: the `jax.named_scope` of the sends, and that of the matmuls.
    """

    side: Literal["x", "w", "out"]
    dim: int
    axes: Axes
    ways: int
    scopes: tuple[str, str] = ("sends", "matmuls")

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Multiplies two shards, inside `jax.shard_map`."""
        if self.side == "out":
            return matmul_scatter(x, w, self)
        return gather_matmul(x, w, self)


def gather_matmul(x: jax.Array, w: jax.Array, ring: RingMatmul) -> jax.Array:
    """`x @ w`, one of the two gathered over `ring.axes` along `ring.dim`. It is never whole in memory.

    A shard of the contracted dimension (x along 1, w along 0) is multiplied with its part of the other side, and the
    products are added in float32. Any other shard yields rows or columns of the result. Shards of int8 travel as int8
    and are converted to x's dtype on arrival.
    """
    n = (x if ring.side == "x" else w).shape[ring.dim]
    k = math.prod(lax.axis_size(a) for a in ring.axes)
    contracts = (ring.side, ring.dim) in (("x", 1), ("w", 0))
    rows, columns = x.shape[0], w.shape[1]
    shape = (rows * k, columns) if ring.side == "x" else (rows, columns * k)

    def step(acc, shard, index, offset):
        at, width = index * n + offset, shard.shape[ring.dim]
        part_of = functools.partial(_part, index=index, offset=offset, n=n, width=width)
        with jax.named_scope(ring.scopes[1]):
            if contracts:
                other = part_of(w, dim=0) if ring.side == "x" else part_of(x, dim=1)
                part = _product(shard, other) if ring.side == "x" else _product(other, shard)
                return part if acc is None else acc + part
            part = (_product(shard, w) if ring.side == "x" else _product(x, shard)).astype(x.dtype)
            if acc is None:
                acc = jnp.zeros(shape, x.dtype)
            return lax.dynamic_update_slice_in_dim(acc, part, at, axis=ring.dim)

    return _fold(step, None, x if ring.side == "x" else w, ring, ring.axes).astype(x.dtype)


def matmul_scatter(x: jax.Array, w: jax.Array, ring: RingMatmul) -> jax.Array:
    """This chip's part, along `ring.dim`, of `x @ w` summed over `ring.axes`.

    The sum for a chip starts at its neighbour and collects a term from each chip of the ring. Each chip computes its
    term while the sum is on its way to it. Terms are added in float32; sums travel in x's dtype.

    Raises:
        ValueError: the chips do not divide that dimension of the result.
    """
    k = math.prod(lax.axis_size(a) for a in ring.axes)
    whole = x.shape[0] if ring.dim == 0 else w.shape[1]
    if whole % k:
        raise ValueError(f"a result of {whole} along dimension {ring.dim} cannot be scattered over {k} chips")

    def product(x, index, offset, width):
        with jax.named_scope(ring.scopes[1]):
            cut = functools.partial(_part, index=index, offset=offset, n=whole // k, width=width, dim=ring.dim)
            return _product(cut(x), w) if ring.dim == 0 else _product(x, cut(w))

    return _sum(x, product, ring, ring.axes, (0, whole // k)).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ w` in float32."""
    return jnp.matmul(x, w.astype(x.dtype), precision=exact(x.dtype), preferred_element_type=jnp.float32)


def _part(array: jax.Array, *, index: jax.Array | int, offset: int, n: int, width: int, dim: int) -> jax.Array:
    """`width` elements from `offset` of part `index`; `array` is parts of `n` elements along `dim`.

    Rows of int8 are cut in two steps, whole parts first: XLA:TPU then copies the weights of one layer. In one step it
    would give the weights of all layers a new memory layout, in every layer. Rows of other dtypes it reads in place,
    but only if they are cut in one step.
    """
    if dim or array.dtype != jnp.int8:
        return lax.dynamic_slice_in_dim(array, index * n + offset, width, axis=dim)
    parts = array.reshape(-1, n, *array.shape[1:])
    part = lax.dynamic_index_in_dim(parts, index, 0, keepdims=False)
    return lax.slice_in_dim(part, offset, offset + width, axis=0)


def _send(array: jax.Array, axis: str, by: int, ring: RingMatmul) -> jax.Array:
    """`array` of the chip that is `by` places before this one on the ring over `axis`."""
    k = lax.axis_size(axis)
    with jax.named_scope(ring.scopes[0]):
        return lax.ppermute(array, axis, [(i, (i + by) % k) for i in range(k)])


def _fold(
    step: OnArrival, acc: jax.Array | None, shard: jax.Array, ring: RingMatmul, axes: Axes, offset: int = 0, index=0
):
    """Calls `step(acc, shard, index, offset)` for every shard of the group in order of arrival, the chip's own first.

    `index` is the chip that the shard belongs to, row-major over `ring.axes`. `offset` is where a part of a shard
    begins in that shard.
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
            shard, _ = lax.optimization_barrier((coming, acc))
        return visit(acc, shard, k - 1)
    legs, waiting = {1: shard, -1: shard}, [(shard, 0, 0)]
    for n in range(1, k // 2 + 1):
        offsets = dict.fromkeys(legs, 0)
        if 2 * n == k:
            legs, offsets = _halves(legs[1], legs[-1], ring.dim)
        coming = {by: _send(leg, axis, by, ring) for by, leg in legs.items()}
        for piece in waiting:
            acc = visit(acc, *piece)
        legs, _ = lax.optimization_barrier((coming, acc))
        waiting = [(leg, by * n, offsets[by]) for by, leg in legs.items()]
    for piece in waiting:
        acc = visit(acc, *piece)
    return acc


def _sum(
    x: jax.Array, product: Callable, ring: RingMatmul, axes: Axes, span: tuple[int, int], index: jax.Array | int = 0
):
    """This chip's part of the sums over `axes`; `product(x, index, *span)` is its term for chip `index`.

    `span` is a range (offset, width) of that chip's part along `ring.dim`.
    """
    if not axes:
        return product(x, index, *span)
    axis, k = axes[0], lax.axis_size(axes[0])
    here = lax.axis_index(axis)
    offset, width = span
    half = width // 2
    back = 1 if _is_one_way(k, ring.ways) else -1
    legs = [(by, part) for by, part in ((1, (offset, half)), (back, (offset + half, width - half))) if part[1]]

    def term(x: jax.Array, n: int, by: int, part: tuple[int, int]) -> jax.Array:
        """The term for the chip `n` places away in direction `by`."""
        return _sum(x, product, ring, axes[1:], part, index * k + (here + by * n) % k)

    totals = [term(x, k - 1, *leg) for leg in legs]
    for n in range(k - 2, -1, -1):
        for i, leg in enumerate(legs):
            come = _send(totals[i].astype(x.dtype), axis, leg[0], ring)
            late, come, _ = lax.optimization_barrier((x, come, totals[i - 1]))  # after the terms computed meanwhile
            mine = term(late, n, *leg)
            totals[i] = mine + come.astype(mine.dtype)
    return lax.concatenate(totals, ring.dim)


def _halves(right: jax.Array, left: jax.Array, dim: int) -> tuple[dict[int, jax.Array], dict[int, int]]:
    """The first half of one shard and the second half of the other, without empty halves, and where they begin; both by
    direction."""
    n = right.shape[dim]
    half = n // 2
    legs = {1: lax.slice_in_dim(right, 0, half, axis=dim), -1: lax.slice_in_dim(left, half, n, axis=dim)}
    return {by: leg for by, leg in legs.items() if leg.size}, {1: 0, -1: half}


def _is_one_way(k: int, ways: int) -> bool:
    return ways == 1 or k == 2


def sends(kind: str, axes: Axes, sizes: Mapping[str, int], n: int, ways: int) -> Iterator[tuple[str, int]]:
    """The sends of one looped collective.

    Args:
        kind: `all-gather` or `reduce-scatter`.
        axes: mesh axes of the group, major first.
        sizes: mesh axis -> size.
        n: elements of one shard along the dimension that is gathered or scattered.
        ways: ring directions, 1 or 2.

    Returns:
        For each send its mesh axis and how many of those `n` elements it carries.

    Example: four chips, both directions, shards of 5.
        >>> list(sends("all-gather", ("x",), {"x": 4}, 5, 2))
        [('x', 5), ('x', 5), ('x', 2), ('x', 3)]
    """
    if not axes:
        return
    axis, k = axes[0], sizes[axes[0]]
    both, halves = not _is_one_way(k, ways), [part for part in (n // 2, n - n // 2) if part]
    if kind == "all-gather":
        parts = [n] * (k - 2) + halves if both and k % 2 == 0 else [n] * (k - 1)
        inner = [n, *parts]
    else:
        parts, inner = halves * (k - 1), halves * k
    yield from ((axis, part) for part in parts)
    for part in inner:
        yield from sends(kind, axes[1:], sizes, part, ways)


@dataclass(frozen=True, kw_only=True)
class LoopedStep:
    """The step of a layout that is looped with a matmul: `step` (from 0) of the ladder `name`, as a `Move`."""

    name: str
    step: int
    move: Move


@functools.lru_cache(maxsize=4096)
def looped_steps(layout: Layout) -> Mapping[str, LoopedStep]:
    """Result of a matmul (`h`, `kv`, `out`) -> the step that the layout loops with that matmul, see `variants.LOOPED`.

    All-gathers are looped if they are the last step of their ladder, reduce-scatters if they are the first.
    """
    found: dict[str, LoopedStep] = {}
    for target, names in LOOPED.items() if layout.rings else ():
        for name in names:
            steps = moves(getattr(layout, name))
            at, wanted = (0, "reduce-scatter") if name == target else (len(steps) - 1, "all-gather")
            if target not in found and steps and steps[at].kind == wanted:
                found[target] = LoopedStep(name=name, step=at, move=steps[at])
    return found


def before(layout: Layout, name: str) -> Ladder:
    """The ladder of a tensor before its matmul, without a last step that is looped."""
    looped = any(loop.name == name for loop in looped_steps(layout).values())
    return getattr(layout, name)[:-1] if looped else getattr(layout, name)


def after(layout: Layout, name: str) -> Ladder:
    """The ladder of a tensor after the matmul that makes it, without a first step that is looped."""
    loop = looped_steps(layout).get(name)
    return getattr(layout, name)[1:] if loop and loop.name == name else getattr(layout, name)


def multiply(x: jax.Array, w: jax.Array, layout: Layout, names: tuple[str, str, str]) -> jax.Array:
    """`x @ w` of global arrays, looped with the step that the layout gives.

    Args:
        x: [T, n], in the last spec of `before(layout, names[0])`.
        w: [n, m], in the last spec of `before(layout, names[1])`.
        layout: a layout with rings.
        names: the ladders of x, of w and of the result; the last must be one of `looped_steps(layout)`.

    Returns:
        [T, m], in the first spec of `after(layout, names[2])`.
    """
    loop = looped_steps(layout)[names[2]]
    gathers = loop.move.kind == "all-gather"
    ring = RingMatmul(
        side=("x", "w", "out")[names.index(loop.name)],
        dim=loop.move.source if gathers else loop.move.target,
        axes=loop.move.axes,
        ways=layout.rings,
        scopes=(loop.name, names[2]),
    )
    to = after(layout, names[2])[0]
    if on_a_chip():
        return ring(x, w)

    def on_shards(x, w):
        out = ring(x, w)
        return lax.pcast(out, tuple(to.unreduced), to="unreduced") if to.unreduced else out

    at = (before(layout, names[0])[-1], before(layout, names[1])[-1])
    return jax.shard_map(on_shards, in_specs=at, out_specs=to)(x, w)
