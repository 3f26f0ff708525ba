"""The decoder's matmuls and norms under a layout.

A matmul leaves its result at the first step of the result's ladder, or runs one step of a ladder as a ring
(`partitioning.layouts.rings`). Norms need one number per token from other chips. The order of matmuls and norms in a
layer is in `models.decoder.decoder`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from toruslab.models.decoder.sequences import split_axes
from toruslab.partitioning.layouts.layout import Ladder, Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import follow, follow_together, local, on_a_chip
from toruslab.partitioning.layouts.precision import exact
from toruslab.partitioning.layouts.rings import after, looped_steps, multiply
from toruslab.partitioning.plan.tensors import norm_ladder

scope = jax.named_scope


def product(
    x: jax.Array, w: jax.Array, scale: jax.Array | None, layout: Layout, names: tuple[str, str, str]
) -> jax.Array:
    """`x @ w` at the first step of the result's ladder, or after the step that is looped with the matmul.

    Args:
        x: [T, n], at the last step of its ladder, or before the gather that is looped with the matmul.
        w: [n, m], placed likewise.
        scale: [m], whole on every chip: the scales of an int8 `w`, which multiply the result.
        names: the ladders of x, of w and of the result.
    """
    to = after(layout, names[2])
    if names[2] in looped_steps(layout):
        out = multiply(x, w, layout, names)
    else:
        with scope(names[2]):
            out = matmul("tn,nm->tm", x, w, to)
    with scope(names[2]):
        return scaled(out, scale, to)


def matmul(subscripts: str, x: jax.Array, w: jax.Array, ladder: Ladder) -> jax.Array:
    """`x @ w` at the first step of the result's ladder. Partial sums are not reduced."""
    at = ladder[0] if ladder and not on_a_chip() else None
    return jnp.einsum(subscripts, x, w.astype(x.dtype), precision=exact(x.dtype), out_sharding=at)


def scaled(out: jax.Array, scale: jax.Array | None, ladder: Ladder) -> jax.Array:
    """`out` [T, m], at the first step of its ladder, times `scale` [m] if there is one."""
    if scale is None:
        return out
    if not ladder:
        return out * scale
    # JAX's type for a factor of partial sums: the same on all chips that hold terms of them
    return out * jax.sharding.reshard(scale, P(entries(ladder[0])[1], reduced=ladder[0].unreduced))


def rms_norm(x: jax.Array, scale: jax.Array, ladder: Ladder, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension.

    The sum of squares is one all-reduce of T numbers over the axes that E is split over, if any.

    Args:
        x: [T, E], at the last step of its ladder.
        scale: [E], whole on every chip.
    """
    e = scale.shape[-1]
    at = ladder[-1:]
    stat = norm_ladder(at[0]) if at else ()
    across = (P(None), P(entries(at[0])[1])) if split_axes(at, 1) else (P(None),) if at else ()

    def scaled(x, squares, scale):
        return (x * (lax.rsqrt(squares / e + eps)[:, None] * scale.astype(jnp.float32)).astype(x.dtype),)

    with scope("norm"):
        (squares,) = local(lambda x: (jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1),), [at], [stat])(x)
        return local(scaled, [at, stat, across], [at])(x, follow(squares, stat), follow(scale, across))[0]


def normalise(x: jax.Array, scale: jax.Array, layout: Layout, eps: float) -> tuple[jax.Array, jax.Array | None]:
    """The normalised input of a block's matmuls, [T, E] at the last step of `layout.x`.

    With `layout.together`, the mean square travels with the results of the matmuls. The input is then only multiplied
    by `scale`, and each chip's part [T] of the mean square is returned beside it. The mean square is one factor per
    token, so `sums` can apply it after the matmuls.
    """
    if not layout.together:
        return rms_norm(x, scale, layout.x, eps), None
    at, e = layout.x[-1], scale.shape[-1]
    across = (P(None), P(entries(at)[1]))

    def scaled(y, scale):
        return y * scale, jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-1) / e

    with scope("norm"):
        return local(scaled, [at, across], [at, norm_ladder(at)])(x, follow(scale, across))


def sums(made: Sequence[jax.Array], squares: jax.Array | None, layout: Layout, eps: float) -> list[jax.Array]:
    """The results of the matmuls of a block's input, each at the last step of its ladder.

    Args:
        made: the hidden units and, where the block attends, K and V, as `product` leaves them.
        squares: the mean squares of `normalise`. They are summed in the same all-reduce as `made`, and each token of
            `made` is multiplied by its factor.
    """
    scopes = ("h", "kv")[: len(made)]
    ladders = [after(layout, name) for name in scopes]
    if squares is not None:
        stat = norm_ladder(layout.x[-1])
        with scope("h"):
            *made, squares = follow_together([*made, squares], [*(ladder[:2] for ladder in ladders), stat])
            made = [_normalised(a, squares, ladder[1], eps) for a, ladder in zip(made, ladders, strict=True)]
            ladders = [ladder[1:] for ladder in ladders]
    found = []
    for name, array, ladder in zip(scopes, made, ladders, strict=True):
        with scope(name):
            found.append(follow(array, ladder))
    return found


def _normalised(x: jax.Array, squares: jax.Array, at: P, eps: float) -> jax.Array:
    """x / sqrt(mean square + eps) for `x` [T, ...] placed as `at` says; the mean `squares` [T] are whole."""
    tokens = P(entries(at)[0])
    squares = follow(squares, (P(None), tokens) if axes_of(tokens[0]) else (tokens,))
    return local(lambda x, s: (x * lax.rsqrt(s + eps).astype(x.dtype)[:, None],), [at, tokens], [at])(x, squares)[0]
