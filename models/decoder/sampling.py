"""Sampling over a sharded vocabulary: greedy, temperature, top-k, top-p. Logits are never gathered.

Random numbers depend only on (seed, request, position, token id), and not on the rest of the batch, the layout or the
mesh. One all-gather of every chip's best value and id finds the likeliest token. A top-k or top-p limit is found by a
16-way search on the logits' bit patterns: eight all-reduces of 15 R numbers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from toruslab.models.decoder.sequences import batch_ladder, split_axes
from toruslab.partitioning.layouts.layout import Axes, Layout
from toruslab.partitioning.layouts.moves import follow, local


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens and those that tie with the k-th; 0 means all.
        top_p: sample from the likeliest tokens that together reach probability p (after top_k); 1 means all.
        seed: of all random streams.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all) or a positive integer")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in 0..2**32-1")

    def __call__(self, logits: jax.Array, requests: jax.Array, positions: jax.Array, layout: Layout) -> jax.Array:
        """The next token of each of R sequences.

        Args:
            logits: [R, V'] at the last step of `layout.logits`.
            requests, positions: [R] integers, whole on every chip, that select the random numbers.

        Returns:
            [R] int32, whole on every chip.
        """
        at = layout.logits[-1:]
        axes = split_axes(at, 1)
        by_sequence = batch_ladder(layout, at[0]) if at else ()

        def choose(logits, requests, positions):
            return (self._choose(logits.astype(jnp.float32), requests, positions, axes),)

        with jax.named_scope("sample"):
            requests, positions = follow(requests, by_sequence), follow(positions, by_sequence)
            (ids,) = local(choose, [at, by_sequence, by_sequence], [layout.ids])(logits, requests, positions)
            return follow(ids, layout.ids)

    def _choose(self, logits: jax.Array, requests: jax.Array, positions: jax.Array, axes: Axes) -> jax.Array:
        """The next token of each sequence of a chip, from the chip's columns of the logits."""
        columns = jnp.arange(logits.shape[1], dtype=jnp.int32)
        columns += (lax.axis_index(axes) * logits.shape[1]).astype(jnp.int32) if axes else 0
        if self.temperature:
            logits = (logits - _max(jnp.max(logits, axis=1), axes)[:, None]) / self.temperature
            keys = _ordered(logits)
            if self.top_k:
                least = _threshold(keys, jnp.ones_like(logits), jnp.float32(self.top_k), axes)
                logits = jnp.where(keys >= least[:, None], logits, -jnp.inf)
            if self.top_p < 1:
                weights = jnp.exp(logits)
                least = _threshold(keys, weights, self.top_p * _sum(jnp.sum(weights, axis=1), axes), axes)
                logits = jnp.where(keys >= least[:, None], logits, -jnp.inf)
            logits += jax.vmap(jax.vmap(self._noise, (None, None, 0)), (0, 0, None))(requests, positions, columns)
        best = jnp.argmax(logits, axis=1)
        top, ids = jnp.max(logits, axis=1), columns[best]
        if axes:  # one gather of every chip's best value and id
            pairs = jnp.stack([lax.bitcast_convert_type(top, jnp.int32), ids])
            pairs = lax.all_gather(pairs, axes, to="invarying")  # n2R
            tops, found = lax.bitcast_convert_type(pairs[:, 0], jnp.float32), pairs[:, 1]
            ids = jnp.take_along_axis(found, jnp.argmax(tops, axis=0)[None], axis=0)[0]
        return ids

    def _noise(self, request: jax.Array, position: jax.Array, token: jax.Array) -> jax.Array:
        """Gumbel noise of one token id. The id with the largest logit plus noise is a draw from the softmax."""
        key = jax.random.key(self.seed)
        for number in (request, position, token):
            key = jax.random.fold_in(key, number)
        return jax.random.gumbel(key)


def _max(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.pmax(x, axes) if axes else x


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return lax.psum(x, axes) if axes else x


def _ordered(x: jax.Array) -> jax.Array:
    """Float32 -> uint32 that sort in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: jax.Array, weights: jax.Array, limit: jax.Array, axes: Axes) -> jax.Array:
    """For each sequence the largest t such that the weights of all keys >= t reach the limit.

    Args:
        keys, weights: [r, v], this chip's columns; `axes` split the vocabulary.
        limit: a number, or [r].

    Returns:
        [r] uint32.
    """
    digits = jnp.arange(1, 16, dtype=jnp.uint32)
    limit = jnp.broadcast_to(limit, keys.shape[:1])

    def narrow(i, least):
        shift = 28 - 4 * i.astype(jnp.uint32)
        tries = least[:, None] + (digits << shift)
        reached = jnp.sum(jnp.where(keys[:, None] >= tries[:, :, None], weights[:, None], 0), axis=-1)
        digit = jnp.sum(_sum(reached, axes) >= limit[:, None], axis=1)
        return least + (digit.astype(jnp.uint32) << shift)

    return lax.fori_loop(0, 8, narrow, _sum(keys[:, 0] * 0, axes))  # a zero for each sequence
