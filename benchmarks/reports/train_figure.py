"""The picture of a training run: the loss of its steps, on held-out text, and what byte frequencies alone lose."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toruslab.benchmarks.reports.style import Panel, Picture, legend_below, save
from toruslab.benchmarks.runs.rows import Row

WINDOW = 25


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes loss.svg and loss.png; returns their paths."""
    return save(picture(rows), folder)


def picture(rows: Sequence[Row]) -> Picture:
    """Loss against steps."""
    s = next(row for row in reversed(rows) if "training" in row)["training"]
    title = (
        f"{s['model']} on {s['slice']}, {s['layout']}/{s['attention']}, {s['weights']}; "
        f"{s['batch']} x {s['length']} bytes a step"
    )
    return Picture(
        name="loss",
        heading="Loss of training",
        says=f"Thin: of every step; thick: median of {WINDOW} steps; discs: held-out text, the last one all of it.",
        columns=1,
        panels=[
            Panel(title=title, draw=lambda axes: _draw(axes, rows), height_in=3.6, alt="Loss against training steps")
        ],
    )


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    losses = [(row["step"], row["loss_nats_per_byte"]) for row in rows if "loss_nats_per_byte" in row]
    held_out = [(row["step"], row["held_out_nats_per_byte"]) for row in rows if "held_out_nats_per_byte" in row]
    unigram = next(row["unigram_nats_per_byte"] for row in rows if "unigram_nats_per_byte" in row)
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color="#56B4E9", linewidth=0.6, alpha=0.7)
        axes.plot(steps, _smooth(values), color="#0072B2", linewidth=1.6, label="text trained on")
    if held_out:
        style = {"color": "#D55E00", "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(*zip(*held_out, strict=True), **style, label="held-out text")
    axes.axhline(unigram, color="#555555", linewidth=0.9, linestyle=":", label="byte frequencies alone")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.set_ylim(bottom=0)
    axes.grid(True)
    legend_below(axes)


def _smooth(values: Sequence[float]) -> list[float]:
    """The median of the steps up to each."""
    return [statistics.median(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]
