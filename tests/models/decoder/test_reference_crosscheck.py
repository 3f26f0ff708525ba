"""The reference decoder against five published decoders that we did not write: Hugging Face `transformers`.

`transformers` and `torch` are the extra `crosscheck`. Where they are missing, these tests skip.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.models.decoder.test_reference import CONFIGS, TOKENS, TOLERANCE, by_name, error
from toruslab.models.config import ModelConfig
from toruslab.models.decoder import reference

# Deprecations inside transformers and torch are not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def comparable(config: ModelConfig, weights: reference.Weights) -> reference.Weights:
    """For Llama and Gemma the same weights; for the others, writes to the residual stream are zero-mean over E.

    The others use LayerNorm, which subtracts the mean: on a zero-mean stream it is the same function as RMS norm.
    """
    writers = () if config.name.startswith(("llama", "gemma")) else ("embed", "wo", "w_down")
    return {name: w - w.mean(axis=-1, keepdims=True) if name in writers else w for name, w in weights.items()}


# Our name -> theirs, inside a layer; whatever else they have is a bias and must be zero.
ATTENTION = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
SWIGLU = {"w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj"}
NORMS = {"norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
LAYER_NAMES = {
    "llama": ATTENTION | SWIGLU | NORMS,
    "gemma": ATTENTION | SWIGLU | NORMS,
    "starcoder2": ATTENTION | NORMS | {"w_up": "mlp.c_fc", "w_down": "mlp.c_proj"},
    "phi": ATTENTION | {"wo": "self_attn.dense", "w_up": "mlp.fc1", "w_down": "mlp.fc2", "norm": "input_layernorm"},
    "cohere": ATTENTION | SWIGLU | {"norm": "input_layernorm"},
}
FINAL_NORM = {"phi": "model.final_layernorm"}


def linear(name: str, w: np.ndarray, neighbours: bool) -> np.ndarray:
    """One layer's canonical matrix as theirs, [out, in]; `neighbours`: their RoPE turns (0, 1), (2, 3), ..."""
    if name in ("wq", "wk", "wv"):  # [E, H, Q]
        if neighbours and name != "wv":
            half = w.shape[-1] // 2
            w = w[..., np.arange(w.shape[-1]).reshape(2, half).T.reshape(-1)]
        return w.reshape(w.shape[0], -1).T
    if name == "wo":  # [H, Q, E]
        return w.reshape(-1, w.shape[-1]).T
    return w.T


def their_model(config: ModelConfig, weights: reference.Weights, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `transformers` decoder built from a config made here, holding our weights, in float64. No hub, no files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="the cross-check with published decoders needs torch")
    hf = pytest.importorskip("transformers", reason="the cross-check needs transformers, a test-only dependency")
    family = config.name.split()[0]
    sizes = {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": 1.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    eps = config.norm_eps
    if family == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, head_dim=config.d_head, rms_norm_eps=eps))
    elif family == "gemma":
        model = hf.GemmaForCausalLM(hf.GemmaConfig(**sizes, head_dim=config.d_head, rms_norm_eps=eps))
    elif family == "starcoder2":
        model = hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**sizes, norm_epsilon=eps, use_bias=False))
    elif family == "phi":
        model = hf.PhiForCausalLM(hf.PhiConfig(**sizes, layer_norm_eps=eps))
    else:
        model = hf.CohereForCausalLM(hf.CohereConfig(**sizes, layer_norm_eps=eps, logit_scale=1.0))
    model = model.double().eval()
    theirs = {
        "model.embed_tokens.weight": weights["embed"],
        "lm_head.weight": weights["embed" if config.tied else "unembed"],
        FINAL_NORM.get(family, "model.norm") + ".weight": weights["final_norm"],
    }
    for name, path in LAYER_NAMES[family].items():
        for i, layer in enumerate(weights[name]):
            theirs[f"model.layers.{i}.{path}.weight"] = linear(name, layer, neighbours=family == "cohere")
    if family == "gemma":  # their norms multiply by 1 + weight
        theirs = {name: w - 1 if "norm" in name else w for name, w in theirs.items()}
    state = {name: torch.tensor(np.ascontiguousarray(w), dtype=torch.float64) for name, w in theirs.items()}
    for name, value in model.state_dict().items():
        if name.endswith(".bias"):
            state[name] = torch.zeros_like(value)
    model.load_state_dict(state, strict=True)
    return model


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="the cross-check with published decoders needs torch")
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_equals_published_decoders(config: ModelConfig, tied: bool, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(config, tied=tied)
    weights = comparable(config, reference.init(config, seed=1))
    theirs = their_logits(their_model(config, weights, monkeypatch), TOKENS)
    ours = reference.logits(config, weights, TOKENS)
    assert ours.shape == (len(TOKENS), config.vocab) and ours.dtype == np.float64
    assert error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_the_published_decoders_would_show_a_mistake(config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    """Each mistake that the agreement excludes moves a logit far beyond the tolerance."""
    weights = comparable(config, reference.init(config, seed=1))
    theirs = their_logits(their_model(config, weights, monkeypatch), TOKENS)
    n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
    # h % K instead of h // (H/K): reorder the query heads so that the reference reads the wrong KV head.
    strided = np.argsort(np.arange(n_heads) % n_kv_heads, kind="stable")
    wrong: dict[str, tuple[ModelConfig, reference.Weights]] = {
        "theta": (dataclasses.replace(config, rope_theta=100.0), weights),
        "eps": (dataclasses.replace(config, norm_eps=0.0), weights),
        "final norm's scale": (config, weights | {"final_norm": np.ones_like(weights["final_norm"])}),
        "norm's scale": (config, weights | {"norm": np.ones_like(weights["norm"])}),
        "layers' order": (config, weights | {"w_down": weights["w_down"][::-1]}),
    }
    if 1 < n_kv_heads < n_heads:
        swapped = weights | {"wq": weights["wq"][:, :, strided], "wo": weights["wo"][:, strided]}
        wrong["KV head of a query head"] = (config, swapped)
    if config.scaled_embed:
        wrong["embeddings' scale"] = (dataclasses.replace(config, scaled_embed=False), weights)
        wrong["SiLU in the gate"] = (dataclasses.replace(config, mlp="swiglu"), weights)
    if config.gated:
        wrong["gate and up"] = (config, weights | {"w_gate": weights["w_up"], "w_up": weights["w_gate"]})
    if config.block == "serial":
        wrong["mlp norm's scale"] = (config, weights | {"mlp_norm": weights["norm"]})
    for mistake, (wrong_config, wrong_weights) in wrong.items():
        assert error(reference.logits(wrong_config, wrong_weights, TOKENS), theirs) > 1000 * TOLERANCE, mistake
