"""Generation gives the reference's tokens for any pair of layouts, chunks and lengths."""

import numpy as np
import pytest

from tests import battery
from tests.canonical import pad_heads
from toruslab.models.decoder.parameters import load
from toruslab.models.decoder.reference import init, logits
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.programs.generate import Generator
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach

SHAPE = (2, 2, 2)
LENGTHS = (1, 4, 9, 2, 3, 9, 5, 8)


def generator(config, prefill, decode, **changes):
    names = [n.split("/") for n in (prefill, decode)]
    first, second = [layout(name, attention, SHAPE, config.n_kv_heads) for name, attention in names]
    settings = {"batch": 8, "capacity": 15, "chunk": 4, "sampler": Sampler()} | changes
    return Generator(config=config, prefill=first, decode=second, shape=SHAPE, chip="cpu", **settings)


def parameters(config, made):
    mesh = attach(SHAPE, chip="cpu", explicit=made.prefill.explicit)
    return load(config, init(config, 0), made.prefill, mesh)


def prompts(config):
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.vocab, n).astype(np.int32) for n in LENGTHS]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ("ws2d/heads", "ws2d/batch"),
        ("wgxyz/batch", "ws2d/batch"),
        ("wgx/batch", "wgxy/heads"),
        ("ws1d/batch", "ws2d/heads"),
        ("auto/heads", "ws1d/heads"),
        ("replicated/batch", "auto/batch"),
    ],
)
def test_any_pair_of_layouts_equals_the_reference(prefill, decode):
    config = battery.model("parallel", 1)
    made = generator(config, prefill, decode)
    found = made(parameters(config, made), prompts(config), 4)
    for prompt, new in zip(prompts(config), found, strict=True):
        ids = list(prompt)
        for token in new:
            assert token == logits(config, init(config, 0), ids)[-1].argmax()
            ids.append(token)
        assert len(new) == 4


def test_chunks_and_stop_change_nothing_else():
    config = battery.model("serial", 4)
    whole = generator(config, "ws2d/heads", "ws2d/heads", chunk=9)
    params = parameters(config, whole)
    expected = whole(params, prompts(config), 5)
    chunked = generator(config, "ws2d/heads", "ws2d/heads", chunk=2)
    for a, b in zip(chunked(params, prompts(config), 5), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    stop = int(expected[0][2])
    for a, b in zip(chunked(params, prompts(config), 5, stop=stop), expected, strict=True):
        np.testing.assert_array_equal(a, b[: list(b).index(stop)] if stop in b else b)


def test_padding_heads_contribute_nothing():
    """Six heads padded to eight for eight chips have the logits of six."""
    config = battery.model("parallel", 1).__class__(
        n_layers=2, d_model=40, d_ff=48, n_heads=6, d_head=10, n_kv_heads=1, vocab=91
    )
    weights = init(config, 0)
    padded, padded_weights = pad_heads(config, weights, 8)
    bench = battery.Bench.__new__(battery.Bench)
    bench.config, bench.name, bench.attention, bench.shape = padded, "ws2d", "heads", SHAPE
    bench.layout, bench.compiled = layout("ws2d", "heads", SHAPE, 1), {}
    bench.mesh = attach(SHAPE, chip="cpu")
    bench.params = load(padded, padded_weights, bench.layout, bench.mesh)
    ids = np.random.default_rng(1).integers(0, 91, (battery.BATCH, battery.CHUNK)).astype(np.int32)
    got, _ = bench.run(ids, np.zeros(battery.BATCH), np.full(battery.BATCH, battery.CHUNK), bench.cache())
    battery.assert_close(got, np.stack([logits(config, weights, row) for row in ids]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.zeros(0, np.int32)}, "prompt 0 is empty"),
        ({2: np.array([3, 91], np.int32)}, "prompt 2: token id 91 is outside the vocabulary of 91"),
        ({2: np.array([-1], np.int32)}, "prompt 2: token id -1 is outside"),
        ({1: np.zeros(13, np.int32)}, "prompt 1 of 13 tokens with 4 new ones is longer than the cache of 15"),
    ],
)
def test_prompts_that_cannot_be_served(change, message):
    config = battery.model("parallel", 1)
    made = generator(config, "ws2d/heads", "ws2d/heads")
    asked = prompts(config)
    for at, prompt in change.items():
        asked[at] = prompt
    with pytest.raises(ValueError, match=message):
        made(None, asked, 4)  # pyright: ignore[reportArgumentType]
