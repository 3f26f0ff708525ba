"""The vocabulary of layouts, and the record `Layout`: how one decoder layer is split over the mesh.

A layout lists, for every tensor of the decoder, the `PartitionSpec`s that the tensor passes through. This sequence is
the tensor's *ladder*. From one spec to the next is a *step*, and one step is one collective:

    (P(None, "x", unreduced=frozenset("yz")), P(None, ("x", "y", "z")))     TE_x (partialsum-yz) -> TE_xyz

is a reduce-scatter over y and z. The first spec of a ladder says how the tensor comes out of the operation that makes
it; `unreduced` axes are the paper's partialsum.

In other files of this room: the layouts (`catalogue`), their variants and names (`variants`), and the collective that
a step runs (`moves`). Sizes are in `partitioning.plan`, devices in `partitioning.torus.mesh`.

Letters, after Pope et al. 2022 (figures 2, 4, 5 and A.2 are the source of the layouts):

    T     tokens, B*L, batch-major: a split of T is a split of the batch
    E     d_model
    C, G  columns of the fused input projection, rows of the fused output projection (Q heads and MLP)
    D     columns of K and V
    H, Q  heads and their width
    K, S  KV heads, and positions of the cache
    R     rows of logits
    V     vocabulary
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.torus.mesh import AXES, Shape

Axes = tuple[str, ...]
"""Mesh axes; in a spec the first is the major one."""
Ladder = tuple[P, ...]
"""The specs that one tensor passes through, in order."""

XYZ: Axes = ("x", "y", "z")
# Columns of weights are split with y as the minor axis, so that `wgxy` can gather over y and leave z. x comes last,
# where a reduce-scatter over x splits them further. The batch has the same order where it can, so that a cache that
# `wgxyz` has written is where `ws2d` looks for it.
ZY: Axes = ("z", "y")
ZYX: Axes = ("z", "y", "x")

WEIGHTS = ("w_in", "w_kv", "w_out")
"""The ladders of weights."""

Attention = str
"""How attention is split: one of `ATTENTIONS`."""
ATTENTIONS = ("heads", *("batch-" + "".join(axes) for n in (1, 2) for axes in itertools.combinations(AXES, n)), "batch")
"""`heads`; `batch` over all axes; or `batch-` and the axes that the batch is split over, such as `batch-xy`. Not every
layout has every one of the last kind (`NoAxisLeft`)."""


class NoAxisLeft(ValueError):
    """The layout leaves no mesh axis for this attention."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The specs of one decoder layer, and of the embedding and unembedding around it. Each field names its dimensions.

    An empty ladder constrains nothing (the layout `auto`).
    """

    name: str
    attention: Attention
    # weights: from where they rest to where the matmul uses them
    table: P  # VE, embedding and unembedding
    w_in: Ladder  # EC
    w_kv: Ladder  # ED
    w_out: Ladder  # GE
    # activations: in the order of the pass
    tokens: Ladder  # T
    embed: Ladder  # TE, from the look-up to the residual stream
    x: Ladder  # TE, from the residual stream to the input of the matmuls
    h: Ladder  # TC, out of the input projection
    x_kv: Ladder  # TE, from the input of the matmuls to the slice that K and V are made of
    kv: Ladder  # TD
    q: Ladder  # THQ, to attention
    cache: P  # BKSQ
    o: Ladder  # THQ, from attention
    g: Ladder  # TG, into the output projection
    out: Ladder  # TE, back to the residual stream
    rows: Ladder  # RE, from the residual stream to the input of the unembedding
    logits: Ladder  # RV
    ids: Ladder  # R, sampled tokens
    together: bool = False
    """K, V and the norm's sum share one all-reduce with h."""
    rings: Literal[0, 1, 2] = 0
    """Directions in which collectives are looped with their matmuls (`partitioning.layouts.rings`); 0: not looped."""
    prefetch: bool = False
    """Each layer's weights are gathered while the layer before it runs."""

    def __hash__(self) -> int:
        """Of all fields; kept, because layouts are the keys of many caches."""
        if "_hash" not in self.__dict__:
            values = tuple(getattr(self, f.name) for f in dataclasses.fields(self))
            object.__setattr__(self, "_hash", hash(values))
        return self.__dict__["_hash"]

    @property
    def explicit(self) -> bool:
        """Whether the layout constrains the pass. If not (`auto`), XLA's partitioner decides."""
        return bool(self.x)

    def on(self, mesh: Shape) -> "Layout":
        """The same layout without mesh axes of size 1, and without the steps that would then move nothing."""
        sizes = dict(zip(AXES, mesh, strict=True))
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, P):
                changed[field.name] = trim(value, sizes)
            elif isinstance(value, tuple) and value:
                specs = [trim(spec, sizes) for spec in value]
                changed[field.name] = tuple(s for i, s in enumerate(specs) if i == 0 or s != specs[i - 1])
        changed["together"] = self.together and len(changed["h"]) > 1
        changed["prefetch"] = self.prefetch and any(len(changed[w]) > (2 if self.rings else 1) for w in WEIGHTS)
        return dataclasses.replace(self, **changed)


def entries(spec: P) -> tuple[Any, ...]:
    """The entries of a spec, one for each dimension. Unlike `tuple(spec)`, takes a spec with `unreduced` axes."""
    return tuple(spec.partitions)


def axes_of(entry: Any) -> Axes:
    """The axes of one entry of a spec, which is `None`, a name or a tuple of names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def trim(spec: P, sizes: Mapping[str, int]) -> P:
    """`spec` without the axes of size 1, in its shortest spelling: `"x"` for `("x",)`."""
    kept = [tuple(a for a in axes_of(e) if sizes[a] > 1) for e in entries(spec)]
    return P(
        *(None if not axes else axes[0] if len(axes) == 1 else axes for axes in kept),
        unreduced=frozenset(a for a in spec.unreduced if sizes[a] > 1),
    )
