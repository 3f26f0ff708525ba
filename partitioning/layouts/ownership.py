"""Which chip owns which part of each parameter in training.

The owner sums that part's gradient, keeps its optimizer moments and sends the new values to the chips with copies
(ZeRO, Rajbhandari et al. 2020). Chips hold copies of a parameter if the layout does not split it over all axes: norms,
and K and V of multiquery attention.

This file gives the ladders of gradients and of updated parameters. The optimizer is in `models.programs.training`.
"""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.layout import Axes, Ladder, axes_of, entries
from toruslab.partitioning.layouts.moves import LANES, SUBLANES
from toruslab.partitioning.torus.mesh import AXES


def copy_axes(spec: P, sizes: Mapping[str, int]) -> Axes:
    """The mesh axes, of size above 1, that a parameter at rest is not split over: chips along them hold copies."""
    used = {a for entry in entries(spec) for a in axes_of(entry)}
    return tuple(a for a in AXES if sizes[a] > 1 and a not in used)


def owned(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """The spec of what a chip owns: `spec`, with one dimension split further over the axes of its copies.

    Preferred is a dimension that splits into whole tiles of a TPU, because XLA:TPU turns other reduce-scatters into
    all-reduces. If no dimension is divisible by all those axes together, each chip owns and updates all that it holds.

    Example:
        >>> owned(P(None, "x", None), (3, 40, 12), {"x": 2, "y": 2, "z": 2}) == P(None, ("x", "y", "z"), None)
        True
        >>> owned(P(None, None), (3, 5), {"x": 2, "y": 2, "z": 2}) == P(None, None)
        True
    """
    axes = copy_axes(spec, sizes)
    if not axes:
        return spec
    split = [axes_of(entry) for entry in entries(spec)] + [()] * (len(shape) - len(entries(spec)))
    parts = {
        d: shape[d] // n
        for d in range(len(shape))
        if shape[d] % (n := math.prod(sizes[a] for a in split[d] + axes)) == 0
    }
    if not parts:
        return spec
    tiles = {len(shape) - 1: LANES, len(shape) - 2: SUBLANES}
    dim = max(parts, key=lambda d: (parts[d] % tiles.get(d, 1) == 0, d == len(shape) - 2, d))
    split[dim] += axes
    return P(*(None if not s else s[0] if len(s) == 1 else s for s in split))


def gradient_ladder(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> Ladder:
    """From a chip's own term of the gradient to the owned part of the sum: a reduce-scatter."""
    axes = copy_axes(spec, sizes)
    return (P(*entries(spec), unreduced=frozenset(axes)), owned(spec, shape, sizes)) if axes else (spec,)


def update_ladder(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> Ladder:
    """From the owned part, once updated, back to the spec at rest: an all-gather."""
    mine = owned(spec, shape, sizes)
    return (mine, spec) if mine != spec else (spec,)
