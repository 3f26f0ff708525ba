"""The picture of the mesh as a 3D torus: for each layout, the collectives of one layer and the axes that they use.

The links of an axis are coloured if a collective of the layer uses the axis. They are thicker, the more bytes a chip
receives over it. A collective over several axes counts for each of them. Times are not shown.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from toruslab.benchmarks.reports.cells import Result, number
from toruslab.benchmarks.reports.style import Panel, Picture, volume
from toruslab.benchmarks.runs.rows import Row

AXES: tuple[str, ...] = ("x", "y", "z")
COLOURS: dict[str, str] = {"x": "#D55E00", "y": "#009E73", "z": "#0072B2"}
IDLE = "#D0D0D0"
DIRECTIONS: dict[str, tuple[float, float]] = {"x": (1.0, 0.0), "y": (0.46, 0.36), "z": (0.0, 1.0)}
BULGES: dict[str, tuple[float, float]] = {"x": (0.0, -0.2), "y": (0.2, -0.14), "z": (-0.2, 0.0)}
"""The direction in which a wrap-around link bends, as a share of the ring's length."""
MOST_DRAWN, MOST_LISTED = 4, 8
LINE_IN, RING_IN = 0.21, 2.7


@dataclass(frozen=True, kw_only=True)
class Used:
    """Collectives of one kind over the same axes: their number in a layer, and the bytes that a chip receives."""

    kind: str
    axes: str
    times: float
    bytes: float


def torus(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """A drawing for each layout on each mesh, from the cell with the most tokens."""
    chosen: dict[tuple, tuple[str, Sequence[Result]]] = {}
    for name, lines in cells.items():
        key = tuple(lines[0].point.get(k) for k in ("model", "slice", "mesh"))
        if key not in chosen or lines[0].tokens > chosen[key][1][0].tokens:
            chosen[key] = (name, lines)
    panels: list[Panel] = []
    for _, lines in chosen.values():
        shape = mesh_of(lines[0].point)
        drawn = [(x, of_a_layer(x.collectives)) for x in lines if x.collectives or x.label.startswith("replicated/")]
        if shape is None or not any(used for _, used in drawn):
            continue
        scale = _scale(used for _, used in drawn)
        suffix = f" on {lines[0].family.rpartition(' on ')[2]}" if len(chosen) > 1 else ""
        panels += [
            Panel(
                title=line.label + (" (compiled)" if line.is_auto else "") + suffix,
                draw=lambda axes, used=used, shape=shape, scale=scale: _draw(axes, shape, used, scale),
                height_in=RING_IN + LINE_IN * (_n_listed(used) + 1),
                alt=f"{line.label}: {'; '.join(map(_words, used)) or 'no collective'}",
            )
            for line, used in drawn
        ]
    of = "; ".join(name for name, _ in chosen.values())
    return Picture(
        name="torus",
        heading="The mesh, and the axes that each layout uses",
        says=f"Coloured: axes that collectives of one layer use; the thicker, the more bytes a chip receives over them "
        f"(logarithmic, one scale for all layouts of a mesh). Grey: idle. Bytes are of {of}. Drawn as a full torus, "
        f"curves along its edges are the wrap-around links; of a longer axis {MOST_DRAWN} chips are drawn. auto: "
        f"from the compiled program, all others from the plan.",
        panels=panels,
        columns=3,
    )


def mesh_of(point: Row) -> tuple[int, int, int] | None:
    """The extents of the mesh, 1 where it has fewer than three; None where the point does not say."""
    text = str(point.get("mesh") or str(point.get("slice", "")).rpartition(":")[2])
    if not re.fullmatch(r"\d+(x\d+){0,2}", text):
        return None
    x, y, z = (*map(int, text.split("x")), 1, 1)[:3]
    return (x, y, z)


def of_a_layer(collectives: Sequence[Row]) -> list[Used]:
    """The collectives of one layer in the order of the program; those of one kind and axes are one.

    Example:
        >>> of_a_layer([{"scope": "layer/x", "kind": "all-gather", "axes": ["y"], "bytes": 8, "count": 4}])
        [Used(kind='all-gather', axes='y', times=1.0, bytes=8.0)]
    """
    inside = [c for c in collectives if str(c.get("scope", "")).split("/")[0] == "layer"]
    n_layers = max((number(c.get("count")) or 1 for c in inside), default=1)
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for c in inside:
        axes = "".join(a for a in AXES if a in (c.get("axes") or ()))
        times = (number(c.get("count")) or 1) / n_layers
        n, moved = found.get((str(c["kind"]), axes), (0.0, 0.0))
        found[str(c["kind"]), axes] = (n + times, moved + times * (number(c.get("bytes")) or 0))
    return [Used(kind=kind, axes=axes, times=n, bytes=moved) for (kind, axes), (n, moved) in found.items()]


def by_axis(used: Iterable[Used]) -> dict[str, float]:
    """Bytes that a chip receives in a layer, by the axis of the collectives."""
    found: dict[str, float] = {}
    for u in used:
        for axis in u.axes:
            found[axis] = found.get(axis, 0.0) + u.bytes
    return found


def _scale(layers: Iterable[Sequence[Used]]) -> tuple[float, float]:
    volumes = [b for used in layers for b in by_axis(used).values() if b > 0]
    return (min(volumes, default=1.0), max(volumes, default=1.0))


def _draw(axes: Any, shape: Sequence[int], used: Sequence[Used], scale: tuple[float, float]) -> None:
    axes.set_axis_off()
    listed = _n_listed(used)
    share = LINE_IN * (listed + 1) / (RING_IN + LINE_IN * (listed + 1))
    ring = axes.inset_axes((0.0, share, 1.0, 1 - share))
    _links(ring, shape, by_axis(used), scale)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    step = share / (listed + 1)
    most = MOST_LISTED if len(used) > MOST_LISTED + 1 else len(used)
    shown = sorted(used, key=lambda u: -u.bytes)[:most] if len(used) > most else used
    for row, u in enumerate(shown):
        y = share - (row + 1) * step
        axes.text(0.06, y, f"{u.times:.2g}×" if u.times < 10 else f"{u.times:.0f}×", ha="right", fontsize=10)
        axes.text(0.09, y, u.kind, fontsize=10)
        for i, axis in enumerate(u.axes):
            axes.text(0.5 + 0.035 * i, y, axis, color=COLOURS[axis], fontsize=10.5, fontweight="bold")
        axes.text(0.98, y, volume(u.bytes), ha="right", fontsize=10)
    rest = used if not shown else [u for u in used if u not in shown]
    if rest or not used:
        text = f"and {len(rest)} more, {volume(sum(u.bytes for u in rest))}" if rest else "no collective in a layer"
        axes.text(0.09, share - (len(shown) + 1) * step, text, fontsize=10, color="#555555")


def _n_listed(used: Sequence[Used]) -> int:
    return max(1, min(len(used), MOST_LISTED + 1))


def _links(ring: Any, shape: Sequence[int], volumes: Mapping[str, float], scale: tuple[float, float]) -> None:
    """Chips, links and wrap-around links in an oblique view; the rear ones are drawn first."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    drawn = dict(zip(AXES, (min(n, MOST_DRAWN) for n in shape), strict=True))
    extent = dict(zip(AXES, shape, strict=True))
    ring.set_axis_off()
    ring.set_aspect("equal")

    def place(at: Mapping[str, float]) -> tuple[float, float]:
        return (sum(at[a] * DIRECTIONS[a][0] for a in AXES), sum(at[a] * DIRECTIONS[a][1] for a in AXES))

    crowd = 0.6 if sorted(drawn.values())[1] > 2 else 1.0
    for axis in sorted(AXES, key=lambda a: a in volumes):  # idle links below the used ones
        if extent[axis] == 1:
            continue
        style = {"color": COLOURS[axis] if axis in volumes else IDLE, "zorder": 2 if axis in volumes else 1}
        width = _width(volumes[axis], scale) * crowd if axis in volumes else 0.8
        others = [a for a in AXES if a != axis]
        for rest in product(*(range(drawn[a]) for a in others)):
            at = dict(zip(others, rest, strict=True))
            ends = [place(at | {axis: i}) for i in range(drawn[axis])]
            ring.plot([e[0] for e in ends], [e[1] for e in ends], linewidth=width, solid_capstyle="round", **style)
            if any(i not in (0, drawn[a] - 1) for a, i in zip(others, rest, strict=True)):
                continue  # an inner ring; those along the edges show that the axis wraps around
            length = drawn[axis] - 1 + 0.6
            bend = [length * b for b in BULGES[axis]]
            path = Path(
                [ends[-1], *((e[0] + bend[0], e[1] + bend[1]) for e in (ends[-1], ends[0])), ends[0]],
                [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
            )
            ring.add_patch(
                PathPatch(path, fill=False, edgecolor=style["color"], lw=max(0.6, width * 0.45), alpha=0.6, zorder=1)
            )
    nodes = [place(dict(zip(AXES, at, strict=True))) for at in product(*(range(drawn[a]) for a in AXES))]
    ring.plot([n[0] for n in nodes], [n[1] for n in nodes], "o", color="#222222", markersize=4.5, zorder=3)
    far = {a: drawn[a] - 1 for a in AXES}
    beside = {"x": ({"x": far["x"] / 2}, "center", "top"), "z": ({"z": far["z"] / 2}, "right", "center")}
    beside["y"] = ({"x": far["x"], "y": far["y"] / 2}, "left", "top")
    for axis, (at, ha, va) in beside.items():
        if extent[axis] > 1:
            x, y = place(dict.fromkeys(AXES, 0) | at)
            dx, dy = (0.8 * b * (far[axis] + 0.6) for b in BULGES[axis])
            style = {"color": COLOURS[axis], "fontsize": 10.5, "fontweight": "bold"}
            ring.text(x + dx, y + dy, f" {axis} = {extent[axis]} ", ha=ha, va=va, **style)
    ring.margins(0.16)


def _width(moved: float, scale: tuple[float, float]) -> float:
    """Result width in points: 1.2 for the least bytes of all layouts, 5 for the most."""
    low, high = scale
    return 1.2 + 3.8 * (math.log(moved / low) / math.log(high / low) if moved > low and high > low else 0.0)


def _words(u: Used) -> str:
    return f"{u.times:g} {u.kind} over {u.axes}, {volume(u.bytes)}"
