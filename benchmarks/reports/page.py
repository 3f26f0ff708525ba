"""The report as one HTML page that opens from disk without a network: of one run, or of several compared.

This file collects what the page shows. Its structure and look are in `report.html.jinja`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from toruslab.benchmarks.reports import bench_tables as tables
from toruslab.benchmarks.reports import words
from toruslab.benchmarks.reports.cells import Result, groups
from toruslab.benchmarks.reports.quality import CellQuality, crossover_sentences, quality
from toruslab.benchmarks.reports.style import Picture, svg
from toruslab.benchmarks.reports.tables import DataTable
from toruslab.benchmarks.runs.rows import Row

OF_A_CELL = ("terms", "bytes")
"""Pictures with a panel for each cell, which the page shows with the cell's table."""
FIRST_FACTS = ("date", "commit", "platform", "device_kind", "n_devices", "n_processes", "cores", "load_1m")
READING = (
    *words.READING,
    "In brackets: the plan of ws2d, which auto is held against; it has none of its own.",
    "error: predicted / measured - 1. Spearman: the correlation of the ranks.",
    "regret: the measured time of the layout that the model picks, over that of the best measured one, - 1; of "
    "equal predictions the slowest counts.",
)


def run_page(rows: Sequence[Row], pictures: Sequence[Picture], name: str) -> str:
    """The page of one run.

    Args:
        rows: of the run.
        pictures: of the run; the one named `torus` comes last, those of `OF_A_CELL` with their cells.
        name: of the run.
    """
    cells, found = groups(rows), quality(rows)
    drawn = {p.name: p for p in pictures if p.panels}
    over_all = [p for name, p in drawn.items() if name not in (*OF_A_CELL, "torus")]
    ids = {cell: f"cell-{i}" for i, cell in enumerate(cells)}
    of_cells = [p for p in drawn.values() if p.name in OF_A_CELL]
    run = {
        "quality": [said for said in words.quality_sentences(found) if said],
        "targets": [tables.targets(found), tables.overview(cells, found, ids)] if found.n_points else [],
        "findings": [*crossover_sentences(cells), *words.cell_sentences(cells)],
        "failed": [f"{x.label}, {cell}: {x.error}" for cell, results in cells.items() for x in results if x.error],
        "pictures": over_all,
        "cells": [_cell(cell, ids[cell], results, found.cells[cell], of_cells) for cell, results in cells.items()],
        "torus": drawn.get("torus"),
        "reading": [*READING, *(f"{p.heading}: {p.says}" for p in of_cells)],
    }
    contents = [("summary", "Summary"), *((p.name, p.heading) for p in over_all), ("cells", "Cell by cell")]
    contents += [("torus", run["torus"].heading)] if run["torus"] else []
    contents += [("where", "What was run where"), ("reading", "How to read this")]
    title = f"toruslab bench: {name}"
    return _rendered(title=title, subtitle=_where_in_short(rows), contents=contents, run=run, where={"": where(rows)})


def comparison_page(
    runs: Mapping[str, Sequence[Row]],
    sentences: Sequence[str],
    rule: str,
    qualities: DataTable,
    points: Sequence[DataTable],
    picture: Picture,
) -> str:
    """The page of several runs.

    Args:
        runs: rows by the run's name.
        sentences: how the runs compare.
        rule: when two measurements agree.
        qualities: the quality of each run's predictions.
        points: the measurements of each cell, side by side.
        picture: of the ratios.
    """
    contents = [("quality", qualities.title), *([(picture.name, picture.heading)] if picture.panels else [])]
    contents += [("points", "Point by point"), ("where", "What was run where")]
    return _rendered(
        title="toruslab report: " + ", ".join(runs),
        heading=f"toruslab report: {len(runs)} runs compared",
        subtitle=", ".join(runs),
        contents=contents,
        comparison={
            "sentences": sentences,
            "rule": rule,
            "qualities": qualities,
            "points": points,
            "picture": picture,
        },
        where={name: where(rows) for name, rows in runs.items()},
    )


def _rendered(**context: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja").render(svg=svg, **context)


def _where_in_short(rows: Sequence[Row]) -> str:
    e = (words.environments(rows) or [{}])[-1]
    parts = (
        f"{e['n_devices']} {e.get('platform', '')} devices" if e.get("n_devices") else "",
        f"{e['cores']} cores" if e.get("cores") else "",
        f"JAX {e['jax']}" if e.get("jax") else "",
        f"commit {e['commit']}" if e.get("commit") else "",
        str(e.get("date") or ""),
    )
    return " · ".join(filter(None, parts))


def _cell(
    name: str, id_: str, results: Sequence[Result], found: CellQuality, pictures: Sequence[Picture]
) -> dict[str, Any]:
    """What the page shows of one cell."""
    said = []
    if found.n_points:
        said.append(f"median |error| {words.percent(found.median_error)} over {found.n_points} points")
        said += [f"Spearman {found.spearman:.3f}"] if found.spearman is not None else []
        if found.regret:
            picked = f"the model picks {found.regret.picked}, the best is {found.regret.best}"
            said.append(f"{picked}: regret {words.percent(found.regret.value)}")
    profiles = {x.label: (x, x.row("measured").get("profile")) for x in results}
    return {
        "name": name,
        "id": id_,
        "quality": f"Prediction: {'; '.join(said)}." if said else "",
        "table": tables.cell(name, results),
        "failed": [f"{x.label} failed, {x.error}" for x in results if x.error],
        "figures": [(p, panel) for p in pictures for panel in p.panels if panel.title == name],
        "repetitions": tables.repetitions(name, results) if any(x.row("measured") for x in results) else None,
        "profiles": {
            label: tables.time_spent(x, profile)
            for label, (x, profile) in profiles.items()
            if isinstance(profile, dict) and profile.get("rows")
        },
    }


def where(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Facts of every environment that rows were taken in, then the load meanwhile and the chip files."""
    found = []
    for e in words.environments(rows):
        named = [k for k in FIRST_FACTS if k in e] + [k for k in e if k not in FIRST_FACTS]
        found.append({k.replace("_", " "): str(e[k]) for k in named if e[k] not in (None, "")})
    found.append({"load while timed": words.loads(rows), "chip file": ", ".join(words.chips(rows))})
    return [{k: v for k, v in facts.items() if v} for facts in found if any(facts.values())]
