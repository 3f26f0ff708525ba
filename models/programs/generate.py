"""Generation: prefill under one layout, decode under another, over the same cache and weights.

Prompts of different lengths run in passes of equal shapes, and weights and cache move between the two layouts. The
pass itself is in `models.decoder.decoder`; continuous batching of requests is in `serving`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache, cache_shardings, empty_cache
from toruslab.models.decoder.decoder import Tokens
from toruslab.models.decoder.parameters import abstract, everywhere, shardings
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.programs.program import Program
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.torus.mesh import AXES, Shape, attach


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A prefill program and a decode program over one mesh of devices.

    Args:
        config: the model.
        prefill, decode: layouts made for `shape`. If they place weights or cache differently, these move once, between
            the phases.
        shape, chip: the mesh, as for `partitioning.torus.mesh.attach`.
        batch: number of prompts.
        capacity: cached positions per sequence.
        chunk: new tokens per sequence in one prefill pass; longer prompts take several passes.
        sampler: how tokens are chosen.
        steps_per_call: most decode steps in one call of a program; a shorter program runs the remainder.
        itemsize: bytes per element of activations, and of weights and cache that are not int8: 4 or 2.
        int8, int8_cache: whether the matrices, and the cache, are int8.

    Raises:
        ValueError: sizes that a layout cannot divide, or a chunk that does not fit the cache.
    """

    config: ModelConfig
    prefill: Layout
    decode: Layout
    shape: Shape
    chip: str
    batch: int
    capacity: int
    chunk: int
    sampler: Sampler
    itemsize: int = 4
    steps_per_call: int = 1
    int8: bool = False
    int8_cache: bool = False

    def __post_init__(self):
        if self.chunk > self.capacity:
            raise ValueError(f"chunk={self.chunk} does not fit a cache of {self.capacity} positions")
        if self.steps_per_call < 1:
            raise ValueError(f"steps_per_call={self.steps_per_call} must be at least 1")
        _ = self.prefilling, self.decoding()  # they refuse sizes that a layout cannot divide

    @functools.cached_property
    def prefilling(self) -> Program:
        """The prefill pass of one chunk."""
        return self._program(self.prefill, self.chunk)

    @functools.cached_property
    def _decoding(self) -> dict[tuple[int, int | None], Program]:
        return {}

    def decoding(self, steps: int = 1, stop: int | None = None) -> Program:
        """The decode pass of `steps` steps; it ends early if all sequences have reached `stop`."""
        key = (steps, None if steps == 1 else stop)
        if key not in self._decoding:
            self._decoding[key] = self._program(self.decode, 1, *key)
        return self._decoding[key]

    def _program(self, layout: Layout, length: int, steps: int = 1, stop: int | None = None) -> Program:
        pass_ = Pass(
            batch=self.batch,
            length=length,
            capacity=self.capacity,
            itemsize=self.itemsize,
            weight_itemsize=1 if self.int8 else self.itemsize,
            int8_cache=self.int8_cache,
            steps=steps,
        )
        mesh = attach(self.shape, chip=self.chip, explicit=layout.explicit)
        return Program(config=self.config, layout=layout, mesh=mesh, pass_=pass_, sampler=self.sampler, stop=stop)

    def __call__(
        self,
        params: nnx.State,
        prompts: Sequence[np.ndarray],
        n_new: int,
        *,
        stop: int | None = None,
        each: Callable[[np.ndarray], None] = lambda ids: None,
    ) -> list[np.ndarray]:
        """Continues every prompt.

        Args:
            params: placed as the prefill layout says.
            prompts: `batch` arrays of token ids.
            n_new: most tokens to add.
            stop: an id that ends a sequence; it is not returned.
            each: called with the ids [B, steps] of every call of a program; meaningless after a sequence's stop.

        Returns:
            The new ids of every prompt.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, or a prompt that does not fit the cache with its
                new tokens.
        """
        self._check(prompts, n_new)
        lengths = np.array([len(p) for p in prompts], np.int32)
        requests = np.arange(self.batch, dtype=np.int32)
        mesh, dtype = self.prefilling.mesh, self.prefilling.dtype
        cache = empty_cache(self.config, self.batch, self.capacity, self.prefill, mesh, dtype, self.int8_cache)

        picked = np.zeros(self.batch, np.int32)
        for begin in range(0, int(lengths.max()), self.chunk):
            # A sequence's last chunk slides back to be full. It runs again until all prompts are done, which writes
            # the same values to the same places. The last pass picks the first new token of every sequence.
            starts = np.maximum(np.minimum(begin, lengths - self.chunk), 0)
            now = np.minimum(lengths - starts, self.chunk)
            ids = np.zeros((self.batch, self.chunk), np.int32)
            for i, prompt in enumerate(prompts):
                ids[i, : now[i]] = prompt[starts[i] : starts[i] + now[i]]
            picked, cache = self._run(self.prefilling, params, ids, starts, now, cache, requests)

        params, cache = self._hand_over(params, cache, self.decoding())
        columns = picked[:, None]
        each(columns)
        while (ran := columns.shape[1] - 1) < n_new - 1:
            if stop is not None and all((columns == stop).any(axis=1)):
                break
            program = self.decoding(min(self.steps_per_call, n_new - 1 - ran), stop)
            ones = np.ones(self.batch, np.int32)
            out, cache = self._run(program, params, columns[:, -1:], lengths + ran, ones, cache, requests)
            columns = np.concatenate([columns, out.reshape(self.batch, -1)], axis=1)
            each(out.reshape(self.batch, -1))
        ends = [int(np.flatnonzero(ids == stop)[0]) if stop in ids else len(ids) for ids in columns]
        return [ids[:end] for ids, end in zip(columns, ends, strict=True)]

    def _check(self, prompts: Sequence[np.ndarray], n_new: int) -> None:
        if len(prompts) != self.batch:
            raise ValueError(f"{len(prompts)} prompts for batch={self.batch}")
        if n_new < 1:
            raise ValueError(f"max_new_tokens={n_new} must be at least 1")
        for number, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {number} is empty")
            bad = np.flatnonzero((prompt < 0) | (prompt >= self.config.vocab))
            if len(bad):
                raise ValueError(
                    f"prompt {number}: token id {prompt[bad[0]]} is outside the vocabulary of {self.config.vocab}"
                )
            if len(prompt) + n_new - 1 > self.capacity:
                raise ValueError(
                    f"prompt {number} of {len(prompt)} tokens with {n_new} new ones is longer than "
                    f"the cache of {self.capacity} positions"
                )

    def _run(self, program: Program, params: nnx.State, ids, starts, lengths, cache: Cache, requests):
        mesh = program.mesh
        tokens = Tokens(*[everywhere(mesh, np.asarray(a, np.int32)) for a in (ids, starts, lengths)])
        out, cache = program(params, tokens, cache, everywhere(mesh, requests))
        return np.asarray(out), cache

    def _hand_over(self, params: nnx.State, cache: Cache, to: Program) -> tuple[nnx.State, Cache]:
        """Weights and cache as the decode layout places them. Arrays that are in place are not copied."""
        stored = cache_shardings(to.layout, to.mesh, self.int8_cache)
        wanted = shardings(abstract(self.config, to.dtype, to.int8)[1], to.layout, to.mesh)
        return jax.device_put((params, cache), (wanted, stored))


def batch_multiple(*layouts: Layout, shape: Shape) -> int:
    """The number whose multiples are the batches that all of the layouts can split.

    Example:
        >>> from toruslab.partitioning.layouts.variants import layout
        >>> batch_multiple(layout("ws2d", "batch", (2, 2, 2), 1), layout("wgx", "heads", (2, 2, 2), 1), shape=(2, 2, 2))
        8
    """
    sizes = dict(zip(AXES, shape, strict=True))
    splits = [
        math.prod(sizes[axis] for axis in axes_of(entries(spec)[0]))
        for layout in layouts
        for spec in (layout.cache, *layout.x[:1], *layout.tokens[-1:])
    ]
    return math.lcm(*splits)
