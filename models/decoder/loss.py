"""The loss of training over a sharded vocabulary: no chip ever has all the logits of a token.

Runs on one chip's shards (`partitioning.layouts.moves.on_a_chip`), or on global arrays for a layout without
constraints.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from toruslab.models.decoder.sequences import batch_ladder, index, split_axes
from toruslab.partitioning.layouts.layout import Axes, Layout
from toruslab.partitioning.layouts.moves import follow
from toruslab.partitioning.plan.tensors import norm_ladder


def cross_entropy(logits: jax.Array, targets: jax.Array, layout: Layout) -> jax.Array:
    """A chip's part of the sum over tokens of -log softmax(logits)[target], in nats.

    Args:
        logits: [T, V'] at the last step of `layout.logits`, -inf past the vocabulary.
        targets: [T] ids, whole on every chip.

    Returns:
        A float32 scalar. The sum over the chips that hold the columns of the same tokens is the loss of these tokens.
        The gradient needs nothing from other chips, because each token's maximum and sum are kept.
    """
    if layout.logits:
        targets = follow(targets, batch_ladder(layout, layout.logits[-1]))
    return _cross_entropy(logits, targets, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits: jax.Array, targets: jax.Array, layout: Layout) -> jax.Array:
    return _forward(logits, targets, layout)[0]


def _forward(logits: jax.Array, targets: jax.Array, layout: Layout):
    axes = split_axes(layout.logits, 1)
    x = logits.astype(jnp.float32)
    with jax.named_scope("loss"):
        top = jnp.max(x, axis=-1)
        top = lax.pmax(top, axes) if axes else top
        total = jnp.sum(jnp.exp(x - top[:, None]), axis=-1)
        column = _columns(targets, logits, axes)
        here = (column >= 0) & (column < x.shape[1])
        own = jnp.take_along_axis(x, jnp.clip(column, 0, x.shape[1] - 1)[:, None], axis=1)[:, 0]
        own = jnp.where(here, own - top, 0)
        total = follow(total, norm_ladder(layout.logits[-1]) if axes else ())
        columns = lax.axis_size(axes) if axes else 1
        return jnp.sum(jnp.log(total)) / columns - jnp.sum(own), (logits, column, top, total)


def _backward(layout: Layout, kept, by: jax.Array):
    logits, column, top, total = kept
    with jax.named_scope("loss"):
        p = jnp.exp(logits.astype(jnp.float32) - top[:, None]) / total[:, None]
        p -= (jnp.arange(logits.shape[1]) == column[:, None]).astype(p.dtype)
        return (p * by).astype(logits.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _columns(targets: jax.Array, logits: jax.Array, axes: Axes) -> jax.Array:
    """The targets' columns counted from this chip's first; they may be on another chip."""
    return targets - index(axes) * logits.shape[1]
