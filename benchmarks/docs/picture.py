"""The README's picture: what a token of prefill costs under each layout, and where the layouts cross.

python -m benchmarks.docs.picture          draws docs/crossover.svg
python -m benchmarks.docs.picture --check  exits with 1 where the drawn numbers are no longer the model's

The numbers are kept in the file's metadata, so that the check does not depend on fonts or on the version of matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published.papers import figures

FILE = Path(__file__).resolve().parents[2] / "docs" / "crossover.svg"
TOKENS = tuple(2048 * 2**k for k in range(10))
COLOURS = {"ws2d": "#3b82c4", "wgx": "#c98a00", "wgxy": "#d9622b", "wgxyz": "#c2395b"}
GREY = "#7d8590"
"""Readable on white and on dark pages alike."""
Series = dict[str, list[list[float]]]


def series() -> Series:
    """By layout, [tokens, microseconds a token] of PaLM 540B on 64 TPU v4, the layers alone, bf16."""
    return {layout: [[n, us] for n in TOKENS if (us := _us(layout, n)) is not None] for layout in COLOURS}


def _us(layout: str, tokens: int) -> float | None:
    """The better of the two attentions; None where neither divides the batch, or is too slow to be drawn."""
    found = []
    for attention in ("batch", "heads"):
        try:
            point = Point(
                model="palm-540b-h64",
                slice="v4:4x4x4",
                phase="prefill",
                batch=tokens // 2048,
                length=2048,
                layout=layout,
                attention=attention,
            )
        except ValueError:
            continue
        found.append(1e6 * estimate(point).stack_latency_s / tokens)
    return float(f"{min(found):.4g}") if found else None


def draw(lines: Series) -> None:
    """Writes the picture, with the lines as its description."""
    matplotlib.rcParams |= {
        "svg.hashsalt": "toruslab",
        "font.size": 10,
        "svg.fonttype": "path",
        "axes.edgecolor": GREY,
        "text.color": GREY,
    }
    matplotlib.rcParams |= {"axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax = figure.add_subplot()
    for layout, line in lines.items():
        ax.plot(*zip(*line, strict=True), color=COLOURS[layout], linewidth=2.2)
        ax.annotate(
            layout,
            (line[0][0], line[0][1]),
            (6, 6),
            textcoords="offset points",
            color=COLOURS[layout],
            size=12,
            weight="bold",
        )
    for row in figures():
        if row.set == "Figure 7":
            us = 1e6 * row.compared_s / row.point.tokens
            ax.plot(row.point.tokens, us, "o", color=COLOURS[row.point.layout], markersize=6)
    ax.set(xscale="log", ylim=(60, 225), ylabel="prefill, µs a token", xlabel="tokens in one pass (batch x 2048)")
    ax.set_xticks(TOKENS, labels=[f"{n // 1024}k" if n < 2**20 else "1M" for n in TOKENS])
    ax.minorticks_off()
    ax.set_title("PaLM 540B on 64 TPU v4: each layout is the fastest somewhere (dots: published)", size=11, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(FILE, transparent=True, metadata={"Date": None, "Creator": None, "Description": json.dumps(lines)})


def drawn() -> Series:
    """The lines that the file was drawn from."""
    _, _, rest = FILE.read_text().partition("<dc:description>")
    return json.loads(rest.partition("</dc:description>")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Draws or checks."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.docs.picture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    lines = series()
    if not p.parse_args(argv).check:
        draw(lines)
    elif lines != drawn():
        print(f"{FILE} is stale: run python -m benchmarks.docs.picture", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
