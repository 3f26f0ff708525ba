"""What it costs to change the layout between prefill and decode: no weight moves, but the KV cache may have to.

Two layouts can follow each other if their weights rest in the same places (`same_weights`). The cache then moves from
where prefill leaves it to where decode reads it. Both layouts are on one slice and one mesh.
"""

import functools
import math
from typing import Any

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.partitioning.cost.forward import Constants
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.torus.chip import chip
from toruslab.partitioning.torus.links import CollectiveKind, rate
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape


@functools.lru_cache(maxsize=65536)
def same_weights(a: Layout, b: Layout) -> bool:
    """Whether the weights of two layouts rest in the same places, so that a switch between them moves none."""
    return all(getattr(a, name)[0] == getattr(b, name)[0] for name in ("w_in", "w_kv", "w_out")) and a.table == b.table


def cache_move_s(
    src: Layout,
    dst: Layout,
    slice_: Slice,
    mesh: Shape,
    config: ModelConfig,
    *,
    batch: Any,
    filled: int,
    weight: Any,
    constants: Constants,
    int8_cache: bool = False,
) -> Any:
    """Seconds to move the KV cache from where one layout leaves it to where another layout reads it.

    A chip receives what it reads and does not hold: its share of the cache x (1 - 1 / the number of parts that only the
    old split has). K and V of all layers move in one collective each, and the scales of an int8 cache in another one
    each. A change in the order of the sequences is free.

    Args:
        src, dst: the layouts of prefill and decode, made for `mesh`.
        slice_, mesh: the chips, and the mesh over them.
        config: the model.
        batch: number of sequences; an array or a number.
        filled: positions in the cache.
        weight: bytes per weight, which decide the bytes of an activation; an array or a number.
        constants: the fitted ones.
        int8_cache: K and V move as int8, with their scales.

    Returns:
        An array of the shape to which `batch` and `weight` broadcast.
    """
    share, per_byte, hops = _move(src, dst, slice_, mesh)
    if not share:
        return np.zeros(np.broadcast_shapes(np.shape(batch), np.shape(weight)))
    act = np.where(weight == 4, 4, 2)
    each = config.d_head + act if int8_cache else config.d_head * act
    total = 2.0 * config.n_layers * config.n_kv_heads * each * filled * batch
    start = constants["collective_s"] + hops * constants["hop_s"]
    return share * total * per_byte / constants["link_efficiency"] + (4 if int8_cache else 2) * start


@functools.lru_cache(maxsize=65536)
def _move(src: Layout, dst: Layout, slice_: Slice, mesh: Shape) -> tuple[float, float, int]:
    """The share of the whole cache that a chip receives, seconds per byte of it, and hops."""
    sizes = dict(zip(AXES, mesh, strict=True))
    old, new = ([axes_of(e) for e in entries(each.cache)[:2]] for each in (src, dst))
    left = {a for i in (0, 1) for a in old[i] if a not in new[i]}
    if not left:
        return 0.0, 0.0, 0
    axes = tuple(a for a in AXES if a in left)
    k = math.prod(sizes[a] for a in axes)
    share = (1 - 1 / k) / math.prod(sizes[a] for each in new for a in each)
    kind: CollectiveKind = "all-to-all" if left & {a for each in new for a in each} else "all-gather"
    chip_ = chip(slice_.chip)
    dims = None if chip_.wrap == "switch" else mesh_shape(slice_)
    return share, *rate(kind, axes, mesh, chip_, dims)
