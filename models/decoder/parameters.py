"""The decoder's parameters: their shapes, where a layout places them, and how they are made.

- `abstract` and `specs` plan on shapes and allocate nothing.
- `initial` makes random parameters, every shard on its own device.
- `load` takes canonical weights.
- `read` reads a folder of files.
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

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.decoder import Decoder
from toruslab.models.decoder.quantise import SCALE, integers, quantise, scales_of
from toruslab.models.weights.huggingface import Checkpoint
from toruslab.models.weights.packing import Canonical, pack
from toruslab.partitioning.layouts.layout import WEIGHTS, Layout, entries


@functools.lru_cache(maxsize=64)
def abstract(
    config: ModelConfig, dtype=jnp.float32, int8: bool = False, *, first: bool = True, last: bool = True
) -> tuple[nnx.GraphDef, nnx.State]:
    """The decoder's structure, and its parameters as shapes. Arguments as in `models.decoder.decoder.Decoder`."""
    made = {"dtype": dtype, "int8": int8, "first": first, "last": last}
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, **made, rngs=nnx.Rngs(0))))
    return graph, bare(params)


def bare(shapes: Any) -> Any:
    """Shapes without shardings, which may have come from the ambient mesh."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)


def placed(shapes: Any, at: Any) -> Any:
    """Shapes with the shardings `at`, a tree of the same form."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, at)


def specs(params: nnx.State, layout: Layout) -> nnx.State:
    """The spec of every parameter at rest, in the form of `params`. Norms and scales are whole on every chip."""

    def spec(path: tuple, leaf) -> P:
        name = _name(path)
        if name in ("table", "unembed"):
            return layout.table
        if name in WEIGHTS:
            return P(None, *entries(getattr(layout, name)[0]))
        return P(*[None] * len(leaf.shape))

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(params: nnx.State, layout: Layout, mesh: Mesh) -> nnx.State:
    """`specs` as shardings on a mesh of devices."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(params, layout), is_leaf=lambda s: isinstance(s, P))


def initial(
    config: ModelConfig, layout: Layout, mesh: Mesh, *, seed: int = 0, dtype=jnp.float32, int8: bool = False
) -> nnx.State:
    """Random parameters, every shard made on its own device. Values do not depend on layout and mesh."""
    _, wanted = abstract(config, dtype, int8)

    def make() -> nnx.State:
        params = nnx.state(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed)))
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: _without_padding(config, path, leaf), params)
        return as_int8(config, params, dtype) if int8 else params

    return jax.jit(make, out_shardings=shardings(wanted, layout, mesh))()


def as_int8(config: ModelConfig, params: nnx.State, dtype=jnp.float32) -> nnx.State:
    """Float parameters with their matrices as int8; `dtype` is that of the scales and of the other parameters."""
    nested = quantise(nnx.to_pure_dict(params), dtype)
    return jax.tree_util.tree_map_with_path(lambda path, _: _at(nested, path), abstract(config, dtype, True)[1])


def load(
    config: ModelConfig, weights: Canonical, layout: Layout, mesh: Mesh, *, dtype=jnp.float32, int8: bool = False
) -> nnx.State:
    """Canonical weights (see `models.decoder.reference`) as parameters on the devices of all processes."""
    packed = pack(config, weights)
    return put(quantise(packed, dtype) if int8 else packed, abstract(config, dtype, int8)[1], layout, mesh)


def put(packed: Mapping[str, Any], params: nnx.State, layout: Layout, mesh: Mesh) -> nnx.State:
    """Arrays of `models.weights.packing.pack` on the devices of all processes.

    Args:
        packed: the arrays, nested by module.
        params: the parameters wanted, as shapes; `packed` may have more.
    """

    def place(path: tuple, leaf, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(_at(packed, path), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, params, shardings(params, layout, mesh))


def read(checkpoint: Checkpoint, layout: Layout, mesh: Mesh, *, dtype=jnp.float32, int8: bool = False) -> nnx.State:
    """A folder's weights as parameters on the devices of all processes. The result equals `load` of all weights.

    Each process reads the parts of its own devices, one after the other, so that the host holds one part of one
    parameter at a time. With `int8` each process also reads all matrices once for their scales.
    """
    params = abstract(checkpoint.config, dtype, int8)[1]
    scales: dict[tuple[str, ...], np.ndarray] = {}

    def part(keys: tuple[str, ...], index: tuple[slice, ...], dtype) -> np.ndarray:
        matrix = (*keys[:-1], keys[-1].removesuffix(SCALE))
        if matrix not in scales:
            return checkpoint.part(keys, index, dtype)
        if matrix != keys:
            return scales[matrix][index]
        out = np.empty([s.stop - s.start for s in index], dtype)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            wide = checkpoint.part(keys, (slice(layer, layer + 1), *index[1:]), np.float32)
            out[i] = integers(wide[0], scales[matrix][layer, index[2]])
        return out

    def place(path: tuple, leaf, sharding: NamedSharding) -> jax.Array:
        keys = tuple(keys_of(path))
        if leaf.dtype == np.int8:  # the matrix comes before its scales: keys are sorted
            scales[keys] = _scales(checkpoint, keys, leaf.shape, dtype)
        holders: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        arrays = []
        for bounds, devices in holders.items():
            found = part(keys, tuple(slice(*b) for b in bounds), leaf.dtype)
            arrays += jax.block_until_ready([jax.device_put(found, device) for device in devices])
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)

    return jax.tree_util.tree_map_with_path(place, params, shardings(params, layout, mesh))


def _scales(checkpoint: Checkpoint, keys: tuple[str, ...], shape: tuple[int, ...], dtype) -> np.ndarray:
    """The scales [n, C] of a matrix [n, R, C]. Reads the whole matrix, a block of columns at a time."""
    n, rows, columns = shape
    found = np.empty((n, columns), dtype)
    step = max(1, 2**24 // rows)
    for layer in range(n):
        for begin in range(0, columns, step):
            block = slice(begin, min(begin + step, columns))
            wide = checkpoint.part(keys, (slice(layer, layer + 1), slice(0, rows), block), np.float32)
            found[layer, block] = scales_of(wide[0], dtype)
    return found


def everywhere(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A small array, whole on every device of every process. Each process must pass the same values."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()), lambda index: array[index])


def keys_of(path: tuple) -> list[str]:
    """The names of the modules and of the parameter in a path of the state."""
    return [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]


def _name(path: tuple) -> str:
    return keys_of(path)[-1]


def _at(nested: Mapping[str, Any], path: tuple) -> Any:
    return functools.reduce(lambda inner, key: inner[key], keys_of(path), nested)


def _without_padding(config: ModelConfig, path: tuple, leaf: jax.Array) -> jax.Array:
    """`leaf` with zeros where a padding head reads or writes, so that the head contributes nothing."""
    name, real = _name(path), config.n_heads - config.n_padding_heads
    q, n = config.d_head, config.n_layers
    if not config.n_padding_heads or name not in ("w_in", "w_out") or "mlp" in str(path):
        return leaf
    if name == "w_in":
        by_head = leaf.reshape(n, config.d_model, config.n_heads, -1)
        return by_head.at[:, :, real:, :q].set(0).reshape(leaf.shape)
    by_head = leaf.reshape(n, config.n_heads, -1, config.d_model)
    return by_head.at[:, real:, :q].set(0).reshape(leaf.shape)
