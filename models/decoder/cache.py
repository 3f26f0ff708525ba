"""The KV cache: one array for K and one for V with all layers, updated in place.

The cache has floats, or int8 with one scale for each layer, sequence, KV head and position. A scale is computed when
the position is written (`models.decoder.quantise.quantise_rows`). Written positions never change.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.quantise import quantise_rows
from toruslab.partitioning.layouts.layout import Layout, entries
from toruslab.partitioning.layouts.moves import INT8_SUBLANES, LANES, SUBLANES, tpu


class Cache(NamedTuple):
    """`k` and `v`: arrays (or shapes, or shardings) of [n_layers, B, K, S, Q], S = capacity in positions.

    TPUs tile the last two dimensions. With int8, `k_scale` and `v_scale` are [n_layers, B, K, S] of the activations'
    dtype: an integer times its position's scale is the value.
    """

    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None


def cache_shape(
    config: ModelConfig, batch: int, capacity: int, *, tiled: bool = False, int8: bool = False
) -> tuple[int, ...]:
    """[n_layers, B, K, S, Q].

    With `tiled`, for TPUs, S and Q are rounded up to whole tiles of 8 x 128, or of 32 x 128 with `int8`. A TPU would
    otherwise store a head of 160 as 256, or transpose the cache to avoid that and then copy all of it in every step.
    The same holds for 2049 positions.

    Example:
        >>> from toruslab.models.presets import model
        >>> cache_shape(model("mt-nlg-530b"), 1, 2049, tiled=True)
        (105, 1, 128, 2056, 256)
    """
    if tiled:
        rows = INT8_SUBLANES if int8 else SUBLANES
        capacity, width = -(-capacity // rows) * rows, -(-config.d_head // LANES) * LANES
    else:
        width = config.d_head
    return (config.n_layers, batch, config.n_kv_heads, capacity, width)


def is_tiled(mesh: Mesh) -> bool:
    """Whether the mesh's devices store whole tiles."""
    return mesh.devices.flat[0].platform == "tpu"


def cache_spec(layout: Layout) -> P:
    """The spec of `Cache.k` and `Cache.v` under a layout. Layers, the first dimension, are never split."""
    return P(None, *entries(layout.cache))


def cache_shardings(layout: Layout, mesh: Mesh, int8: bool = False) -> Cache:
    """The sharding of each array of a cache."""
    stored = NamedSharding(mesh, cache_spec(layout))
    scales = NamedSharding(mesh, P(*entries(cache_spec(layout))[:-1])) if int8 else None
    return Cache(stored, stored, scales, scales)


def abstract_cache(
    config: ModelConfig, batch: int, capacity: int, layout: Layout, mesh: Mesh, dtype=jnp.float32, int8: bool = False
) -> Cache:
    """The cache as shapes with their shardings; `dtype` is that of the activations and of int8's scales."""
    shape = cache_shape(config, batch, capacity, tiled=is_tiled(mesh), int8=int8)
    at = cache_shardings(layout, mesh, int8)
    stored = jax.ShapeDtypeStruct(shape, jnp.int8 if int8 else dtype, sharding=at.k)
    scales = jax.ShapeDtypeStruct(shape[:-1], dtype, sharding=at.k_scale) if int8 else None
    return Cache(stored, stored, scales, scales)


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, layout: Layout, mesh, dtype=jnp.float32, int8: bool = False
) -> Cache:
    """A cache of zeros on its devices. The caller keeps count of the positions that each sequence uses."""

    def make(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()

    return jax.tree.map(make, abstract_cache(config, batch, capacity, layout, mesh, dtype, int8))


def store(cache: Cache, k: jax.Array, v: jax.Array, layer: jax.Array, starts: jax.Array) -> Cache:
    """Writes the new positions of one layer, as integers and scales if the cache is int8.

    Args:
        cache: a chip's own shards.
        k, v: [b, L, k, Q].
        layer, starts: see `write`.
    """
    if cache.k_scale is None:
        return Cache(write(cache.k, k, layer, starts), write(cache.v, v, layer, starts))
    (k, k_scale), (v, v_scale) = (quantise_rows(new, cache.k_scale.dtype) for new in (k, v))
    return Cache(
        write(cache.k, k, layer, starts),
        write(cache.v, v, layer, starts),
        write_scales(cache.k_scale, k_scale, layer, starts),
        write_scales(cache.v_scale, v_scale, layer, starts),
    )


def write(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes the new positions of one layer into one array, on a chip's own shards.

    Args:
        cache: [n_layers, b, k, S, Q].
        new: [b, L, k, Q]; if Q is narrower than in the cache, it is filled up with zeros.
        layer: index of the layer, a scalar.
        starts: [b], the first position of each sequence's new tokens. `starts + L` must not exceed S. A traced program
            cannot check this and would overwrite older positions or drop the update, so the caller checks it.
    """
    new = pad_width(jnp.swapaxes(new, 1, 2).astype(cache.dtype), cache.shape[-1])  # bkLQ
    mesh = jax.sharding.get_abstract_mesh()
    if tpu() and mesh.are_all_axes_manual:
        return (_write_one_by_one if new.dtype == jnp.int8 else _write_rows)(cache, new, layer, starts)
    if len(new) <= FEW_ROWS:
        for row in range(len(new)):
            at = (layer, row, 0, starts[row], 0)
            cache = lax.dynamic_update_slice(cache, new[row][None, None], at)
        return cache
    where = jnp.stack([jnp.broadcast_to(layer, starts.shape), starts], axis=1)  # b2
    return lax.scatter(cache, where, new, _PER_ROW, **_NO_TWO_ALIKE)


def write_scales(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """`write` for scales: `new` [b, L, k] into [n_layers, b, k, S]."""
    if tpu() and jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return _write_one_by_one(cache, jnp.swapaxes(new, 1, 2), layer, starts)
    return write(cache[..., None], new[..., None], layer, starts)[..., 0]


def pad_width(x: jax.Array, width: int) -> jax.Array:
    """`x` [..., Q] filled up with zeros to [..., width]."""
    more = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def _write_rows(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """`write` on the cache as a matrix of rows [n_layers * b * k * S, Q], of which XLA:TPU updates many at once.

    With 64 sequences this takes 1.9 us. A scatter of windows becomes a loop of 64 turns and takes 193 us. Declaring the
    rows sorted would save 0.7 us, but takes 5 s longer to compile.
    """
    _, b, k, span, width = cache.shape
    at = (layer * b + jnp.arange(b))[:, None] * k + jnp.arange(k)  # bk
    at = (at * span + starts[:, None])[..., None] + jnp.arange(new.shape[2])  # bkL
    rows = cache.reshape(-1, width).at[at.reshape(-1)]
    rows = rows.set(new.reshape(-1, width), mode="promise_in_bounds", unique_indices=True)
    return rows.reshape(cache.shape)


def _write_one_by_one(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """`write` with one update for each sequence and KV head, for int8 caches and for scales, which have no Q.

    Four int8 positions share a word, and XLA:TPU has no other form that updates them in place. Many updates run in
    groups, in a loop.
    """
    shape, k = cache.shape, cache.shape[2]
    cache, new = cache.reshape(shape[0], -1, 1, *shape[3:]), new.reshape(-1, 1, *new.shape[2:])
    starts = jnp.repeat(starts, k)
    rows = max(n for n in range(1, UNROLLED + 1) if len(new) % n == 0)
    in_tiles = WHOLE_TILES and cache.dtype == jnp.int8 and cache.shape[3] % TILE == 0
    update = _put_in_tiles if in_tiles else _put

    def group(i, cache):
        for row in range(rows):
            at = i * rows + row
            cache = update(cache, lax.dynamic_slice_in_dim(new, at, 1)[None], layer, at, starts[at])
        return cache

    cache = group(0, cache) if rows == len(new) else lax.fori_loop(0, len(new) // rows, group, cache)
    return cache.reshape(shape)


def _put(cache: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array | int, start: jax.Array) -> jax.Array:
    """Writes `new` [1, 1, 1, L, ...] into [n_layers, rows, 1, S, ...], from position `start` of row `at` on."""
    return lax.dynamic_update_slice(cache, new, (layer, at, 0, start, *[0] * (cache.ndim - 4)))


def _put_in_tiles(cache: jax.Array, new: jax.Array, layer, at, start: jax.Array) -> jax.Array:
    """`_put` by whole tiles: tiles with new positions are read, changed and written. S is a multiple of `TILE`."""
    span, length = cache.shape[3], new.shape[3]
    size = min(span, (-(-(length - 1) // TILE) + 1) * TILE)
    first = jnp.minimum(start // TILE, (span - size) // TILE) * TILE  # XLA sees a multiple of TILE
    where = (layer, at, 0, first, 0)
    tiles = lax.dynamic_slice(cache, where, (1, 1, 1, size, cache.shape[4]))
    into = start - first
    zero = jnp.zeros_like(start)
    padded = jnp.pad(new, [(0, 0)] * 3 + [(size, size), (0, 0)])
    moved = lax.dynamic_slice(padded, (zero, zero, zero, size - into, zero), tiles.shape)
    positions = jnp.arange(size)[:, None]
    is_new = (positions >= into) & (positions < into + length)
    tiles = jnp.where(is_new, moved, tiles)  # a select, because XLA would fold an update
    return lax.dynamic_update_slice(cache, tiles, where)


TILE = 32
"""Positions in a tile of int8."""
WHOLE_TILES = jax.__version_info__ >= (0, 11)
"""Whether XLA:TPU updates an int8 cache in place by whole tiles. libtpu 0.0.50 (JAX 0.12) does; for other updates it
copies the cache to another memory layout (96 copies in a decode step of three layers). libtpu 0.0.42 (JAX 0.10) is the
reverse."""
UNROLLED = 64
"""Most updates of an int8 cache that a TPU program has one after the other. More run in a loop over groups."""
FEW_ROWS = 8
"""Most sequences that get one update each on CPU and GPU. This is faster than a scatter (13 against 17 ms per decode
step with 2 sequences on 8 fake CPU devices), but every update adds to the time to compile. More sequences get one
scatter, in the only form that neither copies the cache nor gathers it when XLA partitions the program itself."""

_PER_ROW = lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),  # kLQ
    inserted_window_dims=(0,),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)
_NO_TWO_ALIKE = {
    "indices_are_sorted": True,
    "unique_indices": True,
    "mode": lax.GatherScatterMode.FILL_OR_DROP,
}
