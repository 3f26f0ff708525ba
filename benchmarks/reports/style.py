"""The shared look of the report's pictures, and how they become files and parts of a page.

A picture is a list of panels. Each panel stands alone on the page, so that it is readable on a phone; in the folder the
panels of a picture are one sheet, as SVG and PNG. Decides colours, marks, sizes and the SVG's ids; what is drawn is
decided in `pictures`, `mesh_picture` and `figures`.

Colours are Okabe and Ito's, which the colour-blind can tell apart: warm ones are weight-stationary, cool ones
weight-gathered. A solid line and a disc are attention over the batch, a dashed line and a square over heads.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    """One set of axes: what stands over it, how high it is, and what draws it. `alt` says it to who cannot see it."""

    title: str
    draw: Callable[[Any], None]
    height_in: float = 3.4
    alt: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A named picture; `says` is how to read it."""

    name: str
    heading: str
    says: str
    panels: Sequence[Panel]
    columns: int = 2


def colour(layout: str) -> str:
    """The layout's colour in every picture."""
    return COLOURS.get(layout) or OTHERS[sum(map(ord, layout)) % len(OTHERS)]


def marks(label: str) -> dict[str, Any]:
    """Colour, dash and mark of layout/attention."""
    layout, _, attention = label.partition("/")
    is_batch = attention == "batch"
    return {"color": colour(layout), "linestyle": "-" if is_batch else "--", "marker": "o" if is_batch else "s"}


def in_order(names: Iterable[str]) -> list[str]:
    """Layout/attention in the order of all legends: the layouts that are known here, then the others."""
    known = list(COLOURS)
    order = {n: known.index(n.partition("/")[0]) if n.partition("/")[0] in known else len(known) for n in names}
    return sorted(order, key=lambda n: (order[n], n))


def handles(names: Iterable[str]) -> list[Any]:
    """A mark for each layout/attention, for legends of what was drawn point by point."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    return [Line2D([], [], **marks(n) | style, label=n) for n in in_order(names)]


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


def log_axis(axis: Any, form: Callable[[float], str] | None = None) -> None:
    """Plain numbers, so many to a decade that they do not touch, or as `form` writes them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / max(low, 1e-300))
    fine = (1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    densest = (
        fine
        if decades < 0.35
        else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        if decades < 1
        else (1.0, 2.0, 5.0)
        if decades < 2
        else (1.0, 3.0)
    )
    subs = densest if decades < 3.6 and form is None else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12 if form is None else 6))

    def plain(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:g}"

    axis.set_major_formatter(FuncFormatter(lambda value, _: (form or plain)(value)))
    axis.set_minor_formatter(NullFormatter())


def log_axes(axes: Any, names: str) -> None:
    """Logarithmic axes with plain numbers, and a grid.

    Args:
        axes: matplotlib's.
        names: of "x", "y" and "xy".
    """
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        log_axis(getattr(axes, f"{name}axis"))
    axes.grid(True)


def legend_below(axes: Any, marked: Sequence[Any] | None = None, *, columns: int = 3, offset: float = -0.2) -> None:
    """A legend under the axes, where it hides nothing."""
    found = axes.get_legend_handles_labels()[0] if marked is None else marked
    if found:
        axes.legend(
            handles=found,
            loc="upper center",
            bbox_to_anchor=(0.5, offset),
            ncols=columns,
            columnspacing=1.2,
            handletextpad=0.5,
        )


def svg(panel: Panel, prefix: str) -> str:
    """One panel as an SVG element for a page: it scales to its column, text stays text, ids begin with `prefix`."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = _figure([panel], 1, titled=False)
        text = _svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    name = _attribute(panel.alt or panel.title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{name}" {box[0] if box else ""}>{body.strip()}'
    )


def sheets(*pictures: Picture) -> dict[str, Any]:
    """Each picture as one matplotlib figure, by its name."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        return {p.name: _figure(p.panels, p.columns, titled=True) for p in pictures}


def save(picture: Picture, folder: Path) -> list[Path]:
    """The picture's sheet as SVG and PNG; returns their paths."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = _figure(picture.panels, picture.columns, titled=True)
        paths = [folder / f"{picture.name}.{suffix}" for suffix in ("svg", "png")]
        paths[0].write_text(_svg(figure), encoding="utf-8")
        figure.set_layout_engine("none")  # laid out once
        figure.savefig(paths[1], dpi=120)
    return paths


def _figure(panels: Sequence[Panel], columns: int, *, titled: bool):
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(p.height_in for p in row) + (0.4 if titled else 0) for row in rows]
    figure = Figure(figsize=(WIDTH_IN * columns, sum(heights)), layout="constrained")
    for part, row in zip(
        figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0], rows, strict=True
    ):
        for axes, panel in zip(part.subplots(1, columns, squeeze=False)[0], [*row, *[None] * columns], strict=False):
            if panel is None:
                axes.set_axis_off()
                continue
            panel.draw(axes)
            if titled:
                axes.set_title(textwrap.fill(panel.title, 60), fontsize=9)
    return figure


def _svg(figure: Any) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None})
    return held.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
