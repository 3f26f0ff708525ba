"""Programs: the decoder's pass under a layout, ready to lower, compile and run.

A program is one pass, or several decode steps in a loop, with static sizes and a donated cache. The collectives that it
should have are in `partitioning.plan.plan`; `partitioning.hlo.compare` compares them with the compiled ones.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache, abstract_cache, cache_shardings
from toruslab.models.decoder.decoder import Tokens
from toruslab.models.decoder.parameters import abstract, placed, shardings
from toruslab.models.decoder.sampling import Sampler
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.torus.mesh import AXES, Shape

GREEDY = Sampler()
AHEAD = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
"""Options of XLA:TPU for a layout that prefetches. Without them libtpu 0.0.42 gathers before it multiplies, even if
nothing needs the gathered weights yet."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program with its text, memory and warnings. Bytes are per chip."""

    executable: jax.stages.Compiled
    text: str
    compile_s: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, jitted: Any, arguments: Sequence[Any], mesh: Mesh, *, text: bool = True) -> "Compiled":
        """Compiles `jitted` for shapes with their shardings.

        Args:
            text: read the program's text too, which takes a while.

        Raises:
            jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED if the compiler knows that the program does not fit the
                memory.
        """
        started = time.perf_counter()
        with captured_stderr() as said, jax.set_mesh(mesh):
            executable = jitted.lower(*arguments).compile()
        took = time.perf_counter() - started
        memory = executable.memory_analysis()
        return cls(
            executable=executable,
            text=(executable.as_text() or "") if text else "",
            compile_s=took,
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes,
            warnings=tuple(line for line in said if "rematerialization" in line),
        )

    @property
    def peak_bytes(self) -> int:
        """Arguments, results and temporaries. Donated buffers count once."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes - self.aliased_bytes


@dataclass(frozen=True, kw_only=True)
class Program:
    """One pass of a model under a layout on a mesh.

    Args:
        config, layout, pass_: what runs; the layout must be made for the mesh's shape.
        mesh: devices, with Explicit axes if `layout.explicit`, else with Auto axes.
        sampler: how tokens are chosen; unused with `pass_.all_logits`. Plans know greedy sampling only.
        stop: with several steps in a call, the id that ends a sequence. An ended sequence repeats it, and the call ends
            when all sequences have ended. None: all steps run.

    Raises:
        ValueError: sizes that the layout cannot divide, or a stop id of a single step.
    """

    config: ModelConfig
    layout: Layout
    mesh: Mesh
    pass_: Pass
    sampler: Sampler = GREEDY
    stop: int | None = None

    def __post_init__(self):
        check(self.layout, self.config, self.pass_, self.shape)
        if self.stop is not None and self.pass_.steps == 1:
            raise ValueError(f"stop={self.stop} is for several steps in one call")

    @property
    def shape(self) -> Shape:
        x, y, z = (self.mesh.shape[a] for a in AXES)
        return (x, y, z)

    @property
    def dtype(self):
        """The dtype of activations, and of weights and cache that are not int8."""
        return jnp.float32 if self.pass_.itemsize == 4 else jnp.bfloat16

    @property
    def int8(self) -> bool:
        """Whether the matrices are int8."""
        return self.pass_.weight_itemsize == 1

    @functools.cached_property
    def jitted(self) -> Any:
        """`(params, tokens, cache, requests) -> (ids [B] or logits [R, V'], cache)`; the cache is donated.

        With several steps the ids are [B, steps]. Column i has the ids that a call of one step would pick at
        `starts + i`.
        """
        graph, _ = abstract(self.config, self.dtype, self.int8)

        def one(params: nnx.State, tokens: Tokens, cache: Cache, requests: jax.Array):
            decoder = nnx.merge(graph, params)
            logits, cache = decoder(tokens, cache, self.layout, all_logits=self.pass_.all_logits)
            if self.pass_.all_logits:
                return logits, cache
            return self.sampler(logits, requests, tokens.starts + tokens.lengths, self.layout), cache

        def several(params: nnx.State, tokens: Tokens, cache: Cache, requests: jax.Array):
            def goes_on(state):
                i, ids, _, _ = state
                return i < self.pass_.steps if self.stop is None else (i < self.pass_.steps) & jnp.any(ids != self.stop)

            def step(state):
                i, ids, found, cache = state
                now = Tokens(ids[:, None], tokens.starts + i, tokens.lengths)
                picked, cache = one(params, now, cache, requests)
                if self.stop is not None:
                    picked = jnp.where(ids == self.stop, ids, picked)
                return i + 1, picked, lax.dynamic_update_slice(found, picked[:, None], (jnp.zeros_like(i), i)), cache

            filled = jnp.full((self.pass_.batch, self.pass_.steps), self.stop or 0, jnp.int32)
            _, _, found, cache = lax.while_loop(goes_on, step, (jnp.int32(0), tokens.ids[:, 0], filled, cache))
            return found, cache

        run = one if self.pass_.steps == 1 else several
        out = None if self.pass_.all_logits else NamedSharding(self.mesh, P())
        stored = cache_shardings(self.layout, self.mesh, self.pass_.int8_cache)
        ahead = self.layout.prefetch and self.mesh.devices.flat[0].platform == "tpu"
        options = AHEAD if ahead else None
        return jax.jit(run, donate_argnums=2, out_shardings=(out, stored), compiler_options=options)

    def __call__(self, params: nnx.State, tokens: Tokens, cache: Cache, requests: jax.Array):
        """Runs the pass; the first call compiles it. The cache is consumed."""
        with jax.set_mesh(self.mesh):
            return self.jitted(params, tokens, cache, requests)

    def arguments(self) -> tuple[nnx.State, Tokens, Cache, jax.ShapeDtypeStruct]:
        """The arguments as shapes with their shardings; nothing is allocated."""
        _, params = abstract(self.config, self.dtype, self.int8)
        params = placed(params, shardings(params, self.layout, self.mesh))
        whole, pass_ = NamedSharding(self.mesh, P()), self.pass_

        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

        sizes = (self.config, pass_.batch, pass_.capacity)
        cache = abstract_cache(*sizes, self.layout, self.mesh, self.dtype, pass_.int8_cache)
        by_sequence = integers(pass_.batch)
        return params, Tokens(integers(pass_.batch, pass_.length), by_sequence, by_sequence), cache, by_sequence

    def compile(self, *, text: bool = True) -> Compiled:
        """The pass, compiled ahead of time from shapes alone. See `Compiled.of`."""
        return Compiled.of(self.jitted, self.arguments(), self.mesh, text=text)


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collects the lines written to file descriptor 2, XLA's own warnings included.

    Lines are also passed on as they come, except notes on rematerialisation, which the caller reports.
    """
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    read, write = os.pipe()

    def tee() -> None:
        with os.fdopen(read, "rb") as said:
            for line in said:
                lines.append(line.decode(errors="replace").rstrip("\n"))
                if "rematerialization" not in lines[-1]:
                    os.write(saved, line)

    thread = threading.Thread(target=tee)
    thread.start()
    os.dup2(write, 2)
    os.close(write)
    try:
        yield lines
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        thread.join()
        os.close(saved)
