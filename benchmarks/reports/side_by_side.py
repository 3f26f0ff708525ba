"""Several runs side by side: what was measured of every point, whether the runs agree, how good each prediction is.

A point agrees where its spreads, one of each run, have a time in common (`prediction.agree`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.reports import html_page as h
from toruslab.benchmarks.reports.cells import Result, groups
from toruslab.benchmarks.reports.page import where
from toruslab.benchmarks.reports.quality import TARGETS, Quality, agree, quality
from toruslab.benchmarks.reports.style import Panel, Picture, handles, legend_below, log_axis, marks, save, svg
from toruslab.benchmarks.reports.words import amount, bound, measured, met, milliseconds, percent
from toruslab.benchmarks.runs.options import InputError
from toruslab.benchmarks.runs.rows import Row

RULE = (
    "A point agrees where its spreads (90% of the repetitions), one of each run, have a time in common; ratios are to "
    "the first run."
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One point in all runs; None in `lines` where a run has no measurement of it."""

    cell: str
    label: str
    lines: tuple[Result | None, ...]

    @property
    def medians_s(self) -> tuple[float | None, ...]:
        return tuple(x.measured_s if x else None for x in self.lines)

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """Of every run but the first, its median over the first one's."""
        first = self.medians_s[0]
        return tuple(m / first if m and first else None for m in self.medians_s[1:])

    @property
    def agrees(self) -> bool | None:
        """None where a run did not measure the point, or has no spread of it."""
        return agree(map(_spread, self.lines))

    @property
    def says(self) -> str:
        return {True: "yes", False: "no", None: ""}[self.agrees]


def compare(runs: Sequence[Sequence[Row]]) -> list[Compared]:
    """Every point that some run measured, in the order of the runs."""
    lines = [{(cell, x.label): x for cell, each in groups(rows).items() for x in each if x.measured_s} for rows in runs]
    points = dict.fromkeys(key for each in lines for key in each)
    return [Compared(cell=c, label=label, lines=tuple(x.get((c, label)) for x in lines)) for c, label in points]


def names(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: the folders' names, or as much of their paths as tells them apart."""
    parts = [f.resolve().parts for f in folders]
    for n in range(1, max(map(len, parts)) + 1):
        found = ["/".join(p[-n:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    return [str(f) for f in folders]


def sentences(called: Sequence[str], points: Sequence[Compared], found: Sequence[Quality]) -> list[str]:
    """How many points agree, how far the others are apart, and each run's prediction."""
    known = [p for p in points if p.agrees is not None]
    agreed = sum(bool(p.agrees) for p in known)
    shared = [p for p in points if all(p.medians_s)]
    out = [f"{len(shared)} of {len(points)} points were measured in all {len(called)} runs."]
    if known:
        out.append(f"{agreed} of {len(known)} agree within the runs' spread ({percent(agreed / len(known))}).")
    for i, name in enumerate(called[1:]):
        ratios = sorted(r for p in points if (r := p.ratios[i]) is not None)
        if ratios:
            out.append(
                f"{name} takes {ratios[len(ratios) // 2]:.2f} times as long as {called[0]} in the middle, "
                f"{ratios[0]:.2f} to {ratios[-1]:.2f} over all points{_pair(points, i + 1, len(called))}."
            )
    for name, q in zip(called, found, strict=True):
        if q.n_points:
            missed = [t.words for t in q.targets if t.met is False]
            out.append(
                f"Prediction of {name}, {q.n_points} points: median error {percent(q.median_error)}, Spearman "
                f"{'not known' if q.spearman is None else f'{q.spearman:.3f}'}, mean regret "
                f"{percent(q.mean_regret) or 'not known'}" + (f"; missed: {', '.join(missed)}." if missed else ".")
            )
    return out


def _pair(points: Sequence[Compared], i: int, n_runs: int) -> str:
    """How often a run agrees with the first, where there are others beside the two."""
    agreed = [a for p in points if (a := agree(_spread(x) for x in (p.lines[0], p.lines[i]))) is not None]
    return f"; {sum(agreed)} of {len(agreed)} points agree" if agreed and n_runs > 2 else ""


def _spread(line: Result | None) -> tuple[float, float] | None:
    return line.spread_s if line else None


def show(called: Sequence[str], points: Sequence[Compared], console: Console) -> None:
    """A table per cell."""
    for cell, members in _by_cell(points).items():
        found = Table(title=escape(cell), title_justify="left", title_style="bold")
        found.add_column("layout", no_wrap=True)
        for name in called:
            found.add_column(f"{escape(name)}\nms (half within)", justify="right")
        for _ in called[1:]:
            found.add_column("ratio", justify="right")
        found.add_column("agree")
        for p in members:
            times = [measured(x) if x else "" for x in p.lines]
            ratios = ["" if r is None else f"{r:.2f}" for r in p.ratios]
            found.add_row(*map(escape, (p.label, *times, *ratios, p.says)), style="red" if p.agrees is False else None)
        console.print(found)


def ratio_picture(called: Sequence[str], points: Sequence[Compared]) -> Picture:
    """Every later run's median over the first one's, against the first one's; a panel per run."""
    return Picture(
        name="ratio",
        heading="Medians against the first run's",
        says="On the line the two medians are equal. Filled: the two runs agree within their spread; hollow: not.",
        panels=[
            Panel(
                title=f"{name} over {called[0]}",
                draw=lambda axes, i=i: _ratio(axes, points, i),
                height_in=3.6 + 0.19 * -(-len({p.label for p in points}) // 3),
                alt=f"Ratio of the medians of {name} and {called[0]}",
            )
            for i, name in enumerate(called[1:])
            if any(p.ratios[i] for p in points)
        ],
    )


def _ratio(axes: Any, points: Sequence[Compared], i: int) -> None:
    axes.axhline(1, color="#333333", linewidth=1)
    for p in points:
        first, ratio = p.medians_s[0], p.ratios[i]
        if first and ratio:
            face = {} if agree(map(_spread, (p.lines[0], p.lines[i + 1]))) else {"markerfacecolor": "white"}
            axes.plot(first * 1e3, ratio, **marks(p.label) | {"linestyle": "none", "markersize": 5.5} | face)
    legend_below(axes, handles(p.label for p in points if p.ratios[i]))
    axes.set(xscale="log", yscale="log", xlabel="ms per pass, first run", ylabel="ratio of the medians")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 1.25))
    log_axis(axes.xaxis)
    log_axis(axes.yaxis)
    axes.grid(True)


def write(
    called: Sequence[str],
    runs: Sequence[Sequence[Row]],
    points: Sequence[Compared],
    found: Sequence[Quality],
    folder: Path,
) -> list[Path]:
    """Writes compare.html and the picture; returns their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture = ratio_picture(called, points)
        paths = [folder / "compare.html"]
        paths[0].write_text(page(called, runs, points, found, picture), encoding="utf-8")
        if picture.panels:
            paths += save(picture, folder)
    except OSError as error:
        raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None
    return paths


def page(
    called: Sequence[str],
    runs: Sequence[Sequence[Row]],
    points: Sequence[Compared],
    found: Sequence[Quality],
    picture: Picture,
) -> str:
    """The comparison as a self-contained page."""
    parts = [
        h.element("h1", f"toruslab report: {len(called)} runs compared"),
        h.element("p", ", ".join(called), class_="soft"),
        h.bullets(sentences(called, points, found)),
        h.element("p", RULE, class_="soft"),
        h.element("h2", "Quality of the predictions", id="quality"),
        _qualities(called, found),
    ]
    if picture.panels:
        drawn = [h.figure(svg(p, f"{picture.name}-{i}"), p.title) for i, p in enumerate(picture.panels)]
        parts += [h.element("h2", picture.heading, id="ratio"), h.element("p", picture.says, class_="soft")]
        parts += [h.element("div", *drawn, class_="cards")]
    parts.append(h.element("h2", "Point by point", id="points"))
    for cell, members in _by_cell(points).items():
        columns = [("layout", False), *((f"{n}\nover first", True) for n in called[1:]), ("agree", False)]
        columns += [(f"{n}\nms", True) for n in called]
        columns += [(f"{n}\nquartiles, ms", True) for n in called]
        rows = [[h.Cell(text=p.label), *_row(p)] for p in members]
        parts += [h.element("h3", cell), h.table(columns, rows, label=cell)]
    parts.append(h.element("h2", "What was run where", id="where"))
    for name, rows in zip(called, runs, strict=True):
        parts += [h.element("h3", name), *where(rows)]
    return h.page("toruslab report: " + ", ".join(called), parts)


def _row(p: Compared) -> list[h.Cell]:
    cells = [h.Cell(text="" if r is None else f"{r:.2f}", value=r) for r in p.ratios]
    cells.append(h.Cell(text=p.says, style={True: "good", False: "bad", None: ""}[p.agrees]))
    cells += [h.Cell(text=milliseconds(m), value=m) for m in p.medians_s]
    for spread in map(_spread, p.lines):
        text = " to ".join(map(milliseconds, spread)) if spread else ""
        cells.append(h.Cell(text=text, value=spread[0] if spread else None))
    return cells


def _qualities(called: Sequence[str], found: Sequence[Quality]) -> h.Markup:
    columns = [("run", False), ("points", True)]
    columns += [
        (f"{words}\nwanted {bound(t)}", True) for (words, *_), t in zip(TARGETS.values(), found[0].targets, strict=True)
    ]
    columns += [("90th percentile\nof |error|", True), ("worst\n|error|", True)]
    rows = []
    for name, q in zip(called, found, strict=True):
        reached = [
            h.Cell(
                text=f"{amount(t, t.value)}" + (f", {met(t)}" if t.value is not None else ""),
                value=t.value,
                style={True: "good", False: "bad", None: ""}[t.met],
            )
            for t in q.targets
        ]
        ends = [h.Cell(text=percent(v), value=v) for v in (q.p90_error, q.worst_error)]
        rows.append([h.Cell(text=name), h.Cell(text=str(q.n_points), value=q.n_points), *reached, *ends])
    return h.table(columns, rows, label="Quality of the predictions")


def _by_cell(points: Sequence[Compared]) -> Mapping[str, list[Compared]]:
    found: dict[str, list[Compared]] = {}
    for p in points:
        found.setdefault(p.cell, []).append(p)
    return found


def run(folders: Sequence[Path], runs: Sequence[Sequence[Row]], out: Path, as_json: bool, console: Console) -> int:
    """Prints and writes the comparison."""
    called, points, found = names(folders), compare(runs), [quality(rows) for rows in runs]
    paths = write(called, runs, points, found, out)
    if as_json:
        for p in points:
            line = next(x for x in p.lines if x)
            fields = {"medians_s": p.medians_s, "ratios": p.ratios, "agrees": p.agrees}
            print(json.dumps({"kind": "point", "point": line.point, **fields}))
        known = [p.agrees for p in points if p.agrees is not None]
        summary = {"n_points": len(points), "n_compared": len(known), "n_agree": sum(known)}
        qualities = {name: q.to_json() for name, q in zip(called, found, strict=True)}
        print(json.dumps({"kind": "summary", **summary, "prediction": qualities}))
        return 0
    show(called, points, console)
    for sentence in (RULE, *sentences(called, points, found)):
        console.print(escape(sentence))
    for path in paths:
        print(path)
    return 0
