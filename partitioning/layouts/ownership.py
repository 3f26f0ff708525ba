"""Who keeps what while training: of every parameter, the part whose gradient sum, moments and update are a chip's own.

A parameter rests where the layout puts it, and chips may hold copies of it (a norm, K and V of multiquery). Its
gradient then comes as parts to be summed over these chips; each of them sums and updates one part (ZeRO, Rajbhandari
et al. 2020) and hands it to the others. Decides the ladders of gradients and of updated parameters; knows no optimiser.
"""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.layout import Axes, Ladder, axes_of, entries
from toruslab.partitioning.layouts.moves import LANES, SUBLANES
from toruslab.partitioning.torus.mesh import AXES


def copies(spec: P, sizes: Mapping[str, int]) -> Axes:
    """The mesh axes that a parameter at rest is not split over: chips along them hold copies."""
    used = {a for entry in entries(spec) for a in axes_of(entry)}
    return tuple(a for a in AXES if sizes[a] > 1 and a not in used)


def owned(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """A parameter's `spec`, split further over the axes of its copies: along one dimension that they divide, if they
    can into whole tiles of a TPU (XLA:TPU makes all-reduces of other reduce-scatters).

    Where none is divisible by all of them together, the copies stay, and each updates the whole.

    Example:
        >>> owned(P(None, "x", None), (3, 40, 12), {"x": 2, "y": 2, "z": 2}) == P(None, ("x", "y", "z"), None)
        True
        >>> owned(P(None, None), (3, 5), {"x": 2, "y": 2, "z": 2}) == P(None, None)
        True
    """
    axes = copies(spec, sizes)
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
    """From a chip's part of the sum to the sum, where it is owned."""
    axes = copies(spec, sizes)
    return (P(*entries(spec), unreduced=frozenset(axes)), owned(spec, shape, sizes)) if axes else (spec,)


def update_ladder(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> Ladder:
    """From where it is updated back to where it rests."""
    mine = owned(spec, shape, sizes)
    return (mine, spec) if mine != spec else (spec,)
