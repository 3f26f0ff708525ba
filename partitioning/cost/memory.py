"""What a chip holds during a pass: weights, cache, and the activations and gathered weights that live at once.

Decides which tensors those are, from the layout's ladders.
"""

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from toruslab.models.attention_blocks import block_size
from toruslab.partitioning.layouts.moves import INT8_SUBLANES

if TYPE_CHECKING:
    from toruslab.partitioning.cost.sizes import PassSizes


def matmuls(block: str) -> tuple[tuple[str, str, str, str], ...]:
    """Of one layer: inner and outer dimension, the weight, and the ladder of its rows."""
    found = [("E", "D", "w_kv", "x_kv")]
    for s in ("",) if block == "parallel" else ("", "_mlp"):
        found += [("E", "C" + s, "w_in", "x"), ("G" + s, "E", "w_out", "g")]
    return tuple(found)


def held_bytes(
    splits: Mapping[tuple[str, int], tuple[int, ...]],
    gathered: Mapping[str, float],
    block: str,
    n: "PassSizes",
    tile: tuple[int, int],
    *,
    together: bool = False,
) -> Any:
    """Bytes per chip at the peak of a pass.

    Args:
        splits: see `working_bytes`.
        gathered: weight -> the share of it that a chip holds while it is gathered.
        block, n: see `working_bytes`.
        tile: positions and numbers of a head's width that the cache is rounded up to.
        together: whether all of these are held at once, and not one after the other.
    """
    size = n.size
    at_rest = scales = most = 0.0
    for inner, outer, weight, _ in matmuls(block):
        elements = size[inner] * size[outer]
        at_rest = at_rest + elements / math.prod(splits[weight, 0]) * n.weight
        scales = scales + np.where(n.weight == 1, size[outer] * n.act, 0)
        held = gathered[weight] * elements * n.weight
        most = most + held if together else np.maximum(most, held)
    b_split, k_split = splits["cache", -1][:2]
    stored = np.ceil(size["Q"] / tile[1]) * tile[1]
    rows = np.where(n.int8_cache, INT8_SUBLANES, tile[0]) if tile[0] > 1 else 1
    positions = np.ceil(size["S"] / rows) * rows
    cache = 2 * size["B"] / b_split * size["K"] / k_split * n.cached_bytes(stored) * positions
    v, e = splits["table", -1]
    table = size["V"] * size["E"] / (v * e) * n.act * np.where(n.tied, 1, 2)
    return n.n_layers * (at_rest + scales + cache) + table + working_bytes(splits, block, n, most)


def working_bytes(splits: Mapping[tuple[str, int], tuple[int, ...]], block: str, n: "PassSizes", gathered: Any) -> Any:
    """Bytes per chip of the activations and gathered weights that live at once, where they are most.

    Besides the residual stream, each step holds what goes in and what comes out: into the input projection (its input
    stays for K and V), through attention (float32 scores of one block of positions), out of the output projection,
    through its reduce-scatter, before which TPUs lay the partial sums out anew.

    Args:
        splits: (field of the layout, rung) -> into how many parts each dimension is split.
        block: `parallel` or `serial`.
        n: the sizes of the passes, as arrays.
        gathered: bytes of the weights that a chip holds while one of them is gathered.

    Returns:
        An array like `n`'s; weights at rest, the cache and the tables are not in it.
    """
    size = n.size

    def held(field: str, rung: int, rows: str, columns: str) -> Any:
        r, c, *_ = splits[field, rung]
        return size[rows] / r * size[columns] / c * n.act

    stream = held("x", 0, "T", "E")
    out = held("out", 0, "T", "E")
    scattered = 2 * out if splits["out", 0] != splits["out", -1] else 0.0
    steps = [scattered]
    for s in ("",) if block == "parallel" else ("", "_mlp"):
        h = held("h", 0, "T", "C" + s)
        scattered_h = held("h", -1, "T", "C" + s) if splits["h", 0] != splits["h", -1] else 0.0
        steps.append(held("x", -1, "T", "E") + h + scattered_h)
        steps.append(held("g", -1, "T", "G" + s) + out)
    q = held("q", -1, "T", "H")
    positions = np.where(n.length > 1, block_size(2), block_size(1))
    scores = q / n.act * 4 * np.minimum(size["S"], np.where(size["S"] <= 2 * positions, 2 * positions, positions))
    steps.append(held("h", -1, "T", "C") + 2 * q * size["Q"] + scores)
    layer = stream + functools.reduce(np.maximum, steps) + gathered
    embed = held("embed", 0, "T", "E") + held("embed", 1, "T", "E")
    logits = stream + held("rows", -1, "R", "E") + held("logits", 0, "R", "V")
    return np.maximum(layer, np.maximum(embed, logits))
