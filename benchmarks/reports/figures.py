"""Pictures of commands other than the bench: published numbers, training, simulated serving, comparisons.

Each function takes rows and returns a `Picture`. What a picture looks like is in `style`.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toruslab.benchmarks.reports.style import Panel, Picture, log_axes
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.cost.estimate import estimate_many
from toruslab.partitioning.cost.forward import Constants
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published.papers import figure_3_bytes, figure_7_point, mfu_of

PUBLISHED = ("predicted", "figure_3", "figure_6", "figure_7")
"""The names of `published`'s pictures."""
MARKERS = "os^Dv<>p*h"
SMOOTHED_STEPS = 25
KIND_COLOURS = {
    "multihead over heads": "#0072B2",
    "multiquery over heads": "#56B4E9",
    "multiquery over batch": "#D55E00",
}


def published(rows: Sequence[Row], constants: Constants | None = None) -> list[Picture]:
    """The analytic model beside published numbers, and Figures 3, 6 and 7 of Pope et al. 2022.

    Args:
        rows: of `toruslab published`.
        constants: of TPU v4, for the line of Figure 7; the chip file's by default.
    """
    compared = _compared(rows)
    volumes = [r for r in rows if r["set"] == "Figure 3"]
    return [
        Picture(
            name="predicted",
            heading="Analytic against published",
            says="Bands: within 10% and 25%. Filled marks are in the fit.",
            columns=1,
            panels=[
                Panel(title="Bands: within 10% and 25%", draw=lambda axes: _predicted(axes, compared), height_in=5.5),
                Panel(title="analytic / published", draw=lambda axes: _ratios(axes, compared), height_in=3.2),
            ],
        ),
        _single(
            "figure_3",
            "Figure 3: 16384 x 65536, bf16, mesh 4x4x4",
            lambda axes: _figure_3(axes, volumes),
        ),
        _single(
            "figure_6",
            "Figure 6: PaLM 540B, decode, batch 512",
            lambda axes: _figure_6(axes, rows),
        ),
        _single(
            "figure_7",
            "Figure 7: PaLM 540B, prefill, 64 chips",
            lambda axes: _figure_7(axes, rows, constants),
        ),
    ]


def _single(name: str, heading: str, draw: Callable[[Any], None], height_in: float = 4.0) -> Picture:
    """A picture of one panel."""
    return Picture(name=name, heading=heading, says="", panels=[Panel(title=heading, draw=draw, height_in=height_in)])


def _compared(rows: Sequence[Row]) -> list[tuple[str, dict[str, Any], list[float], list[float]]]:
    """Label, style, published and analytic seconds of each set, its calibrated points apart."""
    rows = [r for r in rows if r["point"]]
    found = []
    for i, name in enumerate(dict.fromkeys(r["set"] for r in rows)):
        for calibrated in (True, False):
            members = [r for r in rows if r["set"] == name and r["calibrated"] == calibrated]
            style = {"color": f"C{i % 10}", "marker": MARKERS[i % 10], "linestyle": "none", "markersize": 5}
            style["markerfacecolor"] = style["color"] if calibrated else "none"
            label = f"{name} ({'in the fit' if calibrated else 'predicted'})"[:60]
            if members:
                times = [r[r["compared"]] for r in members], [r["analytic_s"] for r in members]
                found.append((label, style, *times))
    return found


def _predicted(axes: Any, compared: Sequence[tuple]) -> None:
    ends = _ends(compared)
    for band, alpha in ((0.25, 0.12), (0.10, 0.22)):
        axes.fill_between(ends, ends * (1 - band), ends * (1 + band), color="tab:gray", alpha=alpha, linewidth=0)
    axes.plot(ends, ends, color="black", linewidth=0.8)
    for label, style, x, y in compared:
        axes.plot(x, y, label=label, **style)
    axes.set(xlabel="published, seconds", ylabel="analytic, seconds")
    log_axes(axes, "xy")
    if len(compared) <= 20:
        axes.legend(fontsize="x-small")


def _ratios(axes: Any, compared: Sequence[tuple]) -> None:
    for band, alpha in ((0.25, 0.12), (0.10, 0.22)):
        axes.axhspan(1 - band, 1 + band, color="tab:gray", alpha=alpha, linewidth=0)
    axes.axhline(1, color="black", linewidth=0.8)
    for _, style, x, y in compared:
        axes.plot(x, np.divide(y, x), **style)
    axes.set(xlabel="published, seconds", ylabel="analytic / published", xlim=_ends(compared))
    log_axes(axes, "x")


def _ends(compared: Sequence[tuple]) -> np.ndarray:
    times = [t for *_, x, _ in compared for t in x]
    return np.array([min(times) / 1.5, max(times) * 1.5])


def _figure_3(axes: Any, members: Sequence[Row]) -> None:
    """Communication volume of one MLP by layout: the closed forms as lines, the paper's points as marks."""
    tokens = np.geomspace(min(r["case"]["tokens"] for r in members), max(r["case"]["tokens"] for r in members), 200)
    for i, layout in enumerate(dict.fromkeys(r["case"]["layout"] for r in members)):
        points = [r for r in members if r["case"]["layout"] == layout]
        axes.plot(tokens, [figure_3_bytes(layout, t) / 1e9 for t in tokens], color=f"C{i}", label=layout)
        at = [r["case"]["tokens"] for r in points]
        axes.plot(at, [r["published_bytes"] / 1e9 for r in points], "o", color=f"C{i}", markersize=5)
    axes.set(xlabel="tokens in the batch", ylabel="GB per chip")
    log_axes(axes, "xy")
    axes.legend(title="line: closed form\nmark: paper")


def _figure_6(axes: Any, rows: Sequence[Row]) -> None:
    """Decode latency against chips, 1D and 2D weight-stationary."""
    for i, layout in enumerate(("ws2d", "ws1d")):
        members = [r for r in rows if r["set"] == "Figure 6" and r["point"]["layout"] == layout]
        at = [Point.from_json(r["point"]).n_chips for r in members]
        axes.plot(at, [r["analytic_s"] * 1e3 for r in members], "-x", color=f"C{i}", label=layout)
        axes.plot(at, [r["stack_s"] * 1e3 for r in members], "o", color=f"C{i}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, list(map(str, at)))
    axes.set(xlabel="chips", ylabel="ms per step, layers alone")
    axes.set_ylim(bottom=0)
    axes.grid(True)
    axes.legend(title="line: analytic\nmark: paper")


def _figure_7(axes: Any, rows: Sequence[Row], constants: Constants | None) -> None:
    """Prefill MFU against tokens, 2D weight-stationary and weight-gathered."""
    tokens = [2048 * batch for batch in range(64, 513, 64)]
    for i, layout in enumerate(("ws2d", "wgxyz")):
        members = [r for r in rows if r["set"] == "Figure 7" and r["point"]["layout"] == layout]
        points = [figure_7_point(layout, t) for t in tokens]
        costs = estimate_many(points, constants)
        mfu = [100 * mfu_of(p, e.stack_latency_s) for p, e in zip(points, costs, strict=True)]
        axes.plot(tokens, mfu, color=f"C{i}", label=layout)
        at = [Point.from_json(r["point"]).tokens for r in members]
        axes.plot(at, [r["mfu"] * 100 for r in members], "o", color=f"C{i}")
    axes.set(xlabel="tokens in the batch", ylabel="MFU %, layers alone", ylim=(0, 100))
    axes.set_xscale("log", base=2)
    axes.grid(True)
    axes.legend(title="line: analytic\nmark: paper")


def loss(rows: Sequence[Row]) -> Picture:
    """Loss against steps of a training run: of each step, of held-out text, and of byte frequencies alone."""
    s = next(row for row in reversed(rows) if "training" in row)["training"]
    title = (
        f"{s['model']} on {s['slice']}, {s['layout']}/{s['attention']}, {s['weights']}; "
        f"{s['batch']} x {s['length']} bytes a step"
    )
    return _single("loss", title, lambda axes: _loss(axes, rows), 3.6)


def _loss(axes: Any, rows: Sequence[Row]) -> None:
    losses = [(row["step"], row["loss_nats_per_byte"]) for row in rows if "loss_nats_per_byte" in row]
    held_out = [(row["step"], row["held_out_nats_per_byte"]) for row in rows if "held_out_nats_per_byte" in row]
    unigram = next(row["unigram_nats_per_byte"] for row in rows if "unigram_nats_per_byte" in row)
    if losses:
        steps, values = zip(*losses, strict=True)
        last = [values[max(0, i + 1 - SMOOTHED_STEPS) : i + 1] for i in range(len(values))]
        axes.plot(steps, values, color="#56B4E9", linewidth=0.6, alpha=0.7)
        axes.plot(steps, [*map(statistics.median, last)], color="#0072B2", linewidth=1.6, label="text trained on")
    if held_out:
        style = {"color": "#D55E00", "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(*zip(*held_out, strict=True), **style, label="held-out text")
    axes.axhline(unigram, color="#555555", linewidth=0.9, linestyle=":", label="byte frequencies alone")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.set_ylim(bottom=0)
    axes.grid(True)


def front(rows: Sequence[Row]) -> Picture:
    """Cost of a token against latency in simulated serving; a line for each case, its rates as marks.

    Marks on the Pareto front are ringed.
    """
    return _single("pareto", "cost against latency, simulated", lambda axes: _front(axes, rows), 4.8)


def _front(axes: Any, rows: Sequence[Row]) -> None:
    differ = [k for k in ("slice", "layout", "policy") if len({r[k] for r in rows}) > 1] or ["policy"]
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["chip_s_per_token"] and row["normalised_s"]:
            cases.setdefault(" ".join(str(row[k]) for k in differ), []).append(row)

    def at(members: Sequence[Row]) -> tuple[list[float], list[float]]:
        return [r["normalised_s"]["median"] * 1e3 for r in members], [r["chip_s_per_token"] for r in members]

    for i, (name, members) in enumerate(cases.items()):
        style = {"marker": MARKERS[i % 10], "markersize": 4, "color": f"C{i % 10}"}
        axes.plot(*at(sorted(members, key=lambda r: r["rate"])), label=name, **style)
    on_front = [r for r in rows if r["pareto"]]
    axes.plot(*at(on_front), "o", markersize=10, markerfacecolor="none", color="black", label="not beaten in both")
    axes.set(xlabel="median normalised latency, ms a token", ylabel="chip-seconds per output token")
    log_axes(axes, "xy")


def blocks(rows: Sequence[Row]) -> Picture:
    """Time of the serial block as a multiple of the parallel one's, by source."""
    found = [r for r in rows if r["comparison"] == "block" and "ratio" in r]
    return _single("block", "serial against parallel block", lambda axes: _blocks(axes, found), 2.2)


def _blocks(axes: Any, found: Sequence[Row]) -> None:
    names = [f"{r['source']}: {r['point']['model'].replace('-serial', '')}" for r in found]
    bars = axes.barh(names, [r["ratio"] for r in found])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="decode step, serial / parallel block", xlim=(0, 1.25 * max(r["ratio"] for r in found)))
    axes.invert_yaxis()


def attention(rows: Sequence[Row]) -> Picture:
    """Decode latency over context as in the paper's Figure 8, a panel for each source.

    Dotted lines do not fit the chips. At dashed vertical lines the whole model runs out of memory by Table 1's rule.
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        if row["comparison"] == "attention" and "latency_s" in row:
            by_source.setdefault(row["source"], []).append(row)
    limits = {r["kind"]: r["max_context_by_rule"] for r in rows if r["comparison"] == "memory"}
    panels = []
    for source, members in by_source.items():
        p = members[0]["point"]
        panels.append(
            Panel(
                title=f"{source}: {p['model'].replace('-mha', '')} on {p['slice']}, batch {p['batch']}",
                draw=lambda axes, members=members, source=source: _attention(
                    axes, members, limits if source == "analytic" else {}
                ),
                height_in=4.2,
            )
        )
    return Picture(name="attention", heading="Attention over context", says="", panels=panels, columns=1)


def _attention(axes: Any, members: Sequence[Row], limits: dict[str, int]) -> None:
    for kind, color in KIND_COLOURS.items():
        of_kind = [r for r in members if r["kind"] == kind]
        for style, shown in ((":", of_kind), ("-o", [r for r in of_kind if r.get("fits", True)])):
            x, y = [r["point"]["context"] for r in shown], [r["latency_s"] * 1e3 for r in shown]
            axes.plot(x, y, style, color=color, markersize=4, label=kind if style == "-o" else None)
        if kind in limits:
            axes.axvline(limits[kind], color=color, linewidth=0.8, linestyle="--")
    axes.set(xlabel="context, tokens", ylabel="ms per decode step")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.grid(True)
    note = "dashed: whole model, 30% of memory\ndotted: does not fit" if limits else None
    axes.legend(title=note, loc="upper left", fontsize="small", title_fontsize="small")
