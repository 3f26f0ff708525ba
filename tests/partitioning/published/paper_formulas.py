"""Closed forms of Pope et al. 2022 that only the tests use, in the letters of `partitioning.published.closed_forms`."""

import numpy as np

from toruslab.partitioning.published.closed_forms import Number


def all_gather_s(D_bytes: Number, K: Number, bw: Number) -> Number:
    """Seconds of an all-gather over K chips: D/bw (K-1)/K [appendix A.1].

    Args:
        D_bytes: bytes of the output on one chip.
        K: chips in the group.
        bw: bytes per second into one chip.

    Example:
        >>> all_gather_s(270e9, 4, 270e9)
        0.75
    """
    return D_bytes / bw * (K - 1) / K


def reduce_scatter_s(D_bytes: Number, K: Number, bw: Number) -> Number:
    """Seconds of a reduce-scatter over K chips: as `all_gather_s`, D being the input on one chip [appendix A.1]."""
    return all_gather_s(D_bytes, K, bw)


def all_reduce_s(D_bytes: Number, K: Number, bw: Number) -> Number:
    """Seconds of an all-reduce over K chips: a reduce-scatter, then an all-gather [appendix A.1]."""
    return reduce_scatter_s(D_bytes, K, bw) + all_gather_s(D_bytes, K, bw)


def seconds(volume_elements: Number, bw: Number, bytes_per_element: Number = 2) -> Number:
    """Seconds to move a volume of elements (bf16 unless said otherwise)."""
    return volume_elements * bytes_per_element / bw


def ws2d_best_X(n: Number, E: Number, F: Number) -> Number:
    """The X that makes `ws2d_volume` smallest for n = X YZ chips: sqrt(n E/F).

    At F = 4E this is the paper's 0.5 sqrt(n), and YZ = 2 sqrt(n) [appendix A.2.1]. Not rounded to a legal mesh.

    Example:
        >>> float(ws2d_best_X(64, 16384, 65536))
        4.0
    """
    return np.sqrt(n * E / F)


def ws2d_best_volume(B: Number, L: Number, E: Number, F: Number, n: Number) -> Number:
    """Elements of 2D weight-stationary at `ws2d_best_X`: 4BL sqrt(EF/n), which is 8BLE/sqrt(n) at F = 4E."""
    return 4 * B * L * np.sqrt(E * F / n)


def ws2d_beats_ws1d(n: Number, E: Number, F: Number) -> Number:
    """Whether 2D at its best X moves less than 1D, as the formulas give it: n > 4F/E.

    The paper states sqrt(n) > F/E (`ws2d_beats_ws1d_as_printed`), which is the same only at F = 4E.

    Example:
        >>> bool(ws2d_beats_ws1d(32, 1, 4)), bool(ws2d_beats_ws1d(16, 1, 4))
        (True, False)
    """
    return n > 4 * F / E


def ws2d_beats_ws1d_as_printed(n: Number, E: Number, F: Number) -> Number:
    """The same condition as the paper prints it: sqrt(n) > F/E [section 3.2.2]."""
    return np.sqrt(n) > F / E


def wg_best_N(B: Number, L: Number, F: Number, n: Number) -> Number:
    """The N that makes `wg_volume` smallest: sqrt(BLn/F) [appendix A.2.2]. Not rounded or kept within 1..n."""
    return np.sqrt(B * L * n / F)


def wg_best_volume(B: Number, L: Number, E: Number, F: Number, n: Number) -> Number:
    """Elements of weight-gathered at `wg_best_N`: 4E sqrt(BLF)/sqrt(n) [appendix A.2.2]."""
    return 4 * E * np.sqrt(B * L * F / n)
