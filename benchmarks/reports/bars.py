"""The report's pictures of one cell each: the prediction's terms beside the measured step, and the bytes moved."""

from collections.abc import Mapping, Sequence
from typing import Any

from toruslab.benchmarks.reports.cells import TERMS, Line, number
from toruslab.benchmarks.reports.style import BLANK, Panel, Picture, colour, legend_below, log_axis, volume

Cells = Mapping[str, list[Line]]
TERM_COLOURS: dict[str, str] = dict(
    zip(TERMS, ("#0072B2", "#56B4E9", "#009E73", "#BBBBBB", "#D55E00", "#E69F00"), strict=True)
)
HATCHES = ("//", "..", "xx", "\\\\", "oo", "++")


def terms(cells: Cells) -> Picture:
    """The prediction's terms, stacked, beside the measured step, a panel per cell."""
    return Picture(
        name="terms",
        heading="What the prediction is made of",
        says="Of each layout, above: the prediction's terms, which add up to it. Below, grey: the measured median, "
        "with a bar over the middle half. Where the step was profiled, hatched: its kinds of work, in the shares that "
        "the profile gives them, of the profiled step.",
        panels=[
            Panel(
                title=name,
                draw=lambda axes, lines=lines: _terms(axes, lines),
                height_in=1.8 + 0.42 * len(lines),
                alt=f"Stacked terms of the prediction beside the measured step, {name}",
            )
            for name, lines in cells.items()
            if any(x.terms or x.measured_s for x in lines)
        ],
    )


def _terms(axes: Any, lines: Sequence[Line]) -> None:
    from matplotlib.patches import Patch

    used: dict[str, str] = {}
    profiled: dict[str, str] = {}
    kinds = list(dict.fromkeys(kind for x in lines for kind in profile(x)))
    for row, line in enumerate(lines):
        has_profile = bool(profile(line))
        high, above, below = (0.27, row - 0.27, row) if has_profile else (0.38, row - 0.19, row + 0.19)
        left = 0.0
        for name, taken in line.terms.items():
            used[name] = TERM_COLOURS.get(name, "#CC79A7")
            axes.barh(above, max(0.0, taken) * 1e3, high, left=left, color=used[name], linewidth=0)
            left += max(0.0, taken) * 1e3
        if line.measured_s:
            low, top = line.quartiles_s or (line.measured_s, line.measured_s)
            spread = [[max(0, line.measured_s - low) * 1e3], [max(0, top - line.measured_s) * 1e3]]
            style = {"color": BLANK, "edgecolor": "#555555", "linewidth": 0.6, "capsize": 2}
            axes.barh(below, line.measured_s * 1e3, high, xerr=spread, error_kw={"elinewidth": 1}, **style)
        left = 0.0
        for kind, taken in profile(line).items():
            profiled[kind] = HATCHES[kinds.index(kind) % len(HATCHES)]
            style = {"color": "white", "edgecolor": "#555555", "linewidth": 0.6, "hatch": profiled[kind]}
            axes.barh(row + high, taken * 1e3, high, left=left, **style)
            left += taken * 1e3
    axes.set_yticks(range(len(lines)), [x.label for x in lines])
    axes.set(xlabel="ms per pass", ylim=(len(lines) - 0.3, -0.7))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(True, axis="x")
    handles = [Patch(color=c, label=n.removesuffix("_s")) for n, c in used.items()]
    handles += [Patch(facecolor=BLANK, edgecolor="#555555", label="measured step")]
    handles += [Patch(facecolor="white", edgecolor="#555555", hatch=h, label=k) for k, h in profiled.items()]
    legend_below(axes, handles, columns=3, offset=-0.55 / (0.5 + 0.42 * len(lines)))


def profile(line: Line) -> dict[str, float]:
    """Seconds of the profiled step by kind of work: the devices' time, scaled to the length of the step."""
    found = line.row("measured").get("profile")
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not isinstance(found, dict):
        return {}
    by_kind: dict[str, float] = {}
    for row in rows:
        taken = number(row.get("device_s")) if isinstance(row, dict) else None
        if taken and taken > 0:
            kind = str(row.get("kind") or "other")
            by_kind[kind] = by_kind.get(kind, 0.0) + taken
    step, total = number(found.get("step_s")), sum(by_kind.values())
    if not step or step <= 0 or not total:
        return {}
    return {k: v * step / total for k, v in sorted(by_kind.items(), key=lambda item: -item[1])}


def moved(cells: Cells) -> Picture:
    """Bytes that one chip receives in a pass, planned and compiled, a panel per cell."""
    return Picture(
        name="bytes",
        heading="Bytes planned and compiled",
        says="What one chip receives in a pass. Ring: planned, from the layout alone. Disc: read from XLA's program. "
        "auto has no plan of its own. Marks at the left edge are of layouts that move nothing.",
        panels=[
            Panel(
                title=name,
                draw=lambda axes, lines=lines: _moved(axes, lines),
                height_in=1.4 + 0.27 * len(lines),
                alt=f"Bytes that one chip receives, planned and compiled, {name}",
            )
            for name, lines in cells.items()
            if any(
                x.number(source, "collective_bytes") is not None for x in lines for source in ("analytic", "compiled")
            )
        ],
    )


def _moved(axes: Any, lines: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    pairs = [
        [None if x.is_auto else x.number("analytic", "collective_bytes"), x.number("compiled", "collective_bytes")]
        for x in lines
    ]
    least = min((b for pair in pairs for b in pair if b), default=1e3) / 2e6
    for row, (line, pair) in enumerate(zip(lines, pairs, strict=True)):
        at = [None if b is None else max(b / 1e6, least) for b in pair]
        style = {"color": colour(str(line.point.get("layout"))), "linestyle": "none", "clip_on": False}
        if None not in at:
            axes.plot(at, [row, row], color="#999999", linewidth=1, zorder=1)
        for x, face, size in zip(at, ("white", style["color"]), (9, 4.5), strict=True):
            if x is not None:
                axes.plot(x, row, marker="o", markersize=size, markerfacecolor=face, markeredgewidth=1.4, **style)
    axes.set_yticks(range(len(lines)), [x.label for x in lines])
    axes.set(xscale="log", xlabel="bytes a chip, per pass", ylim=(len(lines) - 0.4, -0.6))
    axes.set_xlim(left=least)
    log_axis(axes.xaxis, lambda megabytes: volume(megabytes * 1e6))
    axes.grid(True, axis="x")
    ring: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#555555"}
    handles = [
        Line2D([], [], **ring, markersize=9, markerfacecolor="white", label="planned"),
        Line2D([], [], **ring, markersize=4.5, label="compiled"),
    ]
    legend_below(axes, handles, offset=-0.5 / (0.3 + 0.27 * len(lines)))
