"""Pictures of the analytic model beside published numbers; Figures 3, 6 and 7 redrawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.cost.estimate import estimate_many
from toruslab.partitioning.cost.forward import Constants
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published.papers import figure_3_bytes, figure_7_point, mfu_of

PICTURES = ("predicted", "figure_3", "figure_6", "figure_7")


def write(rows: Sequence[Row], folder: Path, constants: Constants | None = None) -> list[Path]:
    """Writes the rows and the pictures (SVG and PNG); returns their paths."""
    drawn = (draw_predicted(rows), draw_figure_3(rows), draw_figure_6(rows), draw_figure_7(rows, constants))
    return run_folder.save(folder, "rows", rows, dict(zip(PICTURES, drawn, strict=True)))


def draw_predicted(rows: Sequence[Row]):
    """Analytic against published, and their ratio; bands of 10% and 25%. Filled marks are of the fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = [r for r in rows if r["point"]]
    ends = np.array([min(r[r["compared"]] for r in rows) / 1.5, max(r[r["compared"]] for r in rows) * 1.5])
    for band, alpha in ((0.25, 0.12), (0.10, 0.22)):
        above.fill_between(ends, ends * (1 - band), ends * (1 + band), color="tab:gray", alpha=alpha, linewidth=0)
        below.axhspan(1 - band, 1 + band, color="tab:gray", alpha=alpha, linewidth=0)
    above.plot(ends, ends, color="black", linewidth=0.8)
    below.axhline(1, color="black", linewidth=0.8)
    names = list(dict.fromkeys(r["set"] for r in rows))
    for i, name in enumerate(names):
        for calibrated in (True, False):
            members = [r for r in rows if r["set"] == name and r["calibrated"] == calibrated]
            if not members:
                continue
            x, y = (np.array([r[r["compared"] if k else "analytic_s"] for r in members]) for k in (1, 0))
            color = f"C{i % 10}"
            style = {"color": color, "marker": "os^Dv<>p*h"[i % 10], "linestyle": "none", "markersize": 5}
            face = {"markerfacecolor": color if calibrated else "none"}
            above.plot(x, y, label=f"{name} ({'in the fit' if calibrated else 'predicted'})"[:60], **style, **face)
            below.plot(x, y / x, **style, **face)
    above.set(xscale="log", yscale="log", ylabel="analytic, seconds", title="Bands: within 10% and 25%")
    below.set(xlabel="published, seconds", ylabel="analytic / published")
    for panel in (above, below):
        panel.grid(True, alpha=0.25)
    if len(names) <= 20:
        above.legend(fontsize="small")
    return figure


def draw_figure_3(rows: Sequence[Row]):
    """Communication volume of one MLP by layout, closed forms as lines, the paper's points on them."""
    figure, panel = _panel("tokens in the batch", "GB per chip", "Figure 3: 16384 x 65536, bf16, mesh 4x4x4")
    members = [r for r in rows if r["set"] == "Figure 3"]
    tokens = np.geomspace(min(r["case"]["tokens"] for r in members), max(r["case"]["tokens"] for r in members), 200)
    for i, layout in enumerate(dict.fromkeys(r["case"]["layout"] for r in members)):
        points = [r for r in members if r["case"]["layout"] == layout]
        panel.plot(tokens, [figure_3_bytes(layout, t) / 1e9 for t in tokens], color=f"C{i}", label=layout)
        at = [r["case"]["tokens"] for r in points]
        panel.plot(at, [r["published_bytes"] / 1e9 for r in points], "o", color=f"C{i}", markersize=5)
    panel.set(xscale="log", yscale="log")
    panel.legend(title="line: closed form\nmark: paper")
    return figure


def draw_figure_6(rows: Sequence[Row]):
    """Decode latency against chips, 1D and 2D weight-stationary."""
    figure, panel = _panel("chips", "ms per step, layers alone", "Figure 6: PaLM 540B, decode, batch 512")
    for i, layout in enumerate(("ws2d", "ws1d")):
        members = [r for r in rows if r["set"] == "Figure 6" and r["point"]["layout"] == layout]
        at = [Point.from_json(r["point"]).n_chips for r in members]
        panel.plot(at, [r["analytic_s"] * 1e3 for r in members], "-x", color=f"C{i}", label=layout)
        panel.plot(at, [r["stack_s"] * 1e3 for r in members], "o", color=f"C{i}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, list(map(str, at)))
    panel.set_ylim(bottom=0)
    panel.legend(title="line: analytic\nmark: paper")
    return figure


def draw_figure_7(rows: Sequence[Row], constants: Constants | None = None):
    """Prefill MFU against tokens, 2D weight-stationary and weight-gathered."""
    figure, panel = _panel("tokens in the batch", "MFU %, layers alone", "Figure 7: PaLM 540B, prefill, 64 chips")
    tokens = [2048 * batch for batch in range(64, 513, 64)]
    for i, layout in enumerate(("ws2d", "wgxyz")):
        members = [r for r in rows if r["set"] == "Figure 7" and r["point"]["layout"] == layout]
        points = [figure_7_point(layout, t) for t in tokens]
        costs = estimate_many(points, constants)
        mfu = [100 * mfu_of(p, e.stack_latency_s) for p, e in zip(points, costs, strict=True)]
        panel.plot(tokens, mfu, color=f"C{i}", label=layout)
        at = [Point.from_json(r["point"]).tokens for r in members]
        panel.plot(at, [r["mfu"] * 100 for r in members], "o", color=f"C{i}")
    panel.set_xscale("log", base=2)
    panel.set_ylim(0, 100)
    panel.legend(title="line: analytic\nmark: paper")
    return figure


def _panel(xlabel: str, ylabel: str, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.set(xlabel=xlabel, ylabel=ylabel, title=title)
    panel.grid(True, which="both", alpha=0.25)
    return figure, panel
