"""The KV cache: one array each for K and V, all layers, carried through the pass and updated in place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from partitioning.collectives import LANES, SUBLANES, tpu
from partitioning.layouts import Layout, entries


class Cache(NamedTuple):
    """`k` and `v`, arrays (or shapes, or shardings) of [n_layers, B, K, S, Q], S = capacity in positions.

    The last two dimensions are what TPUs tile.
    """

    k: Any
    v: Any


def cache_shape(config: ModelConfig, batch: int, capacity: int, *, tiled: bool = False) -> tuple[int, ...]:
    """[n_layers, B, K, S, Q].

    `tiled`, for TPUs: S and Q rounded up to whole tiles of 8 x 128. A TPU would store a head of 160 as 256 anyway, or
    turn the cache around to save that, and then copy it whole on every step; and so with 2049 positions.

    Example:
        >>> from models.presets import model
        >>> cache_shape(model("mt-nlg-530b"), 1, 2049, tiled=True)
        (105, 1, 128, 2056, 256)
    """
    if tiled:
        capacity, width = -(-capacity // SUBLANES) * SUBLANES, -(-config.d_head // LANES) * LANES
    else:
        width = config.d_head
    return (config.n_layers, batch, config.n_kv_heads, capacity, width)


def is_tiled(mesh: Mesh) -> bool:
    """Whether the mesh's devices store whole tiles."""
    return mesh.devices.flat[0].platform == "tpu"


def cache_spec(layout: Layout) -> P:
    """The spec of `Cache.k` and `Cache.v` under a layout: the layers in front are never split."""
    return P(None, *entries(layout.cache))


def empty_cache(config: ModelConfig, batch: int, capacity: int, layout: Layout, mesh, dtype=jnp.float32) -> Cache:
    """Zeros on their devices. Callers remember how many positions of each row are in use."""
    sharding = NamedSharding(mesh, cache_spec(layout))
    shape = cache_shape(config, batch, capacity, tiled=is_tiled(mesh))
    make = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return Cache(make(), make())


def write(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """Puts the new positions of one layer in place; a chip's own shards.

    Args:
        cache: [n_layers, b, k, S, Q].
        new: [b, L, k, Q]; narrower than the cache, it is filled up with zeros.
        layer: index of the layer, a scalar.
        starts: [b], the first position of each row's new tokens; `starts + L` must not exceed S, which the caller
            has checked: a traced program cannot, and would slide the update over older positions or drop it.
    """
    new = pad_width(jnp.swapaxes(new, 1, 2).astype(cache.dtype), cache.shape[-1])  # bkLQ
    mesh = jax.sharding.get_abstract_mesh()
    if tpu() and mesh.are_all_axes_manual:
        return _write_rows(cache, new, layer, starts)
    if len(new) <= FEW_ROWS:
        for row in range(len(new)):
            at = (layer, row, 0, starts[row], 0)
            cache = lax.dynamic_update_slice(cache, new[row][None, None], at)
        return cache
    where = jnp.stack([jnp.broadcast_to(layer, starts.shape), starts], axis=1)  # b2
    return lax.scatter(cache, where, new, _PER_ROW, **_NO_TWO_ALIKE)


def pad_width(x: jax.Array, width: int) -> jax.Array:
    """[..., Q] filled up with zeros to [..., width]."""
    more = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def _write_rows(cache: jax.Array, new: jax.Array, layer: jax.Array, starts: jax.Array) -> jax.Array:
    """The same on the cache as a matrix of rows [n_layers * b * k * S, Q], of which XLA:TPU updates many at once: 64
    sequences take it 1.9 us, and 193 us in a scatter of windows, which it makes a loop of 64 turns. (To be told that
    the rows are in order as well, it takes 5 s longer to compile, for 0.7 us.)"""
    _, b, k, span, width = cache.shape
    at = (layer * b + jnp.arange(b))[:, None] * k + jnp.arange(k)  # bk
    at = (at * span + starts[:, None])[..., None] + jnp.arange(new.shape[2])  # bkL
    rows = cache.reshape(-1, width).at[at.reshape(-1)]
    rows = rows.set(new.reshape(-1, width), mode="promise_in_bounds", unique_indices=True)
    return rows.reshape(cache.shape)


FEW_ROWS = 8
"""Not on TPUs. Up to here one update per row: faster (13 against 17 ms per decode step with 2 rows on 8 fake CPU
devices), but every row adds to the time to compile. Beyond, one scatter, in the one form that neither copies the cache
nor, where XLA partitions it by itself, gathers it."""

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
