"""The decoder's building blocks as micro-benchmarks: the blocks and sizes that a machine is measured on.

Each block runs the decoder's own functions on a device's own arrays. `partitioning.cost.measured` looks the samples up
by the names of their sizes. `benchmarks.measure.looped` times the blocks.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from toruslab.benchmarks.measure.looped import Block, as_tuple
from toruslab.models.decoder.attention import attend, rope
from toruslab.models.decoder.cache import write
from toruslab.models.decoder.decoder import ResidualBlock as Layer
from toruslab.models.decoder.matmuls import matmul
from toruslab.models.presets import model
from toruslab.partitioning.torus.calibrated import Sample
from toruslab.partitioning.torus.mesh import AXES

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
WEIGHTS = ((64, 128), (128, 512), (256, 1280), (512, 2560), (1024, 5120))
"""Inner and outer dimensions of matmuls."""
LARGE_ROWS, LARGE_WEIGHTS = (4096, 16384), ((2048, 8192), (4096, 16384), (8192, 32768))
"""More of them, on accelerators."""
MOST_MACS = {"cpu": 4e8, "gpu": 4e12, "tpu": 4e12}
"""Multiply-adds of the largest matmul of one device. Larger ones are priced at its rate."""
KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute")
ALIKE = ("all-reduce", "collective-permute")
"""Collectives whose output has the shape of the input, so that rows and columns make no difference."""
MESSAGES = (256, 16384, 131072, 1048576, 8388608)
"""Bytes that one device holds before a collective, or after an all-gather."""
STACK, LAYERS = (256, 640), (2, 8, 24, 96)
"""Weights of a layer that are copied out of a stack, and the numbers of layers in the stack."""
LARGE_STACK, FEW_LAYERS = (4096, 16384), (2, 8)
"""The same on accelerators."""
WORK = (64, 128, 256)
"""The matmul between two collectives, as in a step; its time is subtracted. Devices that share cores fall asleep
meanwhile."""
NARROW, WIDE = 512, 4096
"""Columns of a collective's tensor: activations and small weights, or the weights of an input projection."""


def blocks(mesh: Mesh, dtypes: Sequence[str], platform: str, *, quick: bool = False) -> Iterator[Block]:
    """Yields all blocks for one mesh. `quick`: fewer sizes, and one group of axes for each number of devices."""
    long = tuple(a for a in AXES if mesh.shape[a] > 1)
    shares_cores = platform == "cpu" and jax.process_count() == 1
    barrier = _barrier(long) if long and shares_cores else None
    for dtype in dtypes:
        yield from matmuls(dtype, MOST_MACS[platform], quick)
        yield from copies(dtype, platform)
    for dtype in dict.fromkeys("bf16" if d == "int8" else d for d in dtypes):
        yield from vectors(dtype)
        yield from attentions(dtype, platform, barrier, quick)
    yield from collectives(mesh, platform, quick)


def element(dtype: str):
    """The dtype of activations beside weights of `dtype`."""
    return jnp.float32 if dtype == "f32" else jnp.bfloat16


def _sample(what: str, dtype: str, **more) -> Sample:
    axes, at = more.pop("axes", ""), more.pop("at", "")
    return Sample(what=what, dtype=dtype, sizes=more, axes=axes, at=at, seconds=0.0, low_s=0.0, high_s=0.0, repeats=0)


def _shape(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _keep(carry: jax.Array, result: jax.Array) -> jax.Array:
    """`carry` with one element that depends on `result`: almost free, and the compiler cannot drop the result."""
    at = (0,) * carry.ndim
    last = tuple(s - 1 for s in result.shape)
    return carry.at[at].set(result[last].astype(carry.dtype) * 1e-3)


def matmuls(dtype: str, most_macs: float, quick: bool) -> Iterator[Block]:
    """The decoder's matmuls [rows, inner] x [inner, outer], with the weights in the processor's cache: the decoder has
    just copied or gathered them."""
    act, weight = element(dtype), jnp.int8 if dtype == "int8" else element(dtype)
    large = most_macs > MOST_MACS["cpu"]
    all_rows, shapes = (ROWS + LARGE_ROWS, WEIGHTS + LARGE_WEIGHTS) if large else (ROWS, WEIGHTS)
    if quick:
        all_rows, shapes = all_rows[::3], shapes[1:-1:2] if large else shapes[1:-1]
    for rows, (inner, outer) in itertools.product(all_rows, shapes):
        if rows * inner * outer <= most_macs:

            def turn(x, w, i):
                return _keep(x, matmul("te,ec->tc", x, w, ()))

            yield Block(
                sample=_sample("matmul", dtype, rows=rows, inner=inner, outer=outer),
                turn=turn,
                carry=[_shape(act, rows, inner)],
                constants=[_shape(weight, inner, outer)],
            )


def copies(dtype: str, platform: str) -> Iterator[Block]:
    """Copies of a layer's weights out of the stacked array, with the smallest matmul that reads all of them."""
    act, weight = element(dtype), jnp.int8 if dtype == "int8" else element(dtype)
    (inner, outer), layers = (STACK, LAYERS) if platform == "cpu" else (LARGE_STACK, FEW_LAYERS)
    size = jnp.dtype(weight).itemsize

    def product(x, w, i):
        return _keep(x, matmul("te,ec->tc", x, w, ()))

    carry = [_shape(act, 1, inner)]
    alone = Block(sample=_sample("work", dtype), turn=product, carry=carry, constants=[_shape(weight, inner, outer)])
    for n in layers:

        def turn(x, stack, i, n=n):
            return product(x, lax.dynamic_index_in_dim(stack, i % n, keepdims=False), i)

        yield Block(
            sample=_sample("copy", dtype, bytes=inner * outer * size, stack=n * inner * outer * size),
            turn=turn,
            carry=carry,
            constants=[_shape(weight, n, inner, outer)],
            without=alone,
        )


def vectors(dtype: str) -> Iterator[Block]:
    """Elementwise work: the norm with the residual's sum, the MLP's activation with its splits and joins, and RoPE.

    The size `elements` counts the elements of the input.
    """
    act, config = element(dtype), model("toy")
    width = config.d_head + 2 * config.d_ff // config.mlp_groups
    layer: Any = SimpleNamespace(config=config, has_attention=True, has_mlp=True)

    def norm(x, scale, i):
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
        y = x * (lax.rsqrt(squares / x.shape[1] + 1e-6)[:, None] * scale.astype(jnp.float32)).astype(x.dtype)
        return x + y * jnp.asarray(1e-3, x.dtype)

    def activation(h, i):
        o, hidden = Layer._split(layer, h)
        (g,) = Layer._join(layer, o, hidden)
        return _keep(h, g)

    def turned(q, cos, sin, i):
        return rope(q, cos, sin)

    for rows, e in ((1, 256), (16, 256), (64, 512), (512, 512), (1024, 1024)):
        yield Block(
            sample=_sample("norm", dtype, elements=rows * e),
            turn=norm,
            carry=[_shape(act, rows, e)],
            constants=[_shape(act, e)],
        )
    for rows, groups in ((1, 2), (8, 4), (64, 4), (256, 8), (512, 16)):
        yield Block(
            sample=_sample("activation", dtype, elements=rows * groups * width),
            turn=activation,
            carry=[_shape(act, rows, groups * width)],
        )
    for rows, heads in ((1, 16), (16, 16), (256, 16)):
        angles = [_shape(jnp.float32, rows, config.d_head // 2)] * 2
        yield Block(
            sample=_sample("rope", dtype, elements=rows * heads * config.d_head),
            turn=turned,
            carry=[_shape(act, rows, heads, config.d_head)],
            constants=angles,
        )


def attentions(dtype: str, platform: str, barrier: Block | None, quick: bool) -> Iterator[Block]:
    """Writing to the cache and attending to it, with the caches of four layers in turn (two, if they are large).

    Sizes: `cache` counts the elements of K and V that are read, `scores` those of all heads, `macs` the multiply-adds:
    two for each score and element of a head.

    A barrier before each turn makes devices that share a core's cache take turns, as in a step. Without it one device
    would run many turns with its arrays in the cache.
    """
    act = element(dtype)
    # rows, heads, KV heads, new tokens, positions, width
    sizes = ((1, 16, 1, 1, 64, 64), (1, 16, 1, 1, 256, 64), (4, 16, 1, 1, 256, 64), (16, 16, 1, 1, 256, 64))
    sizes += ((8, 1, 1, 1, 256, 64), (8, 2, 1, 1, 256, 64), (32, 2, 1, 1, 256, 64))
    sizes += ((16, 4, 1, 1, 256, 64), (64, 2, 1, 1, 256, 64), (128, 2, 1, 1, 256, 64), (4, 16, 1, 1, 1024, 64))
    sizes += ((1, 8, 8, 1, 512, 64), (1, 16, 1, 16, 16, 64), (8, 16, 1, 16, 16, 64), (8, 2, 1, 16, 16, 64))
    sizes += ((1, 16, 1, 64, 64, 64), (1, 16, 1, 256, 256, 64), (8, 2, 1, 128, 128, 64), (8, 2, 1, 256, 256, 64))
    if platform != "cpu":
        sizes += ((16, 16, 1, 1, 2048, 256), (64, 16, 1, 1, 2048, 256), (1, 16, 1, 2048, 2048, 256))
    for b, h, k, length, span, width in sizes[::2] if quick else sizes:
        n_layers = 4 if b < 64 else 2

        def turn(q, keys, values, i, length=length, span=span, n_layers=n_layers):
            k = keys.shape[2]
            starts = jnp.full((q.shape[0],), span - length, jnp.int32)
            new, layer = q[:, :, :k], i % n_layers
            keys, values = write(keys, new, layer, starts), write(values, new, layer, starts)
            return _keep(q, attend(q, keys, values, layer, starts)), keys, values

        cache = _shape(act, n_layers, b, k, span, width)
        scores = b * h * length * span
        numbers = {"cache": 2 * b * k * span * width, "scores": scores, "macs": 2 * scores * width}
        block = Block(
            sample=_sample("attention", dtype, rows=b, length=length, **numbers),
            turn=turn,
            carry=[_shape(act, b, length, h, width), cache, cache],
        )
        yield _after(barrier, block, linked=True)


def collectives(mesh: Mesh, platform: str, quick: bool) -> Iterator[Block]:
    """Every collective over every group of axes, on rows and on columns. The size `bytes` counts received bytes.

    A collective-permute sends to the next device along one axis, as in a looped collective. Fake devices have no links:
    groups with the same number of devices differ by noise only. The first of them gets all message sizes, the others
    two.
    """
    long = [a for a in AXES if mesh.shape[a] > 1]
    seen = set()
    for axes in itertools.chain.from_iterable(itertools.combinations(long, n) for n in range(1, len(long) + 1)):
        k = math.prod(mesh.shape[a] for a in axes)
        again = platform == "cpu" and k in seen
        if again and quick:
            continue
        seen.add(k)
        for kind, at, columns in itertools.product(KINDS, (0, 1), (NARROW, WIDE)):
            if (kind in ALIKE and at) or (columns == WIDE and (kind == "all-to-all" or not at)):
                continue
            if kind == "collective-permute" and len(axes) > 1:
                continue
            for message in MESSAGES[1:4:2] if again else MESSAGES[::2] if quick else MESSAGES:
                held = message // 4
                if columns == WIDE and (again or held < 8 * WIDE):
                    continue
                block = _collective(kind, axes, at, k, max(1, held // columns), min(columns, held))
                if block:
                    yield block


def _collective(kind: str, axes: tuple[str, ...], at: int, k: int, rows: int, columns: int) -> Block | None:
    """A collective over `k` devices. [rows, columns] is the larger one of its input and output."""
    other = 1 - at
    shape = [rows, columns]
    if (kind not in ALIKE and shape[at] % k) or (kind == "all-to-all" and shape[other] % k):
        return None

    def move(x):
        if kind == "all-gather":
            return lax.all_gather(x, axes, axis=at, tiled=True)
        if kind == "reduce-scatter":
            return lax.psum_scatter(x, axes, scatter_dimension=at, tiled=True)
        if kind == "all-reduce":
            return lax.psum(x, axes)
        if kind == "collective-permute":
            return lax.ppermute(x, axes[0], [(i, (i + 1) % k) for i in range(k)])
        return lax.all_to_all(x, axes, split_axis=at, concat_axis=other, tiled=True)

    def turn(x, result, i):
        result = move(x)
        return _keep(x, result), result

    shares = {"all-reduce": 2 * (k - 1), "collective-permute": k}
    n_bytes = rows * columns * 4 * shares.get(kind, k - 1) // k
    result = list(shape)
    if kind == "all-gather":
        shape[at] //= k
    elif kind not in ALIKE:
        result[at] //= k
    if kind == "all-to-all":
        result[other] *= k
    sample = _sample(
        kind, "f32", axes="".join(axes), at=("rows", "columns")[at], group=k, bytes=n_bytes, columns=columns
    )
    if kind == "all-gather" and columns == WIDE:
        return _multiplied(sample, move, (shape[0], shape[1]), (result[0], result[1]))
    block = Block(sample=sample, turn=turn, carry=[_shape(jnp.float32, *shape), _shape(jnp.float32, *result)])
    return _after(_product(*WORK), block)


def _multiplied(sample: Sample, move, shape: tuple[int, int], result: tuple[int, int]) -> Block:
    """Gathers weights and multiplies by them; the time of the product alone is subtracted.

    XLA:CPU gathers columns as the rows of a transposed matrix, and transposes it again for the matmul. The collective
    alone would not show that.
    """
    a, f32 = _shape(jnp.float32, 8, result[0]), jnp.float32

    def turn(a, x, i):
        y = a @ move(x)
        return _keep(a, y), _keep(x, y)

    return Block(
        sample=sample,
        turn=turn,
        carry=[a, _shape(f32, *shape)],
        without=_product(8, *result),
    )


@functools.cache
def _product(rows: int, inner: int, outer: int) -> Block:
    """A matmul, to be subtracted from a block that contains it."""
    return Block(
        sample=_sample("work", "f32"),
        turn=lambda a, w, i: _keep(a, a @ w),
        carry=[_shape(jnp.float32, rows, inner)],
        constants=[_shape(jnp.float32, inner, outer)],
    )


def _barrier(axes: tuple[str, ...]) -> Block:
    """A block in which all devices wait for each other."""
    return Block(
        sample=_sample("barrier", "f32"),
        turn=lambda token, i: lax.psum(token, axes) * 0.1,
        carry=[_shape(jnp.float32, 1)],
    )


def _after(before: Block | None, block: Block, *, linked: bool = False) -> Block:
    """The block with `before` ahead of each of its turns. The time of `before` alone is subtracted.

    Args:
        before: a barrier or some work; None: nothing.
        block: the block to time.
        linked: whether the block's first array depends on the result of `before`, so that it cannot start earlier.
    """
    if before is None:
        return block
    n_carry, n_constants = len(block.carry), len(before.constants)

    def turn(token, *rest, i):
        carry, constants = rest[:n_carry], rest[n_carry:]
        token = before.turn(token, *constants[:n_constants], i=i)
        if linked:
            carry = (_keep(carry[0], token), *carry[1:])
        return token, *as_tuple(block.turn(*carry, *constants[n_constants:], i=i))

    return dataclasses.replace(
        block,
        turn=turn,
        carry=[*before.carry, *block.carry],
        constants=[*before.constants, *block.constants],
        without=before,
    )
