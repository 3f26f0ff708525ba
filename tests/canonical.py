"""Canonical weights in tests: unpacked from the decoder's fused matrices, and with padding heads.

`models.decoder.reference` lists the canonical weights.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from toruslab.models.config import ModelConfig
from toruslab.models.decoder import reference


def unpack(config: ModelConfig, packed: Mapping) -> dict[str, np.ndarray]:
    """The canonical weights of packed parameters: the inverse of `models.weights.packing.pack`."""
    n, e, h, q = config.n_layers, config.d_model, config.n_heads, config.d_head
    groups, f = config.mlp_groups, config.d_ff // config.mlp_groups
    weights = {"embed": packed["table"][: config.vocab], "final_norm": packed["final_norm"]}
    if not config.tied:
        weights["unembed"] = packed["unembed"][: config.vocab]
    if config.block == "parallel":
        block = packed["layer"]
        w_in, w_out = block["w_in"].reshape(n, e, h, -1), block["w_out"].reshape(n, h, -1, e)
        wq, mlp_in, wo, mlp_out = w_in[..., :q], w_in[..., q:], w_out[:, :, :q], w_out[:, :, q:]
    else:
        block, mlp = packed["attention"], packed["mlp"]
        wq, wo = block["w_in"].reshape(n, e, h, q), block["w_out"].reshape(n, h, q, e)
        mlp_in, mlp_out = mlp["w_in"].reshape(n, e, groups, -1), mlp["w_out"].reshape(n, groups, f, e)
        weights["mlp_norm"] = mlp["norm"]
    kv = block["w_kv"].reshape(n, e, config.n_kv_heads, 2 * q)
    if config.gated:
        weights["w_gate"] = mlp_in[..., :f].reshape(n, e, -1)
        mlp_in = mlp_in[..., f:]
    return weights | {
        "norm": block["norm"],
        "wq": wq,
        "wk": kv[..., :q],
        "wv": kv[..., q:],
        "wo": wo,
        "w_up": mlp_in.reshape(n, e, -1),
        "w_down": mlp_out.reshape(n, -1, e),
    }


def pad_heads(
    config: ModelConfig, weights: Mapping[str, ArrayLike], n_heads: int
) -> tuple[ModelConfig, reference.Weights]:
    """The same model with zero heads appended, so that `n_heads` can be split over more chips.

    wq and wo of a padding head are zero, and its wk and wv too where attention is multihead: it attends evenly to
    whatever it reads, and wo drops the result. Its contribution is exactly zero, not merely small.

    Args:
        config: sizes and variants, possibly padded already.
        weights: its canonical weights.
        n_heads: query heads afterwards, padding included.

    Returns:
        The padded config and its float32 weights.

    Raises:
        ValueError: fewer heads than now, weights of a wrong shape, or attention that cannot be padded (grouped-query).

    Example:
        PaLM 540B goes from 48 to 64 heads, to be divisible over 64 chips.

        >>> tiny = ModelConfig(n_layers=1, d_model=4, d_ff=24, n_heads=3, d_head=2, vocab=9)
        >>> padded, weights = pad_heads(tiny, reference.init(tiny, seed=0), n_heads=4)
        >>> padded.n_padding_heads, weights["wq"].shape, float(abs(weights["wq"][:, :, 3]).max())
        (1, (1, 4, 4, 2), 0.0)

    Pope et al. 2022, section 4 (the padding of PaLM's heads).
    """
    if n_heads < config.n_heads:
        raise ValueError(f"n_heads={n_heads} is less than the {config.n_heads} heads (padding included) there are")
    reference._check_weights(config, weights)
    padded = config.padded(n_heads)
    return padded, {
        name: reference._zero_extended(np.asarray(weights[name]).astype(np.float32), shape)
        for name, shape in reference.shapes(padded).items()
    }
