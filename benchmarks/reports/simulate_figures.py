"""Pictures of simulated serving: cost against latency, Orca's Figure 10(b), its ladder."""

from collections.abc import Sequence
from typing import Any

from toruslab.benchmarks.reports.style import log_axis
from toruslab.benchmarks.studies import orca as orca
from toruslab.partitioning.published.papers import data

Row = dict[str, Any]


def draw_front(rows: Sequence[Row]):
    """Cost of a token against latency, a line for each case, its rates as marks; those on the front are ringed."""
    figure, panel = _panel("median normalised latency, ms a token", "chip-seconds per output token")
    names = ("slice", "layout", "policy")
    differ = [k for k in names if len({r[k] for r in rows}) > 1] or ["policy"]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["chip_s_per_token"] and row["normalised_s"]:
            lines.setdefault(" ".join(str(row[k]) for k in differ), []).append(row)
    for i, (name, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda r: r["rate"])
        x, y = [r["normalised_s"]["median"] * 1e3 for r in members], [r["chip_s_per_token"] for r in members]
        panel.plot(x, y, marker="os^Dv<>p*h"[i % 10], markersize=4, color=f"C{i % 10}", label=name)
    front = [r for r in rows if r["pareto"]]
    at = [r["normalised_s"]["median"] * 1e3 for r in front], [r["chip_s_per_token"] for r in front]
    panel.plot(*at, "o", markersize=10, markerfacecolor="none", color="black", label="not beaten in both")
    _log(panel, "xy")
    if len(lines) <= 20:
        figure.legend(loc="outside right center", fontsize="small")
    return figure


def draw_orca(n: int, seed: int):
    """Figure 10(b): lines simulated, marks the paper's points."""
    figure, panel = _panel("requests per second that are served", "median normalised latency, ms a token")
    paper = data("orca_fig10_175b")
    for i, contender in enumerate(orca.CONTENDERS):
        case = orca.scenario(contender)
        peak = orca.peak_per_s(case, n, seed)
        served, latency = [], []
        for share in (0.02, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97, 1.05, 1.3):
            summary, _ = case.run(orca.trace(share * peak, n, seed))
            if summary.normalised_s and summary.throughput_per_s:
                served.append(min(summary.throughput_per_s, peak))
                latency.append(summary.normalised_s.median * 1e3)
        panel.plot(served, latency, color=f"C{i}", linestyle="--" if contender.baseline else "-")
        x, y = zip(*paper[contender.name], strict=True)
        label = f"{'baseline' if contender.baseline else 'Orca'}, max_bs {contender.max_bs}"
        panel.plot(x, y, "os^Dvx"[i], color=f"C{i}", markersize=5, label=label)
    panel.axhline(orca.LIMIT_S * 1e3, color="black", linewidth=0.6, linestyle=":")
    panel.set(ylim=(40, 2500), title="Orca, Figure 10(b): GPT-3 175B, 2 x 8 A100 40 GB")
    _log(panel, "xy")
    panel.legend(title="line: simulated\nmark: paper", fontsize="small")
    return figure


def draw_ladder(rows: Sequence[Row]):
    """From the baseline to Orca, one change at a time."""
    figure, panel = _panel("requests per second at 190 ms a token", "")
    steps = [r for r in rows if r["figure"] == "ladder"][::-1]
    panel.barh([r["step"] for r in steps], [r["rate"] for r in steps], color="C0")
    for i, row in enumerate(steps):
        panel.annotate(f" {row['factor']:.3g} x", (row["rate"], i), va="center", fontsize=8)
    rates = [r["rate"] for r in steps]
    panel.set_xlim(min(rates) / 2, max(rates) * 2)  # room for what is written beside the longest
    panel.set_axisbelow(True)
    _log(panel, "x")
    return figure


def _log(panel: Any, axes: str) -> None:
    for name in axes:
        getattr(panel, f"set_{name}scale")("log")
        log_axis(getattr(panel, f"{name}axis"))


def _panel(xlabel: str, ylabel: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    panel = figure.subplots()
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.grid(True, which="both", alpha=0.25)
    return figure, panel
