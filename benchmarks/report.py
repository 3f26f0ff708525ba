"""The report of a run, in the terminal, as Markdown, pictures and a page; several runs are compared.

    toruslab report results/bench                      draws the report of a run again
    toruslab report results/bench results/bench.1      compares runs, point by point

Reads rows and nothing else: no model, no second measurement.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.reports import bars as report_bars
from toruslab.benchmarks.reports import pictures as report_pictures
from toruslab.benchmarks.reports import words as report_words
from toruslab.benchmarks.reports.cells import Line, Row, groups
from toruslab.benchmarks.reports.html import report as html_report
from toruslab.benchmarks.reports.prediction import quality
from toruslab.benchmarks.reports.style import Picture, save
from toruslab.benchmarks.reports.torus import torus
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import RowFile

PICTURES = {
    "latency": report_pictures.latency,
    "predicted": report_pictures.predicted,
    "roofline": report_pictures.roofline,
    "crossover": report_pictures.crossing,
    "terms": report_bars.terms,
    "bytes": report_bars.moved,
    "torus": torus,
}
"""Every picture by the name of its files; one whose rows are missing has no panel and is not written."""


def show(rows: Iterable[Row], console: Console) -> None:
    """Prints a table per cell: planned, compiled, predicted, measured; n is the number of collectives in a pass."""
    rows = list(rows)
    cells = groups(rows)
    for name, lines in cells.items():
        console.print(table(name, lines))
    for sentence in report_words.sentences(cells, quality(rows)):
        console.print(escape(sentence))


def table(name: str, lines: list[Line]) -> Table:
    """Planned, compiled, predicted and measured of one cell; the fastest line is marked."""
    found = Table(title=escape(name), title_justify="left", title_style="bold", caption_justify="left")
    found.add_column("layout", no_wrap=True)
    for heading in (
        "planned\nn, kB a chip",
        "compiled\nn, kB a chip",
        "as planned",
        "predicted ms\n(error)",
        "measured ms\n(half within)",
        "x best",
    ):
        found.add_column(heading, justify="right", no_wrap=heading != "as planned")
    least = report_words.fastest(lines)
    for x in lines:
        best = f"{x.measured_s / least:.2f}" if x.measured_s and least else ""
        cells = (*_cells(x), best)
        found.add_row(*map(escape, cells), style="bold green" if least and x.measured_s == least else None)
    return found


def _cells(x: Line) -> tuple[str, ...]:
    w = report_words
    volumes = (w.volume(x, "analytic"), w.volume(x, "compiled"))
    return (x.label, *volumes, w.verdict(x), w.predicted(x), w.measured(x))


def markdown(rows: Sequence[Row], drawn: Iterable[str] = ()) -> str:
    """The report as text: where it ran, the tables, the pictures beside it."""
    out = ["# toruslab bench", ""]
    environments = report_words.environments(rows)
    if environments:
        out += [report_words.where(environments[-1]), "", " ".join(report_words.READING), ""]
    cells = groups(rows)
    out += [f"- {sentence}" for sentence in report_words.sentences(cells, quality(rows))]
    for name, lines in cells.items():
        heads = ("layout/attention", "planned", "compiled", "as planned", "predicted ms", "measured ms")
        out += ["", f"## {name}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        out += ["| " + " | ".join(c.replace("|", "\\|") for c in _cells(x)) + " |" for x in lines]
    out += ["", *(f"![{name}]({name}.svg)" for name in drawn), ""]
    return "\n".join(out)


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes report.md, report.html and the pictures (SVG and PNG) that the rows hold; returns their paths.

    Pictures that an earlier report left and that these rows do not hold are removed.
    """
    pictures = [draw(groups(rows)) for draw in PICTURES.values()]
    drawn: list[Picture] = [p for p in pictures if p.panels]
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(html_report(rows, drawn, folder.resolve().name), encoding="utf-8")
    paths[1].write_text(markdown(rows, [p.name for p in drawn]), encoding="utf-8")
    for picture in pictures:
        if picture.panels:
            paths += save(picture, folder)
        else:
            for suffix in ("svg", "png"):
                (folder / f"{picture.name}.{suffix}").unlink(missing_ok=True)
    return paths


def load(folder: Path) -> list[Row]:
    """The rows of a run's folder.

    Raises:
        InputError: a folder without rows.
    """
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise InputError(f"folder={str(folder)!r} holds no rows.jsonl")
    rows = RowFile(path).rows
    if not rows:
        raise InputError(f"folder={str(folder)!r} holds no rows yet")
    return rows


def objects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What `--json` prints of a run: every point with prediction, measurement and error, and the summary."""
    found = [
        {
            "kind": "point",
            "point": x.point,
            "predicted_s": x.predicted_s,
            "measured_s": x.measured_s,
            "relative_error": x.relative_error,
        }
        for lines in groups(rows).values()
        for x in lines
    ]
    return [*found, {"kind": "summary", **quality(rows).to_json()}]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    p = Parser(prog="toruslab report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run, with its rows.jsonl")
    p.add_argument("--out", type=Path, help="folder of the comparison of several runs (default: results/compare)")
    p.add_argument("--json", action="store_true", help="one JSON object a point, then the summary, instead of tables")
    options = p.parse_args(argv)
    folders: list[Path] = options.folders
    if len(folders) == 1 and options.out is not None:
        raise InputError("out is for several folders; the report of one is written into it")
    if len({f.resolve() for f in folders}) < len(folders):
        raise InputError("the same folder is given twice; a comparison is of different runs")
    runs = [load(folder) for folder in folders]
    console = Console(width=None if sys.stdout.isatty() else 120)
    if len(runs) > 1:
        from toruslab.benchmarks.reports import compare as report_compare

        return report_compare.run(folders, runs, options.out or Path("results/compare"), options.json, console)
    try:
        paths = write(runs[0], folders[0])
    except OSError as error:
        raise InputError(f"folder={str(folders[0])!r} cannot be written: {error.strerror}") from None
    if options.json:
        print("\n".join(map(json.dumps, objects(runs[0]))))
        return 0
    show(runs[0], console)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
