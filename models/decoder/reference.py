"""The slow decoder that every layout must equal: NumPy, float64, one sequence, no cache.

This file defines what the model computes, head by head, and the names and shapes of the canonical weights. It has no
batches, caches, fused matrices or meshes. It shares no code with the fast decoder, so that a mistake shows unless it is
made twice.

Canonical weights are a dict of arrays, stacked over the n = `n_layers` layers; letters as in `ModelConfig`:

    embed [V, E]     unembed [V, E] (not tied)    final_norm [E]
    norm [n, E]      mlp_norm [n, E] (serial)
    wq [n, E, H, Q]  wk, wv [n, E, K, Q]          wo [n, H, Q, E]
    w_up [n, E, F]   w_gate [n, E, F] (gated)     w_down [n, F, E]

V has no padding rows here. H counts padding heads: they come last, and their wq and wo are zero.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toruslab.models.config import ModelConfig

Weights = dict[str, NDArray[np.float32]]
Array = NDArray[np.float64]
Reads = Callable[[int, Array, Array], tuple[Array, Array]]
"""(number of the layer, keys rotated by RoPE, values) -> the keys and values that attention reads, [K, L, Q] each."""

_LETTERS = {
    "embed": "V E",
    "unembed": "V E",
    "final_norm": "E",
    "norm": "n E",
    "mlp_norm": "n E",
    "wq": "n E H Q",
    "wk": "n E K Q",
    "wv": "n E K Q",
    "wo": "n H Q E",
    "w_gate": "n E F",
    "w_up": "n E F",
    "w_down": "n F E",
}


def logits(
    config: ModelConfig, weights: Mapping[str, ArrayLike], tokens: ArrayLike, reads: Reads | None = None
) -> Array:
    """Logits of the next token after each position of one sequence.

    A parallel layer is x + attention(norm(x)) + mlp(norm(x)). A serial layer adds attention(norm(x)) to x, then
    mlp(mlp_norm(x)). With `scaled_embed`, x begins as sqrt(E) times the embedding. The logits are
    final_norm(x) @ unembed.T, or @ embed.T if the two are tied.

    Args:
        config: sizes and variants.
        weights: the canonical weights above, of any float type; computed in float64.
        tokens: [L] ids, each in 0..V-1, at positions 0..L-1.
        reads: replaces the keys and values that attention reads, for example by rounded ones; by default unchanged.

    Returns:
        [L, V] float64; logits i depend on tokens 0..i only. No softmax.

    Raises:
        ValueError: a weight that is missing, unknown or of a wrong shape; tokens that are not a 1-D array of ids.

    Example:
        One token attends to itself alone. With an identity embedding and layers that output zero, it predicts itself.

        >>> tiny = ModelConfig(n_layers=1, d_model=4, d_ff=2, n_heads=1, d_head=2, vocab=4, norm_eps=0.0)
        >>> zeros = {name: np.zeros(shape) for name, shape in shapes(tiny).items()}
        >>> weights = zeros | {"embed": np.eye(4), "norm": np.ones((1, 4)), "final_norm": np.ones(4)}
        >>> logits(tiny, weights, [2])
        array([[0., 0., 2., 0.]])

    Pope et al. 2022, section 2 and section 3.4 (the parallel block).
    """
    _check_weights(config, weights)
    ids = _checked_tokens(config, tokens)
    embed = _float64(weights["embed"])
    x = embed[ids]  # [L, E]
    if config.scaled_embed:
        x = x * math.sqrt(config.d_model)
    for i in range(config.n_layers):
        layer = {name: _float64(np.asarray(weights[name])[i]) for name in shapes(config) if _LETTERS[name][0] == "n"}
        normed = _rms_norm(x, layer["norm"], config.norm_eps)
        keys, values = _keys_values(config, layer, normed)
        if reads:
            keys, values = reads(i, keys, values)
        if config.block == "parallel":
            x = x + _attention(config, layer, normed, keys, values) + _mlp(config, layer, normed)
        else:
            x = x + _attention(config, layer, normed, keys, values)
            x = x + _mlp(config, layer, _rms_norm(x, layer["mlp_norm"], config.norm_eps))
    unembed = embed if config.tied else _float64(weights["unembed"])
    return _rms_norm(x, _float64(weights["final_norm"]), config.norm_eps) @ unembed.T


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the canonical weights of `config`, its padding heads included.

    Example:
        >>> tiny = ModelConfig(n_layers=1, d_model=4, d_ff=6, n_heads=2, d_head=8, vocab=9, mlp="gelu")
        >>> [(name, shape) for name, shape in shapes(tiny).items() if name.startswith("w")]
        [('wq', (1, 4, 2, 8)), ('wk', (1, 4, 1, 8)), ('wv', (1, 4, 1, 8)), ('wo', (1, 2, 8, 4)), \
('w_up', (1, 4, 6)), ('w_down', (1, 6, 4))]
    """
    sizes = {
        "V": config.vocab,
        "E": config.d_model,
        "F": config.d_ff,
        "H": config.n_heads,
        "K": config.n_kv_heads,
        "Q": config.d_head,
        "n": config.n_layers,
    }
    absent = {
        "unembed": config.tied,
        "mlp_norm": config.block == "parallel",
        "w_gate": not config.gated,
    }
    return {
        name: tuple(sizes[letter] for letter in letters.split())
        for name, letters in _LETTERS.items()
        if not absent.get(name, False)
    }


def init(config: ModelConfig, seed: int) -> Weights:
    """Random canonical weights for tests and toys. They are not meant as a start for training.

    Matrices are normal / sqrt(fan-in), so that logits and attention scores are of order one. Norm scales are uniform
    in 0.5..1.5, so that a missing or misplaced scale shows. Padding heads are zero and use no random numbers: `init`
    of a padded config equals the unpadded weights, padded.

    Args:
        config: sizes and variants.
        seed: the same seed and config give the same weights under one NumPy version.

    Returns:
        float32 arrays, named and shaped as `shapes(config)`.

    Example:
        >>> tiny = ModelConfig(n_layers=1, d_model=64, d_ff=128, n_heads=2, d_head=8, vocab=9)
        >>> bool(abs(init(tiny, seed=0)["wq"].std() - 64**-0.5) < 0.01)
        True
    """
    rng = np.random.default_rng(seed)
    real_heads = config.n_heads - config.n_padding_heads
    real_kv_heads = real_heads if _is_multihead(config) else config.n_kv_heads
    fan_in = {
        "wo": real_heads * config.d_head,
        "w_down": config.d_ff,
    }
    weights: Weights = {}
    for name, full_shape in shapes(config).items():
        letters = _LETTERS[name].split()
        real = {"H": real_heads, "K": real_kv_heads}
        shape = tuple(real.get(letter, size) for letter, size in zip(letters, full_shape, strict=True))
        if name.endswith("norm"):
            weights[name] = rng.random(shape, dtype=np.float32) + np.float32(0.5)
        else:
            scale = np.float32(fan_in.get(name, config.d_model) ** -0.5)
            weights[name] = rng.standard_normal(shape, dtype=np.float32) * scale
    return {name: _zero_extended(weights[name], shape) for name, shape in shapes(config).items()}


def _keys_values(config: ModelConfig, layer: Mapping[str, Array], x: Array) -> tuple[Array, Array]:
    """`x` [L, E] -> keys, rotated by RoPE, and values, [K, L, Q] each."""
    heads = range(config.n_kv_heads)
    keys = [_rope(x @ layer["wk"][:, head], config.rope_theta) for head in heads]
    return np.stack(keys), np.stack([x @ layer["wv"][:, head] for head in heads])


def _attention(config: ModelConfig, layer: Mapping[str, Array], x: Array, keys: Array, values: Array) -> Array:
    """Causal softmax attention with RoPE, scale 1/sqrt(Q); query head h reads KV head h // (H/K). [L, E] -> [L, E]."""
    length = x.shape[0]
    visible = np.arange(length)[:, None] >= np.arange(length)[None, :]  # [query, key]
    out = np.zeros_like(x)
    for head in range(config.n_heads):
        kv_head = head // (config.n_heads // config.n_kv_heads)
        q = _rope(x @ layer["wq"][:, head], config.rope_theta)  # [L, Q]
        scores = np.where(visible, q @ keys[kv_head].T / math.sqrt(config.d_head), -np.inf)  # [query, key]
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        out = out + probabilities @ values[kv_head] @ layer["wo"][head]
    return out


def _mlp(config: ModelConfig, layer: Mapping[str, Array], x: Array) -> Array:
    """[L, E] -> [L, E]: (silu(gate) * up) @ down, (gelu(gate) * up) @ down, or gelu(up) @ down."""
    up = x @ layer["w_up"]  # [L, F]
    if config.mlp == "gelu":
        return _gelu(up) @ layer["w_down"]
    gate = x @ layer["w_gate"]  # [L, F]
    return ((_silu(gate) if config.mlp == "swiglu" else _gelu(gate)) * up) @ layer["w_down"]


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def _rope(x: Array, theta: float) -> Array:
    """[L, Q] with elements i and i + Q/2 (halves as in Llama, not neighbours) rotated by position * theta**(-2i/Q)."""
    length, d_head = x.shape
    half = d_head // 2
    angle = np.arange(length)[:, None] * theta ** (-2.0 * np.arange(half) / d_head)[None, :]  # [L, Q/2]
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=1
    )


def _silu(x: Array) -> Array:
    """x * sigmoid(x), with the sigmoid as a tanh because exp(-x) would overflow."""
    return x * 0.5 * (1.0 + np.tanh(x / 2.0))


def _gelu(x: Array) -> Array:
    """GELU in its tanh form, which differs from the erf form in the fourth digit."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _is_multihead(config: ModelConfig) -> bool:
    return config.n_kv_heads == config.n_heads > 1


def _float64(x: ArrayLike) -> Array:
    return np.asarray(x).astype(np.float64)


def _zero_extended(x: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """`x` filled up with zeros at the end of every dimension to `shape`."""
    return np.pad(x, [(0, size - have) for size, have in zip(shape, x.shape, strict=True)])


def _check_weights(config: ModelConfig, weights: Mapping[str, ArrayLike]) -> None:
    expected = shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"weights lacks {missing}; {config.name} needs {sorted(expected)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(
            f"weights has {unknown}, which {config.name} (block={config.block!r}, mlp={config.mlp!r}, "
            f"tied={config.tied}) does not use"
        )
    for name, shape in expected.items():
        if (have := np.shape(weights[name])) != shape:
            raise ValueError(f"weights[{name!r}] has shape {have}; must be [{_LETTERS[name]}] = {shape}")


def _checked_tokens(config: ModelConfig, tokens: ArrayLike) -> NDArray[np.int64]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"tokens has shape {ids.shape}; must be [L], one sequence of at least one token")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"tokens has dtype {ids.dtype}; must be integers")
    if outside := [int(i) for i in ids if not 0 <= i < config.vocab]:
        raise ValueError(f"tokens holds {outside[0]}; must be in 0..{config.vocab - 1}, the vocabulary")
    return ids.astype(np.int64)
