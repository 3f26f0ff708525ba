"""The decoder in Flax NNX: one forward body for every layout.

Each tensor follows the ladder that the layout lists for it (`follow`). Matmuls and norms are in
`models.decoder.matmuls`; everything else runs on each chip's own shards (`local`). The body never asks which layout it
runs. `partitioning.plan.plan` lists the same ladders under the same scopes. Activations are flat, [T, features] with
T = B*L, batch-major. The cache is an argument and a result.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache
from toruslab.models.decoder.matmuls import matmul, normalise, product, rms_norm, scope, sums
from toruslab.models.decoder.sequences import Aligned, Sequences, batch_ladder, index, place, split_axes
from toruslab.partitioning.layouts.layout import WEIGHTS, Axes, Layout
from toruslab.partitioning.layouts.moves import follow, local
from toruslab.partitioning.layouts.rings import after, before

GATES = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
"""The activation functions of gated MLPs. GELU is in its tanh form."""


class Tokens(NamedTuple):
    """The tokens of a pass: integer arrays (or their shapes), whole on every chip.

    `ids` [B, L]; `starts` [B], the cached positions of each sequence; `lengths` [B], the new tokens of each sequence.
    The rest of `ids` is padding.
    """

    ids: Any
    starts: Any
    lengths: Any


class ResidualBlock(nnx.Module):
    """Norm, input projection, attention or MLP or both, output projection, added to the residual stream.

    The parameters of all n layers are stacked: `norm` [n, E], `w_in` [n, E, C], `w_kv` [n, E, D], `w_out` [n, G, E].
    An int8 matrix has scales (`models.decoder.quantise`): `w_in_scale` [n, C] and so on.
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
            """A matrix and, with `int8`, its scales: placeholders for the results of `quantise`."""
            if not int8:
                return nnx.Param(weight(rngs.params(), shape, dtype)), None
            return nnx.Param(jnp.zeros(shape, jnp.int8)), nnx.Param(jnp.ones((n, shape[-1]), dtype))

        self.w_in, self.w_in_scale = matrix(n, e, c)
        if attention:
            self.w_kv, self.w_kv_scale = matrix(n, e, 2 * config.n_kv_heads * q)
        self.w_out, self.w_out_scale = matrix(n, g, e)

    def gathered(self, layout: Layout) -> dict[str, jax.Array]:
        """The layer's weights, gathered for the matmuls."""
        names = [name for name in WEIGHTS if hasattr(self, name)]
        return {name: self._gather(getattr(self, name)[...], name, layout) for name in names}

    def _gather(self, weight: jax.Array, name: str, layout: Layout) -> jax.Array:
        with scope(name):
            return follow(weight, before(layout, name))

    def _scale(self, name: str) -> jax.Array | None:
        """The scales of an int8 matrix; None for a float matrix."""
        found = getattr(self, name + "_scale")
        return None if found is None else found[...]

    def __call__(
        self,
        x: jax.Array,
        cache: Cache,
        layer: jax.Array,
        sequences: Sequences,
        layout: Layout,
        held: Mapping[str, jax.Array] | None = None,
        regather: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """One layer of the block.

        Args:
            x: the residual stream [T, E], at the first step of `layout.x`.
            held: the layer's weights, if `gathered` has gathered them already.
            regather: gather the weights again for gradients, instead of keeping them.

        Returns:
            The residual stream, placed as before, and the cache.
        """
        config = self.config

        def times(y: jax.Array, name: str, names: tuple[str, str, str]) -> jax.Array:
            def run(y: jax.Array, weight: jax.Array) -> jax.Array:
                ready = held[name] if held else self._gather(weight, name, layout)
                return product(y, ready, self._scale(name), layout, names)

            # gradients need the gathered weight, not the product, so only the gather is recomputed
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
                o, cache = sequences.attend(q, kv, cache, layer, config, layout)
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
        """[t, groups * width] -> Q [t, heads, Q], if it attends, and the hidden units [t, F], if it has an MLP."""
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
        """Attention's output and the hidden units -> [t, groups * width], interleaved by group as in `_split`."""
        t = parts[0].shape[0]
        groups = parts[0].shape[1] if self.has_attention else 1
        return (jnp.concatenate([p.reshape(t, groups, -1) for p in parts], axis=-1).reshape(t, -1),)


class Decoder(nnx.Module):
    """A PaLM-style decoder (or Llama-style, by its `ModelConfig`), Pope et al. 2022, section 2.

    Args:
        config: the sizes.
        dtype: of parameters and activations.
        int8: make the matrices of the blocks int8, with scales. They are placeholders until `models.decoder.parameters`
            fills them.
        first, last: whether it has the model's embedding, and its final norm and unembedding; a stage of a pipeline may
            lack them.
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
            tokens: what to run; sequences may differ in start and length. `starts + L`, padding included, must not
                exceed the cache's capacity. A traced program cannot check this, so the caller does
                (`models.programs.generate`).
            cache: in the layout's cache spec; donate it.
            layout: made for the ambient mesh (`Layout.on`).
            all_logits: logits of every token, padding included, instead of each sequence's last token.

        Returns:
            Logits [R, V'] at the last step of `layout.logits`, with R = B or B*L and -inf past the vocabulary; and the
            cache.
        """
        length = tokens.ids.shape[1]
        x = self.embed(tokens.ids.reshape(-1), layout)
        sequences = Aligned.of(tokens.starts, length, self.config, layout)
        x, cache = self.through_layers(x, cache, sequences, layout)

        def last(x):
            at = layout.rows[:1]
            by_sequence = batch_ladder(layout, layout.rows[0]) if at else ()
            return local(_last_tokens, [at, by_sequence], [at])(x, follow(tokens.lengths, by_sequence))[0]

        return self.logits(x, layout, None if all_logits else last), cache

    def embed(self, ids: jax.Array, layout: Layout) -> jax.Array:
        """`ids` [T], whole on every chip, -> the residual stream [T, E] at the last step of `layout.embed`."""
        with scope("embed"):
            ids = follow(ids, layout.tokens)
            table = place(layout, layout.table)
            look_up = functools.partial(_look_up, split_axes(table, 0), self.config.embed_scale)
            (x,) = local(look_up, [table, layout.tokens], [layout.embed])(self.table[...], ids)
            return follow(x, layout.embed)

    def through_layers(
        self, x: jax.Array, cache: Cache, sequences: Sequences, layout: Layout, *, remat: str = "none"
    ) -> tuple[jax.Array, Cache]:
        """All layers on the residual stream; `remat`: what gradients recompute (`partitioning.plan.plan.REMAT`)."""
        config = self.config
        blocks = ("layer",) if config.block == "parallel" else ("attention", "mlp")
        graphs, params = nnx.split({name: getattr(self, name) for name in blocks})

        def gathered(layer) -> dict[str, dict[str, jax.Array]]:
            """A layer's gathered weights by block, if the layout gathers a layer ahead; else none."""
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
            coming = gathered((layer + 1) % config.n_layers)  # in the last layer nothing uses them
            for name in blocks:
                with scope(name):
                    x, cache = modules[name](x, cache, layer, sequences, layout, held.get(name), remat == "weights")
            return (x, cache, coming), None

        if remat == "layer":
            body = jax.checkpoint(body, prevent_cse=False)  # the two passes are two loops, which CSE cannot merge
        start = (x, cache, gathered(jnp.int32(0)))
        (x, cache, _), _ = lax.scan(body, start, (jnp.arange(config.n_layers), params))
        return x, cache

    def logits(self, x: jax.Array, layout: Layout, pick: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """Logits [R, V'] at the last step of `layout.logits`.

        Args:
            x: the residual stream [T, E].
            pick: takes the tokens [R, E] that need logits; all T without it.
        """
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


def _look_up(axes: Axes, scale: float, table: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
    """Embeddings times `scale`; zero where another chip holds the row of the table."""
    if axes:
        rows = ids - index(axes) * table.shape[0]
        here = (rows >= 0) & (rows < table.shape[0])
        found = jnp.where(here[:, None], table[jnp.clip(rows, 0, table.shape[0] - 1)], 0)
    else:
        found = table[ids]
    return (found if scale == 1.0 else found * scale,)


def _last_tokens(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array]:
    """[t, e] -> [b, e]: each sequence's last token that is not padding."""
    b = lengths.shape[0]
    return (x.reshape(b, -1, x.shape[-1])[jnp.arange(b), lengths - 1],)


def _mask_vocab(vocab: int, axes: Axes, logits: jax.Array) -> tuple[jax.Array]:
    """-inf in the columns that pad the vocabulary."""
    columns = index(axes) * logits.shape[1] + jnp.arange(logits.shape[1])
    return (jnp.where(columns < vocab, logits, -jnp.inf),)
