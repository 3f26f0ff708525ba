"""The largest batch and the longest context of a point that fit the memory of its chips."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from toruslab.partitioning.cost.forward import price
from toruslab.partitioning.cost.sizes import PassSizes, model_sizes
from toruslab.partitioning.cost.training import fits
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.plan.plan import requirements
from toruslab.partitioning.plan.point import WEIGHTS, Point
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice

MOST = 2**40
"""The largest batch, context or length that is tried."""


@functools.lru_cache(maxsize=65536)
def batch_step(made: Layout, block: str, mesh: Shape) -> int:
    """The number that a batch must be a multiple of under a layout."""
    sizes = dict(zip(AXES, mesh, strict=True))
    splits = (axes for dim, axes in requirements(made, block) if dim in ("B", "T", "R"))
    return math.lcm(1, *(math.prod(sizes[a] for a in axes) for axes in splits))


def largest_batch(point: Point) -> int | None:
    """The largest batch that fits the point's slice, all else equal; None if not even the smallest fits.

    Example:
        >>> largest_batch(Point(model="palm-540b-h64", slice="v4:4x4x4", phase="decode", batch=64, context=2048,
        ...                     layout="ws2d", attention="batch", weights="int8"))
        6400
    """
    step = step_of_batches(point)
    found = _last(point, MOST // step, lambda k: {"batch": k * step})
    return None if found is None else found * step


def step_of_batches(point: Point) -> int:
    """The number that a point's batch must be a multiple of; in training every part of it."""
    return batch_step(point.layout_value, point.config.block, point.mesh_shape) * point.accumulate


def longest_context(point: Point) -> int | None:
    """The longest `context` that fits the point's slice, all else equal; None if not even the shortest fits.

    It is counted as in a point: in decode with the token of this pass (at least 1), in prefill without the tokens of
    this pass (at least 0). Training has no context: None.
    """
    if point.phase == "train":
        return None
    least = 1 if point.phase == "decode" else 0
    found = _last(point, MOST + 1 - least, lambda k: {"context": k - 1 + least})
    return None if found is None else found - 1 + least


def _last(point: Point, most: int, change) -> int | None:
    """The largest k of 1..most whose changed point fits; None if there is none.

    Memory never falls as k grows, so the search narrows an interval: 1024 tries at a time, or one in training, where
    points are priced one by one.
    """
    below, above, at_once = 0, most + 1, 1 if point.phase == "train" else 1024
    while above - below > 1:
        tried = np.unique(np.linspace(below, above, at_once + 2, dtype=np.int64)[1:-1])
        tried = tried[(tried > below) & (tried < above)]
        n = int(np.count_nonzero(_fits(point, change(tried))))
        below, above = (int(tried[n - 1]) if n else below), (int(tried[n]) if n < len(tried) else above)
    return below or None


def _fits(point: Point, changed: Mapping[str, np.ndarray]) -> np.ndarray:
    if point.phase == "train":
        return np.array([fits(dataclasses.replace(point, batch=int(n))) for n in changed["batch"]])
    context = changed.get("context", np.array(point.context))
    more = point.capacity - point.context
    decode = point.phase == "decode"
    numbers = PassSizes.join(
        model_sizes(point.config),
        batch=np.asarray(changed.get("batch", point.batch), float),
        length=float(point.length),
        first=np.asarray(context - (point.length if decode else 0), float),
        capacity=np.asarray(context + more, float),
        weight=float(WEIGHTS[point.weights]),
        int8_cache=point.cache == "int8",
    )
    slice_ = Slice.parse(point.slice)
    cost = price(point.layout_value, point.config.block, slice_, point.mesh_shape, numbers)
    return np.floor(cost.hbm_bytes_per_chip) <= cost.hbm_bytes
