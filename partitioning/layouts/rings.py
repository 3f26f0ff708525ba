"""Looped collective einsums: a collective taken to pieces, each on its way while another is multiplied.

Two forms, on every chip's own shards under `jax.shard_map`: an all-gather of one of a matmul's sides (`gather_matmul`)
and a reduce-scatter of what comes out (`matmul_scatter`), as rings of `lax.ppermute`. Pope et al. 2022, section 3.5,
after Wang et al. 2023 (overlap of communication with dependent computation).

One way round, a ring of K chips sends K-1 whole shards, each to the next chip. Both ways round:

- shards that are gathered travel to both neighbours at once, in K//2 steps instead of K-1. With K even, the shard of
  the opposite chip comes half from either side.
- sums are cut in two halves that travel against each other, K-1 steps of half the size: the term for one is worked
  out and added while the other is under way.

Halves of n elements are n//2 and the rest; one without elements is not sent. Two chips are neighbours on one cable:
there, both ways are one. Over several axes the rings are nested, the minor axis inside, so that every send goes along
one axis of the mesh. The bytes are always those of the one collective.

A send and the matmul beside it do not depend on each other. What has arrived is sent on only when the shard before it
has been multiplied, so that no more than two shards stand in memory beside the chip's own (and those of outer rings).

Decides how a ring runs and what it sends. Which moves run so is the layout's (`Layout.rings`) and `looped_steps`'.
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


@dataclass(frozen=True, kw_only=True)
class RingMatmul:
    """A collective of a matmul [t, n] @ [n, m], looped.

    Args:
        side: what travels.
        dim: along which of its two dimensions it is gathered or scattered.
        axes: of the group, major first.
        ways: 1 or 2 directions.
        scopes: names for the sends and for the matmuls, as `jax.named_scope`s.
    """

    side: Literal["x", "w", "out"]
    dim: int
    axes: Axes
    ways: int
    scopes: tuple[str, str] = ("sends", "matmuls")

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The matmul of two shards with its collective, inside `jax.shard_map`."""
        if self.side == "out":
            return matmul_scatter(x, w, self)
        return gather_matmul(x, w, self)


def gather_matmul(x: jax.Array, w: jax.Array, ring: RingMatmul) -> jax.Array:
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
    """The chip's part, along `ring.dim`, of `x @ w` summed over `ring.axes`.

    The sum for a chip starts at its neighbour and gathers terms on its way all round; each chip works out its term
    while the sum is on its way there. Terms are added in float32, sums travel in x's dtype.
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
    """Of part `index` of `n` elements along `dim`, the `width` elements from `offset` on.

    Rows of int8 are cut as whole parts first: to cut them from anywhere, XLA:TPU lays the weights of all layers out
    anew in every layer; so it copies those of one. Other rows it reads in place, as long as they are cut in one step.
    """
    if dim or array.dtype != jnp.int8:
        return lax.dynamic_slice_in_dim(array, index * n + offset, width, axis=dim)
    parts = array.reshape(-1, n, *array.shape[1:])
    part = lax.dynamic_index_in_dim(parts, index, 0, keepdims=False)
    return lax.slice_in_dim(part, offset, offset + width, axis=0)


def _send(array: jax.Array, axis: str, by: int, ring: RingMatmul) -> jax.Array:
    """What the chip `by` places before this one holds."""
    k = lax.axis_size(axis)
    with jax.named_scope(ring.scopes[0]):
        return lax.ppermute(array, axis, [(i, (i + by) % k) for i in range(k)])


def _fold(
    step: OnArrival, acc: jax.Array | None, shard: jax.Array, ring: RingMatmul, axes: Axes, offset: int = 0, index=0
):
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
    """This chip's part of the sums over `axes`; `product(x, index, *span)` is its own term for chip `index`.

    `span`: where along the dimension it begins in that chip's part, and how long it is.
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
        """For the chip `n` places on in direction `by`."""
        return _sum(x, product, ring, axes[1:], part, index * k + (here + by * n) % k)

    totals = [term(x, k - 1, *leg) for leg in legs]
    for n in range(k - 2, -1, -1):
        for i, leg in enumerate(legs):
            come = _send(totals[i].astype(x.dtype), axis, leg[0], ring)
            late, come, _ = lax.optimization_barrier((x, come, totals[i - 1]))  # after what was worked out meanwhile
            mine = term(late, n, *leg)
            totals[i] = mine + come.astype(mine.dtype)
    return lax.concatenate(totals, ring.dim)


def _halves(right: jax.Array, left: jax.Array, dim: int) -> tuple[dict[int, jax.Array], dict[int, int]]:
    """The first half of one and the second of the other, and where they begin, by direction; without empty ones."""
    n = right.shape[dim]
    half = n // 2
    legs = {1: lax.slice_in_dim(right, 0, half, axis=dim), -1: lax.slice_in_dim(left, half, n, axis=dim)}
    return {by: leg for by, leg in legs.items() if leg.size}, {1: 0, -1: half}


def _is_one_way(k: int, ways: int) -> bool:
    return ways == 1 or k == 2


def sends(kind: str, axes: Axes, sizes: Mapping[str, int], n: int, ways: int) -> Iterator[tuple[str, int]]:
    """What one looped collective sends: for each send the mesh axis, and how many of the shard's `n` elements along its
    gathered (scattered) dimension.

    Args:
        kind: `all-gather` or `reduce-scatter`.
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
    """A move that a layout loops with a matmul: step `step` of ladder `name`."""

    name: str
    step: int
    move: Move


@functools.lru_cache(maxsize=4096)
def looped_steps(layout: Layout) -> Mapping[str, LoopedStep]:
    """What comes out of a matmul -> the move that the layout loops with it; see `variants.LOOPED`.

    A gather is looped if it is the last step of its ladder, a reduce-scatter if it is the first.
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
    """What a tensor follows before its matmul: its ladder, without a last step that is looped."""
    looped = any(loop.name == name for loop in looped_steps(layout).values())
    return getattr(layout, name)[:-1] if looped else getattr(layout, name)


def after(layout: Layout, name: str) -> Ladder:
    """What follows on the matmul that makes a tensor: its ladder, without a first step that is looped."""
    loop = looped_steps(layout).get(name)
    return getattr(layout, name)[1:] if loop and loop.name == name else getattr(layout, name)


def multiply(x: jax.Array, w: jax.Array, layout: Layout, names: tuple[str, str, str]) -> jax.Array:
    """`x @ w`, global arrays, looped with the move that the layout says.

    Args:
        x: [T, n] where `before(layout, names[0])` ends; w: [n, m] where `before(layout, names[1])` does.
        names: of the ladders of x, of w and of what comes out, which must be one of `looped_steps(layout)`.

    Returns:
        [T, m] where `after(layout, names[2])` begins.
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
