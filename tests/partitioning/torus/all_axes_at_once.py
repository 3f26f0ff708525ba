"""A bound on the seconds of a collective: what its group reaches that keeps the links of all its axes busy at once.

`partitioning.torus.links.rate` prices the axes one after the other, as measurements show. The worked answers of "How to
Scale Your Model" are about this bound; the tests use it to check rings, wraps and placements.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from toruslab.partitioning.torus.chip import Chip
from toruslab.partitioning.torus.links import CollectiveKind, Segment, all_to_all_links, group_size, rate, segments

Convention = Literal["flat", "links"]


def seconds(
    kind: CollectiveKind,
    bytes_received: Any,
    axes: Sequence[str],
    mesh: Sequence[int],
    chip: Chip,
    *,
    convention: Convention = "links",
    slice_dims: Sequence[int] | None = None,
    fixed_s: float = 0.0,
    hop_s: float | None = None,
) -> Any:
    """fixed_s + hops x hop_s + bytes_received / (links x one link's bandwidth); 0 for a group of one chip.

    Args:
        kind: one of the five, spelt as in HLO.
        bytes_received: bytes that one chip must receive; a number or an array.
        axes, mesh, chip, slice_dims: see `segments`.
        convention: `links`, or `flat`: all links of the chip at work whatever the group, which is the 270 GB/s of Pope
            et al. 2022 on v4.
        fixed_s: cost of any collective, however small.
        hop_s: latency per hop; the chip's unless given, and 0 under `flat`, which knows no hops.

    Raises:
        ValueError: an unknown kind, convention or axis, negative bytes, a mesh that is not on such a torus, or a
            group larger than a switch joins.

    Example: an all-gather of bf16 [2048, 8192] over an axis of 4 that does not wrap, as the scaling book computes it.
        >>> from toruslab.partitioning.torus.chip import chip
        >>> float(seconds("all-gather", 2 * 2048 * 8192 * 3 / 4, "y", (8, 4), chip("v5e"), hop_s=0))
        0.0005592405333333334
    """
    if kind not in get_args(CollectiveKind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(CollectiveKind))}")
    if convention not in get_args(Convention):
        raise ValueError(f"convention={convention!r} must be one of {', '.join(get_args(Convention))}")
    received: Any = np.asarray(bytes_received, dtype=np.float64)[()]
    if np.any(received < 0):
        raise ValueError(f"bytes_received={bytes_received!r} must not be negative")
    if group_size(tuple(axes), tuple(mesh)) == 1:
        return np.zeros_like(received)[()]
    if hop_s is None:
        hop_s = chip.hop_s if convention == "links" else 0.0
    n_phases = 2 if kind == "all-reduce" else 1
    if chip.wrap == "switch":
        rate(kind, tuple(axes), tuple(mesh), chip)  # refuses a group that is too large
        n_links, n_hops = float(chip.n_links), 1
    else:
        group = segments(axes, mesh, chip, slice_dims)
        n_links = float(chip.n_links) if convention == "flat" else usable_links(kind, group)
        n_hops = _hops(kind, group)
    return fixed_s + n_phases * n_hops * hop_s + received / (n_links * chip.link_bytes_per_s)


def usable_links(kind: CollectiveKind, group: Sequence[Segment]) -> float:
    """Links that a group can keep busy.

    - all-gather, reduce-scatter, all-reduce: the group splits its data so that every axis works at once. Any set S of
      the axes must still carry its own (N_S - 1) of the group's (N - 1) shards, and that is also enough (the loads of
      all orders of the axes span exactly those splits). The links are the least over S of links(S) (N - 1)/(N_S - 1):
      the sum over all axes, unless a slow axis is long. The book has the sum.
    - all-to-all: `all_to_all_links`.
    - collective-permute: a shift by one chip, over one link, one way.
    """
    if kind == "collective-permute":
        return min(1 / (s.stride * s.n_sharing) for s in group)
    if kind == "all-to-all":
        return all_to_all_links(group)
    n_group = math.prod(s.n_chips for s in group)
    subsets = itertools.chain.from_iterable(itertools.combinations(group, r) for r in range(1, len(group) + 1))
    return min(
        sum(s.n_links for s in subset) * (n_group - 1) / (math.prod(s.n_chips for s in subset) - 1)
        for subset in subsets
    )


def _hops(kind: CollectiveKind, group: Sequence[Segment]) -> int:
    farthest = [s.stride * (s.n_chips // 2 if s.closed else s.n_chips - 1) for s in group]
    if kind == "collective-permute":  # to the next chip, and in a line all the way back
        return max(s.stride if s.closed else far for s, far in zip(group, farthest, strict=True))
    return sum(farthest)
