"""A mixed pass over tokens of many requests in both phases: Orca's selective batching under static shapes.

All operations with parameters see one flat list of tokens. The list has single tokens of decoding requests first, then
pieces of prompts, all of one length. If the layout splits attention's tokens over chips, each chip's part of the list
has this form and holds tokens of that chip's requests. Only attention knows requests: each single token and each piece
attends to the pages of its own request. Tokens that fill up the list are computed, but written to no page.

This file has the form of the list, and how attention reads and writes pages. `serving.engine.engine` decides which
request is where. Source: Orca (OSDI 2022), section 3.2; pages as in vLLM (SOSP 2023).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.attention import rope, rope_tables
from toruslab.models.decoder.cache import Cache, cache_spec, pad_width
from toruslab.models.decoder.sequences import arrays, heads_read, place, token_ladder
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import follow, local
from toruslab.partitioning.layouts.precision import exact


@dataclass(frozen=True, kw_only=True)
class MixedForm:
    """The static sizes of a mixed pass. All but `parts` are per part of the list.

    Args:
        parts: parts of the list: groups of chips that the layout splits attention's tokens over.
        singles: single tokens.
        pieces, length: pieces of prompts, and tokens in each.
        pages: most pages that a request may have.
        page: positions in a page.
    """

    parts: int
    singles: int
    pieces: int
    length: int
    pages: int
    page: int

    @property
    def tokens(self) -> int:
        """Tokens of one part."""
        return self.singles + self.pieces * self.length

    @property
    def segments(self) -> int:
        """Single tokens and pieces of one part. The last token of each gets logits."""
        return self.singles + self.pieces

    @property
    def width(self) -> int:
        """Number of integers that describe one part."""
        return self.tokens + self.segments * (3 + self.pages)

    def describe(self) -> "Control":
        """A list without tokens, to be filled in. All arrays are views into one array `whole` [parts, width]."""
        whole = np.zeros((self.parts, self.width), np.int32)
        return self.read(whole)

    def read(self, whole: Any) -> "Control":
        """The fields of `whole` [..., width]."""
        at, fields = 0, []
        for n in (self.tokens, self.segments, self.segments, self.segments):
            fields.append(whole[..., at : at + n])
            at += n
        ids, starts, lengths, requests = fields
        tables = whole[..., at:].reshape(*whole.shape[:-1], self.segments, self.pages)
        return Control(whole, ids, starts, lengths, requests, tables)


class Control(NamedTuple):
    """The integers that describe a mixed pass: `whole` [parts, width] has all of them, the others are views into it.

    - `ids` [parts, tokens].
    - `starts` [parts, segments]: position of a segment's first token.
    - `lengths` [parts, segments]: number of its tokens; 0 for an empty segment.
    - `requests` [parts, segments]: the request whose random numbers the segment samples with.
    - `tables` [parts, segments, pages]: the request's pages in order, as far as they are read or written.
    """

    whole: Any
    ids: Any
    starts: Any
    lengths: Any
    requests: Any
    tables: Any


class Paged(NamedTuple):
    """The `models.decoder.sequences.Sequences` of a mixed pass: `control` [n, width] of the parts that a chip holds,
    and RoPE's `cos` and `sin` [t, Q/2]."""

    form: MixedForm
    control: jax.Array
    cos: jax.Array
    sin: jax.Array

    @classmethod
    def of(cls, whole: jax.Array, form: MixedForm, config: ModelConfig, layout: Layout) -> "Paged":
        """The sequences that `whole` [parts, width] describes; it is whole on every chip."""
        split = entries(layout.cache)[0]
        by_part = () if not layout.explicit else (P(None, None), P(split, None)) if axes_of(split) else (P(None, None),)
        by_token = token_ladder(layout)
        control = follow(whole, by_part)

        def tables(control):
            positions = jax.vmap(lambda part: token_positions(form, form.read(part)))(control)
            return rope_tables(positions.reshape(-1), config.d_head, config.rope_theta)

        return cls(form, control, *local(tables, [by_part], [by_token, by_token])(control))

    def attend(
        self, q: jax.Array, kv: jax.Array, cache: Cache, layer: jax.Array, config: ModelConfig, layout: Layout
    ) -> tuple[jax.Array, Cache]:
        """See `models.decoder.sequences.Sequences`. The cache consists of pages, [n_layers, N, K, page, Q]."""
        form = self.form

        def on_shards(q, kv, layer, control, cos, sin, k, v):
            t, h, width = q.shape
            told = form.read(control[0])
            kv = kv.reshape(t, -1, 2, width)
            k_new, v_new = rope(kv[:, :, 0], cos, sin), kv[:, :, 1]
            pages, offsets = where(form, told, k.shape[1])
            k, v = (
                c.at[layer, pages, :, offsets].set(pad_width(new.astype(c.dtype), c.shape[-1]), mode="drop")
                for c, new in ((k, k_new), (v, v_new))
            )
            which = heads_read(config, layout, h, k.shape[2])
            o = attend_pages(form, rope(q, cos, sin), k, v, layer, told, which)
            return o, k, v

        held = [place(layout, cache_spec(layout))] * 2
        ins = [layout.q, layout.kv, place(layout, P()), *[token_ladder(layout)] * 3, *held]
        arguments = (q, kv, layer, self.control, self.cos, self.sin, *arrays(cache))
        o, *stored = local(on_shards, ins, [layout.o, *held])(*arguments)
        return o, Cache(*stored)


def token_positions(form: MixedForm, told: Control) -> jax.Array:
    """The position of each token of one part, [tokens]."""
    singles = told.starts[: form.singles]
    pieces = told.starts[form.singles :, None] + jnp.arange(form.length)
    return jnp.concatenate([singles, pieces.reshape(-1)])


def where(form: MixedForm, told: Control, n_pages: int) -> tuple[jax.Array, jax.Array]:
    """The page of each token of one part and the offset in it, [tokens] each. Tokens that only fill up the list get
    page `n_pages`, which does not exist."""
    within = jnp.concatenate([jnp.zeros(form.singles, jnp.int32), jnp.tile(jnp.arange(form.length), form.pieces)])
    segment = jnp.concatenate(
        [jnp.arange(form.singles), jnp.repeat(form.singles + jnp.arange(form.pieces), form.length)]
    )
    positions = token_positions(form, told)
    page = told.tables[segment, jnp.minimum(positions // form.page, form.pages - 1)]
    return jnp.where(within < told.lengths[segment], page, n_pages), positions % form.page


def attend_pages(
    form: MixedForm, q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, told: Control, which: Any
) -> jax.Array:
    """Softmax attention of every token of one part over its request's positions up to its own.

    Segments are computed one after the other. Each reads exactly the pages that it has, and no page is moved.

    Args:
        q: [t, h, Q], rotated by RoPE.
        k, v: [n_layers, N, K, page, Q], the new positions already written.
        which: KV heads of these query heads, from `models.decoder.sequences.heads_read`.

    Returns:
        [t, h, Q]; meaningless for tokens that only fill up the list.
    """
    h, width = q.shape[1], q.shape[2]

    def read(pool: jax.Array, at: jax.Array) -> jax.Array:
        """One page of the layer, [k, page, Q]."""
        size = (1, 1, *pool.shape[2:])
        if isinstance(which, jax.Array):
            return lax.dynamic_slice(pool, (layer, at, 0, 0, 0), size)[0, 0][which]
        first, n = which
        return lax.dynamic_slice(pool, (layer, at, first, 0, 0), (1, 1, n, *pool.shape[3:]))[0, 0]

    n_kv = h if isinstance(which, jax.Array) else which[1]
    group = h // n_kv

    def segment(q: jax.Array, table: jax.Array, start: jax.Array, length: jax.Array) -> jax.Array:
        """The c tokens of one segment, [c, h, Q]; the first `length` are real."""
        c = q.shape[0]
        q = pad_width(q, k.shape[-1]).reshape(c, n_kv, group, -1).transpose(1, 2, 0, 3).reshape(n_kv, group * c, -1)
        reach = jnp.tile(start + jnp.arange(c), group)  # gc
        product = functools.partial(jnp.einsum, precision=exact(q.dtype), preferred_element_type=jnp.float32)

        def page(i, running):
            top, total, acc = running
            keys, values = read(k, table[i]).astype(q.dtype), read(v, table[i]).astype(q.dtype)
            written = i * form.page + jnp.arange(form.page) < start + length
            values = jnp.where(written[:, None], values, 0)  # a NaN that another request left would stay NaN times 0
            s = product("kcq,kpq->kcp", q, keys) / jnp.sqrt(jnp.float32(width))
            seen = i * form.page + jnp.arange(form.page) <= reach[:, None]
            s = jnp.where(seen, s, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            old, p = jnp.exp(top - new_top), jnp.exp(s - new_top[..., None])
            weighed = product("kcp,kpq->kcq", p.astype(q.dtype), values)
            return new_top, total * old + jnp.sum(p, axis=-1), acc * old[..., None] + weighed

        zero = q.astype(jnp.float32) * 0  # zeros with q's type, which says over which mesh axes it varies
        begin = (zero[..., 0] - 1e30, zero[..., 0], zero)
        n_pages = jnp.where(length > 0, (start + length - 1) // form.page + 1, 0)
        _, total, acc = lax.fori_loop(0, n_pages, page, begin)
        o = (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
        return o.reshape(n_kv, group, c, -1).transpose(2, 0, 1, 3).reshape(c, h, -1)[..., :width]

    parts = []
    for first, n, c in ((0, form.singles, 1), (form.singles, form.pieces, form.length)):
        if n:
            here = slice(first, first + n)
            queries = q[first : first + n * c].reshape(n, c, h, width)
            each = (queries, told.tables[here], told.starts[here], told.lengths[here])
            parts.append(lax.map(lambda a: segment(*a), each).reshape(n * c, h, width))
    return jnp.concatenate(parts)


def last_of_segments(form: MixedForm, x: jax.Array, control: jax.Array) -> tuple[jax.Array]:
    """`x` [n * tokens, e] -> [n * segments, e]: the last real token of each segment of `control` [n, width]."""
    x = x.reshape(len(control), form.tokens, x.shape[-1])
    lengths = form.read(control).lengths[:, form.singles :]
    ends = jnp.maximum(lengths - 1, 0) + jnp.arange(form.pieces) * form.length + form.singles
    at = jnp.concatenate([jnp.broadcast_to(jnp.arange(form.singles), (len(control), form.singles)), ends], axis=1)
    found = jnp.take_along_axis(x, at[..., None], axis=1)
    return (found.reshape(-1, x.shape[-1]),)
