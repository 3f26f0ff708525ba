"""Attention of one layer on one chip's shards: RoPE, the causal mask by position, and the softmax.

The functions work on the sequences and heads that a chip holds, and never communicate. Over many positions the softmax
runs block by block (`models.attention_blocks`) with a running maximum and sum, so that the scores of a long prefill are
never in memory at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from toruslab.models.attention_blocks import BLOCK, block_size
from toruslab.models.decoder.cache import pad_width
from toruslab.partitioning.layouts.precision import exact


def rope_tables(positions: jax.Array, d_head: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Positions [...] -> the cosines and the sines of RoPE, [..., Q/2] float32 each."""
    frequencies = theta ** (-jnp.arange(d_head // 2, dtype=jnp.float32) * 2 / d_head)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` [..., heads, Q] rotated by RoPE's angles [..., Q/2]: dimension i with dimension i + Q/2, as in Llama."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal softmax attention within whole sequences, without a cache, for training.

    Sequences longer than two `BLOCK`s are computed block of queries by block of queries. Gradients recompute a block's
    scores.

    Args:
        q: [b, L, h, Q]; equal runs of its heads share a KV head.
        k, v: [b, k, L, Q].

    Returns:
        [b, L, h, Q].
    """
    b, length, h, width = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(b, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)  # [b, k, g, L, Q]
    product = functools.partial(jnp.einsum, precision=exact(q.dtype))

    def of_queries(q: jax.Array, first: jax.Array | int) -> jax.Array:
        """[b, k, g, n, Q], for queries of this shape at the positions from `first` on."""
        s = product("bkgnq,bkmq->bkgnm", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(jnp.float32(width))
        seen = jnp.arange(length) <= first + jnp.arange(q.shape[3])[:, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
        return product("bkgnm,bkmq->bkgnq", p.astype(q.dtype), v)

    if length <= 2 * BLOCK:
        o = of_queries(q, 0)
    else:
        n, left = divmod(length, BLOCK)
        blocks = q[:, :, :, left:].reshape(*q.shape[:3], n, BLOCK, width)
        firsts = left + BLOCK * jnp.arange(n)
        found = lax.map(jax.checkpoint(lambda turn: of_queries(*turn)), (jnp.moveaxis(blocks, 3, 0), firsts))
        o = jnp.moveaxis(found, 0, 3).reshape(*q.shape[:3], n * BLOCK, width)
        if left:
            o = jnp.concatenate([of_queries(q[:, :, :, :left], 0), o], axis=3)
    return o.transpose(0, 3, 1, 2, 4).reshape(b, length, h, width)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    starts: jax.Array,
    kv_first: jax.Array | int = 0,
    kv_heads: int | None = None,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of new tokens over the cached positions up to their own.

    Args:
        q: [b, L, h, Q], rotated by RoPE; equal runs of its heads share a KV head.
        k, v: [n_layers, b, k, S, Q], the new positions already written. If Q is wider than in `q`, the rest is zeros.
        layer: index of the layer, a scalar.
        starts: [b], position of each sequence's first new token.
        kv_first, kv_heads: the first and the number of the KV heads that these query heads read; all by default.
        k_scale, v_scale: [n_layers, b, k, S], with int8 K and V. `k_scale` multiplies scores and `v_scale`
            probabilities, which is cheaper than scaling K and V.

    Returns:
        [b, L, h, Q].
    """
    b, length, h, d_head = q.shape
    kv_heads, span, width = kv_heads or k.shape[2], k.shape[3], k.shape[4]
    group, q = h // kv_heads, pad_width(q, width)
    q = (
        q.reshape(b, length, kv_heads, group, width)
        .transpose(0, 2, 3, 1, 4)
        .reshape(b, kv_heads, group * length, width)
    )
    reach = jnp.tile(starts[:, None] + jnp.arange(length), (1, group))  # [b, gL], last position that a query sees

    def dot(x, y, contract, **kwargs):
        """A product batched over b and k, in an order that needs no transposed copy of the cache."""
        return lax.dot_general(x, y, (((3,), (contract,)), ((0, 1), (0, 1))), precision=exact(q.dtype), **kwargs)

    def read(cache, first, size):
        """[b, k, size, Q]: `size` positions of the layer from `first` on, in q's dtype."""
        found = lax.dynamic_slice(cache, (layer, 0, kv_first, first, 0), (1, b, kv_heads, size, width))[0]
        return found.astype(q.dtype)

    def scaled(x, scales, first, size):
        """`x` [b, k, gL, size] float32, times the scales of these positions if there are any."""
        if scales is None:
            return x
        found = lax.dynamic_slice(scales, (layer, 0, kv_first, first), (1, b, kv_heads, size))
        return x * found[0][:, :, None].astype(jnp.float32)

    def values(p, first, size, **kwargs):
        """[b, k, gL, Q]: the values of these positions, weighted with `p` [b, k, gL, size]."""
        return dot(scaled(p, v_scale, first, size).astype(q.dtype), read(v, first, size), 2, **kwargs)

    def scores(first, size):
        """[b, k, gL, size] float32, -inf where the mask hides a position."""
        s = dot(q, read(k, first, size), 3, preferred_element_type=jnp.float32) / jnp.sqrt(jnp.float32(d_head))
        s = scaled(s, k_scale, first, size)
        positions = first + jnp.arange(size)
        seen = positions <= reach[..., None]
        return jnp.where(seen[:, None], s, -jnp.inf)

    def out(o):
        """[b, k, gL, Q] -> [b, L, h, Q]."""
        return (
            o.astype(q.dtype)
            .reshape(b, kv_heads, group, length, width)
            .transpose(0, 3, 1, 2, 4)
            .reshape(b, length, h, width)[..., :d_head]
        )

    size = block_size(length)
    if span <= 2 * size:
        return out(values(jax.nn.softmax(scores(0, span), axis=-1), 0, span))

    def block(i):
        return weighted(i * size, size)

    def weighted(first, size):
        """(largest score, sum of exponentials, weighted values) of `size` positions from `first` on."""
        s = scores(first, size)
        top = jnp.max(s, axis=-1)
        p = jnp.exp(s - jnp.maximum(top, -1e30)[..., None])
        return top, jnp.sum(p, axis=-1), values(p, first, size, preferred_element_type=jnp.float32)

    def add(i, running):
        top, total, acc = running
        block_top, block_total, block_acc = block(i)
        new_top = jnp.maximum(top, block_top)
        old, new = jnp.exp(top - new_top), jnp.exp(block_top - new_top)
        return new_top, total * old + block_total * new, acc * old[..., None] + block_acc * new[..., None]

    # the remainder is computed first, so that every block begins at a multiple of its size, as XLA:TPU needs
    n_whole, left = divmod(span, size)
    n_blocks = jnp.minimum(jnp.max(reach) // size + 1, n_whole)
    begin = weighted(n_whole * size, left) if left else block(0)  # block 0 holds position 0, which every token sees
    _, total, acc = lax.fori_loop(0 if left else 1, n_blocks, add, begin)
    return out(acc / total[..., None])
