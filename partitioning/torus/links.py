"""How long a collective takes on the chips' interconnect as it is: rings, wraps, hops, switches.

Decides which links a group of chips can use and how evenly a collective can load them. Leaves the collective's bytes
to the caller, the chip's figures to `partitioning.torus.chip`, and fitted constants to whoever fits them: the fixed cost
and the hop's latency are arguments. Imports no JAX.

A mesh axis lies on one or more axes of the physical torus (row-major, x slowest). Its part on one physical axis is
closed to a ring when the whole axis is used and the axis wraps; else it is a line. The chips of a ring have two
links each to receive by, the chip at the end of a line has one, so that a line takes twice as long as a ring. An
axis of two chips is a line of two: a wrap-around link, where there is one, closes axes of 4k or of 16, and the one
cable between two neighbours carries each direction once, so that both directions reaching the same chip gain nothing.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from toruslab.partitioning.torus.chip import Chip, Wrap

Number = TypeVar("Number", float, np.ndarray)
CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
Convention = Literal["flat", "links"]
MESH_AXES = "xyz"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The chips of one group that lie along one physical axis.

    Args:
        n_chips: how many, two or more.
        stride: links between one and the next; as many groups are interleaved on the same links.
        closed: whether the last is linked to the first (a ring), or not (a line).
        n_sharing: rings of the same group that lie on this physical axis and share its links.
    """

    n_chips: int
    stride: int = 1
    closed: bool
    n_sharing: int = 1

    @property
    def n_links(self) -> float:
        """Links, one way, that every chip can receive by: 2 in a ring and 1 in a line, less what others take."""
        return (2 if self.closed else 1) / (self.stride * self.n_sharing)

    @property
    def n_hops(self) -> int:
        """Links to the chip that is farthest away."""
        return self.stride * (self.n_chips // 2 if self.closed else self.n_chips - 1)


def wraps(wrap: Wrap, dims: Sequence[int]) -> tuple[bool, ...]:
    """Which axes of a slice close to rings, by the chip's rule.

    Example:
        >>> wraps("cubes_of_4", (4, 4, 8)), wraps("cubes_of_4", (2, 2, 4)), wraps("axis_of_16", (8, 16))
        ((True, True, True), (False, False, False), (False, True))
    """
    if wrap == "cubes_of_4":
        return (len(dims) == 3 and all(size % 4 == 0 for size in dims),) * len(dims)
    return tuple(wrap == "axis_of_16" and size == 16 for size in dims)


def segments(
    axes: Sequence[str], mesh: Sequence[int], chip: Chip, slice_dims: Sequence[int] | None = None
) -> tuple[Segment, ...]:
    """The rings and lines that join the chips of one group, one per physical axis (and per gap on it).

    Args:
        axes: mesh axes of the collective, of `x`, `y`, `z`.
        mesh: sizes of the mesh axes in that order.
        chip: which tells the wrap rule and how many axes the torus has.
        slice_dims: the physical torus; the mesh itself unless given. The mesh is laid over it in row-major order.

    Raises:
        ValueError: unknown or repeated axes, a torus that the chip does not have, or a mesh that does not fit it.

    Example:
        >>> from toruslab.partitioning.torus.chip import chip
        >>> segments("y", (4, 8, 8), chip("v5e"), slice_dims=(16, 16))
        (Segment(n_chips=4, stride=1, closed=False, n_sharing=1), Segment(n_chips=2, stride=8, closed=True, n_sharing=1))
    """
    dims = tuple(mesh if slice_dims is None else slice_dims)
    if chip.wrap == "switch":
        raise ValueError(f"chip={chip.name!r} hangs on a switch and has no rings")
    return _segments(tuple(axes), tuple(mesh), dims, chip.wrap, chip.torus_axes)


def seconds(
    kind: CollectiveKind,
    bytes_received: Number,
    axes: Sequence[str],
    mesh: Sequence[int],
    chip: Chip,
    *,
    convention: Convention = "links",
    slice_dims: Sequence[int] | None = None,
    fixed_s: float = 0.0,
    hop_s: float | None = None,
) -> Number:
    """Seconds of one collective: fixed_s + hops x hop_s + bytes_received / (links x one link's bandwidth).

    `links` is what the collective's group can keep busy:

    - all-gather, reduce-scatter, all-reduce: a group over several axes splits its data so that every axis works at
      once. Any set S of the axes must still carry its own (N_S - 1) of the group's (N - 1) shards, and that is also
      enough (the loads of all orders of the axes span exactly those splits), so links = min over S of
      links(S) (N - 1)/(N_S - 1): the sum over all axes, unless a slow axis is long. [B] has the sum.
    - all-to-all: the links across the middle of the busiest axis of K chips, each carrying floor(K^2/4)/K of a
      chip's input: a quarter of an all-gather on a closed even ring, as in [B].
    - collective-permute: a shift by one chip, over one link, one way.
    - a switch: all links of the chip, whatever the kind.

    Args:
        kind: one of the five, spelt as in HLO.
        bytes_received: bytes that one chip must receive (all-gather: output x (K-1)/K; reduce-scatter: input x
            (K-1)/K; all-reduce: both; all-to-all: input x (K-1)/K). A number or an array.
        axes: mesh axes of the group, of `x`, `y`, `z`; `"yz"` and `("y", "z")` both do.
        mesh: sizes of the mesh axes in that order.
        chip: figures and wrap rule.
        convention: `links` as above, or `flat`: all links of the chip at work whatever the group, which is the
            270 GB/s of Pope et al. 2022 on v4.
        slice_dims: the physical torus, where the mesh is laid over it otherwise than axis by axis.
        fixed_s: cost of any collective, however small.
        hop_s: latency per hop; the chip's unless given, and 0 under `flat`, which knows no hops.

    Returns:
        Seconds; 0 for a group of one chip. Overlap with computation is not included.

    Raises:
        ValueError: an unknown kind, convention or axis, negative bytes, a mesh that is not on such a torus, or a
            group larger than a switch joins.

    Example:
        The all-gather of bf16 [2048, 8192] over an axis of 4 that does not wrap, as the scaling book works it out:

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
    n_group = _group_size(tuple(axes), tuple(mesh))
    if n_group == 1:
        return np.zeros_like(received)[()]
    if hop_s is None:
        hop_s = chip.hop_s if convention == "links" else 0.0
    n_phases = 2 if kind == "all-reduce" else 1
    if chip.wrap == "switch":
        if n_group > chip.max_chips:
            raise ValueError(
                f"a group of {n_group} chips over {','.join(axes)} is larger than the {chip.max_chips} that one switch "
                f"of {chip.name} joins; the network between switches is not described"
            )
        n_links, n_hops = float(chip.n_links), 1
    else:
        dims = tuple(mesh if slice_dims is None else slice_dims)
        group = _segments(tuple(axes), tuple(mesh), dims, chip.wrap, chip.torus_axes)
        n_links = float(chip.n_links) if convention == "flat" else _usable_links(kind, group)
        n_hops = _hops(kind, group)
    return fixed_s + n_phases * n_hops * hop_s + received / (n_links * chip.link_bytes_per_s)


@functools.lru_cache(maxsize=65536)
def rate(
    kind: CollectiveKind,
    axes: tuple[str, ...],
    mesh: tuple[int, ...],
    chip: Chip,
    slice_dims: tuple[int, ...] | None = None,
    *,
    one_way: bool = False,
) -> tuple[float, int]:
    """The `axes` convention: a collective over several axes runs on one after the other, each on that axis' links only.

    The gather over the longest axis comes last and moves most. This is what Pope et al.'s measurements on v4 show
    (`partitioning.cost.forward`); `seconds` with `links` is the bound that a collective on all axes at once could reach.

    Args:
        one_way: rings send in one direction only, as looped collective-permutes do.

    Returns:
        Seconds per received byte at full bandwidth, and hops: chips passed one by one, both phases of an all-reduce.
    """
    n_group = _group_size(axes, mesh)
    if n_group == 1:
        return 0.0, 0
    phases = 2 if kind == "all-reduce" else 1
    if chip.wrap == "switch":
        if n_group > chip.max_chips:
            seconds(kind, 1.0, axes, mesh, chip)  # raises
        return 1 / (chip.n_links * chip.link_bytes_per_s), phases
    group = _segments(axes, mesh, tuple(mesh if slice_dims is None else slice_dims), chip.wrap, chip.torus_axes)
    hops = phases * sum(ring.stride * (ring.n_chips - 1) for ring in group)
    if kind in ("all-to-all", "collective-permute"):
        return 1 / (_usable_links(kind, group) * chip.link_bytes_per_s), hops
    left, taken = n_group / (n_group - 1), 0.0
    for ring in sorted(group, key=lambda ring: -ring.n_chips):
        n_links = ring.n_links / 2 if one_way and ring.closed else ring.n_links
        taken += left * (ring.n_chips - 1) / ring.n_chips / (n_links * chip.link_bytes_per_s)
        left /= ring.n_chips
    return taken, hops


def permute_rate(
    axis: str, mesh: tuple[int, ...], chip: Chip, slice_dims: tuple[int, ...] | None = None, *, ways: int = 1
) -> tuple[float, float]:
    """One send of a looped collective along a mesh axis (`partitioning.layouts.rings`): seconds per byte, and hops.

    One way, a send has one link, and all chips send at once; the way back from the end of a line is long, but over the
    links of the other direction. Both ways, two sends run at once on a closed ring, so that each counts half; on a line
    and between two chips they share the links, and on a switch a send has all of them.
    """
    per_byte, hops = rate("collective-permute", (axis,), mesh, chip, slice_dims)
    if chip.wrap == "switch":
        return per_byte, hops
    group = _segments((axis,), mesh, tuple(mesh if slice_dims is None else slice_dims), chip.wrap, chip.torus_axes)
    closed = all(ring.closed for ring in group)
    step = sum(ring.stride for ring in group) if closed else hops
    share = 0.5 if ways == 2 and closed and _group_size((axis,), mesh) > 2 else 1.0
    return per_byte * share, step * share


def _group_size(axes: tuple[str, ...], mesh: tuple[int, ...]) -> int:
    if not 1 <= len(mesh) <= len(MESH_AXES) or any(size < 1 for size in mesh):
        raise ValueError(f"mesh={mesh} must be one to three positive sizes")
    for axis in axes:
        if axis not in tuple(MESH_AXES[: len(mesh)]):
            known = ", ".join(MESH_AXES[: len(mesh)])
            raise ValueError(f"axes={axes}: {axis!r} is not an axis of the mesh, which has {known}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes={axes} names an axis twice")
    return math.prod(mesh[MESH_AXES.index(axis)] for axis in axes)


@functools.lru_cache(maxsize=4096)
def _segments(
    axes: tuple[str, ...], mesh: tuple[int, ...], dims: tuple[int, ...], wrap: Wrap, torus_axes: int
) -> tuple[Segment, ...]:
    _group_size(axes, mesh)
    if sum(size > 1 for size in dims) > torus_axes:
        raise ValueError(
            f"slice {'x'.join(map(str, dims))} has more axes longer than 1 than the chip's torus, which has "
            f"{torus_axes}; give the torus as slice_dims and lay the mesh over it"
        )
    segments: list[tuple[int, int, int]] = []  # physical axis, stride, chips
    for physical, stride, n_chips, axis in sorted(_placed(mesh, dims)):
        if axis not in axes:
            continue
        if segments and segments[-1][0] == physical and segments[-1][1] * segments[-1][2] == stride:
            segments[-1] = (physical, segments[-1][1], segments[-1][2] * n_chips)
        else:
            segments.append((physical, stride, n_chips))
    closed = wraps(wrap, dims)
    on_axis = [physical for physical, _, _ in segments]
    return tuple(
        Segment(
            n_chips=n_chips,
            stride=stride,
            closed=closed[physical] and n_chips * stride == dims[physical],
            n_sharing=on_axis.count(physical),
        )
        for physical, stride, n_chips in segments
    )


def _placed(mesh: tuple[int, ...], dims: tuple[int, ...]) -> list[tuple[int, int, int, str]]:
    """Where each mesh axis lies: (physical axis, stride, chips, mesh axis), both in row-major order."""
    misfit = f"mesh {'x'.join(map(str, mesh))} cannot be laid over slice {'x'.join(map(str, dims))}"
    if math.prod(mesh) != math.prod(dims):
        raise ValueError(f"{misfit}: {math.prod(mesh)} chips are not {math.prod(dims)}")
    places = []
    physical, stride = len(dims) - 1, 1
    for axis, size in reversed(list(zip(MESH_AXES, mesh, strict=False))):
        while size > 1:
            while stride == dims[physical]:
                physical, stride = physical - 1, 1
            left = dims[physical] // stride
            n_chips = math.gcd(size, left)
            if n_chips not in (size, left):
                raise ValueError(f"{misfit}: an axis of {size} over {left} chips in a row")
            places.append((physical, stride, n_chips, axis))
            size, stride = size // n_chips, stride * n_chips
    return places


def _hops(kind: CollectiveKind, group: tuple[Segment, ...]) -> int:
    if kind == "collective-permute":  # to the next chip, and in a line all the way back
        return max(ring.stride if ring.closed else ring.n_hops for ring in group)
    return sum(ring.n_hops for ring in group)


def _usable_links(kind: CollectiveKind, group: tuple[Segment, ...]) -> float:
    n_group = math.prod(ring.n_chips for ring in group)
    if kind == "collective-permute":
        return min(1 / (ring.stride * ring.n_sharing) for ring in group)
    if kind == "all-to-all":
        crossing = max(ring.n_chips**2 // 4 / ring.n_chips / ring.n_links for ring in group)  # of a chip's input
        return (n_group - 1) / n_group / crossing
    subsets = itertools.chain.from_iterable(itertools.combinations(group, r) for r in range(1, len(group) + 1))
    return min(
        sum(ring.n_links for ring in subset) * (n_group - 1) / (math.prod(ring.n_chips for ring in subset) - 1)
        for subset in subsets
    )
