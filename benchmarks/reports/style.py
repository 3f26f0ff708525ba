"""The shared look of all pictures, and how they become files and parts of a page.

A picture is a list of panels. On the page each panel is shown alone, so that it is readable on a phone. In the folder
the panels of a picture are one sheet, as SVG and PNG. This file has colours, marks, sizes, axes and legends. What is
drawn is in `pictures`, `mesh_picture`, `figures` and `serving_report`.

Colours are Okabe and Ito's, which the colour-blind can tell apart: warm ones are weight-stationary, cool ones
weight-gathered. A solid line and a disc are attention over the batch, a dashed line and a square over heads.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

COLOURS = {
    "ws1d": "#E69F00",
    "ws2d": "#D55E00",
    "wgx": "#56B4E9",
    "wgxy": "#0072B2",
    "wgxyz": "#009E73",
    "replicated": "#8C8C8C",
    "auto": "#000000",
}
OTHERS = ("#CC79A7", "#882255", "#44AA99", "#999933")
"""Of layouts that are not known here, by name, so that one keeps its colour from picture to picture."""
BLANK = "#D9D9D9"
WIDTH_IN = 4.7
LEGEND_ROW_IN, LEGEND_COLUMNS = 0.19, 3
STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.fonttype": "none",
    "svg.hashsalt": "toruslab",
    "figure.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

    Args:
        title: stands over it.
        draw: draws on matplotlib's axes.
        height_in: inches, without title and legend.
        labels: layout/attention of marks that the legend explains, beside the axes' own labelled lines.
        alt: what the panel shows, for people who cannot see it, where the title is not enough.
    """

    title: str
    draw: Callable[[Any], None]
    height_in: float = 3.4
    labels: Iterable[str] = ()
    alt: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A named picture. `says` tells how to read it; a sheet has `columns` panels in a row."""

    name: str
    heading: str
    says: str
    panels: Sequence[Panel]
    columns: int = 2


def colour(layout: str) -> str:
    """The layout's colour in every picture."""
    return COLOURS.get(layout) or OTHERS[sum(map(ord, layout)) % len(OTHERS)]


def stroke(label: str) -> dict[str, Any]:
    """Colour, dash and mark of the line of a layout/attention."""
    layout, _, attention = label.partition("/")
    is_batch = attention == "batch"
    return {"color": colour(layout), "linestyle": "-" if is_batch else "--", "marker": "o" if is_batch else "s"}


def marks(label: str, *, hollow: bool = False) -> dict[str, Any]:
    """The same for single points, filled or hollow."""
    face = {"markerfacecolor": "none"} if hollow else {}
    return stroke(label) | {"linestyle": "none", "markersize": 5, "alpha": 0.85} | face


def in_order(names: Iterable[str]) -> list[str]:
    """Layout/attention in the order of all legends, each once: the layouts of `COLOURS`, then the others."""
    known = list(COLOURS)
    order = {n: known.index(n.partition("/")[0]) if n.partition("/")[0] in known else len(known) for n in names}
    return sorted(order, key=lambda n: (order[n], n))


def volume(n_bytes: float) -> str:
    """Bytes with three digits and a unit.

    Example:
        >>> volume(2_359_296), volume(448)
        ('2.36 MB', '448 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.3g} B"


DENSEST_TICKS = (
    (0.35, (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)),
    (1, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (2, (1.0, 2.0, 5.0)),
    (3.6, (1.0, 3.0)),
)
"""Decades that an axis spans at most, and the ticks of each decade whose numbers do not touch."""


def log_axis(axis: Any, form: Callable[[float], str] | None = None) -> None:
    """Plain numbers on a logarithmic axis, as `form` writes them, few enough that they do not touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / max(low, 1e-300))
    subs = next((ticks for most, ticks in DENSEST_TICKS if decades < most), (1.0,)) if form is None else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12 if form is None else 6))

    def plain(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:g}"

    axis.set_major_formatter(FuncFormatter(lambda value, _: (form or plain)(value)))
    axis.set_minor_formatter(NullFormatter())


def log_axes(axes: Any, names: str) -> None:
    """Logarithmic axes with plain numbers, and a grid; `names` is "x", "y" or "xy"."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        log_axis(getattr(axes, f"{name}axis"))
    axes.grid(True)


def svg(panel: Panel, prefix: str, heading: str = "") -> str:
    """One panel as an SVG element for a page: it scales to its column, text stays text, ids begin with `prefix`.

    People who cannot see it are told `panel.alt`, or the heading of its picture and its title.
    """
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        text = _svg(_figure([panel], 1, titled=False))
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{escape(panel.alt or f"{heading}: {panel.title}")}" {box[0] if box else ""}>{body.strip()}'
    )


def sheets(*pictures: Picture) -> dict[str, Any]:
    """Each picture as one matplotlib figure, by its name."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        return {p.name: _figure(p.panels, p.columns, titled=True) for p in pictures}


def save(picture: Picture, folder: Path) -> list[Path]:
    """Writes the picture's sheet as SVG and PNG; returns their paths."""
    import matplotlib

    paths = [folder / f"{picture.name}.{suffix}" for suffix in ("svg", "png")]
    figure = sheets(picture)[picture.name]
    with matplotlib.rc_context(cast(Any, STYLE)):
        paths[0].write_text(_svg(figure), encoding="utf-8")
        figure.set_layout_engine("none")  # laid out once
        figure.savefig(paths[1], dpi=120)
    return paths


def _figure(panels: Sequence[Panel], columns: int, *, titled: bool):
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    extra_in = 0.4 if titled else 0.0
    heights = [max(p.height_in + LEGEND_ROW_IN * _legend_rows(p) for p in row) + extra_in for row in rows]
    figure = Figure(figsize=(WIDTH_IN * columns, sum(heights)), layout="constrained")
    grid = figure.subfigures(len(rows), columns, height_ratios=heights, squeeze=False)
    for row, parts in zip(rows, grid, strict=True):
        for panel, part in zip(row, parts, strict=False):
            axes = part.subplots()
            panel.draw(axes)
            _legend(part, axes, panel)
            if titled:
                axes.set_title(textwrap.fill(panel.title, 60), fontsize=9)
    return figure


def _legend_rows(panel: Panel) -> int:
    return -(-len(in_order(panel.labels)) // LEGEND_COLUMNS)


def _legend(part: Any, axes: Any, panel: Panel) -> None:
    """A legend under the axes, where it hides nothing, unless the panel has drawn its own."""
    from matplotlib.lines import Line2D

    handles = [
        *axes.get_legend_handles_labels()[0],
        *(Line2D([], [], **marks(n), label=n) for n in in_order(panel.labels)),
    ]
    if handles and axes.get_legend() is None:
        part.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, columnspacing=1.2)


def _svg(figure: Any) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    return held.getvalue()
