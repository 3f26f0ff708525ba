"""Timing of passes. This file defines what "measured" means.

Programs are compiled and warmed up before the clock starts. All contenders run in turn, round after round, so that a
slow moment of the machine affects all of them. No repetition is dropped.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.models.decoder.cache import cache_shardings, empty_cache
from toruslab.models.decoder.decoder import Tokens
from toruslab.models.decoder.parameters import everywhere
from toruslab.models.programs.program import Program
from toruslab.models.programs.training import Trainer, TrainState

RunOnce = Callable[[], None]
"""Calls a program once and waits for it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of every repetition, in their order."""

    times_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.times_s) < 2:
            return (self.median_s, self.median_s)
        low, _, high = statistics.quantiles(self.times_s, n=4, method="inclusive")
        return (low, high)

    def per(self, n: int) -> "Timing":
        """The timing of one step, if a call takes `n` steps."""
        return Timing(times_s=tuple(t / n for t in self.times_s))

    def numbers(self) -> dict:
        """The fields of a row.

        Median, quartiles, the spread that holds 90% of the repetitions, extremes, all times, and the machine's load
        now. `outliers` counts times more than three interquartile ranges above the third quartile; they stay in.
        """
        low, high = self.quartiles_s
        return {
            "latency_s": self.median_s,
            "quartiles_s": [low, high],
            "spread_s": [float(t) for t in np.percentile(self.times_s, [5, 95])],
            "min_s": min(self.times_s),
            "max_s": max(self.times_s),
            "repeats": len(self.times_s),
            "outliers": sum(t > high + 3 * (high - low) for t in self.times_s),
            "load_1m": round(os.getloadavg()[0], 2),
            "times_s": list(self.times_s),
        }


def stepper(
    program: Program, executable: jax.stages.Compiled, params: nnx.State, ids: np.ndarray, start: int
) -> RunOnce:
    """A function that calls a program once and waits for it. Each call gets the cache of the previous call.

    Args:
        program: describes the pass.
        executable: the compiled program, or `idle`.
        params: placed as the layout wants them.
        ids: [B, L] tokens.
        start: position of the first token of every sequence.
    """
    batch, length = ids.shape
    mesh = program.mesh
    tokens = Tokens(
        everywhere(mesh, ids.astype(np.int32)),
        everywhere(mesh, np.full(batch, start, np.int32)),
        everywhere(mesh, np.full(batch, length, np.int32)),
    )
    requests = everywhere(mesh, np.arange(batch, dtype=np.int32))
    pass_, layout = program.pass_, program.layout
    held = [empty_cache(program.config, batch, pass_.capacity, layout, mesh, program.dtype, pass_.int8_cache)]

    def step() -> None:
        with jax.set_mesh(mesh):
            out, held[0] = executable(params, tokens, held[0], requests)
        jax.block_until_ready((out, held[0]))

    return step


def training_stepper(trainer: Trainer, executable: jax.stages.Compiled, state: TrainState, ids: np.ndarray) -> RunOnce:
    """A function that takes one training step and waits for it. Each call gets the state of the previous call.

    Args:
        trainer: describes the step.
        executable: the compiled step.
        state: of `trainer.initial`, or of training. It is donated to the first call.
        ids: [B, L + 1] tokens.
    """
    mesh, held, placed = trainer.mesh, [state], everywhere(trainer.mesh, ids.astype(np.int32))

    def step() -> None:
        with jax.set_mesh(mesh):
            held[0], report = executable(held[0], placed)
        jax.block_until_ready((held[0], report))

    return step


def idle(program: Program) -> jax.stages.Compiled:
    """A program with the same arguments and results that does nothing. Its time is that of dispatch."""
    steps, layout, mesh = program.pass_.steps, program.layout, program.mesh

    def nothing(params, tokens, cache, requests):
        return tokens.ids[:, 0] if steps == 1 else jnp.tile(tokens.ids, (1, steps)), cache

    cached = cache_shardings(layout, mesh, program.pass_.int8_cache)
    results = (NamedSharding(mesh, P()), cached)
    with jax.set_mesh(mesh):
        run = jax.jit(nothing, donate_argnums=2, out_shardings=results, keep_unused=True)
        return run.lower(*program.arguments()).compile()


def interleaved(steps: Sequence[RunOnce], *, repeats: int, budget_s: float, least: int = 3) -> list[Timing]:
    """Times all steps in turn, round after round.

    Args:
        steps: the contenders. Each runs once before the clock starts; its next run is its first repetition.
        repeats: repetitions of each contender within its budget.
        budget_s: about how many seconds one contender may take. A slow one gets fewer repetitions.
        least: fewest repetitions.
    """
    if not steps:
        return []
    warm = []
    for step in steps:
        step()
        warm.append(_seconds(step))
    rounds = [max(least, min(repeats, int(budget_s / w))) for w in warm]
    if jax.process_count() > 1:  # all processes must run the same programs equally often
        rounds = [int(r) for r in multihost_utils.broadcast_one_to_all(np.array(rounds))]
    times = [[w] for w in warm]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(1, max(rounds)):
            for step, taken, n in zip(steps, times, rounds, strict=True):
                if i < n:
                    taken.append(_seconds(step))
    finally:
        if collecting:
            gc.enable()
    return [Timing(times_s=tuple(t)) for t in times]


def _seconds(step: RunOnce) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
