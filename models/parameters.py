"""The decoder's parameters: their abstract shapes, where a layout places them, and how they come to be.

Plans on shapes and allocates last: `abstract` allocates nothing, `initial` makes every shard on its own device,
`load` takes canonical weights.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from models.decoder import Decoder
from models.quantise import quantise
from models.weights import Canonical, pack
from partitioning.layouts import Layout, entries


@functools.lru_cache(maxsize=64)
def abstract(
    config: ModelConfig, dtype=jnp.float32, int8: bool = False, *, first: bool = True, last: bool = True
) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure and its parameters as shapes; `int8`: matrices as int8, with scales; `first`, `last`:
    whether it has the model's beginning and end."""
    made = {"dtype": dtype, "int8": int8, "first": first, "last": last}
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, **made, rngs=nnx.Rngs(0))))


def specs(params: nnx.State, layout: Layout) -> nnx.State:
    """The spec of every parameter at rest, in the form of `params`: matrices as the layout says, norms whole."""

    def spec(path: tuple, leaf) -> P:
        name = _name(path)
        if name in ("table", "unembed"):
            return layout.table
        if name in ("w_in", "w_kv", "w_out"):
            return P(None, *entries(getattr(layout, name)[0]))
        return P(*[None] * len(leaf.shape))

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(params: nnx.State, layout: Layout, mesh: Mesh) -> nnx.State:
    """`specs` on a mesh of devices."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(params, layout), is_leaf=lambda s: isinstance(s, P))


def initial(
    config: ModelConfig, layout: Layout, mesh: Mesh, *, seed: int = 0, dtype=jnp.float32, int8: bool = False
) -> nnx.State:
    """Random parameters, every shard made on its own device; the same values under every layout and mesh."""
    _, wanted = abstract(config, dtype, int8)

    def make() -> nnx.State:
        params = nnx.state(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed)))
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: _without_padding(config, path, leaf), params)
        return as_int8(config, params, dtype) if int8 else params

    return jax.jit(make, out_shardings=shardings(wanted, layout, mesh))()


def as_int8(config: ModelConfig, params: nnx.State, dtype=jnp.float32) -> nnx.State:
    """Float parameters with their matrices as int8; `dtype` is that of the scales, and of what stays as it is."""
    nested = quantise(nnx.to_pure_dict(params), dtype)
    return jax.tree_util.tree_map_with_path(lambda path, _: _at(nested, path), abstract(config, dtype, True)[1])


def load(
    config: ModelConfig, weights: Canonical, layout: Layout, mesh: Mesh, *, dtype=jnp.float32, int8: bool = False
) -> nnx.State:
    """Canonical weights (see `models.reference`) as parameters on their devices, over all processes."""
    packed = pack(config, weights)
    return put(quantise(packed, dtype) if int8 else packed, abstract(config, dtype, int8)[1], layout, mesh)


def put(packed: Mapping[str, Any], params: nnx.State, layout: Layout, mesh: Mesh) -> nnx.State:
    """Arrays of `models.weights.pack` on their devices, over all processes: those that `params` has, as shapes."""

    def place(path: tuple, leaf, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(_at(packed, path), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, params, shardings(params, layout, mesh))


def everywhere(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A small array, whole on every device of every process; each process must pass the same values."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda index: array[index])


def _keys(path: tuple) -> list[str]:
    return [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]


def _name(path: tuple) -> str:
    return _keys(path)[-1]


def _at(nested: Mapping[str, Any], path: tuple) -> Any:
    return functools.reduce(lambda inner, key: inner[key], _keys(path), nested)


def _without_padding(config: ModelConfig, path: tuple, leaf: jax.Array) -> jax.Array:
    """Zeros where a padding head would read or write, so that it contributes nothing."""
    name, real = _name(path), config.n_heads - config.n_padding_heads
    q, n = config.d_head, config.n_layers
    if not config.n_padding_heads or name not in ("w_in", "w_out") or "mlp" in str(path):
        return leaf
    if name == "w_in":
        by_head = leaf.reshape(n, config.d_model, config.n_heads, -1)
        return by_head.at[:, :, real:, :q].set(0).reshape(leaf.shape)
    by_head = leaf.reshape(n, config.n_heads, -1, config.d_model)
    return by_head.at[:, real:, :q].set(0).reshape(leaf.shape)
