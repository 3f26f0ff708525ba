"""Tables and pictures from rows. Reads rows and nothing else: no JAX, no model, no second measurement.

python -m benchmarks.report results/bench
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cli import InputError, Parser, guarded
from benchmarks.rows import Row, Rows

PICTURES = ("latency", "bytes")
COMPARATORS = ("replicated", "auto")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One point with everything that is known of it."""

    point: Row
    rows: dict[str, Row]

    @property
    def label(self) -> str:
        return f"{self.point['layout']}/{self.point['attention']}"

    @property
    def tokens(self) -> int:
        return self.point["batch"] * self.point["length"]

    def number(self, source: str, field: str) -> Any:
        """A number of a source, None where it is missing or the point failed."""
        return self.rows.get(source, {}).get(field)


def groups(rows: Iterable[Row]) -> dict[str, list[Line]]:
    """Lines by what they can be compared within: everything but layout and attention."""
    found: dict[str, dict[str, Line]] = {}
    for row in rows:
        point = row["point"]
        line = Line(point=point, rows={})
        by_label = found.setdefault(title(point), {})
        by_label.setdefault(line.label, line).rows[row["source"]] = row
    return {name: list(lines.values()) for name, lines in found.items()}


def title(point: Row) -> str:
    """What the lines of a table share."""
    sizes = f"batch {point['batch']}" + (f" x {point['length']} tokens" if point["length"] > 1 else "")
    context = f", context {point['context']}" if point["context"] else ""
    where = point["slice"] + (f" as {point['mesh']}" if point.get("mesh") else "")
    return f"{point['phase']}, {sizes}{context}, {point['model']} {point['weights']} on {where}"


def show(rows: Iterable[Row], console: Console) -> None:
    """Prints a table per group: planned, compiled, measured; n is the number of collectives in a pass."""
    everything = groups(rows)
    for name, lines in everything.items():
        console.print(table(name, lines))
    for sentence in summary(everything):
        console.print(sentence)


def table(name: str, lines: list[Line]) -> Table:
    """Planned, compiled and measured of one group; the fastest line is marked."""
    found = Table(title=name, title_justify="left", title_style="bold", caption_justify="left")
    found.add_column("layout", no_wrap=True)
    for heading in (
        "planned\nn, kB a chip",
        "compiled\nn, kB a chip",
        "as planned",
        "measured ms\n(half within)",
        "x best",
    ):
        found.add_column(heading, justify="right", no_wrap=heading != "as planned")
    times = [t for line in lines if (t := line.number("measured", "latency_s"))]
    fastest = min(times, default=None)
    for line in lines:
        latency = line.number("measured", "latency_s")
        is_auto = line.point["layout"] == "auto"
        failed = any("error" in r for r in line.rows.values())
        found.add_row(
            line.label,
            f"({_volume(line, 'analytic')})" if is_auto else _volume(line, "analytic"),
            _volume(line, "compiled"),
            "failed" if failed else verdict(line),
            _milliseconds(line),
            f"{latency / fastest:.2f}" if latency and fastest else "",
            style="bold green" if latency and latency == fastest else None,
        )
    return found


def verdict(line: Line) -> str:
    """Whether the program is the plan; for `auto`, its bytes as a multiple of the plan of ws2d."""
    compiled, plan = line.rows.get("compiled"), line.number("analytic", "collective_bytes")
    if not compiled or "error" in compiled:
        return ""
    if line.point["layout"] == "auto":
        return f"{compiled['collective_bytes'] / plan:.1f} x bytes" if plan else "no plan"
    exact = all(c["verdict"] == "as planned" for c in compiled["collectives"])
    return "yes" if exact else f"{compiled['unexplained']} unexplained" if compiled["unexplained"] else "merged"


def summary(everything: dict[str, list[Line]]) -> list[str]:
    """One sentence per group: which of the paper's layouts was fastest, and how the comparators did."""
    sentences = []
    for name, lines in everything.items():
        timed = sorted((x for x in lines if x.number("measured", "latency_s")), key=_latency)
        own = [x for x in timed if x.point["layout"] not in COMPARATORS]
        if own:
            others = [f"{x.label} {_digits(_latency(x))}" for x in timed if x not in own]
            sentences.append(
                f"{own[0].tokens} tokens, {name.split(',')[0]}: fastest is {own[0].label} ({_kind(own[0])}), "
                f"{_digits(_latency(own[0]))} ms" + (f"; comparators: {', '.join(others)} ms" if others else "")
            )
    return sentences


def _kind(line: Line) -> str:
    """By the plan: whether weights move."""
    planned = line.number("analytic", "collectives") or ()
    return "weight-gathered" if any(c["scope"].endswith("/w_in") for c in planned) else "weight-stationary"


def _latency(line: Line) -> float:
    return line.number("measured", "latency_s")


def markdown(rows: Sequence[Row]) -> str:
    """The report as text: where it ran, the tables, the pictures beside it."""
    out = ["# toruslab bench", ""]
    environments = [r["environment"] for r in rows if r.get("environment")]
    if environments:
        e = environments[-1]
        out += [
            f"{e['n_devices']} {e['platform']} devices ({e['device_kind']}) in {e['n_processes']} process(es) on "
            f"{e['cores']} cores, load {e['load_1m']}; JAX {e['jax']}, Flax {e['flax']}, Python {e['python']}; "
            f"commit {e['commit']}, {e['date']}, seed {e['seed']}.",
            "",
            "planned: from the layout alone. compiled: read from XLA's program. measured: median of the step, "
            "and between which times half of all repetitions lie. Bytes are what one chip must receive in a pass.",
            "",
        ]
    everything = groups(rows)
    out += [f"- {sentence}" for sentence in summary(everything)]
    for name, lines in everything.items():
        out += [
            "",
            f"## {name}",
            "",
            "| layout/attention | planned | compiled | as planned | measured ms |",
            "|---|---|---|---|---|",
        ]
        out += [
            f"| {x.label} | {_volume(x, 'analytic')} | {_volume(x, 'compiled')} | {verdict(x)} | {_milliseconds(x)} |"
            for x in lines
        ]
    out += ["", *(f"![{name}]({name}.svg)" for name in PICTURES), ""]
    return "\n".join(out)


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes report.md and the pictures (SVG and PNG); returns their paths."""
    paths = [folder / "report.md"]
    paths[0].write_text(markdown(rows))
    for name, draw in zip(PICTURES, (draw_latency, draw_bytes), strict=True):
        figure = draw(groups(rows))
        for suffix in ("svg", "png"):
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=150)
    return paths


def draw_latency(everything: dict[str, list[Line]]):
    """Latency against tokens of a pass, a line per layout, a panel per phase; bars span the middle half."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    phases = sorted({line.point["phase"] for lines in everything.values() for line in lines})
    figure = Figure(figsize=(6.5 * len(phases) + 2, 5), layout="constrained")
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    labels = list(dict.fromkeys(line.label for lines in everything.values() for line in lines))
    for panel, phase in zip(panels, phases, strict=True):
        for label in labels:
            lines = [x for g in everything.values() for x in g if x.label == label and x.point["phase"] == phase]
            lines = sorted((x for x in lines if x.number("measured", "latency_s")), key=lambda x: x.tokens)
            if lines:
                middle = [x.number("measured", "latency_s") * 1e3 for x in lines]
                ends = [[q * 1e3 for q in x.number("measured", "quartiles_s")] for x in lines]
                spread = [
                    [m - e[0] for m, e in zip(middle, ends, strict=True)],
                    [e[1] - m for m, e in zip(middle, ends, strict=True)],
                ]
                panel.errorbar([x.tokens for x in lines], middle, yerr=spread, label=label, **_style(label))
        panel.set(
            xscale="log", yscale="log", xlabel="tokens in the pass (B·L)", ylabel="measured ms per pass", title=phase
        )
        panel.grid(True, which="both", alpha=0.25)
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_bytes(everything: dict[str, list[Line]]):
    """Bytes that one chip receives in a pass, planned and compiled, by layout; a panel per group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 2.6 * len(everything)), layout="constrained")
    panels = figure.subplots(len(everything), 1, squeeze=False)[:, 0]
    for panel, (name, lines) in zip(panels, everything.items(), strict=True):
        at = range(len(lines))
        moved = 0.0
        for offset, source, hatch in ((-0.2, "analytic", None), (0.2, "compiled", "//")):
            heights = [(x.number(source, "collective_bytes") or 0) / 1e6 for x in lines]
            moved = max([moved, *heights])
            label = "planned" if source == "analytic" else "compiled"
            panel.bar([i + offset for i in at], heights, 0.4, label=label, hatch=hatch, edgecolor="white")
        panel.set_xticks(list(at), [x.label for x in lines], rotation=30, ha="right", fontsize="small")
        panel.set_title(name, fontsize="small", loc="left")
        panel.set(yscale="log" if moved else "linear", ylabel="MB a chip")
    panels[0].legend(fontsize="small")
    return figure


def _style(label: str) -> dict:
    """One colour per layout, one dash per attention."""
    from matplotlib import colormaps

    name, attention = label.split("/")
    names = ("ws1d", "ws2d", "wgx", "wgxy", "wgxyz", "replicated", "auto")
    index = names.index(name) if name in names else len(names) + sum(map(ord, name)) % 3
    return {
        "color": colormaps["tab10"](index),
        "linestyle": "-" if attention == "batch" else "--",
        "marker": "o" if attention == "batch" else "s",
        "markersize": 4,
        "capsize": 2,
    }


def _volume(line: Line, source: str) -> str:
    total = line.number(source, "collective_bytes")
    return "" if total is None else f"{line.number(source, 'n_collectives')}, {total / 1e3:,.1f}"


def _milliseconds(line: Line) -> str:
    median = line.number("measured", "latency_s")
    if median is None:
        return ""
    low, high = line.number("measured", "quartiles_s")
    return f"{_digits(median)} ({_digits(low)}..{_digits(high)})"


def _digits(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the tables and pictures of a folder of rows again."""
    p = Parser(prog="python -m benchmarks.report", description=main.__doc__)
    p.add_argument("folder", type=Path)
    folder = p.parse_args(argv).folder
    path = folder / "rows.jsonl"
    if not path.exists():
        raise InputError(f"folder={str(folder)!r} holds no rows.jsonl")
    rows = Rows(path).rows
    if not rows:
        raise InputError(f"folder={str(folder)!r} holds no rows yet")
    show(rows, Console(width=None if sys.stdout.isatty() else 120))
    for written in write(rows, folder):
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
