"""The sequences that the T tokens of a pass belong to, and attention within them on each chip's shards.

A pass gives the layers one value that can `attend`. The layers do not know which of these it is:
- `Aligned`: sequences with equally many new tokens, each with its part of a cache.
- `Causal`: whole sequences without a cache.
- `models.decoder.mixed.Paged`: tokens of many requests over shared pages.

The end of the file has small functions about shards that the whole decoder uses.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.attention import attend, causal, rope, rope_tables
from toruslab.models.decoder.cache import Cache, cache_spec, store
from toruslab.partitioning.layouts.layout import Axes, Ladder, Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import follow, local


class Sequences(Protocol):
    """A value that knows where the keys and values of each token's sequence are."""

    def attend(
        self, q: jax.Array, kv: jax.Array, cache: Cache, layer: jax.Array, config: ModelConfig, layout: Layout
    ) -> tuple[jax.Array, Cache]:
        """RoPE, cache update and attention of one layer.

        Args:
            q: [T, H, Q] at the last step of `layout.q`.
            kv: [T, D] at the last step of `layout.kv`.

        Returns:
            [T, H, Q] at the first step of `layout.o`, and the cache.
        """
        ...


class Aligned(NamedTuple):
    """T = B*L tokens, batch-major. `starts` [b], and RoPE's `cos` and `sin` [t, Q/2], split as in attention."""

    starts: jax.Array
    cos: jax.Array
    sin: jax.Array

    @classmethod
    def of(cls, starts: jax.Array, length: int, config: ModelConfig, layout: Layout) -> "Aligned":
        """Sequences with `length` new tokens each, from `starts` [B], whole on every chip."""
        by_sequence, by_token = batch_ladder(layout, layout.cache), token_ladder(layout)
        starts = follow(starts, by_sequence)

        def tables(starts):
            positions = starts[:, None] + jnp.arange(length)
            return rope_tables(positions.reshape(-1), config.d_head, config.rope_theta)

        return cls(starts, *local(tables, [by_sequence], [by_token, by_token])(starts))

    def attend(
        self, q: jax.Array, kv: jax.Array, cache: Cache, layer: jax.Array, config: ModelConfig, layout: Layout
    ) -> tuple[jax.Array, Cache]:
        """See `Sequences`."""

        def on_shards(q, kv, layer, starts, cos, sin, *held):
            t, h, width = q.shape
            b = starts.shape[0]
            kv = kv.reshape(t, -1, 2, width)
            k_new, v_new = rope(kv[:, :, 0], cos, sin), kv[:, :, 1]
            k_new, v_new = (n.reshape(b, t // b, -1, width) for n in (k_new, v_new))
            stored = store(Cache(*held), k_new, v_new, layer, starts)
            q = rope(q, cos, sin).reshape(b, t // b, h, width)

            def read(cache, layer, *which):
                scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
                return attend(q, cache.k, cache.v, layer, starts, *which, **scales)

            found = heads_read(config, layout, h, stored.k.shape[2])
            if isinstance(found, jax.Array):  # one KV head for each
                of_layer = jax.tree.map(lambda c: lax.dynamic_index_in_dim(c, layer, 0)[:, :, found], stored)
                o = read(of_layer, jnp.zeros_like(layer))
            else:
                o = read(stored, layer, *found)
            return o.reshape(t, h, width), *arrays(stored)

        by_sequence, by_token = batch_ladder(layout, layout.cache), token_ladder(layout)
        held = [place(layout, P(*entries(cache_spec(layout))[: a.ndim])) for a in arrays(cache)]
        ins = [layout.q, layout.kv, place(layout, P()), by_sequence, by_token, by_token, *held]
        o, *stored = local(on_shards, ins, [layout.o, *held])(q, kv, layer, *self, *arrays(cache))
        return o, Cache(*stored)


class Causal(NamedTuple):
    """T = B*L tokens of whole sequences, for training: nothing is cached. RoPE's `cos` and `sin` are [L, Q/2]."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def of(cls, length: int, config: ModelConfig) -> "Causal":
        return cls(*rope_tables(jnp.arange(length), config.d_head, config.rope_theta))

    def attend(
        self, q: jax.Array, kv: jax.Array, cache: Cache, layer: jax.Array, config: ModelConfig, layout: Layout
    ) -> tuple[jax.Array, Cache]:
        """See `Sequences`."""
        length = self.cos.shape[0]

        def on_shards(q, kv, cos, sin):
            t, h, width = q.shape
            q = rope(q.reshape(-1, length, h, width), cos, sin)
            kv = kv.reshape(t // length, length, -1, 2, width)
            k, v = rope(kv[:, :, :, 0], cos, sin).transpose(0, 2, 1, 3), kv[:, :, :, 1].transpose(0, 2, 1, 3)
            found = heads_read(config, layout, h, k.shape[1])
            if isinstance(found, jax.Array):
                k, v = k[:, found], v[:, found]
            else:
                k, v = (lax.dynamic_slice_in_dim(a, *found, axis=1) for a in (k, v))
            return (causal(q, k, v).reshape(t, h, width),)

        whole = place(layout, P(None, None))
        (o,) = local(on_shards, [layout.q, layout.kv, whole, whole], [layout.o])(q, kv, *self)
        return o, cache


def heads_read(config: ModelConfig, layout: Layout, h: int, here: int) -> tuple[jax.Array | int, int] | jax.Array:
    """The KV heads, among the `here` that a chip holds, that its `h` query heads read.

    Returns:
        A run of KV heads as (first, number). If the query heads span parts of several groups: the KV head of each, [h].
    """
    heads, kv_heads = split_axes(layout.q[-1:], 1), split_axes(layout.kv[-1:], 1)
    group, first = config.n_heads // config.n_kv_heads, index(heads) * h
    if here == 1 or h == here * group:
        return 0, here
    if h % group == 0 or group % h == 0:  # these query heads do not read all KV heads here
        return first // group - index(kv_heads) * here, max(1, h // group)
    return (first + jnp.arange(h)) // group - index(kv_heads) * here


def arrays(cache: Cache) -> list[jax.Array]:
    """The arrays of a cache: K and V, and with int8 their scales."""
    return [a for a in cache if a is not None]


def split_axes(ladder: Ladder, dim: int) -> Axes:
    """The axes that split dimension `dim` at the last step of the ladder; none for a layout without constraints."""
    return axes_of(entries(ladder[-1])[dim]) if ladder else ()


def place(layout: Layout, spec: P) -> Ladder:
    """A ladder of one step; no step for a layout without constraints."""
    return (spec,) if layout.explicit else ()


def batch_ladder(layout: Layout, like: P) -> Ladder:
    """The ladder of a [B] from whole on every chip to the split of the first dimension of `like`, which is B or T."""
    split = entries(like)[0]
    return () if not layout.explicit else (P(None), P(split)) if axes_of(split) else (P(None),)


def index(axes: Axes) -> jax.Array | int:
    """The number of this chip's part of a dimension that is split over `axes`."""
    return lax.axis_index(axes) if axes else 0


def token_ladder(layout: Layout) -> Ladder:
    """The ladder of a [T, ...] array that is split as attention splits tokens."""
    return place(layout, P(entries(layout.cache)[0], None))
