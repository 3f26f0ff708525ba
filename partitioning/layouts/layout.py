"""Layouts as values: for every tensor of the decoder, the `PartitionSpec`s that it passes through.

A field of `Layout` is a ladder: the specs of one tensor in the order in which it takes them on. Each step of a
ladder is one move, and one move is one collective (`partitioning.layouts.moves` runs and prices it). The first rung
says how the tensor comes out of what made it: `unreduced=frozenset("x")` is the paper's (partialsum-x).

Decides what is sharded over which axis. Leaves to others the sizes (`partitioning.plan.plan`), the collective
(`partitioning.layouts.moves`), the devices (`partitioning.torus.mesh`), and names and variants (`partitioning.layouts.variants`). Knows
no model but the number of its KV heads.

Letters of Pope et al. 2022: T = B*L tokens, batch-major, so that a split of T is a split of the batch; E = d_model;
C and G = columns of the fused input and rows of the fused output projection (Q heads and MLP); D = columns of K and V;
H, Q = heads and their width; R = rows of logits; V = vocabulary. Figures 2, 4, 5 and A.2 of the paper are the source.

Order of axes. Weight columns are split over (z, y), minor axis y, so that wgxy can gather y and leave z; x joins last
where a reduce-scatter over x splits them further: (z, y, x). The batch follows the same order where it can, so that a
cache written by wgxyz is where ws2d looks for it.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.torus.mesh import AXES, Shape

Attention = str
"""One of `ATTENTIONS`."""
ATTENTIONS = ("heads", *("batch-" + "".join(axes) for n in (1, 2) for axes in itertools.combinations(AXES, n)), "batch")
"""`heads`, `batch`, or `batch-` and the axes that the batch is split over where that is not all. Which of the latter
there are is each layout's to say (`NoAxisLeft`)."""
Ladder = tuple[P, ...]
Axes = tuple[str, ...]

ZYX: Axes = ("z", "y", "x")
ZY: Axes = ("z", "y")
XYZ: Axes = ("x", "y", "z")
WEIGHTS = ("w_in", "w_kv", "w_out")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one decoder layer, and what stands around it, lies on the mesh. Dimensions are named beside each field.

    An empty ladder constrains nothing (the layout `auto`).
    """

    name: str
    attention: Attention
    # weights, from where they rest to where the matmul uses them
    table: P  # VE, embedding and unembedding
    w_in: Ladder  # EC
    w_kv: Ladder  # ED
    w_out: Ladder  # GE
    # activations, in the order of the pass
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
    """Whether K, V and the norm's sum are all-reduced in one collective with the hidden units."""
    rings: Literal[0, 1, 2] = 0
    """Collectives looped with the matmuls that they feed or drain (`partitioning.layouts.rings`): not at all, one way round, or
    both ways."""
    prefetch: bool = False
    """A layer's weights gathered while the layer before it runs."""

    def __hash__(self) -> int:
        """Of all fields, worked out once: layouts are keys of many look-ups."""
        if "_hash" not in self.__dict__:
            values = tuple(getattr(self, f.name) for f in dataclasses.fields(self))
            object.__setattr__(self, "_hash", hash(values))
        return self.__dict__["_hash"]

    @property
    def explicit(self) -> bool:
        """Whether the layout constrains the pass; otherwise XLA's partitioner is on its own."""
        return bool(self.x)

    def on(self, mesh: Shape) -> "Layout":
        """The same layout without the axes of size 1, and without the steps that these leave empty."""
        sizes = dict(zip(AXES, mesh, strict=True))
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, P):
                changed[field.name] = trim(value, sizes)
            elif isinstance(value, tuple) and value:
                steps = [trim(spec, sizes) for spec in value]
                changed[field.name] = tuple(s for i, s in enumerate(steps) if i == 0 or s != steps[i - 1])
        changed["together"] = self.together and len(changed["h"]) > 1
        changed["prefetch"] = self.prefetch and any(len(changed[w]) > (2 if self.rings else 1) for w in WEIGHTS)
        return dataclasses.replace(self, **changed)


def entries(spec: P) -> tuple[Any, ...]:
    """A spec's entries, one a dimension, also where it has `unreduced` axes."""
    return tuple(spec.partitions)


def axes_of(entry: Any) -> Axes:
    """The axes of one entry of a spec: `None`, a name or a tuple of names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def trim(spec: P, sizes: Mapping[str, int]) -> P:
    """`spec` without the axes of size 1, in its shortest spelling."""
    kept = [tuple(a for a in axes_of(e) if sizes[a] > 1) for e in entries(spec)]
    return P(
        *(None if not axes else axes[0] if len(axes) == 1 else axes for axes in kept),
        unreduced=frozenset(a for a in spec.unreduced if sizes[a] > 1),
    )


class NoAxisLeft(ValueError):
    """Attention that a layout leaves no axis for."""
