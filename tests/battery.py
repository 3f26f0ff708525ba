"""What every layout must pass, whatever its name: a layout added to `LAYOUTS` inherits all of it.

Sizes are pairwise distinct and different from every axis, so that a mix-up of dimensions cannot hide. The reference
is `models.reference`, in NumPy and float64.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from models.cache import Cache, cache_shape, cache_spec, empty_cache
from models.config import ModelConfig
from models.decoder import Tokens
from models.parameters import everywhere, load
from models.reference import init
from models.reference import logits as reference_logits
from partitioning.dataflow import Pass, plan
from partitioning.evidence import compare
from partitioning.hlo import copies, read
from partitioning.layouts import LAYOUTS, NoAxisLeft, layout
from partitioning.mesh import AXES, Shape, attach
from partitioning.program import Compiled, Program

TOLERANCE = {"float32": 1e-5}
"""Largest error of a logit, relative to the largest logit. Never raised to make a test pass."""

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
"""Looped and prefetching variants that stand for all; the rings by themselves have `test_rings`."""
BATCH, TOTAL, CHUNK, CAPACITY = 8, 7, 3, 11  # 11 divides no other size: what is as large as the cache is the cache


def model(block: str, kv_heads: int, mlp: str = "swiglu") -> ModelConfig:
    """Heads 16, so that eight chips can split them in two ways; three layers, so that a scan is a loop."""
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
    """Every layout with every attention that makes sense for it."""
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
    """Weights, ids [BATCH, TOTAL] and the reference's logits [BATCH, TOTAL, V], each sequence by itself."""
    weights = init(config, 0)
    ids = np.random.default_rng(1).integers(0, config.vocab, (BATCH, TOTAL)).astype(np.int32)
    return weights, ids, np.stack([reference_logits(config, weights, row) for row in ids])


@dataclass
class Bench:
    """A model under one layout on one mesh: programs by (length, all_logits), compiled once each and checked."""

    config: ModelConfig
    name: str
    attention: str
    shape: Shape

    def __post_init__(self):
        self.layout = layout(self.name, self.attention, self.shape, self.config.n_kv_heads)
        self.mesh = attach(self.shape, chip="cpu", explicit=self.layout.explicit)
        self.params = load(self.config, case(self.config)[0], self.layout, self.mesh)
        self.compiled: dict[tuple[int, bool], Compiled] = {}

    def cache(self) -> Cache:
        return empty_cache(self.config, BATCH, CAPACITY, self.layout, self.mesh)

    def program(self, length: int, all_logits: bool) -> Compiled:
        if (length, all_logits) not in self.compiled:
            pass_ = Pass(batch=BATCH, length=length, capacity=CAPACITY, all_logits=all_logits)
            program = Program(config=self.config, layout=self.layout, mesh=self.mesh, pass_=pass_)
            compiled = program.compile()
            self.check(compiled, pass_)
            self.compiled[length, all_logits] = compiled
        return self.compiled[length, all_logits]

    def check(self, compiled: Compiled, pass_: Pass) -> None:
        """The compiled program holds the planned collectives and no others, and never copies the cache."""
        if not self.layout.explicit:
            return
        collectives = read(compiled.text, dict(zip(AXES, self.shape, strict=True)))
        wrong = [
            m
            for m in compare(plan(self.layout, self.config, pass_, self.shape), collectives)
            if m.verdict != "as planned"
        ]
        assert not wrong, wrong
        assert not compiled.warnings, compiled.warnings
        cache = NamedSharding(self.mesh, cache_spec(self.layout))
        shard = cache.shard_shape(cache_shape(self.config, BATCH, CAPACITY))
        copied = [c.dims for c in copies(compiled.text, 4 * math.prod(shard)) if _long(c.dims) == _long(shard)]
        assert not copied, f"the cache is copied: {copied}"

    def run(self, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, cache: Cache, *, all_logits: bool = True):
        """Logits [B, L, V] as NumPy, or sampled ids [B], and the cache."""
        batch, length = ids.shape
        tokens = Tokens(*[everywhere(self.mesh, np.asarray(a, np.int32)) for a in (ids, starts, lengths)])
        requests = everywhere(self.mesh, np.arange(batch, dtype=np.int32))
        with jax.set_mesh(self.mesh):
            out, cache = self.program(length, all_logits).executable(self.params, tokens, cache, requests)
        out = np.asarray(out)
        return (out.reshape(batch, length, -1)[..., : self.config.vocab] if all_logits else out), cache


def assert_close(got: np.ndarray, expected: np.ndarray, dtype: str = "float32") -> None:
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def check_full_pass(bench: Bench) -> None:
    """One pass over whole sequences equals the reference."""
    _, ids, expected = case(bench.config)
    logits, _ = bench.run(ids, np.zeros(BATCH), np.full(BATCH, TOTAL), bench.cache())
    assert_close(logits, expected)


def check_chunks_then_decode(bench: Bench) -> None:
    """Prefill in chunks over a growing cache, then single steps: the same logits at every position."""
    _, ids, expected = case(bench.config)
    cache, seen = bench.cache(), 0
    while seen < TOTAL:
        length = CHUNK if seen + CHUNK <= TOTAL else 1
        chunk = ids[:, seen : seen + length]
        logits, cache = bench.run(chunk, np.full(BATCH, seen), np.full(BATCH, length), cache)
        assert_close(logits, expected[:, seen : seen + length])
        seen += length


def check_mixed_lengths(bench: Bench) -> None:
    """Rows of different lengths in one batch, padded with other tokens: each equals its sequence alone."""
    _, ids, expected = case(bench.config)
    cache, starts = bench.cache(), np.zeros(BATCH, int)
    for turn in range(2):
        lengths = 1 + (np.arange(BATCH) + turn) % CHUNK
        chunk = np.full((BATCH, CHUNK), 5, np.int32)
        for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            chunk[row, :n] = ids[row, start : start + n]
        logits, cache = bench.run(chunk, starts, lengths, cache)
        for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            assert_close(logits[row, :n], expected[row, start : start + n])
        starts = starts + lengths


def check_greedy(bench: Bench) -> None:
    """The token sampled in a decode step after a padded prefill is the reference's likeliest."""
    _, ids, expected = case(bench.config)
    rows, lengths = np.arange(BATCH), 1 + np.arange(BATCH) % CHUNK
    _, cache = bench.run(ids[:, :CHUNK], np.zeros(BATCH), lengths, bench.cache())
    picked, _ = bench.run(ids[rows, lengths][:, None], lengths, np.ones(BATCH), cache, all_logits=False)
    np.testing.assert_array_equal(picked, expected[rows, lengths].argmax(-1))


CHECKS = (check_full_pass, check_chunks_then_decode, check_mixed_lengths, check_greedy)
SHORT_CHECKS = (check_chunks_then_decode, check_mixed_lengths)
"""Without the programs of a full pass and of sampling, which `CHECKS` compile as well."""


def _long(dims: Sequence[int]) -> list[int]:
    """Dimensions longer than 1, in any order."""
    return sorted(d for d in dims if d > 1)
