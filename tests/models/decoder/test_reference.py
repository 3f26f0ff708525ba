"""The reference decoder against five published decoders that we did not write, and against what a decoder must do.

Hugging Face `transformers` is a test-only dependency: where it is missing, those tests skip and the others still run.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.canonical import pad_heads
from toruslab.models.config import ModelConfig
from toruslab.models.decoder import reference

# Their matrices are float64 here, but norms, softmax and cosines are float32 inside; measured: at most 3e-7.
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


def comparable(config: ModelConfig, weights: reference.Weights) -> reference.Weights:
    """For Llama and Gemma the same weights; for the others, writes to the residual stream are zero-mean over E.

    The others use LayerNorm, which subtracts the mean: on a zero-mean stream it is the same function as RMS norm.
    """
    writers = () if config.name.startswith(("llama", "gemma")) else ("embed", "wo", "w_down")
    return {name: w - w.mean(axis=-1, keepdims=True) if name in writers else w for name, w in weights.items()}


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


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


# Deprecations inside transformers and torch are not ours to mend.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_equals_published_decoders(config: ModelConfig, tied: bool, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(config, tied=tied)
    weights = comparable(config, reference.init(config, seed=1))
    theirs = their_logits(their_model(config, weights, monkeypatch), TOKENS)
    ours = reference.logits(config, weights, TOKENS)
    assert ours.shape == (len(TOKENS), config.vocab) and ours.dtype == np.float64
    assert error(ours, theirs) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
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
