"""The report's pictures over all cells: latency, prediction against measurement, roofline, crossover.

Each takes the cells of a run and returns a `Picture`, with no panel where the rows do not hold what it shows.
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
    handles,
    in_order,
    legend_below,
    log_axis,
    marks,
    volume,
)

Cells = Mapping[str, list[Result]]
LEGEND_ROW_IN = 0.19
TERM_COLOURS: dict[str, str] = dict(
    zip(TERMS, ("#0072B2", "#56B4E9", "#009E73", "#BBBBBB", "#D55E00", "#E69F00"), strict=True)
)
HATCHES = ("//", "..", "xx", "\\\\", "oo", "++")


def latency(cells: Cells) -> Picture:
    """Latency against tokens, a panel per family and attention, a line per layout."""
    panels = [
        Panel(
            title=f"{name}, attention over {attention}",
            draw=lambda axes, lines=lines, attention=attention: _latency(axes, lines, attention),
            height_in=3.9 + LEGEND_ROW_IN * _rows(lines) / 2,
            alt=f"Latency against tokens, {name}, attention over {attention}",
        )
        for name, lines in families(dict(cells)).items()
        for attention in dict.fromkeys(str(x.point.get("attention")) for x in lines if x.measured_s or x.predicted_s)
    ]
    return Picture(
        name="latency",
        heading="Latency by layout and tokens",
        says="Filled marks and thick lines: measured median, bars over the middle half of all repetitions. Hollow "
        "marks and thin lines: predicted. Solid and discs: attention over the batch; dashed and squares: over heads.",
        panels=panels,
    )


def _latency(axes: Any, family: Sequence[Result], attention: str) -> None:
    """The lines of one attention, in the frame of the whole family, so that panels beside each other compare."""
    times = [t * 1e3 for x in family for t in (x.measured_s, x.predicted_s, *(x.quartiles_s or ())) if t]
    lines = [x for x in family if str(x.point.get("attention")) == attention]
    for label in in_order(labels(lines)):
        mine, style = [x for x in lines if x.label == label], marks(label)
        priced = [x for x in mine if x.predicted_s]
        axes.plot(
            [x.tokens for x in priced],
            [(x.predicted_s or 0) * 1e3 for x in priced],
            **style | {"markerfacecolor": "white", "markersize": 6.5, "linewidth": 0.7, "alpha": 0.85},
        )
        timed = [x for x in mine if x.measured_s]
        middle = [(x.measured_s or 0) * 1e3 for x in timed]
        ends = [[q * 1e3 for q in x.quartiles_s or (x.measured_s or 0,) * 2] for x in timed]
        spread = [
            [max(0, m - low) for m, (low, _) in zip(middle, ends, strict=True)],
            [max(0, high - m) for m, (_, high) in zip(middle, ends, strict=True)],
        ]
        axes.errorbar(
            [x.tokens for x in timed],
            middle,
            yerr=spread if timed else None,
            label=label,
            **style | {"markersize": 4, "linewidth": 1.6, "elinewidth": 1, "capsize": 2},
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens in the pass (B·L)", ylabel="ms per pass")
    axes.set_ylim(min(times) / 1.25, max(times) * 1.25)
    _token_axis(axes, lines)
    log_axis(axes.yaxis)
    axes.grid(True)
    legend_below(axes)


def predicted(cells: Cells) -> Picture:
    """Predicted against measured time of every point that has both."""
    lines = [x for each in cells.values() for x in each if x.relative_error is not None]
    panel = Panel(
        title="all points",
        draw=lambda axes: _predicted(axes, lines),
        height_in=4.85 + LEGEND_ROW_IN * _rows(lines),
        alt="Predicted against measured time, all points",
    )
    return Picture(
        name="predicted",
        heading="Predicted against measured",
        says="On the line the prediction is right; the band is within 20%. Filled: decode; hollow: prefill.",
        panels=[panel] if lines else [],
    )


def _predicted(axes: Any, lines: Sequence[Result]) -> None:
    times = [(x.measured_s or 0) * 1e3 for x in lines], [(x.predicted_s or 0) * 1e3 for x in lines]
    ends = [min(map(min, times)) / 1.4, max(map(max, times)) * 1.4]
    axes.fill_between(ends, [e * 0.8 for e in ends], [e * 1.2 for e in ends], color="#BBBBBB", alpha=0.35, linewidth=0)
    axes.plot(ends, ends, color="#333333", linewidth=0.8)
    for label in labels(lines):
        for is_prefill in (False, True):
            mine = [x for x in lines if x.label == label and (x.point.get("phase") == "prefill") == is_prefill]
            style = marks(label) | {"linestyle": "none", "markersize": 5, "alpha": 0.85}
            axes.plot(
                [(x.measured_s or 0) * 1e3 for x in mine],
                [(x.predicted_s or 0) * 1e3 for x in mine],
                **style | ({"markerfacecolor": "none"} if is_prefill else {}),
            )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured ms", ylabel="predicted ms")
    axes.set_aspect("equal", anchor="N")
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.grid(True)
    legend_below(axes, handles(labels(lines)), offset=-0.14)


def roofline(cells: Cells) -> Picture:
    """Attained FLOP/s against FLOPs per byte of memory, a panel for each machine, under its roof."""
    of: dict[tuple, list[Result]] = {}
    for lines in cells.values():
        for line in lines:
            if line.measured_s and _intensity(line):
                of.setdefault((line.point.get("slice", "?"), _roof(line)), []).append(line)
    panels = [
        Panel(
            title=f"{slice_}, roof: "
            + (f"{roof[0] / 1e9:,.4g} GFLOP/s, {roof[1] / 1e9:,.4g} GB/s" if roof else "not known"),
            draw=lambda axes, lines=lines, roof=roof: _roofline(axes, lines, roof),
            height_in=3.7 + LEGEND_ROW_IN * _rows(lines),
            alt=f"Attained FLOP/s against FLOPs per byte, {slice_}",
        )
        for (slice_, roof), lines in of.items()
    ]
    return Picture(
        name="roofline",
        heading="Roofline",
        says="FLOPs of the plan over the measured time, of all chips together, against FLOPs per byte of weights and "
        "cache that they read. The roof is the calibrated machine's. Filled: decode; hollow: prefill.",
        panels=panels,
    )


def _intensity(line: Result) -> float | None:
    flops, read = line.number("analytic", "flops"), line.number("analytic", "memory_bytes")
    return flops / read if flops and read and min(flops, read) > 0 else None


def _roof(line: Result) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of the machine."""
    found = line.row("analytic").get("roofline")
    if not isinstance(found, dict):
        return None
    flops, read = number(found.get("flops_per_s")), number(found.get("bytes_per_s"))
    return (flops, read) if flops and read and min(flops, read) > 0 else None


def _roofline(axes: Any, lines: Sequence[Result], roof: tuple[float, float] | None) -> None:
    at = [_intensity(x) or 0 for x in lines]
    rate = [(x.number("analytic", "flops") or 0) / (x.measured_s or 1) / 1e9 for x in lines]
    low, high = min(at) / 2, max(at) * 2
    if roof:
        ridge = roof[0] / roof[1]
        low, high = min(low, ridge / 2), max(high, ridge * 2)
        axes.plot(
            [low, ridge, high], [low * roof[1] / 1e9, roof[0] / 1e9, roof[0] / 1e9], color="#333333", linewidth=1.4
        )
    for line, x, y in zip(lines, at, rate, strict=True):
        style = marks(line.label) | {"markersize": 5, "alpha": 0.85}
        axes.plot(x, y, **style | ({"markerfacecolor": "none"} if line.point.get("phase") == "prefill" else {}))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of memory", ylabel="attained GFLOP/s")
    axes.margins(y=0.12)
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.grid(True)
    legend_below(axes, handles(labels(lines)))


def crossing(cells: Cells) -> Picture:
    """Best weight-gathered over best weight-stationary time against tokens, a panel per family."""
    panels = [
        Panel(
            title=found.family,
            draw=lambda axes, found=found: _crossing(axes, found),
            height_in=3.9,
            alt=f"Best weight-gathered over best weight-stationary time against tokens, {found.family}",
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
    from matplotlib.lines import Line2D

    drawn = [d for source in SOURCES for d in found.duels[source]]
    top, bottom = (f([1.0, *(d.ratio for d in drawn)]) for f in (max, min))
    axes.axhline(1, color="#333333", linewidth=1)
    for source in SOURCES:
        duels, is_measured = found.duels[source], source == "measured"
        axes.plot(
            [d.tokens for d in duels],
            [d.ratio for d in duels],
            color="#555555",
            linestyle="-" if is_measured else "--",
            linewidth=1.6 if is_measured else 0.9,
            zorder=2,
        )
        for d in duels:
            style = marks(d.best) | {"linestyle": "none", "markersize": 6 if is_measured else 10, "zorder": 4}
            axes.plot(d.tokens, d.ratio, **style | ({} if is_measured else {"markerfacecolor": "none", "zorder": 3}))
        at = found.tokens(source)
        if at is not None:
            axes.axvline(at, color="#555555", linestyle=":" if is_measured else (0, (1, 4)), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the pass (B·L)", ylabel="gathered / stationary, time")
    axes.set_ylim(min(bottom / 1.35, 0.7), max(top * 1.35, 1.4))
    style = {"transform": axes.transAxes, "fontsize": 9, "color": "#555555"}
    axes.text(0.985, 0.98, "over 1: stationary is faster", ha="right", va="top", **style)
    axes.text(0.015, 0.02, "under 1: gathered is faster", ha="left", va="bottom", **style)
    _token_axis(axes, drawn)
    log_axis(axes.yaxis)
    axes.grid(True)
    kinds = [
        Line2D([], [], color="#555555", linewidth=1.6, label="measured"),
        Line2D([], [], color="#555555", linewidth=0.9, linestyle="--", label="predicted"),
    ]
    legend_below(axes, [*kinds, *handles(list(dict.fromkeys(d.best for d in drawn)))])


def _token_axis(axes: Any, of: Sequence[Any]) -> None:
    """A tick for every number of tokens there is, where they are few."""
    tokens = sorted({x.tokens for x in of})
    if not 1 <= len(tokens) <= 7:
        log_axis(axes.xaxis)
        return
    from matplotlib.ticker import NullLocator

    axes.set_xticks(tokens, [f"{t:,}" for t in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(tokens) == 1:
        axes.set_xlim(tokens[0] / 2, tokens[0] * 2)


def _rows(lines: Sequence[Result]) -> int:
    return -(-len(labels(lines)) // 3)


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


def _terms(axes: Any, lines: Sequence[Result]) -> None:
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


def profile(line: Result) -> dict[str, float]:
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


def _moved(axes: Any, lines: Sequence[Result]) -> None:
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
