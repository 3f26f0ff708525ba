"""Several runs side by side: the measurements of every point, whether the runs agree, how good each prediction is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from toruslab.benchmarks.reports.bench_tables import qualities
from toruslab.benchmarks.reports.cells import Result, groups
from toruslab.benchmarks.reports.page import comparison_page
from toruslab.benchmarks.reports.quality import Quality, agree, quality
from toruslab.benchmarks.reports.style import Panel, Picture, log_axes, marks, save
from toruslab.benchmarks.reports.tables import Column, DataTable, Value, between, ms, number
from toruslab.benchmarks.reports.words import measured, percent
from toruslab.benchmarks.runs.parser import InputError
from toruslab.benchmarks.runs.rows import Row

RULE = (
    "A point agrees where its spreads (90% of the repetitions), one of each run, have a time in common; ratios are to "
    "the first run."
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One point in all runs; `results` has None for a run that did not measure it."""

    cell: str
    label: str
    results: tuple[Result | None, ...]

    @property
    def medians_s(self) -> tuple[float | None, ...]:
        """The measured median of each run."""
        return tuple(x.measured_s if x else None for x in self.results)

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """The median of every run but the first over the first one's."""
        first = self.medians_s[0]
        return tuple(m / first if m and first else None for m in self.medians_s[1:])

    @property
    def spreads_s(self) -> tuple[tuple[float, float] | None, ...]:
        """The spread of each run's repetitions."""
        return tuple(x.spread_s if x else None for x in self.results)

    @property
    def agrees(self) -> bool | None:
        """None where a run did not measure the point, or has no spread of it."""
        return agree(self.spreads_s)

    def agrees_with_first(self, run: int) -> bool | None:
        """As `agrees`, of the first run and this one."""
        return agree((self.spreads_s[0], self.spreads_s[run]))


def compare(runs: Sequence[Sequence[Row]]) -> list[Compared]:
    """Every point that some run measured, in the order of the runs."""
    known = [{(cell, x.label): x for cell, each in groups(rows).items() for x in each if x.measured_s} for rows in runs]
    points = dict.fromkeys(key for each in known for key in each)
    return [Compared(cell=c, label=label, results=tuple(x.get((c, label)) for x in known)) for c, label in points]


def names(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: the folders' names, or as much of their paths as tells them apart."""
    parts = [f.resolve().parts for f in folders]
    for n in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-n:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    return [str(f) for f in folders]


def sentences(points: Sequence[Compared], runs: Mapping[str, Quality]) -> list[str]:
    """How many points agree, how far the others are apart, and how good each run's prediction is."""
    first, *others = runs
    known = [p for p in points if p.agrees is not None]
    shared = sum(all(p.medians_s) for p in points)
    out = [f"{shared} of {len(points)} points were measured in all {len(runs)} runs."]
    if known:
        agreed = sum(bool(p.agrees) for p in known)
        out.append(f"{agreed} of {len(known)} agree within the runs' spread ({percent(agreed / len(known))}).")
    for i, name in enumerate(others, 1):
        ratios = sorted(r for p in points if (r := p.ratios[i - 1]) is not None)
        pairs = [a for p in points if (a := p.agrees_with_first(i)) is not None]
        said = f"; {sum(pairs)} of {len(pairs)} points agree" if pairs and len(runs) > 2 else ""
        if ratios:
            out.append(
                f"{name} takes {ratios[len(ratios) // 2]:.2f} times as long as {first} in the middle, "
                f"{ratios[0]:.2f} to {ratios[-1]:.2f} over all points{said}."
            )
    for name, q in runs.items():
        if q.n_points:
            missed = [t.words for t in q.targets if t.met is False]
            out.append(
                f"Prediction of {name}, {q.n_points} points: median error {percent(q.median_error)}, Spearman "
                f"{'not known' if q.spearman is None else f'{q.spearman:.3f}'}, mean regret "
                f"{percent(q.mean_regret) or 'not known'}" + (f"; missed: {', '.join(missed)}." if missed else ".")
            )
    return out


def tables(called: Sequence[str], points: Sequence[Compared]) -> list[DataTable]:
    """A table for each cell; points that do not agree stand out."""
    cells: dict[str, list[Compared]] = {}
    for p in points:
        cells.setdefault(p.cell, []).append(p)

    def agreement(p: Compared) -> Value:
        said, mark = {True: ("yes", "good"), False: ("no", "bad"), None: ("", "")}[p.agrees]
        return Value(text=said, mark=mark)

    def time(p: Compared, i: int) -> str:
        result = p.results[i]
        return measured(result) if result else ""

    of_runs, later = list(enumerate(called)), list(enumerate(called[1:]))
    columns = [
        Column("layout", lambda p: p.label, numeric=False),
        *(Column(f"{n}\nms (half within)", lambda p, i=i: time(p, i), only="text") for i, n in of_runs),
        *(Column(f"{n}\nover first", lambda p, i=i: number(p.ratios[i], "{:.2f}")) for i, n in later),
        Column("agree", agreement, numeric=False),
        *(Column(f"{n}\nms", lambda p, i=i: ms(p.medians_s[i]), only="page") for i, n in of_runs),
        *(Column(f"{n}\nspread, ms", lambda p, i=i: between(p.spreads_s[i]), only="page") for i, n in of_runs),
    ]
    return [
        DataTable(title=cell, columns=columns, records=members, failing=lambda p: p.agrees is False)
        for cell, members in cells.items()
    ]


def ratio_picture(called: Sequence[str], points: Sequence[Compared]) -> Picture:
    """The median of every later run over the first one's, a panel for each run."""
    return Picture(
        name="ratio",
        heading="Medians against the first run's",
        says="On the line the two medians are equal. Filled: the two runs agree within their spread; hollow: not.",
        panels=[
            Panel(title=f"{name} over {called[0]}", draw=lambda axes, i=i: _ratio(axes, points, i))
            for i, name in enumerate(called[1:], 1)
            if any(p.ratios[i - 1] for p in points)
        ],
    )


def _ratio(axes: Any, points: Sequence[Compared], run: int) -> None:
    axes.axhline(1, color="#333333", linewidth=1)
    for p in points:
        first, ratio = p.medians_s[0], p.ratios[run - 1]
        if first and ratio:
            axes.plot(first * 1e3, ratio, **marks(p.label, hollow=not p.agrees_with_first(run)))
    axes.set(xlabel="ms per pass, first run", ylabel="ratio of the medians", yscale="log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 1.25))
    log_axes(axes, "xy")


def run(folders: Sequence[Path], runs: Sequence[Sequence[Row]], out: Path, as_json: bool, console: Console) -> int:
    """Writes compare.html and the picture, and prints the comparison."""
    called, points = names(folders), compare(runs)
    found = {name: quality(rows) for name, rows in zip(called, runs, strict=True)}
    cells, said, picture = tables(called, points), sentences(points, found), ratio_picture(called, points)
    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = dict(zip(called, runs, strict=True))
        page = comparison_page(rows, said, RULE, qualities(found), cells, picture)
        paths = [out / "compare.html"]
        paths[0].write_text(page, encoding="utf-8")
        paths += save(picture, out) if picture.panels else []
    except OSError as error:
        raise InputError(f"out={str(out)!r} cannot be written: {error.strerror}") from None
    if as_json:
        for p in points:
            fields = {"medians_s": p.medians_s, "ratios": p.ratios, "agrees": p.agrees}
            point = next(x for x in p.results if x).point
            print(json.dumps({"kind": "point", "point": point, **fields}))
        known = [p.agrees for p in points if p.agrees is not None]
        summary = {"n_points": len(points), "n_compared": len(known), "n_agree": sum(known)}
        predictions = {name: q.to_json() for name, q in found.items()}
        print(json.dumps({"kind": "summary", **summary, "prediction": predictions}))
        return 0
    for table in cells:
        console.print(table.rich())
    for sentence in (RULE, *said):
        console.print(escape(sentence))
    for path in paths:
        print(path)
    return 0
