"""The tables of a bench run: a cell's layouts, targets, cells, repetitions, and where a step's time goes."""

from collections.abc import Mapping, Sequence

from toruslab.benchmarks.reports import words
from toruslab.benchmarks.reports.cells import Result, Traced, number, traced
from toruslab.benchmarks.reports.quality import Quality, Target
from toruslab.benchmarks.reports.tables import Column, DataTable, Value, between, ms, share
from toruslab.benchmarks.reports.tables import number as numeral
from toruslab.benchmarks.runs.rows import Row

TARGET_MARKS = {True: "good", False: "bad", None: ""}


def cell(name: str, results: Sequence[Result]) -> DataTable:
    """Planned, compiled, predicted and measured of every layout in a cell; the fastest is marked."""
    least = words.fastest(results)

    def planned(field: str, form: str, scale: float = 1.0):
        def value(x: Result) -> Value:
            found = numeral(x.number("analytic", field), form, scale)
            return Value(text=f"({found.text})", sort=found.sort) if found.text and x.is_auto else found

        return value

    def verdict(x: Result) -> Value:
        said = words.verdict(x)
        return Value(text=said, mark={"yes": "good", "failed": "bad"}.get(said, ""))

    return DataTable(
        title=name,
        records=results,
        marked=lambda x: x.measured_s is not None and x.measured_s == least,
        columns=[
            Column("layout", lambda x: x.label, numeric=False),
            Column("planned\nn, kB a chip", lambda x: words.volume(x, "analytic"), only="text"),
            Column("compiled\nn, kB a chip", lambda x: words.volume(x, "compiled"), only="text"),
            Column("as planned", verdict, numeric=False),
            Column("predicted ms\n(error)", words.predicted, only="text"),
            Column("measured ms\n(half within)", words.measured, only="text"),
            Column("predicted\nms", lambda x: ms(x.predicted_s), only="page"),
            Column("measured\nms", lambda x: ms(x.measured_s), only="page"),
            Column("quartiles\nms", lambda x: between(x.quartiles_s), only="page"),
            Column("error", lambda x: share(x.relative_error, signed=True), only="page"),
            Column("x best", lambda x: numeral(x.measured_s / least if x.measured_s and least else None, "{:.2f}")),
            Column("outliers", lambda x: numeral(x.number("measured", "outliers")), only="page"),
            Column("planned\nn", planned("n_collectives", "{:,.0f}"), only="page"),
            Column("planned\nkB a chip", planned("collective_bytes", "{:,.1f}", 1e3), only="page"),
            Column("compiled\nn", lambda x: numeral(x.number("compiled", "n_collectives")), only="page"),
            Column(
                "compiled\nkB a chip",
                lambda x: numeral(x.number("compiled", "collective_bytes"), "{:,.1f}", 1e3),
                only="page",
            ),
            Column(
                "peak MB\na chip",
                lambda x: numeral(x.number("compiled", "peak_bytes_per_chip"), "{:,.1f}", 1e6),
                only="page",
            ),
        ],
    )


def targets(quality: Quality) -> DataTable:
    """What a prediction should reach, what it reached, and whether that is enough."""
    return DataTable(
        title="Targets of the prediction",
        records=quality.targets,
        columns=[
            Column("prediction", lambda t: t.words, numeric=False),
            Column("target", lambda t: Value(text=words.met(t), mark=TARGET_MARKS[t.met]), numeric=False),
            Column("reached", lambda t: Value(text=words.amount(t, t.value), sort=t.value)),
            Column("wanted", lambda t: Value(text=words.bound(t), sort=t.limit)),
        ],
    )


def overview(cells: Mapping[str, Sequence[Result]], quality: Quality, ids: Mapping[str, str]) -> DataTable:
    """The quality of the prediction cell by cell.

    Args:
        cells: results by the cell's name.
        quality: of all of them.
        ids: by the cell's name, the part of the page that it is shown in.
    """

    def best(name: str) -> str:
        return min(((x.measured_s, x.label) for x in cells[name] if x.measured_s), default=(0.0, ""))[1]

    def regret(name: str) -> Value:
        found = quality.cells[name].regret
        return share(found.value if found else None)

    def picked(name: str) -> str:
        found = quality.cells[name].regret
        return found.picked if found else ""

    return DataTable(
        title="Quality of the prediction by cell",
        records=list(cells),
        columns=[
            Column("cell", lambda name: Value(text=name, link=ids[name]), numeric=False),
            Column("tokens", lambda name: numeral(cells[name][0].tokens)),
            Column("points", lambda name: numeral(quality.cells[name].n_points)),
            Column("median\n|error|", lambda name: share(quality.cells[name].median_error)),
            Column("Spearman", lambda name: numeral(quality.cells[name].spearman, "{:.3f}")),
            Column("best measured", best, numeric=False),
            Column("picked", picked, numeric=False),
            Column("regret", regret),
        ],
    )


def qualities(runs: Mapping[str, Quality]) -> DataTable:
    """The quality of the predictions of several runs."""

    def reached(target: Target) -> Value:
        said = words.amount(target, target.value) + (f", {words.met(target)}" if target.value is not None else "")
        return Value(text=said, sort=target.value, mark=TARGET_MARKS[target.met])

    wanted = next(iter(runs.values())).targets
    return DataTable(
        title="Quality of the predictions",
        records=list(runs.items()),
        columns=[
            Column("run", lambda run: run[0], numeric=False),
            Column("points", lambda run: numeral(run[1].n_points)),
            *(
                Column(f"{t.words}\nwanted {words.bound(t)}", lambda run, i=i: reached(run[1].targets[i]))
                for i, t in enumerate(wanted)
            ),
            Column("90th percentile\nof |error|", lambda run: share(run[1].p90_error)),
            Column("worst\n|error|", lambda run: share(run[1].worst_error)),
        ],
    )


def repetitions(name: str, results: Sequence[Result]) -> DataTable:
    """All timed repetitions of a cell, their extremes, and what it took to get them."""

    def times(x: Result) -> list[float]:
        found = x.row("measured").get("times_s")
        return [t for t in map(number, found if isinstance(found, list) else []) if t is not None and t >= 0]

    longest = max((t for x in results for t in times(x)), default=0.0)

    def measured(field: str, form: str = "{:.0f}"):
        return lambda x: numeral(x.number("measured", field), form)

    return DataTable(
        title=f"all repetitions, {name}",
        records=results,
        columns=[
            Column("layout", lambda x: x.label, numeric=False),
            Column("in a strip", lambda x: Value(dots=[t / longest for t in times(x) if longest]), numeric=False),
            Column("times", measured("repeats")),
            Column("lowest\nms", lambda x: ms(x.number("measured", "min_s"))),
            Column("highest\nms", lambda x: ms(x.number("measured", "max_s"))),
            Column("outliers", measured("outliers")),
            Column("load", measured("load_1m", "{:.2f}")),
            Column("compile\ns", lambda x: numeral(x.number("compiled", "compile_s"), "{:.2f}")),
            Column(
                "all times, ms",
                lambda x: Value(text=", ".join(map(words.milliseconds, times(x))), mark="wide"),
                numeric=False,
            ),
        ],
    )


def time_spent(x: Result, profile: Row) -> DataTable:
    """Where a profiled step's time goes, each collective beside its price."""

    def time(field: str):
        return lambda t: ms(getattr(t, field))

    records: list[Traced] = traced(profile, x.row("analytic").get("collectives") or ())
    return DataTable(
        title=f"where the time of {x.label} goes",
        records=records,
        columns=[
            Column("scope", lambda t: t.scope, numeric=False),
            Column("work", lambda t: t.what, numeric=False),
            Column("times", lambda t: numeral(t.count)),
            Column("priced\nms", time("predicted_s")),
            Column("device\nms", time("device_s")),
            Column("of these\nwaiting ms", time("wait_s")),
            Column("of the cores\nms", time("work_s")),
        ],
    )
