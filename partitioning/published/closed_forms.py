"""The closed forms of Pope et al. 2022, in its letters, for a multi-layer perceptron of two matrices.

These are the paper's own estimates. `partitioning.cost.forward` prices what the decoder really does; the two are kept
apart so that one can check the other. The closed forms take (K-1)/K as 1 and count only the MLP's activations and
weights. Everything is vectorised: any argument may be a NumPy array.

B sequences of L tokens, E = d_model, F = d_ff, n chips as a mesh of X by YZ, N chips over which weights are
gathered. Volumes are in elements per chip. Imports no JAX.
"""

from typing import Any, TypeAlias

import numpy as np

Number: TypeAlias = Any
"""A number or an array. The answer is an array if an argument is."""


def ws1d_volume(B: Number, L: Number, E: Number) -> Number:
    """Elements of 1D weight-stationary: 2BLE, whatever the number of chips [section 3.2.1]."""
    return 2 * B * L * E


def ws2d_volume(B: Number, L: Number, E: Number, F: Number, X: Number, YZ: Number) -> Number:
    """Elements of 2D weight-stationary: 2BL (E/X + F/YZ) [section 3.2.2].

    Example:
        >>> 2 * ws2d_volume(1, 2048, 16384, 65536, 4, 16)  # Figure 3, first point, in bytes
        67108864.0
    """
    return 2 * B * L * (E / X + F / YZ)


def wg_volume(B: Number, L: Number, E: Number, F: Number, n: Number, N: Number) -> Number:
    """Elements of weight-gathered over N of n chips: 2EFN/n for weights, 2BLE/N for activations [section 3.2.3].

    Activations move among the n/N chips that are left. If N = n none are left, and they do not move, as in Figure 3.

    Example:
        >>> float(2 * wg_volume(1, 2048, 16384, 65536, 64, 64))  # Figure 3, XYZ, in bytes
        4294967296.0
    """
    return 2 * E * F * N / n + _moved(n, N) * 2 * B * L * E / N


def ws2d_to_wg_tokens(E: Number, F: Number, X: Number, YZ: Number, N: Number) -> Number:
    """Tokens (BL) from which gathering weights over N chips moves less than 2D weight-stationary; inf if it never does.

    Example:
        >>> float(ws2d_to_wg_tokens(16384, 65536, 4, 16, 4))  # Figure 3: to X
        16384.0
    """
    n = X * YZ
    saved = E / X + F / YZ - _moved(n, N) * E / N
    with np.errstate(divide="ignore"):
        return np.where(np.asarray(saved) > 0, np.divide(E * F * N / n, saved), np.inf)[()]


def wg_to_wg_tokens(E: Number, F: Number, n: Number, N: Number, N_more: Number) -> Number:
    """Tokens (BL) from which gathering weights over N_more chips moves less than over N. E cancels out.

    Example:
        >>> float(wg_to_wg_tokens(16384, 65536, 64, 4, 16)), float(wg_to_wg_tokens(16384, 65536, 64, 16, 64))
        (65536.0, 786432.0)
    """
    return (E * F * (N_more - N) / n) / (E / N - _moved(n, N_more) * E / N_more)


def layout_volume(layout: str, tokens: Number, E: Number, F: Number, mesh: tuple[int, int, int]) -> Number:
    """Elements of one layout by name, as Figure 3 draws them.

    Args:
        layout: `ws1d`, `ws2d`, `wgx`, `wgxy` or `wgxyz`.
        tokens: B times L.
        mesh: sizes of x, y, z.

    Raises:
        ValueError: another layout.
    """
    X, Y, Z = mesh
    gathered = {"wgx": X, "wgxy": X * Y, "wgxyz": X * Y * Z}
    if layout == "ws1d":
        return ws1d_volume(1, tokens, E)
    if layout == "ws2d":
        return ws2d_volume(1, tokens, E, F, X, Y * Z)
    if layout in gathered:
        return wg_volume(1, tokens, E, F, X * Y * Z, gathered[layout])
    raise ValueError(f"layout={layout!r} has no closed form; there are ws1d, ws2d, {', '.join(gathered)}")


def kv_bytes_per_token(n_layers: Number, n_kv_heads: Number, d_head: Number, bytes_per_element: Number = 2) -> Number:
    """Bytes of K and V of one token in all layers: 2 x layers x KV heads x Q x bytes, on all chips together.

    Example:
        >>> kv_bytes_per_token(118, 1, 256)
        120832
    """
    return 2 * n_layers * n_kv_heads * d_head * bytes_per_element


def forward_flops(n_params: Number, tokens: Number) -> Number:
    """FLOPs of a forward pass: two per weight and token; attention's own products are left out [section 2]."""
    return 2 * n_params * tokens


def longest_context(
    hbm_bytes: Number,
    n_kv_shards: Number,
    batch: Number,
    kv_bytes: Number,
    kv_fraction: Number = 0.3,
) -> Number:
    """Longest context whose K and V fit, as in Table 1.

    Args:
        hbm_bytes: memory of one chip.
        n_kv_shards: number of chips that K and V are divided over: all of them if they are sharded over the batch or
            over as many KV heads; 1 for multiquery sharded over heads, where every chip holds them whole.
        batch: number of sequences.
        kv_bytes: bytes of K and V of one token, see `kv_bytes_per_token`.
        kv_fraction: the fraction of memory that is left for K and V.

    Returns:
        Tokens, not rounded.

    Example:
        >>> round(float(longest_context(32 * 2**30, 64, 512, kv_bytes_per_token(118, 1, 256))))
        10663
    """
    return kv_fraction * hbm_bytes * n_kv_shards / (batch * kv_bytes)


def _moved(n: Number, N: Number) -> Number:
    return np.where(np.asarray(N) < n, 1.0, 0.0)[()]
