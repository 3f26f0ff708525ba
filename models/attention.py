"""Attention of one layer on one chip's shards: RoPE, the causal mask by position, and the softmax.

Works on whatever rows and heads a chip holds; never communicates. Above `BLOCK` cached positions the softmax runs
over blocks of positions with a running maximum and sum, so that the scores of a long prefill never stand in memory
whole.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 512
"""Cached positions per block; up to twice as many are done in one piece."""


def rope_tables(positions: jax.Array, d_head: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE for positions [...]: each [..., Q/2], float32."""
    frequencies = theta ** (-jnp.arange(d_head // 2, dtype=jnp.float32) * 2 / d_head)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns [..., heads, Q] by the angles [..., Q/2]: dimension i with dimension i + Q/2, as Llama does."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, starts: jax.Array, span: int) -> jax.Array:
    """Softmax attention of new tokens over the cached positions up to each one's own.

    Args:
        q: [b, L, h, Q], turned by RoPE; h is a multiple of k's heads, which are shared by equal runs of q heads.
        k, v: [n_layers, b, k, S, Q], the new positions already written.
        layer: index of the layer, a scalar.
        starts: [b], position of each row's first new token.
        span: positions at and beyond it are known to be out of reach, so they are not read; static, at most S.

    Returns:
        [b, L, h, Q].
    """
    b, length, h, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, length, kv_heads, h // kv_heads, width)
    reach = starts[:, None] + jnp.arange(length)  # bL, the last position that each token sees

    def scores(first, size):
        """[b, k, g, L, size], float32, and the values of those positions [b, k, size, Q]."""
        at, shape = (layer, 0, 0, first, 0), (1, b, kv_heads, size, width)
        keys, values = lax.dynamic_slice(k, at, shape)[0], lax.dynamic_slice(v, at, shape)[0]
        s = jnp.einsum("blkgq,bksq->bkgls", q, keys, preferred_element_type=jnp.float32)
        return s / jnp.sqrt(jnp.float32(width)), first + jnp.arange(size), values

    def mask(s, seen):
        return jnp.where(seen[:, None, None], s, -jnp.inf)

    if span <= 2 * BLOCK:
        s, positions, values = scores(0, span)
        p = jax.nn.softmax(mask(s, positions <= reach[..., None]), axis=-1)
        o = jnp.einsum("bkgls,bksq->blkgq", p.astype(values.dtype), values)
        return o.reshape(b, length, h, width)

    def block(i):
        """Exponentials of block i, by their own maximum: (maximum, sum, weighted values)."""
        first = jnp.minimum(i * BLOCK, span - BLOCK)  # the last block slides back; what it has seen is masked
        s, positions, values = scores(first, BLOCK)
        s = mask(s, (positions <= reach[..., None]) & (positions >= i * BLOCK))
        top = jnp.max(s, axis=-1)
        p = jnp.exp(s - jnp.maximum(top, -1e30)[..., None])
        weighted = jnp.einsum("bkgls,bksq->bkglq", p.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return top, jnp.sum(p, axis=-1), weighted

    def add(i, running):
        top, total, acc = running
        block_top, block_total, block_acc = block(i)
        new_top = jnp.maximum(top, block_top)
        old, new = jnp.exp(top - new_top), jnp.exp(block_top - new_top)
        return new_top, total * old + block_total * new, acc * old[..., None] + block_acc * new[..., None]

    n_blocks = jnp.minimum(jnp.max(reach) // BLOCK + 1, -(-span // BLOCK))
    _, total, acc = lax.fori_loop(1, n_blocks, add, block(0))  # block 0 holds position 0, which every token sees
    o = (acc / total[..., None]).astype(q.dtype)
    return jnp.moveaxis(o, 3, 1).reshape(b, length, h, width)
