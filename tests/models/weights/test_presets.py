"""Names, suffixes and Hugging Face files become the decoders that they say, or a sentence."""

import dataclasses
import doctest
import json

import pytest

from toruslab.models import presets
from toruslab.models.presets import PRESETS, from_hugging_face, model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}


def write(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (LLAMA | fields).items() if v != "absent"}))
    return file


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


def test_hugging_face_file_and_folder(tmp_path):
    file = write(tmp_path)
    llama = model(str(file))
    assert llama.name == str(file)
    assert (llama.n_layers, llama.d_model, llama.d_ff, llama.n_heads, llama.d_head) == (16, 2048, 8192, 32, 64)
    assert (llama.n_kv_heads, llama.vocab, llama.tied, llama.block, llama.mlp) == (8, 128256, True, "serial", "swiglu")
    assert (llama.rope_theta, llama.norm_eps) == (5e5, 1e-5)
    assert llama.n_params == pytest.approx(1.236e9, rel=0.001)
    assert model(tmp_path).d_model == 2048


def test_hugging_face_defaults(tmp_path):
    write(tmp_path, num_key_value_heads="absent", tie_word_embeddings="absent", rope_theta="absent", head_dim=None)
    llama = model(tmp_path)
    assert (llama.n_kv_heads, llama.tied, llama.rope_theta, llama.d_head) == (32, False, 10000.0, 64)


def test_rope_theta_under_rope_parameters(tmp_path):
    write(tmp_path, rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert model(tmp_path).rope_theta == 1e6


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_type='llama3' .rotary frequencies are not rescaled",
        ),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, "biases on Q, K and V$"),
        ({"model_type": "qwen3", "head_dim": 128}, "norms on Q and K"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .the erf form"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"model_type": "gemma", "head_dim": 32, "use_bidirectional_attention": True}, "use_bidirectional_att.*=true$"),
        ({"model_type": "gemma2", "head_dim": 256}, "norms after each block and capped logits$"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, fields, left_out):
    write(tmp_path, **fields)
    with pytest.warns(UserWarning, match=left_out):
        config = model(tmp_path)
    assert config.d_head == fields.get("head_dim", 64)
    with pytest.raises(ValueError, match=f"model_type='.*' with .*{left_out.removesuffix('$')}.* cannot be loaded"):
        from_hugging_face(tmp_path, exact=True)


@pytest.mark.parametrize(
    "act", [{"hidden_act": "gelu"}, {"hidden_act": None}, {"hidden_activation": "gelu_pytorch_tanh"}]
)
def test_the_first_gemma_is_exact(tmp_path, act):
    write(tmp_path, model_type="gemma", head_dim=256, **act)
    gemma = from_hugging_face(tmp_path, exact=True)
    assert (gemma.mlp, gemma.scaled_embed, gemma.embed_scale, gemma.gated) == ("geglu", True, 2048**0.5, True)
    assert (model("gemma-2b").mlp, model("gemma-2b").scaled_embed) == ("geglu", True)
    write(tmp_path)
    llama = from_hugging_face(tmp_path, exact=True)
    assert (llama.mlp, llama.scaled_embed, llama.embed_scale) == ("swiglu", False, 1.0)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' is not a decoder"),
        ({"model_type": "absent"}, "model_type=None is not a decoder"),
        ({"num_experts": 8}, "num_experts=8: this decoder has no mixture of experts"),
        ({"vocab_size": "absent"}, "field 'vocab_size' is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": "absent"}, "field 'num_key_value_heads' is missing"),
        ({"hidden_size": 2050}, "field 'head_dim' is missing"),
        ({"hidden_size": "2048"}, "hidden_size='2048' must be a positive integer"),
        ({"num_key_value_heads": 5}, "n_heads=32 is not divisible by n_kv_heads=5"),
        ({"hidden_act": "relu"}, "hidden_act='relu' must be"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 must be a positive number"),
    ],
)
def test_what_cannot_be_represented_is_refused(tmp_path, fields, rule):
    write(tmp_path, **fields)
    with pytest.raises(ValueError, match=rule):
        model(tmp_path)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold one JSON object"):
        model(tmp_path)
