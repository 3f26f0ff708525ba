"""The report of one run: tables in the terminal, report.md, report.html and the pictures.

What the tables and sentences say is in `words` and `quality`, how the pictures look in `style`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.reports import pictures
from toruslab.benchmarks.reports import words as report_words
from toruslab.benchmarks.reports.cells import Result, groups
from toruslab.benchmarks.reports.mesh_picture import torus
from toruslab.benchmarks.reports.page import report as html_report
from toruslab.benchmarks.reports.quality import quality
from toruslab.benchmarks.reports.style import Picture, save
from toruslab.benchmarks.runs.rows import Row

PICTURES = {
    "latency": pictures.latency,
    "predicted": pictures.predicted,
    "roofline": pictures.roofline,
    "crossover": pictures.crossing,
    "terms": pictures.terms,
    "bytes": pictures.moved,
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


def table(name: str, lines: list[Result]) -> Table:
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


def _cells(x: Result) -> tuple[str, ...]:
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
    made = [draw(groups(rows)) for draw in PICTURES.values()]
    drawn: list[Picture] = [p for p in made if p.panels]
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(html_report(rows, drawn, folder.resolve().name), encoding="utf-8")
    paths[1].write_text(markdown(rows, [p.name for p in drawn]), encoding="utf-8")
    for picture in made:
        if picture.panels:
            paths += save(picture, folder)
        else:
            for suffix in ("svg", "png"):
                (folder / f"{picture.name}.{suffix}").unlink(missing_ok=True)
    return paths
