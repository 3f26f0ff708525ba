"""Remakes the corpus beside it: optimised HLO of small programs, `PROGRAM-DTYPE-CHIP-MESH-jaxVERSION.txt`.

    python tests/partitioning/hlo/texts/make.py cpu | v4:2x2x2 | v4:4x4x4 | v5e:4x4 | v6e:4x4

once for each; the TPU targets need libtpu, none needs a TPU. Which files come out depends on the version of JAX, and
`test_hlo.py` says what is in each: the programs and their sizes are repeated there on purpose.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.partitioning.torus.described import describe
from toruslab.partitioning.torus.mesh import Slice

YZ = ("y", "z")
Lowered = Any


def gather(a: jax.Array, axes: str | tuple[str, ...], dimension: int) -> jax.Array:
    return lax.all_gather(a, axes, axis=dimension, tiled=True)


def lower(
    f: Callable[..., Any], mesh: Mesh, specs: tuple[P, ...], out: Any, *args: tuple[tuple[int, ...], Any]
) -> Lowered:
    """Lowers `f`, which sees one device's part of each argument."""
    avals = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for (s, d), p in zip(args, specs, strict=True)]
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)).lower(*avals)


def kinds(mesh: Mesh, dtype: Any) -> Lowered:
    """One collective of each kind."""
    n = mesh.shape["y"]

    def f(a: jax.Array) -> tuple[jax.Array, ...]:
        with jax.named_scope("gather_y"):
            g = gather(a, "y", 1)
        with jax.named_scope("gather_yz"):
            h = gather(a * 2, YZ, 1)
        with jax.named_scope("scatter_x"):
            s = lax.psum_scatter(jnp.sin(g), "x", scatter_dimension=0, tiled=True)
        with jax.named_scope("sum_xz"):
            r = lax.psum(jnp.cos(s), ("x", "z"))
        with jax.named_scope("all_to_all_z"):
            t = lax.all_to_all(jnp.exp(a), "z", 1, 0, tiled=True)
        with jax.named_scope("shift_y"):
            p = lax.ppermute(t, "y", [(i, (i + 1) % n) for i in range(n)])
        return g, h, s, r, t, p

    return lower(f, mesh, (P("x", YZ),), P(("x", "y", "z")), ((256, 512), dtype))


def loops(mesh: Mesh, dtype: Any) -> Lowered:
    """A scan of six layers around a loop of three."""

    def inner(_: jax.Array, c: jax.Array) -> jax.Array:
        with jax.named_scope("inner"):
            return lax.psum(jnp.tanh(c * (1 + c)), "y") / c.dtype.type(2)

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope("weights"):
            w = gather(w, "x", 0)
        with jax.named_scope("out"):
            h = gather(h @ w, YZ, 1)
        return lax.fori_loop(0, 3, inner, h), None

    def f(a: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(layer, a, w)[0]

    return lower(f, mesh, (P(), P(None, "x", YZ)), P(), ((64, 512), dtype), ((6, 512, 512), dtype))


def branches(mesh: Mesh, dtype: Any) -> Lowered:
    """A conditional of three branches with one, two and no collectives."""

    def f(a: jax.Array, n: jax.Array) -> jax.Array:
        two = lambda b: lax.psum(lax.psum(b, "y"), "z") * 2  # noqa: E731
        return lax.switch(n, [lambda b: lax.psum(jnp.sin(b), "x"), two, lambda b: b], a)

    return lower(f, mesh, (P("x", "y"), P()), P("x", "y"), ((64, 512), dtype), ((), jnp.int32))


def merged(mesh: Mesh, dtype: Any) -> Lowered:
    """Three sums of different sizes, which the compiler merges."""

    def f(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        with jax.named_scope("one"):
            p = lax.psum(a, "z")
        with jax.named_scope("two"):
            q = lax.psum(b, "z")
        with jax.named_scope("three"):
            return p, q, lax.psum(jnp.sum(b), "z")

    specs = (P("x", "y"), P("x", "y"))
    return lower(f, mesh, specs, (*specs, P()), ((64, 512), dtype), ((16, 32), dtype))


def scatter(mesh: Mesh, dtype: Any) -> Lowered:
    """A partial sum, scattered by an explicit reduce-scatter."""

    def f(a: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("scatter"):
            return jnp.sin(lax.psum_scatter(a @ w, "x", scatter_dimension=1, tiled=True))

    specs = (P(None, "x"), P("x", YZ))
    return lower(f, mesh, specs, P(None, ("y", "z", "x")), ((64, 512), dtype), ((512, 1024), dtype))


def reshard(mesh: Mesh, dtype: Any) -> Lowered:
    """The same by `reshard`: often an all-reduce of which a slice is used."""

    def f(a: jax.Array, w: jax.Array) -> jax.Array:
        h = jnp.einsum("be,ef->bf", a, w, out_sharding=P(None, YZ, unreduced=frozenset({"x"})))
        return jnp.sin(jax.sharding.reshard(h, P(None, ("y", "z", "x"))))

    with jax.set_mesh(mesh):
        a = jax.ShapeDtypeStruct((64, 512), dtype, sharding=NamedSharding(mesh, P(None, "x")))
        w = jax.ShapeDtypeStruct((512, 1024), dtype, sharding=NamedSharding(mesh, P("x", YZ)))
        return jax.jit(f).lower(a, w)


def unbounded(mesh: Mesh, dtype: Any) -> Lowered:
    """A loop whose trip count is an argument."""

    def f(a: jax.Array, n: jax.Array) -> jax.Array:
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, lax.psum(jnp.sin(c[1]), "z")), (0, a))[1]

    return lower(f, mesh, (P("x", "y"), P()), P("x", "y"), ((64, 512), dtype), ((), jnp.int32))


def weights(mesh: Mesh, dtype: Any) -> Lowered:
    """Eight layers that gather their weights, large enough that XLA:TPU overlaps a gather with a matmul."""

    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        with jax.named_scope("in"):
            u = jnp.tanh(h @ gather(gather(w[0], "x", 0), YZ, 1))
        with jax.named_scope("out"):
            return h + u @ gather(gather(w[1], "x", 1), YZ, 0), None

    def f(h: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
        return lax.scan(layer, h, (w_in, w_out))[0]

    rows = P(("x", "y", "z"), None)
    specs = (rows, P(None, "x", YZ), P(None, YZ, "x"))
    return lower(f, mesh, specs, rows, ((2048, 4096), dtype), ((8, 4096, 16384), dtype), ((8, 16384, 4096), dtype))


def stationary(mesh: Mesh, dtype: Any) -> Lowered:
    """Eight 2D weight-stationary layers, large enough that XLA:TPU pads a reduce-scatter."""

    def layer(h: jax.Array, w: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        with jax.named_scope("gather_yz"):
            u = gather(h, YZ, 1) @ w[0]
        with jax.named_scope("scatter_x"):
            u = jnp.tanh(lax.psum_scatter(u, "x", scatter_dimension=1, tiled=True))
        with jax.named_scope("gather_x"):
            u = gather(u, "x", 1) @ w[1]
        with jax.named_scope("scatter_yz"):
            return h + lax.psum_scatter(u, YZ, scatter_dimension=1, tiled=True), None

    def f(h: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
        return lax.scan(layer, h, (w_in, w_out))[0]

    columns = P(None, ("x", "y", "z"))
    specs = (columns, P(None, "x", YZ), P(None, YZ, "x"))
    return lower(f, mesh, specs, columns, ((4096, 4096), dtype), ((8, 4096, 16384), dtype), ((8, 16384, 4096), dtype))


BF16, F32 = jnp.bfloat16, jnp.float32
CPU = [(kinds, BF16), (loops, BF16), (branches, F32), (merged, BF16), (scatter, F32), (reshard, BF16), (unbounded, F32)]
TARGETS: dict[str, tuple[tuple[int, int, int], list[tuple[Callable[[Mesh, Any], Lowered], Any]]]] = {
    "cpu": ((2, 2, 2), CPU),
    "cpu:1x4x2": ((1, 4, 2), CPU[:3]),
    "v4:2x2x2": ((2, 2, 2), [(branches, BF16), (scatter, F32), (reshard, BF16)]),
    "v4:4x4x4": ((4, 4, 4), [(kinds, BF16), (loops, F32), (merged, BF16), (reshard, BF16)]),
    "v5e:4x4": ((4, 4, 1), [(scatter, BF16), (unbounded, F32), (weights, BF16)]),
    "v6e:4x4": ((4, 4, 1), [(stationary, BF16)]),
}


def devices(target: str) -> list[Any]:
    return jax.devices() if target.startswith("cpu") else describe(Slice.parse(target))


def strip(text: str) -> str:
    """The text without the names of files and lines."""
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:\d+ .*\n)*", "", text)
    text = re.sub(r" ?(stack_frame_id|source_line|source_end_line|source_column|source_end_column)=\d+", "", text)
    return re.sub(r' ?source_file="[^"]*"', "", text)


def main(target: str) -> None:
    dims, programs = TARGETS[target]
    mesh = Mesh(np.array(devices(target)).reshape(dims), ("x", "y", "z"), axis_types=(AxisType.Explicit,) * 3)
    version = ".".join(jax.__version__.split(".")[:2])
    for program, dtype in programs:
        text = strip(program(mesh, dtype).compile().as_text())
        short = {"bfloat16": "bf16", "float32": "f32"}[jnp.dtype(dtype).name]
        chip = target.partition(":")[0]
        name = f"{program.__name__}-{short}-{chip}-{'x'.join(map(str, dims))}-jax{version}.txt"
        (Path(__file__).parent / name).write_text(text)
        print(name, len(text))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main(sys.argv[1])
