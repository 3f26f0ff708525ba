"""Canonical weights -> the decoder's fused matrices, in NumPy.

Canonical weights have one array for each matrix of the literature (`models.decoder.reference` lists them). The decoder
fuses matrices that share an input (Q with gate and up, K with V) or an output (attention-out with down). A chip must
hold matching columns of all fused matrices on every mesh, so these are interleaved: by head for attention, by
`ModelConfig.mlp_groups` for the MLP of a serial block.
"""

from collections.abc import Mapping

import numpy as np

from toruslab.models.config import ModelConfig

Canonical = Mapping[str, np.ndarray]


def pack(config: ModelConfig, weights: Canonical) -> dict:
    """The decoder's parameters, nested by module, from canonical weights. The dtype does not change.

    Returns:
        `table` [V', E], `unembed` [V', E] if untied, `final_norm` [E], and per block (`layer`, or `attention` and
        `mlp`): `norm` [n, E], `w_in` [n, E, C], `w_kv` [n, E, D] if the block attends, `w_out` [n, G, E].
        V' = `vocab_rows`; the rows past the vocabulary are zero.
    """
    n, e, h, groups = config.n_layers, config.d_model, config.n_heads, config.mlp_groups
    f = config.d_ff // groups

    def columns(name: str) -> np.ndarray:
        return weights[name].reshape(n, e, groups, f)

    mlp_in = [columns("w_gate"), columns("w_up")] if config.gated else [columns("w_up")]
    mlp_out = [weights["w_down"].reshape(n, groups, f, e)]
    attention = {"w_kv": np.concatenate([weights["wk"], weights["wv"]], axis=-1).reshape(n, e, -1)}

    def fused(norm: str, ins: list[np.ndarray], outs: list[np.ndarray]) -> dict:
        return {
            "norm": weights[norm],
            "w_in": np.concatenate(ins, axis=-1).reshape(n, e, -1),
            "w_out": np.concatenate(outs, axis=2).reshape(n, -1, e),
        }

    wq, wo = weights["wq"].reshape(n, e, h, -1), weights["wo"]
    packed: dict = {"table": _padded(weights["embed"], config.vocab_rows), "final_norm": weights["final_norm"]}
    if not config.tied:
        packed["unembed"] = _padded(weights["unembed"], config.vocab_rows)
    if config.block == "parallel":
        packed["layer"] = fused("norm", [wq, *mlp_in], [wo, *mlp_out]) | attention
    else:
        packed["attention"] = fused("norm", [wq], [wo]) | attention
        packed["mlp"] = fused("mlp_norm", mlp_in, mlp_out)
    return packed


def layers(packed: Mapping, first: int, n: int) -> dict:
    """Packed parameters with only `n` layers, from layer `first` on. Parameters outside the layers stay."""
    return {
        name: {key: array[first : first + n] for key, array in found.items()} if isinstance(found, Mapping) else found
        for name, found in packed.items()
    }


def _padded(table: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(table, ((0, rows - len(table)), (0, 0)))
