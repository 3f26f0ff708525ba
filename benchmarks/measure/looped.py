"""Times one building block of the decoder, on all devices at once, in a loop inside one program.

The program runs the block n times, with n an argument, so that the time of one turn excludes dispatch. The output of a
turn is an input of the next, so that the compiler cannot drop a turn. `benchmarks.measure.building_blocks` lists the
blocks.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.benchmarks.measure.timing import Timing, idle, interleaved, stepper
from toruslab.models.decoder.parameters import everywhere, initial
from toruslab.models.presets import model
from toruslab.models.programs.program import Program
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.torus.calibrated import Sample
from toruslab.partitioning.torus.mesh import AXES

Turn = Callable[..., Any]
SHORTEST_S = 0.006
"""Seconds that a repetition takes, unless one turn takes longer."""
Arrays = dict[tuple[tuple[int, ...], str], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A building block.

    Args:
        sample: describes the block (`what`, `dtype`, `sizes`, `axes`, `at`), without seconds.
        turn: `turn(*carry, *constants, i=i) -> carry`, on a device's own arrays. Collectives name mesh axes.
        carry: shapes and dtypes of the arrays that go from turn to turn.
        constants: shapes and dtypes of the arrays that every turn reads.
        without: the block without what is measured, if that cannot run alone. Its time is subtracted.
    """

    sample: Sample
    turn: Turn
    carry: Sequence[jax.ShapeDtypeStruct]
    constants: Sequence[jax.ShapeDtypeStruct] = ()
    without: "Block | None" = None


class Timed:
    """A compiled and warm block, and its times so far.

    Args:
        block: to time.
        mesh: all of its devices run the block.
        constants: arrays by shape and dtype, shared with other blocks. New ones are added.
    """

    def __init__(self, block: Block, mesh: Mesh, constants: Arrays | None = None):
        self.block, self.mesh = block, mesh
        shared = {} if constants is None else constants
        for s in block.constants:
            if (s.shape, str(s.dtype)) not in shared:
                shared[s.shape, str(s.dtype)] = _fill(mesh, [s])[0]
        every = P(AXES)

        def program(n, carry, constants):
            mine = jax.tree.map(lambda a: a[0], (carry, constants))
            carry = lax.fori_loop(0, n, lambda i, c: as_tuple(block.turn(*c, *mine[1], i=i)), tuple(mine[0]))
            return jax.tree.map(lambda a: a[None], carry)

        run = jax.shard_map(program, mesh=mesh, in_specs=(P(), every, every), out_specs=every, check_vma=False)
        with jax.set_mesh(mesh):
            self.arrays = [_fill(mesh, block.carry), tuple(shared[s.shape, str(s.dtype)] for s in block.constants)]
            self.run = jax.jit(run, donate_argnums=1).lower(self._count(0), *self.arrays).compile()
            self.times_s: list[float] = []
            self.none_s = self._agreed(min(self._seconds(0) for _ in range(3)))
            self.n = self._turns()

    def _turns(self) -> int:
        n, enough = 1, max(SHORTEST_S, 3 * self.none_s)
        while True:
            taken = self._agreed(self._seconds(n) - self.none_s)
            if taken > enough / 2:
                return max(1, round(n * enough / taken))
            n = max(2 * n, int(n * enough / max(taken, enough / 64) / 2))

    def _agreed(self, value: float) -> float:
        """The first process's value: all processes must run the same number of turns."""
        return float(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value

    def _count(self, n: int):
        return everywhere(self.mesh, np.array(n, np.int32))

    def _seconds(self, n: int) -> float:
        count = self._count(n)
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.arrays[0] = self.run(count, *self.arrays)
        jax.block_until_ready(self.arrays[0])
        return time.perf_counter() - started

    def repeat(self) -> None:
        """Times one turn once more."""
        empty = self._seconds(0)
        self.times_s.append(max(self._seconds(self.n) - empty, 0.0) / self.n)

    def sample(self, without: "Timed | None" = None) -> Sample:
        """The measured sample. The quartiles of the block `without` are subtracted, each from its own."""
        low, middle, high = _quartiles(self.times_s)
        less = _quartiles(without.times_s) if without else (0.0, 0.0, 0.0)
        figures = {
            "seconds": max(middle - less[1], 0.0),
            "low_s": max(low - less[0], 0.0),
            "high_s": max(high - less[2], 0.0),
        }
        return dataclasses.replace(self.block.sample, **figures, repeats=len(self.times_s))


def _quartiles(times_s: Sequence[float]) -> tuple[float, float, float]:
    timing = Timing(times_s=tuple(times_s))
    low, high = timing.quartiles_s
    return low, timing.median_s, high


def measure(blocks: Sequence[Block], mesh: Mesh, *, repeats: int, each: Callable[[str], None]):
    """Times all blocks in every round, so that a slow minute of the machine affects all of them.

    Args:
        blocks: to time. All are compiled before the first round.
        mesh: the devices.
        repeats: rounds.
        each: called with the block's kind after each compilation and each timing.

    Returns:
        Samples in the order of the blocks.
    """
    timed, baselines, constants = [], {}, {}
    for block in blocks:
        timed.append(Timed(block, mesh, constants))
        if block.without and id(block.without) not in baselines:
            baselines[id(block.without)] = Timed(block.without, mesh, constants)
        each(block.sample.what)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for one in (*baselines.values(), *timed):
                one.repeat()
                if one.block.sample.what not in ("work", "barrier"):
                    each(one.block.sample.what)
    finally:
        if collecting:
            gc.enable()
    return [one.sample(baselines.get(id(one.block.without))) for one in timed]


def dispatch(mesh: Mesh, repeats: int) -> Sample:
    """Times dispatch: calling an idle program with a decoder step's arguments and waiting for its results.

    No block's time includes it.
    """
    config = model("toy-s-1l")
    x, y, z = (mesh.shape[a] for a in AXES)
    whole = layout("replicated", "batch", (x, y, z), config.n_kv_heads)
    program = Program(config=config, layout=whole, mesh=mesh, pass_=Pass(batch=mesh.size, length=1, capacity=1))
    step = stepper(program, idle(program), initial(config, whole, mesh), np.zeros((mesh.size, 1), np.int32), 0)
    (timing,) = interleaved([step], repeats=20 * repeats, budget_s=20)
    low, middle, high = _quartiles(timing.times_s)
    numbers = {"seconds": middle, "low_s": low, "high_s": high, "repeats": len(timing.times_s)}
    sizes = {"arguments": len(jax.tree.leaves(program.arguments()))}
    return Sample(what="dispatch", dtype="f32", sizes=sizes, **numbers)


def as_tuple(value: Any) -> tuple:
    """A turn's result as a tuple of arrays."""
    return value if isinstance(value, tuple) else (value,)


def _fill(mesh: Mesh, shapes: Sequence[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    """Arrays of small numbers: one of each shape on every device."""
    sharding = NamedSharding(mesh, P(AXES))

    def make(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        part = np.full((1, *shape), 1 if jnp.issubdtype(dtype, jnp.integer) else 0.5, dtype)
        return jax.make_array_from_callback((mesh.size, *shape), sharding, lambda _: part)

    return tuple(make(s.shape, s.dtype) for s in shapes)
