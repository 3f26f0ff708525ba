"""The checks that every layout must pass. A layout added to `LAYOUTS` inherits all of them.

- `model`, `case`: toy models with the reference's logits (`models.decoder.reference`: NumPy, float64).
- `Bench`: a toy model under one layout on one mesh, with its compiled programs.
- `check_full_pass` and the other checks: what a bench must compute. `CHECKS` and `SHORT_CHECKS` list them.

Toy sizes differ from each other and from every axis of a mesh, so that a mix-up of dimensions shows. Which layouts,
models and meshes are combined is up to the tests.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tests.canonical import unpack
from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache, cache_shape, cache_spec, empty_cache
from toruslab.models.decoder.decoder import Tokens
from toruslab.models.decoder.parameters import everywhere, load
from toruslab.models.decoder.quantise import dequantise, quantise
from toruslab.models.decoder.reference import init
from toruslab.models.decoder.reference import logits as reference_logits
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.programs.program import GREEDY, Compiled, Program
from toruslab.models.weights.packing import pack
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.compare import compare
from toruslab.partitioning.hlo.cycles import copies
from toruslab.partitioning.hlo.text import parse
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.layouts.layout import NoAxisLeft
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.torus.mesh import AXES, Shape, attach

TOLERANCE = {"float32": 1e-5}
"""Dtype -> the largest error of a logit as a share of the largest logit. It is never raised to make a test pass."""

MESHES: tuple[Shape, ...] = ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4), (4, 2, 1))
RINGS = (
    "ws1d+biring",
    "ws2d+ring",
    "ws2d+biring",
    "wgx+ring",
    "wgx+biring",
    "wgxy+ring",
    "wgxyz+biring",
    "wgx+prefetch",
    "wgxyz+ring+prefetch",
)
"""Layouts with looped collectives and prefetching, one of each kind. `test_rings` tests the rings alone."""
BATCH, TOTAL, CHUNK, CAPACITY = 8, 7, 3, 11
"""Sequences, tokens of each, tokens of a prefill chunk, and positions of the cache. Only the cache has a dimension
of 11, so `Bench.check` knows copies of it by their sizes."""


def model(block: str, kv_heads: int, mlp: str = "swiglu") -> ModelConfig:
    """A toy model. It has 16 heads, so that eight chips can split them in two ways, and three layers in a loop."""
    return ModelConfig(
        name=f"{block}-{kv_heads}",
        n_layers=3,
        d_model=40,
        d_ff=96,
        n_heads=16,
        d_head=6,
        n_kv_heads=kv_heads,
        vocab=91,
        block=block,  # pyright: ignore[reportArgumentType]
        mlp=mlp,  # pyright: ignore[reportArgumentType]
        tied=block == "parallel",
    )


def legal(names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """All pairs of a layout and an attention, "heads" or "batch", that the layout allows."""
    pairs = []
    for name in names or LAYOUTS:
        for attention in ("heads", "batch"):
            try:
                layout(name, attention, (2, 2, 2), 1)
            except NoAxisLeft:
                pass
            else:
                pairs.append((name, attention))
    return pairs


@functools.lru_cache(maxsize=32)
def case(config: ModelConfig) -> tuple[dict, np.ndarray, np.ndarray]:
    """Weights, ids [BATCH, TOTAL], and logits [BATCH, TOTAL, V] that the reference computes one sequence at a time."""
    weights = init(config, 0)
    ids = np.random.default_rng(1).integers(0, config.vocab, (BATCH, TOTAL)).astype(np.int32)
    return weights, ids, np.stack([reference_logits(config, weights, row) for row in ids])


@functools.lru_cache(maxsize=32)
def rounded(config: ModelConfig) -> tuple[dict, np.ndarray]:
    """The weights after rounding to int8 and back, and the reference's logits [BATCH, TOTAL, V] with them."""
    weights, ids, _ = case(config)
    seen = unpack(config, dequantise(quantise(pack(config, weights), np.float64)))
    return seen, np.stack([reference_logits(config, seen, row) for row in ids])


@dataclass
class Bench:
    """A model under one layout on one mesh. Each of its programs is compiled once and then checked.

    Args:
        config: a toy model, from `model`.
        name, attention: the layout.
        shape: extents (X, Y, Z) of the mesh.
        int8: whether the weights are int8. Activations are float32 in any case.
        int8_cache: whether the cache is int8.
    """

    config: ModelConfig
    name: str
    attention: str
    shape: Shape
    int8: bool = False
    int8_cache: bool = False

    def __post_init__(self):
        self.layout = layout(self.name, self.attention, self.shape, self.config.n_kv_heads)
        self.mesh = attach(self.shape, chip="cpu", explicit=self.layout.explicit)
        self.params = load(self.config, case(self.config)[0], self.layout, self.mesh, int8=self.int8)
        self.compiled: dict[tuple[int, bool], Compiled] = {}
        self.several: dict[tuple[Sampler, int, int | None], Compiled] = {}

    @functools.cached_property
    def empty(self) -> Cache:
        return empty_cache(self.config, BATCH, CAPACITY, self.layout, self.mesh, int8=self.int8_cache)

    def cache(self) -> Cache:
        """An empty cache of its own: programs write into the one that they are given."""
        return jax.tree.map(jnp.copy, self.empty)

    def expected(self, cache: Cache) -> np.ndarray:
        """The reference's logits [BATCH, TOTAL, V].

        With an int8 cache, the reference attends to the integers and scales in `cache`, so that rounding makes no
        difference. `check_rounding` compares the integers with the exact keys and values.
        """
        if not self.int8_cache:
            return rounded(self.config)[1] if self.int8 else case(self.config)[2]
        held, ids = [np.asarray(a) for a in cache], case(self.config)[1]
        weights = rounded(self.config)[0] if self.int8 else case(self.config)[0]

        def row(number: int) -> np.ndarray:
            def reads(layer: int, *floats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                k, v = (
                    np.where(scales[..., None] > 0, integers.astype(float) * scales[..., None], exact)
                    for exact, (integers, scales) in zip(floats, written(held, layer, number), strict=True)
                )
                return k, v

            return reference_logits(self.config, weights, ids[number], reads)

        return np.stack([row(number) for number in range(BATCH)])

    def pass_(self, length: int, **more) -> Pass:
        sizes = {"batch": BATCH, "length": length, "capacity": CAPACITY}
        return Pass(**sizes, weight_itemsize=1 if self.int8 else 4, int8_cache=self.int8_cache, **more)

    def program(self, length: int, all_logits: bool) -> Compiled:
        """The program of one pass over `length` tokens. It returns all logits, or else the sampled ids."""
        if (length, all_logits) not in self.compiled:
            pass_ = self.pass_(length, all_logits=all_logits)
            program = Program(config=self.config, layout=self.layout, mesh=self.mesh, pass_=pass_)
            compiled = program.compile()
            self.check(compiled, pass_)
            self.compiled[length, all_logits] = compiled
        return self.compiled[length, all_logits]

    def steps(self, n: int, stop: int | None = None, sampler: Sampler = GREEDY) -> Compiled:
        """The program of `n` decode steps in one call. It is checked if greedy: plans are for greedy sampling."""
        if n == 1 and sampler == GREEDY:
            return self.program(1, False)
        stop = stop if n > 1 else None
        if (sampler, n, stop) not in self.several:
            pass_ = self.pass_(1, steps=n)
            sizes = {"config": self.config, "layout": self.layout, "mesh": self.mesh, "pass_": pass_}
            compiled = Program(**sizes, sampler=sampler, stop=stop).compile()
            if sampler == GREEDY:
                self.check(compiled, pass_)
            self.several[sampler, n, stop] = compiled
        return self.several[sampler, n, stop]

    def check(self, compiled: Compiled, pass_: Pass) -> None:
        """The program must have exactly the planned collectives, no rematerialisation, and no copy of the cache."""
        if not self.layout.explicit:
            return
        module = parse(compiled.text)
        collectives = read(module, dict(zip(AXES, self.shape, strict=True)), unknown_trips=pass_.steps)
        wrong = [
            m
            for m in compare(plan(self.layout, self.config, pass_, self.shape), collectives, steps=pass_.steps)
            if m.verdict != "as planned"
        ]
        assert not wrong, wrong
        assert not compiled.warnings, compiled.warnings
        cache = NamedSharding(self.mesh, cache_spec(self.layout))
        shard = cache.shard_shape(cache_shape(self.config, BATCH, CAPACITY))
        for held, itemsize in ((shard, 1), (shard[:-1], 4)) if self.int8_cache else ((shard, 4),):
            found = copies(module, itemsize * math.prod(held), unknown_trips=pass_.steps)
            copied = [c.dims for c in found if _long(c.dims) == _long(held)]
            assert not copied, f"the cache is copied: {copied}"

    def run(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, cache: Cache, *, all_logits: bool = True):
        """Runs one pass: logits [B, L, V] or, without `all_logits`, sampled ids [B]; and the cache after it."""
        batch, length = ids.shape
        tokens = Tokens(*[everywhere(self.mesh, np.asarray(a, np.int32)) for a in (ids, starts, lengths)])
        requests = everywhere(self.mesh, np.arange(batch, dtype=np.int32))
        with jax.set_mesh(self.mesh):
            out, cache = self.program(length, all_logits).executable(self.params, tokens, cache, requests)
        out = np.asarray(out)
        return (out.reshape(batch, length, -1)[..., : self.config.vocab] if all_logits else out), cache

    def decode(
        self, calls: Sequence[int], stop: int | None = None, sampler: Sampler = GREEDY
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decodes after a prefill of rows with different lengths.

        Args:
            calls: the number of steps of each call.
            stop: the id after which a row gets nothing else.
            sampler: how ids are picked.

        Returns:
            Ids [B, sum of calls], and K of the cache after them, [n_layers, B, K, S, Q].
        """
        _, ids, _ = case(self.config)
        rows, starts = np.arange(BATCH), 1 + np.arange(BATCH) % CHUNK
        _, cache = self.run(ids[:, :CHUNK], np.zeros(BATCH), starts, self.cache())
        last, found = ids[rows, starts], []
        for n in calls:
            tokens = [np.asarray(a, np.int32) for a in (last[:, None], starts, np.ones(BATCH))]
            tokens = Tokens(*[everywhere(self.mesh, a) for a in tokens])
            requests = everywhere(self.mesh, np.arange(BATCH, dtype=np.int32))
            with jax.set_mesh(self.mesh):
                out, cache = self.steps(n, stop, sampler).executable(self.params, tokens, cache, requests)
            found.append(np.asarray(out).reshape(BATCH, n))
            last, starts = found[-1][:, -1], starts + n
        return np.concatenate(found, axis=1), np.asarray(cache.k)


def written(held: Sequence[np.ndarray], layer: int, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The integers [K, TOTAL, Q] and scales [K, TOTAL] of one sequence in an int8 cache: of K, then of V."""
    return [(held[i][layer, row, :, :TOTAL], held[i + 2][layer, row, :, :TOTAL]) for i in (0, 1)]


def assert_close(got: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def check_full_pass(bench: Bench) -> None:
    """One pass over whole sequences equals the reference."""
    _, ids, _ = case(bench.config)
    logits, cache = bench.run(ids, np.zeros(BATCH), np.full(BATCH, TOTAL), bench.cache())
    assert_close(logits, bench.expected(cache))


def check_chunks_then_decode(bench: Bench) -> None:
    """Prefill in chunks and then single steps give the reference's logits at every position."""
    _, ids, _ = case(bench.config)
    cache, seen, found = bench.cache(), 0, []
    while seen < TOTAL:
        length = CHUNK if seen + CHUNK <= TOTAL else 1
        chunk = ids[:, seen : seen + length]
        logits, cache = bench.run(chunk, np.full(BATCH, seen), np.full(BATCH, length), cache)
        found.append(logits)
        seen += length
    expected = bench.expected(cache)
    assert_close(np.concatenate(found, axis=1), expected)


def check_mixed_lengths(bench: Bench) -> None:
    """Rows of different lengths in one batch, padded with other tokens, each equal their sequence alone."""
    _, ids, _ = case(bench.config)
    cache, starts, found = bench.cache(), np.zeros(BATCH, int), []
    for turn in range(2):
        lengths = 1 + (np.arange(BATCH) + turn) % CHUNK
        chunk = np.full((BATCH, CHUNK), 5, np.int32)
        for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            chunk[row, :n] = ids[row, start : start + n]
        logits, cache = bench.run(chunk, starts, lengths, cache)
        found += [(row, start, logits[row, :n]) for row, (start, n) in enumerate(zip(starts, lengths, strict=True))]
        starts = starts + lengths
    expected = bench.expected(cache)
    for row, start, logits in found:
        assert_close(logits, expected[row, start : start + len(logits)])


def check_greedy(bench: Bench) -> None:
    """A decode step after a padded prefill picks the token that is likeliest in the reference."""
    _, ids, _ = case(bench.config)
    rows, lengths = np.arange(BATCH), 1 + np.arange(BATCH) % CHUNK
    _, cache = bench.run(ids[:, :CHUNK], np.zeros(BATCH), lengths, bench.cache())
    picked, cache = bench.run(ids[rows, lengths][:, None], lengths, np.ones(BATCH), cache, all_logits=False)
    np.testing.assert_array_equal(picked, bench.expected(cache)[rows, lengths].argmax(-1))


def check_rounding(bench: Bench) -> None:
    """Integers of an int8 cache times their scales are within half a step of the exact numbers. The largest integer of
    each position is 127."""
    _, ids, _ = case(bench.config)
    _, cache = bench.run(ids, np.zeros(BATCH), np.full(BATCH, TOTAL), bench.cache())
    held = [np.asarray(a) for a in cache]
    assert held[0].dtype == np.int8 and (np.abs(held[0][..., :TOTAL, :]).max(-1) == 127).all()
    weights = rounded(bench.config)[0] if bench.int8 else case(bench.config)[0]
    for row in range(BATCH):

        def reads(layer: int, *floats: np.ndarray, row=row) -> tuple[np.ndarray, np.ndarray]:
            found = []
            for exact, (integers, scales) in zip(floats, written(held, layer, row), strict=True):
                found.append(integers.astype(float) * scales[..., None])
                steps = np.abs(found[-1] - exact) / scales[..., None]
                assert steps.max() <= 0.5 + 1e-3, f"off by {steps.max():.4f} steps"
            return found[0], found[1]

        reference_logits(bench.config, weights, ids[row], reads)


CALLS = (3, 3)
"""Steps of each call. A third call would not fit the cache."""


def check_several_steps(bench: Bench) -> None:
    """Several decode steps in one call pick the same ids as single steps. They end early when every row has stopped."""
    expected, cached = bench.decode([1] * sum(CALLS))
    picked, k = bench.decode(CALLS)
    np.testing.assert_array_equal(picked, expected)
    np.testing.assert_array_equal(k, cached)
    given = case(bench.config)[1][np.arange(BATCH), 1 + np.arange(BATCH) % CHUNK]
    counts = np.bincount(expected[:, 1], minlength=bench.config.vocab)
    counts[given] = 0  # a row that begins with the stop id has stopped already
    stop = int(counts.argmax())
    picked, _ = bench.decode(CALLS, stop)
    np.testing.assert_array_equal(picked, stopped(expected, stop))


def stopped(ids: np.ndarray, stop: int) -> np.ndarray:
    """Ids [B, N] in which every id of a row after its first stop id is the stop id too."""
    return np.where(np.cumsum(ids == stop, axis=1) > 0, stop, ids)


CHECKS = (check_full_pass, check_chunks_then_decode, check_mixed_lengths, check_greedy)
SHORT_CHECKS = (check_chunks_then_decode, check_mixed_lengths)
"""Checks with two programs instead of four: none for a full pass and none for sampling."""


def _long(dims: Sequence[int]) -> list[int]:
    """The dimensions longer than 1, sorted."""
    return sorted(d for d in dims if d > 1)
