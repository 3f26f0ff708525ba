"""The decoder in Flax NNX: one forward body for every layout.

The body walks each tensor down the ladder that the layout gives for it (`follow`), multiplies, and does everything
else on each chip's own shards (`local`). It never asks which layout it runs; `partitioning.plan.plan` lists the same
ladders under the same scopes. The trunk is flat, [T, features] with T = B*L, batch-major. State goes in and comes
out: the cache is an argument and a result.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache
from toruslab.models.decoder.sequences import Aligned, Sequences, batch_ladder, index, place, split_axes
from toruslab.partitioning.layouts.layout import Axes, Ladder, Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import follow, follow_together, local, on_a_chip
from toruslab.partitioning.layouts.precision import exact
from toruslab.partitioning.layouts.rings import after, before, loops, multiply
from toruslab.partitioning.plan.plan import norm_ladder

Initializer = Callable[..., jax.Array]
scope = jax.named_scope
GATES = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
"""Of a gated MLP; GELU in its tanh form."""


class Tokens(NamedTuple):
    """What a pass is about, as integer arrays (or their shapes), whole on every chip.

    `ids` [B, L], `starts` [B] (cached positions of each row), `lengths` [B] (new tokens of each row; the rest of
    `ids` is padding).
    """

    ids: Any
    starts: Any
    lengths: Any


class ResidualBlock(nnx.Module):
    """Norm, input projection, attention and/or MLP, output projection; parameters of all layers stacked.

    `norm` [n, E], `w_in` [n, E, C], `w_kv` [n, E, D], `w_out` [n, G, E]; where these are int8, also their scales
    (`models.decoder.quantise`), `w_in_scale` [n, C] and so on.
    """

    def __init__(self, config: ModelConfig, *, attention: bool, mlp: bool, dtype, int8: bool, rngs: nnx.Rngs):
        n, e, q = config.n_layers, config.d_model, config.d_head
        self.config, self.has_mlp, self.has_attention = config, mlp, attention
        groups = config.n_heads if attention else config.mlp_groups
        f = config.d_ff // config.mlp_groups if mlp else 0
        c = groups * ((q if attention else 0) + (2 if config.gated else 1) * f)
        g = groups * ((q if attention else 0) + f)
        weight = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        self.norm = nnx.Param(jnp.ones((n, e), dtype))

        def matrix(*shape: int) -> tuple[nnx.Param, nnx.Param | None]:
            """A matrix and, if int8, its scales: places for what `quantise` makes."""
            if not int8:
                return nnx.Param(weight(rngs.params(), shape, dtype)), None
            return nnx.Param(jnp.zeros(shape, jnp.int8)), nnx.Param(jnp.ones((n, shape[-1]), dtype))

        self.w_in, self.w_in_scale = matrix(n, e, c)
        if attention:
            self.w_kv, self.w_kv_scale = matrix(n, e, 2 * config.n_kv_heads * q)
        self.w_out, self.w_out_scale = matrix(n, g, e)

    def gathered(self, layout: Layout) -> dict[str, jax.Array]:
        """The layer's weights, as the matmuls take them."""
        names = [name for name in ("w_in", "w_kv", "w_out") if hasattr(self, name)]
        return {name: self._gather(getattr(self, name)[...], name, layout) for name in names}

    def _gather(self, weight: jax.Array, name: str, layout: Layout) -> jax.Array:
        with scope(name):
            return follow(weight, before(layout, name))

    def _scale(self, name: str) -> jax.Array | None:
        """Of a matrix of int8."""
        found = getattr(self, name + "_scale")
        return None if found is None else found[...]

    def __call__(
        self,
        x: jax.Array,
        cache: Cache,
        layer: jax.Array,
        rows: Sequences,
        layout: Layout,
        held: Mapping[str, jax.Array] | None = None,
        regather: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """One layer of the block on the residual stream `x` = TE, as `layout.x` begins.

        `held`: its weights, where they were `gathered` before; `regather`: they are gathered again for gradients.
        """
        config = self.config

        def times(y: jax.Array, name: str, names: tuple[str, str, str]) -> jax.Array:
            def run(y: jax.Array, weight: jax.Array) -> jax.Array:
                ready = held[name] if held else self._gather(weight, name, layout)
                return product(y, ready, self._scale(name), layout, names)

            # of a matmul run again from its inputs, gradients need the gathered weight only
            return (jax.checkpoint(run, prevent_cse=False) if regather else run)(y, getattr(self, name)[...])

        with scope("x"):
            y = follow(x, layout.x)
        y, squares = normalise(y, self.norm[...], layout, config.norm_eps)
        inputs = [(y, "w_in", ("x", "w_in", "h"))]
        if self.has_attention:
            with scope("kv"):
                inputs.append((follow(y, layout.x_kv), "w_kv", ("x_kv", "w_kv", "kv")))
        made = [times(*one) for one in inputs]
        h, *kvs = sums(made, squares, layout, config.norm_eps)

        parts = local(self._split, [layout.h], [layout.q] * self.has_attention + [layout.h[-1:]] * self.has_mlp)(h)
        if self.has_attention:
            (kv,) = kvs
            with scope("q"):
                q = follow(parts[0], layout.q)
            with scope("attend"):
                o, cache = rows.attend(q, kv, cache, layer, config, layout)
            with scope("o"):
                parts = (follow(o, layout.o), *parts[1:])
        ins = [layout.o] * self.has_attention + [layout.h[-1:]] * self.has_mlp
        (g,) = local(self._join, ins, [layout.g])(*parts)

        with scope("g"):
            g = follow(g, before(layout, "g"))
        out = times(g, "w_out", ("g", "w_out", "out"))
        with scope("out"):
            return x + follow(out, after(layout, "out")), cache

    def _split(self, h: jax.Array) -> tuple[jax.Array, ...]:
        """[t, groups * width] -> Q [t, heads, Q] and the MLP's hidden units [t, groups, F/groups], as there are."""
        config = self.config
        q = config.d_head if self.has_attention else 0
        f = config.d_ff // config.mlp_groups if self.has_mlp else 0
        h = h.reshape(h.shape[0], -1, q + (2 if config.gated else 1) * f)
        parts = (h[..., :q],) if self.has_attention else ()
        if self.has_mlp:
            up = h[..., -f:]
            hidden = GATES[config.mlp](h[..., q : q + f]) * up if config.gated else jax.nn.gelu(up)
            parts += (hidden.reshape(h.shape[0], -1),)
        return parts

    def _join(self, *parts: jax.Array) -> tuple[jax.Array]:
        """The inverse of `_split`: attention's output and the hidden units, group by group -> [t, groups * width]."""
        t = parts[0].shape[0]
        groups = parts[0].shape[1] if self.has_attention else 1
        return (jnp.concatenate([p.reshape(t, groups, -1) for p in parts], axis=-1).reshape(t, -1),)


class Decoder(nnx.Module):
    """A PaLM-style decoder (or Llama-style, by its `ModelConfig`), Pope et al. 2022, section 2.

    Args:
        config: the sizes.
        dtype: of parameters and activations.
        int8: keep the matrices of the blocks as int8 with scales (placeholders: `models.decoder.parameters` fills them).
        first, last: whether it has the model's beginning, and its end; a stage of a pipeline may not.
        rngs: for the initial weights; `nnx.eval_shape` around the constructor allocates nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        int8: bool = False,
        first: bool = True,
        last: bool = True,
        rngs: nnx.Rngs,
    ):
        self.config = config
        table = nnx.initializers.normal(stddev=config.d_model**-0.5)
        if first or (last and config.tied):
            self.table = nnx.Param(table(rngs.params(), (config.vocab_rows, config.d_model), dtype))
        if config.block == "parallel":
            self.layer = ResidualBlock(config, attention=True, mlp=True, dtype=dtype, int8=int8, rngs=rngs)
        else:
            self.attention = ResidualBlock(config, attention=True, mlp=False, dtype=dtype, int8=int8, rngs=rngs)
            self.mlp = ResidualBlock(config, attention=False, mlp=True, dtype=dtype, int8=int8, rngs=rngs)
        if last:
            self.final_norm = nnx.Param(jnp.ones((config.d_model,), dtype))
        if last and not config.tied:
            self.unembed = nnx.Param(table(rngs.params(), (config.vocab_rows, config.d_model), dtype))

    def __call__(
        self, tokens: Tokens, cache: Cache, layout: Layout, *, all_logits: bool = False
    ) -> tuple[jax.Array, Cache]:
        """One pass over new tokens: prefill, a chunk of one, or a decode step.

        Args:
            tokens: what to run; rows may differ in start and length. `starts + L`, padding included, must not
                exceed the cache's capacity: who makes the tokens checks it (`models.programs.generate` does), a traced program
                cannot.
            cache: in the layout's cache spec; donate it.
            layout: already made for the ambient mesh (`Layout.on`).
            all_logits: logits of every token, padding included, instead of each row's last.

        Returns:
            Logits [R, V'], as `layout.logits` ends, R = B or B*L; -inf past the vocabulary. And the cache.
        """
        length = tokens.ids.shape[1]
        x = self.embed(tokens.ids.reshape(-1), layout)
        rows = Aligned.of(tokens.starts, length, self.config, layout)
        x, cache = self.through_layers(x, cache, rows, layout)

        def last(x):
            at = layout.rows[:1]
            by_row = batch_ladder(layout, layout.rows[0]) if at else ()
            return local(_last_of_rows, [at, by_row], [at])(x, follow(tokens.lengths, by_row))[0]

        return self.logits(x, layout, None if all_logits else last), cache

    def embed(self, ids: jax.Array, layout: Layout) -> jax.Array:
        """The residual stream [T, E], as `layout.embed` ends, of `ids` [T], whole on every chip."""
        with scope("embed"):
            ids = follow(ids, layout.tokens)
            table = place(layout, layout.table)
            look_up = functools.partial(_look_up, split_axes(table, 0), self.config.embed_scale)
            (x,) = local(look_up, [table, layout.tokens], [layout.embed])(self.table[...], ids)
            return follow(x, layout.embed)

    def through_layers(
        self, x: jax.Array, cache: Cache, rows: Sequences, layout: Layout, *, remat: str = "none"
    ) -> tuple[jax.Array, Cache]:
        """All layers on the residual stream; `remat`: what is worked out again for gradients (`dataflow.REMAT`)."""
        config = self.config
        blocks = ("layer",) if config.block == "parallel" else ("attention", "mlp")
        graphs, params = nnx.split({name: getattr(self, name) for name in blocks})

        def gathered(layer) -> dict[str, dict[str, jax.Array]]:
            """The weights of a layer by block, of a layout that gathers them ahead."""
            if not layout.prefetch:
                return {}
            of_layer = jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, layer, 0, keepdims=False), params)
            modules, found = nnx.merge(graphs, of_layer), {}
            for name in blocks:
                with scope(name):
                    found[name] = modules[name].gathered(layout)
            return found

        def body(carry, at_layer):
            x, cache, held = carry
            layer, of_layer = at_layer
            modules = nnx.merge(graphs, of_layer)
            coming = gathered((layer + 1) % config.n_layers)  # the last layer's are not needed
            for name in blocks:
                with scope(name):
                    x, cache = modules[name](x, cache, layer, rows, layout, held.get(name), remat == "weights")
            return (x, cache, coming), None

        if remat == "layer":
            body = jax.checkpoint(body, prevent_cse=False)  # a loop's body keeps the two runs apart by itself
        start = (x, cache, gathered(jnp.int32(0)))
        (x, cache, _), _ = lax.scan(body, start, (jnp.arange(config.n_layers), params))
        return x, cache

    def logits(self, x: jax.Array, layout: Layout, pick: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """[R, V'], as `layout.logits` ends, of the residual stream [T, E], or of the rows [R, E] that `pick` takes."""
        config = self.config
        with scope("rows"):
            x = follow(pick(x) if pick else x, layout.rows)
        x = rms_norm(x, self.final_norm[...], layout.rows, config.norm_eps)
        with scope("logits"):
            table = self.table[...] if config.tied else self.unembed[...]
            logits = follow(matmul("te,ve->tv", x, table, layout.logits), layout.logits)
            at = layout.logits[-1:]
            mask = functools.partial(_mask_vocab, config.vocab, split_axes(at, 1))
            return local(mask, [at], [at])(logits)[0]


def product(
    x: jax.Array, w: jax.Array, scale: jax.Array | None, layout: Layout, names: tuple[str, str, str]
) -> jax.Array:
    """`x @ w`, as the ladder of what comes out begins, or past the step of it that is looped with the matmul.

    Args:
        x: [T, n], where its ladder ends, but for a looped gather.
        w: [n, m], the same; `scale` [m], whole on every chip, belongs to a `w` of int8: it scales what comes out.
        names: of the ladders of x, of w and of what comes out.
    """
    to = after(layout, names[2])
    if names[2] in loops(layout):
        out = multiply(x, w, layout, names)
    else:
        with scope(names[2]):
            out = matmul("tn,nm->tm", x, w, to)
    with scope(names[2]):
        return scaled(out, scale, to)


def matmul(subscripts: str, x: jax.Array, w: jax.Array, ladder: Ladder) -> jax.Array:
    """`x @ w`, left as the ladder begins: partial sums stay where they are."""
    at = ladder[0] if ladder and not on_a_chip() else None
    return jnp.einsum(subscripts, x, w.astype(x.dtype), precision=exact(x.dtype), out_sharding=at)


def scaled(out: jax.Array, scale: jax.Array | None, ladder: Ladder) -> jax.Array:
    """`out` [T, m], as the ladder begins, times `scale` [m], if there is one."""
    if scale is None:
        return out
    if not ladder:
        return out * scale
    # JAX's type for a factor of partial sums: the same on all chips that hold terms of them
    return out * jax.sharding.reshard(scale, P(entries(ladder[0])[1], reduced=ladder[0].unreduced))


def rms_norm(x: jax.Array, scale: jax.Array, ladder: Ladder, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, of x = TE as the ladder ends; scale [E] is whole.

    The sum of squares is one all-reduce of T numbers over the axes that E is split over, if any.
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
    """The input of a block's matmuls, TE as `layout.x` ends, normalised.

    Where its mean square travels with what the matmuls make (`layout.together`), it is only multiplied by `scale`, and
    the chips' parts of it [T] come beside it: the mean square is a factor of each row, which may follow later.
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
    """What the matmuls made of a block's input, hidden units and (where there are any) K and V, down their ladders.

    With `squares` of `normalise`, in one all-reduce, and each row times its factor.
    """
    scopes = ("h", "kv")[: len(made)]
    ladders = [after(layout, name) for name in scopes]
    if squares is not None:
        stat = norm_ladder(layout.x[-1])
        with scope("h"):
            *made, squares = follow_together([*made, squares], [*(ladder[:2] for ladder in ladders), stat])
            made = [_by_row(a, squares, ladder[1], eps) for a, ladder in zip(made, ladders, strict=True)]
            ladders = [ladder[1:] for ladder in ladders]
    found = []
    for name, array, ladder in zip(scopes, made, ladders, strict=True):
        with scope(name):
            found.append(follow(array, ladder))
    return found


def _by_row(x: jax.Array, squares: jax.Array, at: P, eps: float) -> jax.Array:
    """x / sqrt(mean square + eps), of `x` [T, ...] placed as `at` says; `squares`, the means, are whole."""
    rows = P(entries(at)[0])
    squares = follow(squares, (P(None), rows) if axes_of(rows[0]) else (rows,))
    return local(lambda x, s: (x * lax.rsqrt(s + eps).astype(x.dtype)[:, None],), [at, rows], [at])(x, squares)[0]


def _look_up(axes: Axes, scale: float, table: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
    """Sequences of the table times `scale`, zero where this chip's part does not hold them."""
    if axes:
        rows = ids - index(axes) * table.shape[0]
        here = (rows >= 0) & (rows < table.shape[0])
        found = jnp.where(here[:, None], table[jnp.clip(rows, 0, table.shape[0] - 1)], 0)
    else:
        found = table[ids]
    return (found if scale == 1.0 else found * scale,)


def _last_of_rows(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
    """[t, e] -> [b, e]: each row's last token that is not padding."""
    b = lengths.shape[0]
    return (x.reshape(b, -1, x.shape[-1])[jnp.arange(b), lengths - 1],)


def _mask_vocab(vocab: int, axes: Axes, logits: jax.Array) -> tuple[jax.Array]:
    """-inf in the columns that pad the vocabulary."""
    columns = index(axes) * logits.shape[1] + jnp.arange(logits.shape[1])
    return (jnp.where(columns < vocab, logits, -jnp.inf),)
