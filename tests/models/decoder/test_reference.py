"""The reference decoder against what a decoder must do. Published decoders are in `test_reference_crosscheck`."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.canonical import pad_heads
from toruslab.models.config import ModelConfig
from toruslab.models.decoder import reference

# The published decoders' matrices are float64, but norms, softmax and cosines are float32 inside; measured: at most
# 3e-7.
TOLERANCE = 1e-6
TOKENS = np.array([7, 0, 36, 19, 7, 2, 11, 30, 5])

# Sizes differ pairwise (H*Q from E too, in Llama); eps and theta are such that a mistake in them shows in a logit.
LLAMA = ModelConfig(
    name="llama",
    n_layers=2,
    d_model=30,
    d_ff=26,
    n_heads=6,
    d_head=4,
    n_kv_heads=2,
    vocab=37,
    block="serial",
    mlp="swiglu",
    tied=False,
    rope_theta=50.0,
    norm_eps=1e-2,
)
LLAMA_MULTIHEAD = dataclasses.replace(LLAMA, name="llama multihead", n_heads=3, n_kv_heads=3, d_head=8, tied=True)
STARCODER2 = dataclasses.replace(LLAMA, name="starcoder2", d_model=24, n_heads=6, d_head=4, mlp="gelu", tied=True)
PHI = dataclasses.replace(
    LLAMA, name="phi", d_model=24, n_heads=4, d_head=6, n_kv_heads=1, d_ff=32, block="parallel", mlp="gelu"
)
COHERE = dataclasses.replace(PHI, name="cohere", mlp="swiglu", n_kv_heads=2, tied=True)
GEMMA = dataclasses.replace(LLAMA, name="gemma", mlp="geglu", scaled_embed=True, tied=True)
CONFIGS = [LLAMA, LLAMA_MULTIHEAD, GEMMA, STARCODER2, PHI, COHERE]


def by_name(config: ModelConfig) -> str:
    return config.name


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_later_token_changes_no_earlier_logit(config: ModelConfig):
    weights = reference.init(config, seed=2)
    changed = TOKENS.copy()
    changed[5] = 33
    before, after = (reference.logits(config, weights, tokens) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (np.abs(before[5:] - after[5:]).max(axis=1) > 1e-3).all()  # and every later one moves


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_prefix_scores_as_in_the_whole(config: ModelConfig):
    weights = reference.init(config, seed=2)
    whole = reference.logits(config, weights, TOKENS)
    for length in (1, 4):
        assert error(reference.logits(config, weights, TOKENS[:length]), whole[:length]) < 1e-12


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_order_matters(config: ModelConfig):
    """Two layers and a causal mask see order without RoPE too, so one layer and a swap of two seen tokens."""
    config = dataclasses.replace(config, n_layers=1)
    weights = reference.init(config, seed=3)
    last = reference.logits(config, weights, TOKENS)[-1]
    swapped = reference.logits(config, weights, TOKENS[[2, 1, 0, 3, 4, 5, 6, 7, 8]])[-1]
    assert np.abs(last - swapped).max() > 1e-3
    no_rope = dataclasses.replace(config, rope_theta=float("inf"))  # only the pair of frequency one still turns
    assert error(reference.logits(no_rope, weights, TOKENS)[-1], last) > 1e-3


@pytest.mark.parametrize("config", [PHI, LLAMA_MULTIHEAD], ids=by_name)
def test_padding_heads_contribute_exactly_nothing(config: ModelConfig):
    weights = reference.init(config, seed=4)
    n_heads = 8 if config.n_heads == 4 else 5
    padded, padded_weights = pad_heads(config, weights, n_heads)
    assert padded.n_heads == n_heads and padded.n_padding_heads == n_heads - config.n_heads
    assert padded_weights["wk"].shape[2] == padded.n_kv_heads == (1 if config.n_kv_heads == 1 else n_heads)
    assert padded.n_params == config.n_params
    ours = reference.logits(config, weights, TOKENS)
    np.testing.assert_array_equal(reference.logits(padded, padded_weights, TOKENS), ours)
    again = reference.init(padded, seed=4)
    for name in padded_weights:
        np.testing.assert_array_equal(again[name], padded_weights[name], err_msg=name)
    with pytest.raises(ValueError, match=f"n_heads={config.n_heads} is less than the {n_heads} heads"):
        pad_heads(padded, padded_weights, config.n_heads)


def test_grouped_heads_cannot_be_padded():
    with pytest.raises(ValueError, match="n_padding_heads=2 with n_kv_heads=2"):
        pad_heads(LLAMA, reference.init(LLAMA, seed=0), 8)


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_init_is_of_order_one_and_repeats(config: ModelConfig):
    weights = reference.init(config, seed=5)
    assert {name: w.shape for name, w in weights.items()} == reference.shapes(config)
    assert all(w.dtype == np.float32 for w in weights.values())
    assert 0.3 < np.std(reference.logits(config, weights, TOKENS)) < 3.0
    other = reference.init(config, seed=6)
    for name, w in reference.init(config, seed=5).items():
        np.testing.assert_array_equal(w, weights[name])
        assert (w != other[name]).any()


def test_init_counts_the_weights_that_the_config_counts():
    for config in CONFIGS:
        matrices = [w for name, w in reference.init(config, seed=0).items() if "norm" not in name]
        assert sum(w.size for w in matrices) == config.n_params


@pytest.mark.parametrize("size", ["d_model", "d_ff", "d_head", "vocab", "n_layers", "n_heads"])
def test_wrong_shapes_are_refused(size: str):
    weights = reference.init(LLAMA, seed=0)
    other = dataclasses.replace(LLAMA, **{size: 2 * getattr(LLAMA, size)})
    with pytest.raises(ValueError, match=r"weights\['\w+'\] has shape \(.*\); must be \[.*\] = \("):
        reference.logits(other, weights, TOKENS)
    with pytest.raises(ValueError, match="has shape"):
        pad_heads(other, weights, other.n_heads)


def test_missing_and_unknown_weights_are_refused():
    weights = reference.init(LLAMA, seed=0)
    with pytest.raises(ValueError, match=r"weights lacks \['unembed'\]"):
        reference.logits(LLAMA, {name: w for name, w in weights.items() if name != "unembed"}, TOKENS)
    with pytest.raises(ValueError, match=r"weights has \['unembed'\].*tied=True"):
        reference.logits(dataclasses.replace(LLAMA, tied=True), weights, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 37], r"tokens holds 37; must be in 0..36"),
        ([-1, 3], r"tokens holds -1; must be in 0..36"),
        ([[1, 2]], r"tokens has shape \(1, 2\); must be \[L\]"),
        ([], r"tokens has shape \(0,\)"),
        ([1.0, 2.0], r"tokens has dtype float64; must be integers"),
    ],
)
def test_wrong_tokens_are_refused(tokens: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        reference.logits(LLAMA, reference.init(LLAMA, seed=0), tokens)
