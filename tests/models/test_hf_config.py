"""Hugging Face `config.json` files become the decoders that they describe, or are refused in a sentence."""

import json

import pytest

from toruslab.models.hf_config import from_hugging_face
from toruslab.models.presets import model

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
