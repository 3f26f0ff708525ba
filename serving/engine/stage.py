"""A pipeline stage: some of the model's layers under a layout on a mesh.

Defines the program of one stage. Its input is token ids (first stage) or the residual stream of the previous stage, its
output the residual stream or sampled tokens (last stage). The host describes each pass in one small array.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache, cache_shardings, empty_cache
from toruslab.models.decoder.mixed import MixedForm, Paged, last_of_segments
from toruslab.models.decoder.parameters import abstract, put, shardings
from toruslab.models.decoder.sampling import Sampler
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import follow, local
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.torus.mesh import AXES, Shape

GREEDY = Sampler()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Layers of a model under a layout on a mesh.

    Args:
        config: of the stage, with the stage's number of layers.
        layout: made for the mesh's extents.
        mesh: with Explicit axes if `layout.explicit`, else with Auto axes.
        first: whether the input is token ids.
        last: whether the output is sampled tokens.
        itemsize: bytes per element of activations, of the cache and of weights that are not int8: 4 or 2.
        int8: whether the weight matrices are int8.
        sampler: chooses the tokens of the last stage.

    Raises:
        ValueError: the layout cannot divide the model's sizes.
    """

    config: ModelConfig
    layout: Layout
    mesh: Mesh
    first: bool = True
    last: bool = True
    itemsize: int = 4
    int8: bool = False
    sampler: Sampler = GREEDY

    def __post_init__(self):
        x, y, z = (self.mesh.shape[a] for a in AXES)
        shape: Shape = (x, y, z)
        check(self.layout, self.config, Pass(batch=self.mesh.size, length=1, capacity=1), shape)

    @property
    def parts(self) -> int:
        """Groups of chips that attention's batch is split over. Each group has its own requests."""
        return self._extent() if self.layout.explicit else 1

    @property
    def dtype(self):
        return jnp.float32 if self.itemsize == 4 else jnp.bfloat16

    def pool(self, n_pages: int, page: int) -> Cache:
        """An empty cache with `n_pages` pages in each part."""
        split = self._extent()
        total = -(-n_pages * self.parts // split) * split  # XLA splits the cache of `auto` into equal parts, too
        return empty_cache(self.config, total, page, self.layout, self.mesh, self.dtype)

    def params(self, packed: Any) -> nnx.State:
        """Puts the parameters of its layers (`models.weights.packing.layers`), quantised if `int8`, on its devices."""
        return put(packed, self._abstract[1], self.layout, self.mesh)

    def control(self, whole: np.ndarray) -> jax.Array:
        """The description of a pass (`Control.whole`), on the stage's devices."""
        return jax.device_put(whole, NamedSharding(self.mesh, P()))

    def receive(self, x: jax.Array) -> jax.Array:
        """The residual stream, moved from the previous stage's devices to this stage's."""
        return jax.device_put(x, self._stream)

    def compile(self, form: MixedForm, pool: Cache) -> "jax.stages.Compiled":
        """Compiles `program(params, x, control, pool) -> (y, pool)` for passes of one form. The pool is donated.

        x is the residual stream [parts * tokens, E], or None in the first stage, which reads the ids from `control`. y
        is the residual stream, or in the last stage the sampled ids [parts * segments].
        """
        graph, params = self._abstract
        layout, config = self.layout, self.config

        def run(params: nnx.State, x: jax.Array | None, whole: jax.Array, pool: Cache):
            decoder = nnx.merge(graph, params)
            if x is None:
                x = decoder.embed(form.read(whole).ids.reshape(-1), layout)
            rows = Paged.of(whole, form, config, layout)
            x, pool = decoder.through_layers(x, pool, rows, layout)
            if not self.last:
                return x, pool
            at = layout.rows[:1]
            by_part = _parts(at, whole)
            pick = functools.partial(last_of_segments, form)
            logits = decoder.logits(x, layout, lambda x: local(pick, [at, by_part], [at])(x, follow(whole, by_part))[0])
            told = form.read(whole)
            requests, positions = told.requests.reshape(-1), (told.starts + told.lengths).reshape(-1)
            return self.sampler(logits, requests, positions, layout), pool

        placed = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            params,
            shardings(params, layout, self.mesh),
        )
        stream = (form.parts * form.tokens, config.d_model)
        x = None if self.first else jax.ShapeDtypeStruct(stream, self.dtype, sharding=self._stream)
        whole = jax.ShapeDtypeStruct((form.parts, form.width), jnp.int32, sharding=NamedSharding(self.mesh, P()))
        held = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), pool)
        out = NamedSharding(self.mesh, P()) if self.last else self._stream
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(run, donate_argnums=3, out_shardings=(out, cache_shardings(layout, self.mesh)))
            return jitted.lower(placed, x, whole, held).compile()

    @functools.cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return abstract(self.config, self.dtype, self.int8, first=self.first, last=self.last)

    @property
    def _stream(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.layout.x[0] if self.layout.explicit else P())

    def _extent(self) -> int:
        """Number of chips that the cache's pages are split over."""
        return int(np.prod([self.mesh.shape[a] for a in axes_of(entries(self.layout.cache)[0])], dtype=int))


def _parts(at: tuple[P, ...], whole: jax.Array) -> tuple[P, ...]:
    """The ladder that moves `whole` [parts, width] to the chips that hold each part's tokens."""
    if not at:
        return ()
    rows = entries(at[0])[0]
    return (P(None, None), P(rows, None)) if axes_of(rows) else (P(None, None),)
