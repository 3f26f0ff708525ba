"""What load a slice carries: requests served on a virtual clock, iteration times from the analytic model. No device.

    toruslab simulate --model llama-3-70b --slices v5e:4x4 --rates 2,4,8
    toruslab simulate --slices v5e:4x4,v5e:4x8 --layouts ws1d,ws2d --policies orca,chunked-512 --out results/simulate
    toruslab simulate --limits 2:0.1 --capacity          the highest rate at which 90% keep TTFT and TPOT
    toruslab simulate --disaggregate v5e:4x4 --prefill-layout wgxyz    prompts on a slice of their own
    toruslab simulate --figure orca-10b --out results/orca             Orca's Figure 10(b), beside the paper's points

The scheduler is the engine's own. Latencies are of requests that arrived in the steady window: without the warm-up, and
until the last arrival; the words are those of `serving.results.metrics`. A run at a rate above the peak never settles.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import scenarios as asked
from toruslab.benchmarks.runs.options import InputError, guarded
from toruslab.benchmarks.runs.rows import line
from toruslab.benchmarks.runs.scenarios import Case
from toruslab.serving.results.timeline import Timeline
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request
from toruslab.serving.simulation.scenario import SHARE, highest_rate
from toruslab.serving.traffic.traces import Pattern

Row = dict[str, Any]
PEAK_REQUESTS = 2000
"""So many at most are run to find a peak."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = asked.parser(__doc__).parse_args(argv)
    asked.check(options, asked.parser(__doc__).given(argv))
    if options.out is not None:
        run_folder.writable(options.out)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if options.figure:
        return _figure(options, console)
    cases, when = asked.cases(options), asked.pattern(options)
    rates = asked.rates(options, when)
    asked.limits(options)
    if options.timeline and (options.capacity or len(cases) != 1 or rates is None or len(rates) != 1):
        raise InputError(f"timeline={str(options.timeline)!r} is of one run: one case, one of --rates")
    asked.workload(options, when.at(1.0))  # refuses before anything runs
    rows: list[Row] = []
    began_s, done = time.perf_counter(), _Work()
    with _progress("runs", len(cases) * (1 if options.capacity else 1 + len(rates or asked.LOADS))) as tick:
        for case in cases:
            try:
                rows += (
                    _capacity(case, options, when, done) if options.capacity else _runs(case, options, when, done, tick)
                )
            except ValueError as error:
                raise InputError(str(error)) from None
            tick()
    taken_s = time.perf_counter() - began_s
    for row in _front(rows):
        row["pareto"] = True
    if options.out is not None:
        from toruslab.benchmarks.reports.figures import front
        from toruslab.benchmarks.reports.style import sheets

        drawn = {} if options.capacity else sheets(front(rows))
        for path in run_folder.save(options.out, "rows", rows, drawn):
            print(path, file=sys.stderr)
    if options.json:
        print("\n".join(map(line, rows)))
    else:
        _show(rows, cases, options.capacity, console)
    speed = f"{done.tokens:,} tokens scheduled, {done.works:,} parts of batches, in {taken_s:.1f} s"
    print(f"{speed}: {done.tokens / taken_s:,.0f} tokens a second", file=sys.stderr)
    return 0


class _Work:
    """What all runs have scheduled."""

    def __init__(self):
        self.tokens = self.works = 0

    def add(self, runs: Sequence[Any]) -> None:
        self.tokens += sum(run.tokens for run in runs)
        self.works += sum(run.works for run in runs)


class Returned(Observer):
    """Moves a progress bar on as requests return."""

    def __init__(self, move: Callable[[int], None]):
        self._move, self._n = move, 0

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self._n += len(back)
        if self._n >= 100:
            self._move(self._n)
            self._n = 0


class _Tick:
    """The progress of runs, and of requests in the present one."""

    def __init__(self, progress: Progress, what: str, total: int):
        self._progress = progress
        self._runs, self._requests = progress.add_task(what, total=total), progress.add_task("requests", total=None)

    def __call__(self) -> None:
        self._progress.advance(self._runs)

    def observer(self, n: int) -> list[Observer]:
        self._progress.reset(self._requests, total=n)
        return [Returned(lambda moved: self._progress.advance(self._requests, moved))]


@contextmanager
def _progress(what: str, total: int) -> Iterator[_Tick]:
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield _Tick(progress, what, total)


def _peak(case: Case, options: Any, when: Pattern) -> float:
    """Of a part of the requests, all of which are there at the beginning."""
    few = asked.workload(options, when.at(1.0))
    return case.scenario.peak_per_s(replace(few, n=min(few.n, PEAK_REQUESTS)))


def _runs(case: Case, options: Any, when: Pattern, done: _Work, tick: _Tick) -> list[Row]:
    """A row for each rate."""
    n, limits = options.requests, asked.limits(options)
    peak = _peak(case, options, when)
    rows = []
    for rate in asked.rates(options, when) or [share * peak for share in asked.LOADS]:
        timeline = [Timeline()] if options.timeline else []
        summary, runs = case.scenario.run(
            asked.workload(options, when.at(rate)),
            warm_up=options.warm_up,
            limits=limits,
            observers=[*timeline, *(tick.observer(n) if sys.stderr.isatty() else ())],
        )
        done.add(runs)
        if timeline:
            timeline[0].write(options.timeline)
        chip_s = case.scenario.n_chips / summary.tokens_per_s if summary.tokens_per_s else None
        rows.append(
            {"kind": "run", **case.fields, "rate": rate, "peak_per_s": peak, "seed": options.seed, "pareto": False}
            | {"chip_s_per_token": chip_s, **asdict(summary)}
        )
        tick()
    return rows


def _capacity(case: Case, options: Any, when: Pattern, done: _Work) -> list[Row]:
    """One row: the highest rate within limits."""
    peak, limits = _peak(case, options, when), asked.limits(options)
    assert limits
    found: dict[float, Any] = {}

    def good(rate: float) -> bool:
        summary, runs = case.scenario.run(
            asked.workload(options, when.at(rate)), warm_up=options.warm_up, limits=limits
        )
        done.add(runs)
        found[rate] = summary
        return summary.within_limits is not None and summary.within_limits >= SHARE

    rate = highest_rate(good, peak)
    summary = asdict(found[rate]) if rate is not None else {}
    tokens_per_s = summary.get("tokens_per_s")
    return [
        {"kind": "capacity", **case.fields, "rate": rate, "peak_per_s": peak, "seed": options.seed, "pareto": False}
        | {"chip_s_per_token": case.scenario.n_chips / tokens_per_s if tokens_per_s else None}
        | {"limits": asdict(limits), **summary}
    ]


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other one beats in both cost and latency."""
    priced = [r for r in rows if r["chip_s_per_token"] and r.get("normalised_s")]
    front, best = [], float("inf")
    for row in sorted(priced, key=lambda r: (r["chip_s_per_token"], r["normalised_s"]["median"])):
        if row["normalised_s"]["median"] < best:
            best = row["normalised_s"]["median"]
            front.append(row)
    return front


def _show(rows: Sequence[Row], cases: Sequence[Case], is_capacity: bool, console: Console) -> None:
    """A table for people; what all cases share stands above it."""
    differ = asked.columns(cases)
    shared = {k: v for k, v in cases[0].fields.items() if k not in differ}
    console.print(", ".join(f"{k} {v}" for k, v in shared.items()))
    table = Table(
        title="* not beaten in both cost and median latency",
        title_justify="left",
    )
    for name in differ:
        table.add_column(name)
    headings = ("req/s", "peak", "done/s", "tokens/s", "chip-s/token", "ms/token", "TTFT ms", "p90", "TPOT ms", "p90")
    headings += ("in limits", "occupied", "slots")
    if refusals := any(row.get("refused") for row in rows):
        headings += ("refused",)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        refused = [f"{row.get('refused', 0):,}"] if refusals else []
        table.add_row(*(str(row.get(k, "")) for k in differ), *_cells(row), *refused)
    console.print(table)
    if refusals:
        console.print("refused: of the requests of a run, those that need more slots than there are")
    for row in rows:
        if is_capacity and row["rate"] is None:
            case = ", ".join(f"{k} {row[k]}" for k in differ if k in row)
            console.print(
                f"{case + ': ' if case else ''}no rate keeps the limits: at a hundredth of the peak, "
                f"{row['peak_per_s'] / 100:.3g} requests/s, fewer than {SHARE:.0%} of the requests do"
            )


def _cells(row: Row) -> list[str]:
    def number(value: float | None, scale: float = 1.0, form: str = ".3g") -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    def of(field: str, which: str) -> float | None:
        return (row.get(field) or {}).get(which)

    cells = [number(row["rate"]), number(row["peak_per_s"]), number(row.get("throughput_per_s"))]
    cells += [number(row.get("tokens_per_s"), form=",.0f"), number(row["chip_s_per_token"])]
    cells.append(number(of("normalised_s", "median"), 1e3, ",.1f") + (" *" if row["pareto"] else ""))
    cells += [number(of(f, w), 1e3, ",.1f") for f in ("ttft_s", "tpot_s") for w in ("median", "p90")]
    cells += [number(row.get("within_limits"), 1, ".0%"), number(row.get("occupancy"), 1, ".0%")]
    used = row.get("slots_reserved_peak")
    cells.append(number(used / row["slots"] if used is not None else None, 1, ".0%"))
    return cells


def _figure(options: Any, console: Console) -> int:
    from toruslab.benchmarks.studies import orca as orca

    n, seed = options.requests, options.seed
    with _progress("the paper's points, the ladder, other models", 50) as tick:
        rows = orca.compare(n, seed, tick)
        rows += orca.ladder(n, seed, tick)
        rows += orca.predict([m for m in orca.PANELS if m != "orca-175b"], n, seed, tick)
        if options.out is not None:
            from toruslab.benchmarks.reports.style import sheets

            drawn = sheets(orca.figure_10b(n, seed), orca.ladder_picture(rows))
            for path in run_folder.save(options.out, "rows", rows, drawn):
                print(path, file=sys.stderr)
    if options.json:
        print("\n".join(map(line, rows)))
        return 0
    constants = ", ".join(f"{k} {v}" for k, v in orca.FITTED.items())
    console.print(f"GPT-3 175B, 2 stages of 8 A100 40 GB; fitted on this figure: {constants}")
    _table(
        console, [r for r in rows if r["figure"] == "10b"], ("line", "what", "at", "simulated", "published", "error")
    )
    console.print("Requests/s at 190 ms a token, one change after another")
    _table(console, [r for r in rows if r["figure"] == "ladder"], ("step", "rate", "factor"))
    console.print("Predicted with the same constants, nothing fitted")
    _table(console, [r for r in rows if r["figure"].startswith("orca-")], ("figure", "line", "what", "simulated"))
    return 0


def _table(console: Console, rows: Sequence[Row], fields: Sequence[str]) -> None:
    table = Table()
    for field in fields:
        table.add_column(field, justify="left" if field in ("line", "what", "figure", "step") else "right")
    for row in rows:
        table.add_row(*(_cell(field, row[field]) for field in fields))
    console.print(table)


def _cell(field: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:+.1%}" if field == "error" else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(guarded(main))
