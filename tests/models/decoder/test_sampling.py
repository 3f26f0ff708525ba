"""Sampling over a sharded vocabulary: against NumPy, and the same under every layout and in every batch."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests import battery
from toruslab.models.decoder.parameters import everywhere
from toruslab.models.decoder.sampling import Sampler
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach

ROWS, VOCAB = 8, 128


@functools.cache
def program(sampler, name, attention, shape):
    """The layout, the mesh and the jitted sampler: traced and compiled once for all calls with the same shapes."""
    made = layout(name, attention, shape, 1)
    mesh = attach(shape, chip="cpu", explicit=made.explicit)
    return made, mesh, jax.jit(lambda logits, requests, positions: sampler(logits, requests, positions, made))


def sample(sampler, logits, requests, positions, name="ws2d", attention="batch", shape=(2, 2, 2)):
    made, mesh, run = program(sampler, name, attention, shape)
    with jax.set_mesh(mesh):
        if made.explicit:
            placed = jax.device_put(logits, NamedSharding(mesh, made.logits[-1]))
        else:
            placed = everywhere(mesh, logits)
        return np.asarray(run(placed, everywhere(mesh, requests), everywhere(mesh, positions)))


@pytest.fixture
def logits():
    found = np.random.default_rng(3).standard_normal((ROWS, VOCAB)).astype(np.float32) * 2
    found[:, 100:] = -np.inf  # the padding of a vocabulary
    return found


REQUESTS, POSITIONS = np.arange(ROWS, dtype=np.int32) * 7, np.arange(ROWS, dtype=np.int32) + 40


@pytest.mark.parametrize(("name", "attention"), battery.legal())
@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(temperature=0.7, seed=5), Sampler(temperature=1.3, top_k=9, top_p=0.8, seed=2)]
)
def test_every_layout_picks_the_same(name, attention, sampler, logits):
    expected = sample(sampler, logits, REQUESTS, POSITIONS, "ws2d", "batch", (1, 1, 1))
    np.testing.assert_array_equal(sample(sampler, logits, REQUESTS, POSITIONS, name, attention), expected)
    if not sampler.temperature:
        np.testing.assert_array_equal(expected, logits.argmax(1))


def test_a_stream_belongs_to_its_request_and_position(logits):
    """A request at a position draws the same token, whatever its place in the batch and the other requests."""
    sampler = Sampler(temperature=1.0)
    expected = sample(sampler, logits, REQUESTS, POSITIONS)
    order = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_array_equal(sample(sampler, logits[order], REQUESTS[order], POSITIONS[order]), expected[order])
    later = sample(sampler, np.tile(logits[:1], (ROWS, 1)), np.full(ROWS, 3, np.int32), POSITIONS)
    assert len(set(later.tolist())) > 1


def draws(sampler, row, n=4096):
    """Token frequencies over many positions, all with the same logits."""
    tokens = [
        sample(sampler, np.tile(row, (512, 1)), np.zeros(512, np.int32), np.arange(i, i + 512, dtype=np.int32))
        for i in range(0, n, 512)
    ]
    return np.bincount(np.concatenate(tokens), minlength=VOCAB) / n


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (20, 0.5)])
def test_frequencies(logits, top_k, top_p):
    """Draws follow the softmax over the k likeliest tokens, then over the likeliest that reach p."""
    row = logits[0]
    temperature = 0.8
    p = np.exp((row - row.max()) / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    reached = np.cumsum(p[order])
    p[order[np.searchsorted(reached, top_p) + 1 :]] = 0
    p /= p.sum()
    found = draws(Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=1), row)
    assert found[p == 0].sum() == 0
    assert np.abs(found - p).max() < 5 * np.sqrt(0.25 / 4096)


def test_extreme_top_p_keeps_the_likeliest(logits):
    picked = sample(Sampler(temperature=1.0, top_p=1e-6), logits, REQUESTS, POSITIONS)
    np.testing.assert_array_equal(picked, logits.argmax(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"top_k": -1}, "top_k=-1 must be"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_values_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**wrong)
