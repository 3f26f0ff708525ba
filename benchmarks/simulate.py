"""What load a slice carries: requests served on a virtual clock, iteration times from the analytic model. No device.

    toruslab simulate --model llama-3-70b --slices v5e:4x4 --rates 2,4,8
    toruslab simulate --slices v5e:4x4,v5e:4x8 --layouts ws1d,ws2d --policies orca,chunked-512 --out results/simulate
    toruslab simulate --limits 2:0.1 --capacity          the highest rate at which 90% keep TTFT and TPOT
    toruslab simulate --disaggregate v5e:4x4 --prefill-layout wgxyz    prompts on a slice of their own
    python -m benchmarks.studies.orca --out results/orca     Orca's Figure 10(b), beside the paper's points

The scheduler is the engine's own. Latencies are of requests that arrived in the steady window: without the warm-up, and
until the last arrival; the words are those of `serving.results.metrics`. A run at a rate above the peak never settles.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output, scenarios, serving_options
from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, guarded, number, path, refused
from toruslab.benchmarks.runs.progress import Progress, progress
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.runs.scenarios import LOADS, MOST, Case
from toruslab.partitioning.plan.point import CACHES
from toruslab.partitioning.torus.chip import FITTED
from toruslab.serving.results.metrics import Limits
from toruslab.serving.results.timeline import Timeline
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.policies import POLICIES
from toruslab.serving.scheduling.request import Request
from toruslab.serving.simulation.scenario import SHARE, highest_rate
from toruslab.serving.traffic.traces import Pattern

PEAK_REQUESTS = 2000
"""The most requests that are run to find a peak."""


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab simulate", __doc__)
    serving_options.add(p, model="llama-3-70b", attention="batch", weights="bf16", max_bs=32, most_bs=MOST)
    p.add_argument("--slices", "--slice", default="v5e:4x4", help="of one stage, CHIP:DIMS,...")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--layouts", "--layout", default="ws2d", help="one or more")
    p.add_argument("--cache", help=f"{', '.join(CACHES)}; default: a KV cache of the activations' dtype")
    names = f"{', '.join(POLICIES)}, chunked-N"
    p.add_argument("--policies", "--policy", default="orca", help=f"one or more of {names}")
    p.add_argument("--slots", type=at_least(1, MOST), help="tokens of the KV cache (default: what fits beside weights)")
    p.add_argument("--in-flight", type=at_least(1), help="batches in the pipeline (default: one for each stage)")
    not_negative = number(lambda us: 0 <= us <= MOST, f"must be a number that is not negative, and at most {MOST}")
    p.add_argument("--host-us", type=not_negative, default=0.0, help="host's microseconds for a batch")
    p.add_argument("--disaggregate", metavar="SLICE", help="prompts run on a slice of their own; K and V are sent")
    p.add_argument("--prefill-layout", help="there (default: the other's)")
    p.add_argument("--prefill-attention", help="there (default: the other's)")
    p.add_argument("--prefill-max-bs", type=at_least(1, MOST), default=4, help="there")
    p.add_argument("--constants", help=f"JSON object; of the chip's {', '.join(FITTED)} those to change")
    p.add_argument("--stage-times", metavar="FILE", help="measured seconds, one JSON row a line, in place of the model")
    p.add_argument("--prompt", help="tokens, N or LOW..HIGH, in place of the trace's")
    p.add_argument("--output", help="tokens, N or LOW..HIGH, in place of the trace's")
    p.add_argument("--max-output", type=at_least(1), help="what every request declares (default: what it will produce)")
    p.add_argument(
        "--rates", "--rate", help="requests per second (default: shares of the peak, 0.25 to 0.9, or a file's own)"
    )
    p.add_argument("--requests", type=at_least(1, MOST), default=1000, help="of each run")
    p.add_argument("--seed", type=at_least(0, MOST), default=0, help="of the trace")
    p.add_argument("--capacity", action="store_true", help="the highest rate at which 90%% keep within --limits")
    p.add_argument("--timeline", type=path, metavar="FILE", help="of a single run, for ui.perfetto.dev")
    p.add_argument("--out", type=path, help="folder for rows and pictures")
    p.add_moved("--figure", "orca")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    scenarios.check(options, parser().given(argv))
    if options.out is not None:
        run_folder.writable(options.out)
    cases, when = scenarios.cases(options), serving_options.pattern(options)
    rates, limits = scenarios.rates(options, when), serving_options.limits(options)
    if options.timeline and (options.capacity or len(cases) != 1 or rates is None or len(rates) != 1):
        raise InputError(f"timeline={str(options.timeline)!r} is of one run: one case, one of --rates")
    scenarios.workload(options, when)  # refuses before anything runs
    began_s = time.perf_counter()
    n_runs = len(cases) * (1 if options.capacity else len(rates or LOADS))
    with progress("toruslab simulate", what="runs", total=n_runs) as work:
        sweep = _Sweep(options, when, limits, work)
        rows: list[Row] = []
        with refused():
            for case in cases:
                rows += sweep.capacity(case) if options.capacity else sweep.runs(case, rates)
    taken_s = time.perf_counter() - began_s
    for row in _front(rows):
        row["pareto"] = True
    if options.out is not None:
        from toruslab.benchmarks.reports.figures import front
        from toruslab.benchmarks.reports.style import sheets

        drawn = {} if options.capacity else sheets(front(rows))
        output.written(run_folder.save(options.out, "rows", rows, drawn))
    if options.json:
        output.print_rows(rows)
    else:
        _show(rows, cases, options.capacity, output.console(170))
    speed = f"{sweep.n_tokens:,} tokens scheduled, {sweep.n_parts:,} parts of batches, in {taken_s:.1f} s"
    print(f"{speed}: {sweep.n_tokens / taken_s:,.0f} tokens a second", file=sys.stderr)
    return 0


class _Returned(Observer):
    """Tells how many requests of a run have returned, a hundred at a time."""

    def __init__(self, tell: Callable[[int], None]):
        self._tell, self._n = tell, 0

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        before, self._n = self._n, self._n + len(back)
        if self._n // 100 > before // 100:
            self._tell(self._n)


class _Sweep:
    """Runs scenarios and counts the work that was scheduled."""

    def __init__(self, options: argparse.Namespace, when: Pattern, limits: Limits | None, work: Progress):
        self.options, self.when, self.limits, self._work = options, when, limits, work
        self.n_tokens = self.n_parts = 0

    def runs(self, case: Case, rates: Sequence[float] | None) -> Iterator[Row]:
        """A row for each rate."""
        peak = self._peak(case)
        for rate in rates or [share * peak for share in LOADS]:
            timeline = [Timeline()] if self.options.timeline else []
            summary = self._run(case, rate, timeline)
            for drawn in timeline:
                drawn.write(self.options.timeline)
            yield self._row("run", case, rate, peak, asdict(summary))
            self._work.advance()

    def capacity(self, case: Case) -> Iterator[Row]:
        """One row: the highest rate within limits."""
        peak, found = self._peak(case), {}

        def good(rate: float) -> bool:
            found[rate] = self._run(case, rate)
            within = found[rate].within_limits
            return within is not None and within >= SHARE

        assert self.limits
        rate = highest_rate(good, peak)
        summary = {} if rate is None else asdict(found[rate])
        yield self._row("capacity", case, rate, peak, {"limits": asdict(self.limits), **summary})
        self._work.advance()

    def _peak(self, case: Case) -> float:
        """Throughput when all requests, or the first of them, are there at the beginning."""
        n = min(self.options.requests, PEAK_REQUESTS)
        return case.scenario.peak_per_s(scenarios.workload(self.options, self.when, n=n))

    def _run(self, case: Case, rate: float, observers: Sequence[Observer] = ()) -> Any:
        options, n = self.options, self.options.requests
        told = _Returned(lambda done: self._work.advance(0, f"runs ({done:,} of {n:,} requests of this one)"))
        load = scenarios.workload(options, self.when, rate)
        observers = [*observers, told]
        summary, runs = case.scenario.run(load, warm_up=options.warm_up, limits=self.limits, observers=observers)
        self.n_tokens += sum(run.tokens for run in runs)
        self.n_parts += sum(run.works for run in runs)
        return summary

    def _row(self, kind: str, case: Case, rate: float | None, peak: float, numbers: Row) -> Row:
        per_s = numbers.get("tokens_per_s")
        row = {"kind": kind, **case.fields, "rate": rate, "peak_per_s": peak, "seed": self.options.seed}
        cost = case.scenario.n_chips / per_s if per_s else None
        return row | {"pareto": False, "chip_s_per_token": cost, **numbers}


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
    """A table for people, with what all cases share above it."""
    differ = scenarios.columns(cases)
    console.print(", ".join(f"{k} {v}" for k, v in cases[0].fields.items() if k not in differ))
    headings = ("req/s", "peak", "done/s", "tokens/s", "chip-s/token", "ms/token", "TTFT ms", "p90", "TPOT ms", "p90")
    headings += ("in limits", "occupied", "slots")
    if refusals := any(row.get("refused") for row in rows):
        headings += ("refused",)
    title = "* not beaten in both cost and median latency"
    table = output.table((*differ, *headings), left=len(differ), title=title)
    for row in rows:
        n_refused = [f"{row.get('refused', 0):,}"] if refusals else []
        table.add_row(*(str(row.get(k, "")) for k in differ), *_cells(row), *n_refused)
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
    def cell(value: float | None, scale: float = 1.0, form: str = ".3g") -> str:
        return "-" if value is None else f"{value * scale:{form}}"

    def of(field: str, which: str) -> float | None:
        return (row.get(field) or {}).get(which)

    cells = [cell(row["rate"]), cell(row["peak_per_s"]), cell(row.get("throughput_per_s"))]
    cells += [cell(row.get("tokens_per_s"), form=",.0f"), cell(row["chip_s_per_token"])]
    cells.append(cell(of("normalised_s", "median"), 1e3, ",.1f") + (" *" if row["pareto"] else ""))
    cells += [cell(of(f, w), 1e3, ",.1f") for f in ("ttft_s", "tpot_s") for w in ("median", "p90")]
    cells += [cell(row.get("within_limits"), 1, ".0%"), cell(row.get("occupancy"), 1, ".0%")]
    used = row.get("slots_reserved_peak")
    cells.append(cell(used / row["slots"] if used is not None else None, 1, ".0%"))
    return cells


if __name__ == "__main__":
    sys.exit(guarded(main))
