"""The report of one run: tables in the terminal, report.md, report.html and the pictures.

What the tables say is in `bench_tables`, what the sentences say in `words`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toruslab.benchmarks.reports import pictures, words
from toruslab.benchmarks.reports.bench_tables import cell
from toruslab.benchmarks.reports.cells import groups
from toruslab.benchmarks.reports.mesh_picture import torus
from toruslab.benchmarks.reports.page import run_page
from toruslab.benchmarks.reports.quality import quality
from toruslab.benchmarks.reports.style import save
from toruslab.benchmarks.runs.rows import Row

PICTURES = (
    pictures.latency,
    pictures.predicted,
    pictures.roofline,
    pictures.crossing,
    pictures.terms,
    pictures.moved,
    torus,
)
"""All pictures. One without a panel, because the rows lack what it shows, is not written."""


def show(rows: Iterable[Row], console: Console) -> None:
    """Prints a table for each cell, then what they say in sentences."""
    rows = list(rows)
    cells = groups(rows)
    for name, results in cells.items():
        console.print(cell(name, results).rich())
    for sentence in words.sentences(cells, quality(rows)):
        console.print(escape(sentence))


def markdown(rows: Sequence[Row], drawn: Iterable[str] = ()) -> str:
    """The report as text: where it ran, sentences, tables, and links to the pictures named in `drawn`."""
    out = ["# toruslab bench", ""]
    if environments := words.environments(rows):
        out += [words.where(environments[-1]), "", " ".join(words.READING), ""]
    cells = groups(rows)
    out += [f"- {sentence}" for sentence in words.sentences(cells, quality(rows))]
    for name, results in cells.items():
        out += ["", f"## {name}", "", *cell(name, results).markdown()]
    return "\n".join([*out, "", *(f"![{name}]({name}.svg)" for name in drawn), ""])


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes report.html, report.md and the pictures (SVG and PNG) that the rows hold; returns their paths.

    Pictures of an earlier report for which these rows have no panel are removed.
    """
    cells = groups(rows)
    made = [draw(cells) for draw in PICTURES]
    drawn = [p for p in made if p.panels]
    paths = [folder / "report.html", folder / "report.md"]
    paths[0].write_text(run_page(rows, drawn, folder.resolve().name), encoding="utf-8")
    paths[1].write_text(markdown(rows, [p.name for p in drawn]), encoding="utf-8")
    for picture in made:
        if picture.panels:
            paths += save(picture, folder)
        else:
            for suffix in ("svg", "png"):
                (folder / f"{picture.name}.{suffix}").unlink(missing_ok=True)
    return paths
