"""How fast a collective is on the chips' interconnect as it is: rings, wraps, hops, switches.

Which links a group of chips can use, and how evenly a collective loads them. The bytes of a collective come from the
caller, the figures from `partitioning.torus.chip`, and fixed costs from whoever fits them. Imports no JAX.

A mesh axis is laid over one or more axes of the physical torus (row-major, x slowest). Its part on one physical axis is
a ring when the whole axis is used and the axis wraps; otherwise it is a line. A chip in a ring receives by two links,
the chip at the end of a line by one, so a line takes twice as long as a ring.

An axis of two chips is a line of two. Wrap-around links, where there are any, close axes of 4k or of 16; and the one
cable between two neighbours carries each direction once, so both directions to the same chip gain nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from toruslab.partitioning.torus.chip import Chip, Wrap

CollectiveKind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
MESH_AXES = "xyz"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The chips of one group along one physical axis: a ring or a line.

    Args:
        n_chips: two or more.
        stride: links between one chip and the next. As many groups are interleaved on the same links.
        closed: whether the last chip is linked to the first (a ring) or not (a line).
        n_sharing: segments of the same group on this physical axis, which share its links.
    """

    n_chips: int
    stride: int = 1
    closed: bool
    n_sharing: int = 1

    @property
    def n_links(self) -> float:
        """Links, one way, by which every chip can receive: 2 in a ring and 1 in a line, divided by those who share."""
        return (2 if self.closed else 1) / (self.stride * self.n_sharing)


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
        axes: mesh axes of the group, of `x`, `y`, `z`; `"yz"` and `("y", "z")` both do.
        mesh: sizes of the mesh axes in that order.
        chip: its wrap rule, and how many axes its torus has.
        slice_dims: the physical torus; the mesh itself unless given. The mesh is laid over it in row-major order.

    Raises:
        ValueError: unknown or repeated axes, a torus that the chip does not have, or a mesh that does not fit it.

    Example:
        >>> from toruslab.partitioning.torus.chip import chip
        >>> line, ring = segments("y", (4, 8, 8), chip("v5e"), slice_dims=(16, 16))
        >>> line == Segment(n_chips=4, closed=False), ring == Segment(n_chips=2, stride=8, closed=True)
        (True, True)
    """
    if chip.wrap == "switch":
        raise ValueError(f"chip={chip.name!r} hangs on a switch and has no rings")
    dims = tuple(mesh if slice_dims is None else slice_dims)
    return _segments(tuple(axes), tuple(mesh), dims, chip.wrap, chip.torus_axes)


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
    """How fast a collective is that runs over its axes one after the other, each time on that axis' links only.

    The gather over the longest axis comes last and moves most. This is what Pope et al.'s measurements on v4 show
    (`partitioning.cost.forward`); a collective on all axes at once could be faster. An all-to-all is bound by the links
    across the middle of its busiest axis, a collective-permute shifts by one chip over one link, one way. On a switch
    every kind has all links of the chip.

    Args:
        kind, axes: the collective, and the mesh axes of its group.
        mesh, chip, slice_dims: see `segments`.
        one_way: rings send in one direction only, as looped collective-permutes do.

    Returns:
        Seconds per received byte at full bandwidth, and hops: chips passed one by one, both phases of an all-reduce.
        Both are 0 for a group of one chip.

    Raises:
        ValueError: as `segments`, or a group larger than a switch joins.

    Example: an all-gather over a closed axis of 4 chips, on two links of 45e9 bytes/s.
        >>> from toruslab.partitioning.torus.chip import chip
        >>> s_per_byte, hops = rate("all-gather", ("x",), (4, 4, 4), chip("v4"))
        >>> round(1 / s_per_byte), hops
        (90000000000, 3)
    """
    n_group = group_size(axes, mesh)
    if n_group == 1:
        return 0.0, 0
    phases = 2 if kind == "all-reduce" else 1
    if chip.wrap == "switch":
        if n_group > chip.max_chips:
            raise ValueError(
                f"a group of {n_group} chips over {','.join(axes)} is larger than the {chip.max_chips} that one switch "
                f"of {chip.name} joins; the network between switches is not described"
            )
        return 1 / (chip.n_links * chip.link_bytes_per_s), phases
    group = segments(axes, mesh, chip, slice_dims)
    hops = phases * sum(s.stride * (s.n_chips - 1) for s in group)
    if kind == "collective-permute":
        return 1 / (min(1 / (s.stride * s.n_sharing) for s in group) * chip.link_bytes_per_s), hops
    if kind == "all-to-all":
        return 1 / (all_to_all_links(group) * chip.link_bytes_per_s), hops
    left, taken = n_group / (n_group - 1), 0.0
    for s in sorted(group, key=lambda s: -s.n_chips):
        n_links = s.n_links / 2 if one_way and s.closed else s.n_links
        taken += left * (s.n_chips - 1) / s.n_chips / (n_links * chip.link_bytes_per_s)
        left /= s.n_chips
    return taken, hops


def permute_rate(
    axis: str, mesh: tuple[int, ...], chip: Chip, slice_dims: tuple[int, ...] | None = None, *, ways: int = 1
) -> tuple[float, float]:
    """Seconds per byte, and hops, of one collective-permute of a looped collective along a mesh axis.

    One way, a permute has one link, and all chips send at once. The way back from the end of a line is long, but uses
    the links of the other direction. Both ways (`ways` = 2), two permutes run at once on a closed ring, so each counts
    half. On a line and between two chips they share the links, and on a switch a permute has all of them.
    """
    per_byte, hops = rate("collective-permute", (axis,), mesh, chip, slice_dims)
    if chip.wrap == "switch":
        return per_byte, hops
    group = segments(axis, mesh, chip, slice_dims)
    closed = all(s.closed for s in group)
    step = sum(s.stride for s in group) if closed else hops
    share = 0.5 if ways == 2 and closed and group_size((axis,), mesh) > 2 else 1.0
    return per_byte * share, step * share


def all_to_all_links(group: Sequence[Segment]) -> float:
    """Links by which a chip receives in an all-to-all.

    The links across the middle of the busiest axis of K chips each carry floor(K^2/4)/K of a chip's input. On a closed
    even ring that takes a quarter of an all-gather's time, as in "How to Scale Your Model".
    """
    n_group = math.prod(s.n_chips for s in group)
    crossing = max(s.n_chips**2 // 4 / s.n_chips / s.n_links for s in group)  # of a chip's input
    return (n_group - 1) / n_group / crossing


def group_size(axes: Sequence[str], mesh: tuple[int, ...]) -> int:
    """Chips in a group over `axes` of the mesh.

    Raises:
        ValueError: a mesh that is none, or unknown or repeated axes.
    """
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
    group_size(axes, mesh)
    if sum(size > 1 for size in dims) > torus_axes:
        raise ValueError(
            f"slice {'x'.join(map(str, dims))} has more axes longer than 1 than the chip's torus, which has "
            f"{torus_axes}; give the torus as slice_dims and lay the mesh over it"
        )
    placed: list[tuple[int, int, int]] = []  # physical axis, stride, chips
    for physical, stride, n_chips, axis in sorted(_placed(mesh, dims)):
        if axis not in axes:
            continue
        if placed and placed[-1][0] == physical and placed[-1][1] * placed[-1][2] == stride:
            placed[-1] = (physical, placed[-1][1], placed[-1][2] * n_chips)
        else:
            placed.append((physical, stride, n_chips))
    closed = wraps(wrap, dims)
    on_axis = [physical for physical, _, _ in placed]
    return tuple(
        Segment(
            n_chips=n_chips,
            stride=stride,
            closed=closed[physical] and n_chips * stride == dims[physical],
            n_sharing=on_axis.count(physical),
        )
        for physical, stride, n_chips in placed
    )


def _placed(mesh: tuple[int, ...], dims: tuple[int, ...]) -> list[tuple[int, int, int, str]]:
    """The place of each mesh axis: (physical axis, stride, chips, mesh axis), both in row-major order."""
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
