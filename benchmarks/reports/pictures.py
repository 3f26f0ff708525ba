"""The pictures of a bench run: latency, prediction, roofline, crossover; and of each cell, terms and bytes.

Each function takes the cells of a run and returns a `Picture`. Its list of panels is empty where the rows lack what it
would show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from toruslab.benchmarks.reports.cells import TERMS, Result, families, labels, number
from toruslab.benchmarks.reports.quality import SOURCES, Crossover, crossovers
from toruslab.benchmarks.reports.style import (
    BLANK,
    Panel,
    Picture,
    colour,
    in_order,
    log_axes,
    log_axis,
    marks,
    stroke,
    volume,
)

TERM_COLOURS: dict[str, str] = dict(
    zip(TERMS, ("#0072B2", "#56B4E9", "#009E73", "#BBBBBB", "#D55E00", "#E69F00"), strict=True)
)
HATCHES = ("//", "..", "xx", "\\\\", "oo", "++")


def latency(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """Latency against tokens: a panel for each family and attention, a line for each layout."""
    panels = [
        Panel(
            title=f"{name}, attention over {attention}",
            draw=lambda axes, family=family, attention=attention: _latency(axes, family, attention),
            height_in=4.1,
        )
        for name, family in families(cells).items()
        for attention in dict.fromkeys(str(x.point.get("attention")) for x in family if x.measured_s or x.predicted_s)
    ]
    return Picture(
        name="latency",
        heading="Latency by layout and tokens",
        says="Filled marks and thick lines: measured median, bars over the middle half of all repetitions. Hollow "
        "marks and thin lines: predicted. Solid and discs: attention over the batch; dashed and squares: over heads.",
        panels=panels,
    )


def _latency(axes: Any, family: Sequence[Result], attention: str) -> None:
    """The layouts of one attention. All panels of a family have the same scale, so that they can be compared."""
    times = [t * 1e3 for x in family for t in (x.measured_s, x.predicted_s, *(x.quartiles_s or ())) if t]
    shown = [x for x in family if str(x.point.get("attention")) == attention]
    for label in in_order(labels(shown)):
        mine = [x for x in shown if x.label == label]
        priced = [(x.tokens, x.predicted_s * 1e3) for x in mine if x.predicted_s]
        thin = {"markerfacecolor": "white", "markersize": 6.5, "linewidth": 0.7, "alpha": 0.85}
        axes.plot([x for x, _ in priced], [y for _, y in priced], **stroke(label) | thin)
        timed = [(x.tokens, x.measured_s, *(x.quartiles_s or (x.measured_s,) * 2)) for x in mine if x.measured_s]
        below, above = [max(0, m - low) * 1e3 for _, m, low, _ in timed], [max(0, q - m) * 1e3 for _, m, _, q in timed]
        thick = {"markersize": 4, "linewidth": 1.6, "elinewidth": 1, "capsize": 2}
        axes.errorbar(
            [x for x, *_ in timed],
            [m * 1e3 for _, m, *_ in timed],
            yerr=[below, above] if timed else None,
            label=label,
            **stroke(label) | thick,
        )
    axes.set(xlabel="tokens in the pass (B·L)", ylabel="ms per pass", xscale="log")
    axes.set_ylim(min(times) / 1.25, max(times) * 1.25)
    log_axes(axes, "y")
    _token_axis(axes, shown)


def predicted(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """Predicted against measured time of every point that has both."""
    results = [x for each in cells.values() for x in each if x.relative_error is not None]
    panel = Panel(
        title="all points",
        draw=lambda axes: _predicted(axes, results),
        height_in=4.85,
        labels=labels(results),
    )
    return Picture(
        name="predicted",
        heading="Predicted against measured",
        says="On the line the prediction is right; the band is within 20%. Filled: decode; hollow: prefill.",
        panels=[panel] if results else [],
    )


def _predicted(axes: Any, results: Sequence[Result]) -> None:
    times = [(x, (x.measured_s or 0) * 1e3, (x.predicted_s or 0) * 1e3) for x in results]
    low, high = min(min(t) for _, *t in times) / 1.4, max(max(t) for _, *t in times) * 1.4
    axes.fill_between([low, high], [low * 0.8, high * 0.8], [low * 1.2, high * 1.2], color="#BBBBBB", alpha=0.35, lw=0)
    axes.plot([low, high], [low, high], color="#333333", linewidth=0.8)
    for result, x, y in times:
        axes.plot(x, y, **marks(result.label, hollow=_is_prefill(result)))
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="measured ms", ylabel="predicted ms")
    log_axes(axes, "xy")
    axes.set_aspect("equal", anchor="N")


def _is_prefill(result: Result) -> bool:
    return result.point.get("phase") == "prefill"


def roofline(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """Attained FLOP/s against FLOPs per byte of memory, a panel for each machine, under its roof."""
    machines: dict[tuple, list[Result]] = {}
    for x in (x for results in cells.values() for x in results):
        if x.measured_s and _intensity(x):
            machines.setdefault((x.point.get("slice", "?"), _roof(x)), []).append(x)
    panels = [
        Panel(
            title=f"{slice_}, roof: "
            + (f"{roof[0] / 1e9:,.4g} GFLOP/s, {roof[1] / 1e9:,.4g} GB/s" if roof else "not known"),
            draw=lambda axes, results=results, roof=roof: _roofline(axes, results, roof),
            height_in=3.7,
            labels=labels(results),
        )
        for (slice_, roof), results in machines.items()
    ]
    return Picture(
        name="roofline",
        heading="Roofline",
        says="FLOPs of the plan over the measured time, of all chips together, against FLOPs per byte of weights and "
        "cache that they read. The roof is the calibrated machine's. Filled: decode; hollow: prefill.",
        panels=panels,
    )


def _intensity(x: Result) -> float | None:
    """FLOPs per byte that is read from memory."""
    flops, read = x.number("analytic", "flops"), x.number("analytic", "memory_bytes")
    return flops / read if flops and read and min(flops, read) > 0 else None


def _roof(x: Result) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of the machine."""
    found = x.row("analytic").get("roofline")
    if not isinstance(found, dict):
        return None
    flops, read = number(found.get("flops_per_s")), number(found.get("bytes_per_s"))
    return (flops, read) if flops and read and min(flops, read) > 0 else None


def _roofline(axes: Any, results: Sequence[Result], roof: tuple[float, float] | None) -> None:
    at = [_intensity(x) or 0 for x in results]
    if roof:
        top, ridge = roof[0] / 1e9, roof[0] / roof[1]
        low, high = min(*at, ridge) / 2, max(*at, ridge) * 2
        axes.plot([low, ridge, high], [low * roof[1] / 1e9, top, top], color="#333333", linewidth=1.4)
    for result, x in zip(results, at, strict=True):
        rate = (result.number("analytic", "flops") or 0) / (result.measured_s or 1) / 1e9
        axes.plot(x, rate, **marks(result.label, hollow=_is_prefill(result)))
    axes.set(xlabel="FLOPs per byte of memory", ylabel="attained GFLOP/s", xscale="log", yscale="log")
    axes.margins(y=0.12)
    log_axes(axes, "xy")


def crossing(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """Best weight-gathered over best weight-stationary time against tokens, a panel per family."""
    panels = [
        Panel(
            title=found.family,
            draw=lambda axes, found=found: _crossing(axes, found),
            height_in=3.7,
            labels=[duel.best for source in SOURCES for duel in found.duels[source]],
        )
        for found in crossovers(cells)
    ]
    return Picture(
        name="crossover",
        heading="Crossover: which layout is best",
        says="Time of the best weight-gathered layout over that of the best weight-stationary one; under 1 gathering "
        "is faster. The colour of a mark is that of the better of the two; filled is measured, hollow predicted.",
        panels=panels,
    )


def _crossing(axes: Any, found: Crossover) -> None:
    duels = [d for source in SOURCES for d in found.duels[source]]
    axes.axhline(1, color="#333333", linewidth=1)
    looks = {"measured": ("-", ":", 6), "predicted": ("--", (0, (1, 4)), 10)}
    for source in SOURCES:
        line, dots, size = looks[source]
        drawn = found.duels[source]
        x, y = [d.tokens for d in drawn], [d.ratio for d in drawn]
        axes.plot(x, y, color="#555555", linestyle=line, linewidth=1.6 if line == "-" else 0.9, zorder=2, label=source)
        for d in drawn:
            axes.plot(d.tokens, d.ratio, **marks(d.best, hollow=source == "predicted") | {"markersize": size})
        if (at := found.tokens(source)) is not None:
            axes.axvline(at, color="#555555", linestyle=dots, linewidth=1)
    ratios = [1.0, *(d.ratio for d in duels)]
    axes.set(xlabel="tokens in the pass (B·L)", ylabel="gathered / stationary, time", xscale="log", yscale="log")
    axes.set_ylim(min(min(ratios) / 1.35, 0.7), max(max(ratios) * 1.35, 1.4))
    note = {"transform": axes.transAxes, "fontsize": 9, "color": "#555555"}
    axes.text(0.985, 0.98, "over 1: stationary is faster", ha="right", va="top", **note)
    axes.text(0.015, 0.02, "under 1: gathered is faster", ha="left", va="bottom", **note)
    log_axes(axes, "y")
    _token_axis(axes, duels)


def _token_axis(axes: Any, of: Sequence[Any]) -> None:
    """A tick for every number of tokens there is, where they are few."""
    from matplotlib.ticker import NullLocator

    tokens = sorted({x.tokens for x in of})
    if not 1 <= len(tokens) <= 7:
        return log_axis(axes.xaxis)
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(tokens) == 1:
        axes.set_xlim(tokens[0] / 2, tokens[0] * 2)
    return None


def terms(cells: Mapping[str, Sequence[Result]]) -> Picture:
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
                draw=lambda axes, results=results: _terms(axes, results),
                height_in=1.8 + 0.42 * len(results),
            )
            for name, results in cells.items()
            if any(x.terms or x.measured_s for x in results)
        ],
    )


def _terms(axes: Any, results: Sequence[Result]) -> None:
    """Three bars for each layout, or two where none was profiled."""
    edge = {"edgecolor": "#555555", "linewidth": 0.6}
    kinds = list(dict.fromkeys(kind for x in results for kind in profile(x)))
    labelled: set[tuple] = set()

    def label(name: str, hatch: str = "") -> dict[str, str]:
        """The bar's name in the legend, at the first bar of the kind."""
        found = {} if (name, hatch) in labelled else {"label": name}
        labelled.add((name, hatch))
        return found

    def stacked(row: float, high: float, parts: Mapping[str, float], style: Mapping[str, dict]) -> None:
        left = 0.0
        for name, taken in parts.items():
            width = max(0.0, taken) * 1e3
            said = label(name.removesuffix("_s"), style[name].get("hatch", ""))
            axes.barh(row, width, high, left=left, **style[name], **said)
            left += width

    for row, x in enumerate(results):
        spent = profile(x)
        high, above, below = (0.27, row - 0.27, row) if spent else (0.38, row - 0.19, row + 0.19)
        stacked(above, high, x.terms, {n: {"color": TERM_COLOURS.get(n, "#CC79A7"), "linewidth": 0} for n in x.terms})
        if x.measured_s:
            low, top = x.quartiles_s or (x.measured_s, x.measured_s)
            spread = [[max(0, x.measured_s - low) * 1e3], [max(0, top - x.measured_s) * 1e3]]
            bar = {"color": BLANK, "capsize": 2, "xerr": spread, "error_kw": {"elinewidth": 1}} | edge
            axes.barh(below, x.measured_s * 1e3, high, **bar, **label("measured step"))
        hatched = {k: {"color": "white", "hatch": HATCHES[i % len(HATCHES)]} | edge for i, k in enumerate(kinds)}
        stacked(row + high, high, spent, hatched)
    axes.set_yticks(range(len(results)), [x.label for x in results])
    axes.set(xlabel="ms per pass", ylim=(len(results) - 0.3, -0.7))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(True, axis="x")


def profile(x: Result) -> dict[str, float]:
    """Seconds of the profiled step by kind of work: the devices' time, scaled to the length of the step."""
    found = x.row("measured").get("profile")
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


def moved(cells: Mapping[str, Sequence[Result]]) -> Picture:
    """Bytes that one chip receives in a pass, planned and compiled, a panel per cell."""
    volumes = {name: [_volumes(x) for x in results] for name, results in cells.items()}
    return Picture(
        name="bytes",
        heading="Bytes planned and compiled",
        says="What one chip receives in a pass. Ring: planned, from the layout alone. Disc: read from XLA's program. "
        "auto has no plan of its own. Marks at the left edge are of layouts that move nothing.",
        panels=[
            Panel(
                title=name,
                draw=lambda axes, results=results, name=name: _moved(axes, results, volumes[name]),
                height_in=1.4 + 0.27 * len(results),
            )
            for name, results in cells.items()
            if any(x.number(s, "collective_bytes") is not None for x in results for s in ("analytic", "compiled"))
        ],
    )


def _volumes(x: Result) -> tuple[float | None, float | None]:
    """Planned and compiled bytes."""
    planned, compiled = (x.number(source, "collective_bytes") for source in ("analytic", "compiled"))
    return (None if x.is_auto else planned), compiled


def _moved(axes: Any, results: Sequence[Result], volumes: Sequence[tuple[float | None, float | None]]) -> None:
    least = min((b for pair in volumes for b in pair if b), default=1e3) / 2
    kinds = {"planned": {"markersize": 9, "markerfacecolor": "white"}, "compiled": {"markersize": 4.5}}
    common: dict[str, Any] = {"marker": "o", "linestyle": "none", "markeredgewidth": 1.4}
    for row, (x, pair) in enumerate(zip(results, volumes, strict=True)):
        at = [None if b is None else max(b, least) for b in pair]
        if None not in at:
            axes.plot(at, [row, row], color="#999999", linewidth=1, zorder=1)
        for place, style in zip(at, kinds.values(), strict=True):
            if place is not None:
                axes.plot(place, row, color=colour(str(x.point.get("layout"))), **common | style)
    for name, style in kinds.items():
        axes.plot([], [], color="#555555", label=name, **common | style)
    axes.set_yticks(range(len(results)), [x.label for x in results])
    axes.set(xscale="log", xlabel="bytes a chip, per pass", ylim=(len(results) - 0.4, -0.6))
    axes.set_xlim(left=least * 0.8)
    log_axis(axes.xaxis, volume)
    axes.grid(True, axis="x")
