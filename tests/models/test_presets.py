"""Names and suffixes become the decoders that they name, or are refused in a sentence."""

import dataclasses
import doctest

import pytest

from toruslab.models import presets
from toruslab.models.presets import PRESETS, model


def test_doctests():
    assert doctest.testmod(presets).failed == 0


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        # Pope et al. 2022, section 4 (exact counts as in the PaLM paper, Table 1)
        ("palm-8b", 8.63e9),
        ("palm-62b", 62.50e9),
        ("palm-540b", 540.36e9),
    ],
)
def test_palm_counts(name, n_params):
    assert model(name).n_params == pytest.approx(n_params, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "n_params", "rel"),
    [
        ("mt-nlg-530b", 530e9, 0.002),
        ("gpt3-175b", 175e9, 0.005),
        ("orca-13b", 13e9, 0.015),
        ("orca-101b", 101e9, 0.005),
        ("orca-175b", 175e9, 0.005),
        ("orca-341b", 341e9, 0.005),
        ("llama-2-7b", 6.738e9, 0.001),
        ("llama-2-13b", 13.016e9, 0.001),
        ("llama-2-70b", 68.977e9, 0.001),
        ("llama-3-8b", 8.030e9, 0.001),
        ("llama-3-70b", 70.554e9, 0.001),
        ("llama-3-405b", 405.85e9, 0.001),
        ("gemma-2b", 2.506e9, 0.001),
        ("gemma-7b", 8.538e9, 0.001),
        ("gemma-2-2b", 2.614e9, 0.001),
        ("gemma-2-9b", 9.242e9, 0.001),
        ("gemma-2-27b", 27.23e9, 0.001),
        ("mistral-7b", 7.242e9, 0.001),
        ("qwen-2.5-0.5b", 0.494e9, 0.001),
        ("qwen-2.5-1.5b", 1.544e9, 0.001),
        ("qwen-2.5-3b", 3.086e9, 0.001),
        ("qwen-2.5-7b", 7.616e9, 0.001),
        ("qwen-2.5-14b", 14.770e9, 0.001),
        ("qwen-2.5-32b", 32.764e9, 0.001),
        ("qwen-2.5-72b", 72.706e9, 0.001),
    ],
)
def test_counts_of_the_others(name, n_params, rel):
    assert model(name).n_params == pytest.approx(n_params, rel=rel)


def test_every_preset_is_known_by_its_name():
    for name, config in PRESETS.items():
        assert config.name == name
        assert model(name) == config


def test_the_toy_is_the_benchs_decoder():
    toy = model("toy")
    assert (toy.d_model, toy.d_ff, toy.n_layers, toy.n_heads, toy.d_head, toy.vocab) == (512, 2048, 4, 16, 64, 258)
    assert (toy.n_kv_heads, toy.block, toy.mlp, toy.tied) == (1, "parallel", "swiglu", True)


def test_suffixes():
    padded = model("palm-540b-h64")
    assert (padded.n_heads, padded.n_padding_heads, padded.n_layers) == (64, 16, 118)
    assert padded.n_params == model("palm-540b").n_params
    assert model("palm-540b-h64-8l").n_layers == 8
    assert model("llama-2-7b-2l").n_layers == 2
    assert model("palm-540b-h64-8l").name == "palm-540b-h64-8l"
    assert model("orca-13b-h48").n_kv_heads == 48
    assert dataclasses.replace(model("toy-v1024"), name="toy", vocab=258) == model("toy")
    assert (model("toy-v1024").vocab, model("palm-8b-2l-v512").vocab) == (1024, 512)


def test_serial_and_multihead():
    palm, serial, multihead = (model(f"palm-540b-h64{s}") for s in ("", "-serial", "-mha"))
    assert (serial.block, serial.n_params, serial.n_heads) == ("serial", palm.n_params, 64)
    assert (multihead.n_kv_heads, multihead.n_heads, multihead.d_head, multihead.n_padding_heads) == (64, 64, 128, 16)
    one_kv = palm.n_layers * 2 * palm.d_model * palm.d_head  # what one K and V of multiquery adds to Q and O
    assert multihead.n_params == palm.n_params - one_kv
    assert model("palm-540b-mha").n_params == multihead.n_params
    assert (model("toy-mha").n_kv_heads, model("toy-mha").d_head) == (16, 32)
    both = model("toy-serial-mha-2l")
    assert (both.block, both.n_kv_heads, both.n_layers) == ("serial", 16, 2)


def test_suffixes_stand_in_any_order():
    names = ["palm-540b-h64-8l-serial-mha", "palm-540b-mha-serial-8l-h64"]
    assert len({dataclasses.replace(model(name), name="") for name in names}) == 1
    assert model("toy-s-serial").d_model == 256


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("palm-540", "model='palm-540' is not known: did you mean 'palm-540b'"),
        ("llama3-70b", "did you mean 'llama-3-70b'"),
        ("palm-540b-h64-h80", "model='palm-540b-h64-h80': suffix -hN stands there twice: -h64 and -h80"),
        ("toy-serial-serial", "suffix -serial stands there twice"),
        ("toy-mqa", "model='toy-mqa': suffix '-mqa' is not known; known are -hN, -Nl, -serial, -mha, -vN"),
        ("toy-", "suffix '-' is not known"),
        ("llama-2-7b-serial", "block='serial' already in llama-2-7b"),
        ("llama-3-8b-mha", "n_kv_heads=8 of llama-3-8b must be 1 "),
        ("orca-13b-mha", "n_kv_heads=40 of orca-13b must be 1"),
        ("plam-62b-h64-serial", "did you mean 'palm-62b'"),
        ("palm-540b-h32", "n_heads=32 is less than the 48 heads"),
        ("palm-540b-h60", "d_ff=73728 is not divisible by n_heads=60"),
        ("palm-8b-33l", "n_layers=33 must be in 1..32"),
        ("palm-8b-0l", "n_layers=0 must be in 1..32"),
        ("llama-2-70b-h128", "heads can be padded"),
        ("toy-v0", "model='toy-v0': vocab=0 must be a positive integer"),
        ("toy-v512-v256", "suffix -vN stands there twice: -v512 and -v256"),
        ("", "is not known"),
        ("nowhere/config.json", "there is no file"),
    ],
)
def test_bad_names_are_refused(name, rule):
    with pytest.raises(ValueError, match=rule):
        model(name)
