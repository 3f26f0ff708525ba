"""What a chip holds during a forward pass: weights, KV cache, and what is alive at once at the peak.

The tensors follow from the layout's ladders. What a training step holds is in `partitioning.cost.training`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from toruslab.models.attention_blocks import block_size
from toruslab.partitioning.cost.sizes import PassSizes, matmuls
from toruslab.partitioning.cost.traffic import Coefficients
from toruslab.partitioning.layouts.moves import INT8_SUBLANES, LANES, SUBLANES
from toruslab.partitioning.torus.chip import Chip


def cache_tile(chip: Chip) -> tuple[int, int]:
    """What a cache is padded to: positions, and numbers of a head's width. TPUs store whole tiles."""
    return (1, 1) if chip.wrap == "switch" else (SUBLANES, LANES)


def held_bytes(c: Coefficients, n: PassSizes) -> Any:
    """Bytes per chip at the peak of passes of sizes `n`: an array like those of `n`."""
    size = n.size
    at_rest = scales = most = 0.0
    for inner, outer, weight, _ in matmuls(c.block):
        elements = size[inner] * size[outer]
        at_rest = at_rest + elements / math.prod(c.splits[weight, 0]) * n.weight
        scales = scales + np.where(n.weight == 1, size[outer] * n.act, 0)
        held = c.gathered[weight] * elements * n.weight
        most = most + held if c.layout.prefetch else np.maximum(most, held)  # prefetch holds all of them at once
    b_split, k_split = c.splits["cache", -1][:2]
    tile = cache_tile(c.chip)
    stored = np.ceil(size["Q"] / tile[1]) * tile[1]
    rows = np.where(n.int8_cache, INT8_SUBLANES, tile[0]) if tile[0] > 1 else 1
    positions = np.ceil(size["S"] / rows) * rows
    cache = 2 * size["B"] / b_split * size["K"] / k_split * n.cached_bytes(stored) * positions
    v, e = c.splits["table", -1]
    table = size["V"] * size["E"] / (v * e) * n.act * np.where(n.tied, 1, 2)
    return n.n_layers * (at_rest + scales + cache) + table + working_bytes(c.splits, c.block, n, most)


def working_bytes(splits: Mapping[tuple[str, int], tuple[int, ...]], block: str, n: PassSizes, gathered: Any) -> Any:
    """Bytes per chip of the activations and gathered weights that are alive at once, where they are most.

    The residual stream is alive throughout. Beside it every operation holds what goes in and what comes out:

    - the input projection, whose input stays for K and V;
    - attention, with the float32 scores of one block of positions;
    - the output projection;
    - its reduce-scatter, before which TPUs copy the partial sums into another layout.

    Args:
        splits: as in `Coefficients`.
        block: `parallel` or `serial`.
        n: the sizes of the passes.
        gathered: bytes of the weights that a chip holds while one of them is gathered.

    Returns:
        An array like those of `n`. Weights at rest, the cache and the tables are not included.
    """
    size = n.size

    def held(field: str, step: int, rows: str, columns: str) -> Any:
        r, c, *_ = splits[field, step]
        return size[rows] / r * size[columns] / c * n.act

    stream = held("x", 0, "T", "E")
    out = held("out", 0, "T", "E")
    scattered = 2 * out if splits["out", 0] != splits["out", -1] else 0.0
    alive = [scattered]
    for s in ("",) if block == "parallel" else ("", "_mlp"):
        h = held("h", 0, "T", "C" + s)
        scattered_h = held("h", -1, "T", "C" + s) if splits["h", 0] != splits["h", -1] else 0.0
        alive.append(held("x", -1, "T", "E") + h + scattered_h)
        alive.append(held("g", -1, "T", "G" + s) + out)
    q = held("q", -1, "T", "H")
    positions = np.where(n.length > 1, block_size(2), block_size(1))
    scores = q / n.act * 4 * np.minimum(size["S"], np.where(size["S"] <= 2 * positions, 2 * positions, positions))
    alive.append(held("h", -1, "T", "C") + 2 * q * size["Q"] + scores)
    layer = stream + functools.reduce(np.maximum, alive) + gathered
    embed = held("embed", 0, "T", "E") + held("embed", 1, "T", "E")
    logits = stream + held("rows", -1, "R", "E") + held("logits", 0, "R", "V")
    return np.maximum(layer, np.maximum(embed, logits))
