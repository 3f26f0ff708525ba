"""The simulator against our own engine: the same traces through both, with measured stage times.

    python -m benchmarks.studies.simulator_check
    python -m benchmarks.studies.simulator_check --traces orca,fixed:34:16 --policies orca --json

1. The engine serves other seeds of the traces at the same rates. Its stage times become the simulator's table
   (`benchmarks.studies.engine_times`); the median gap between two batches becomes the host's time.
2. Each trace runs through engine and simulator. Compared are the throughput (completions while all batches could be
   full) and the median normalised latency.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from toruslab.benchmarks import serve_bench
from toruslab.benchmarks.runs import output, processes, serving_setting
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.serving_setting import Scheme, ServingSetting
from toruslab.benchmarks.studies.engine_times import EngineTimes, Padding
from toruslab.serving.results.metrics import Metrics
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request
from toruslab.serving.simulation.simulator import simulate

if TYPE_CHECKING:
    from toruslab.serving.engine.engine import Engine
    from toruslab.serving.traffic.workload import Workload

SHARES = (0.4, 0.7, 1.3)
"""Rates of the compared runs, as shares of the capacity. Beyond 1 only throughput counts."""
CALIBRATION = 1000
"""Seeds from here on serve the table only."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser("python -m benchmarks.studies.simulator_check", __doc__)
    p.add_argument("--model", default="toy", help="preset or config.json (default: %(default)s)")
    p.add_argument("--slice", default="cpu:2x2x2", help="default: %(default)s")
    p.add_argument("--layout", default="ws1d+lean", help="default: %(default)s")
    p.add_argument("--attention", default="heads", help="one that leaves the batch whole (default: %(default)s)")
    p.add_argument("--max-bs", type=int, default=16, help="default: %(default)s")
    p.add_argument("--traces", default="orca,fixed:272:64,azure-conversation", help="default: %(default)s")
    p.add_argument("--scale", default="1/8:1/4", help="of prompts, of outputs (default: %(default)s)")
    p.add_argument("--policies", default="orca,request-level-early", help="default: %(default)s")
    p.add_argument("--requests", type=int, default=96, help="of each run (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=1, help="runs of each trace and rate (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="one row a line instead of a table")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study."""
    options = parser().parse_args(argv)
    try:
        settings = _settings(options)
        processes.join(processes.platform_of(settings[0].slice, None), settings[0].slice.n_chips, 1)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    from toruslab.benchmarks.measure.serving_run import engine

    longest = max(settings, key=lambda setting: setting.trace.longest)
    with progress("simulator_check", what="compiling"):
        opened = engine(longest, lambda done, of: None)
    with opened as made:
        if made.parts != 1:
            raise InputError(f"attention={options.attention!r} splits the batch over {made.parts} parts; give heads")
        _compare(options, settings, made)
    return 0


def _compare(options: argparse.Namespace, settings: Sequence[ServingSetting], made: "Engine") -> None:
    """Runs everything and prints the result."""
    from toruslab.benchmarks.measure.serving_run import capacity, run_once, warm

    rows: list[dict[str, Any]] = []
    with progress("simulator_check", what="the engine's stage times") as bar:
        for setting in settings:
            warm(setting, made)
        rates = {setting.trace.name: capacity(setting, made) for setting in settings}
        seen = _Seen()
        for setting in settings:
            for scheme in setting.schemes:
                for share in SHARES:
                    workload = _traffic(setting, share * rates[setting.trace.name], CALIBRATION)
                    run_once(setting, made, scheme, workload, [seen])
        sizes = made.sizes
        padding = Padding(singles=sizes.singles, pieces=sizes.pieces, length=sizes.length)
        times = EngineTimes(padding, seen.samples)
        host_s = seen.gap_s
        for setting in settings:
            for seed in range(setting.seeds):
                for share in SHARES:
                    for scheme in setting.schemes:
                        bar.advance(what=f"{setting.trace.name}, {scheme.name}, {share} of capacity")
                        rate = share * rates[setting.trace.name]
                        rows.append(_row(setting, made, scheme, rate, share, seed, times, host_s))
                        if options.json:
                            print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        show(rows, times, host_s)


def show(rows: Sequence[dict[str, Any]], times: EngineTimes, host_s: float) -> None:
    """Prints rows and the worst errors."""
    table = Table("trace", "policy", "of capacity", "requests/s", "simulated", "", "ms/token", "simulated", "")
    for r in rows:
        table.add_row(
            r["trace"],
            r["policy"],
            f"{r['share']:g}",
            *(f"{r['throughput_per_s'][k]:.1f}" for k in ("engine", "simulated")),
            f"{r['throughput_error']:+.1%}",
            *(f"{1e3 * r['normalised_s'][k]:.1f}" for k in ("engine", "simulated")),
            f"{r['normalised_error']:+.1%}",
        )
    console = output.console()
    console.print(table)
    below = [r for r in rows if r["share"] < 1]
    console.print(
        f"stage times explain {times.explained:.1%} of the variance of the batches they are fitted on; the host takes "
        f"{1e3 * host_s:.2f} ms a batch. Throughput: worst {max(abs(r['throughput_error']) for r in rows):.1%}; median "
        f"normalised latency below saturation: worst {max(abs(r['normalised_error']) for r in below):.1%}, median "
        f"{statistics.median(abs(r['normalised_error']) for r in below):.1%}."
    )


class _Seen(Observer):
    """The stage times of the engine's batches, and the gaps between them."""

    def __init__(self):
        self.samples: list[tuple[Batch, float]] = []
        self._gaps: list[float] = []
        self._pending: dict[int, list[float]] = {}
        self._ended_s = 0.0
        self._number = -1

    @property
    def gap_s(self) -> float:
        """Median time between the end of a batch and the start of the next one, if that was ready."""
        return statistics.median(self._gaps)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        if batch.number == self._number + 1:
            self._gaps.append(max(0.0, start_s - self._ended_s))
        self._pending.setdefault(batch.number, []).append(end_s - start_s)
        self._ended_s, self._number = end_s, batch.number

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self.samples.append((batch, sum(self._pending.pop(batch.number))))
        if not used:
            self._number = -2  # idle: what comes next is no gap


def _settings(options: argparse.Namespace) -> list[ServingSetting]:
    found = []
    for name in options.traces.split(","):
        given = ["--model", options.model, "--slice", options.slice, "--layout", options.layout]
        given += ["--attention", options.attention, "--max-bs", str(options.max_bs), "--trace", name]
        given += ["--scale", options.scale, "--policies", options.policies]
        given += ["--requests", str(options.requests), "--seeds", str(options.seeds)]
        found.append(serving_setting.read(serve_bench.options_of(given)))
    slots = max(setting.n_slots for setting in found)
    return [replace(setting, n_slots=slots) for setting in found]


def _traffic(setting: ServingSetting, rate: float, seed: int) -> "Workload":
    from toruslab.benchmarks.measure.serving_run import traffic

    return traffic(setting, setting.arrivals.at(rate), setting.requests, seed)


def _row(
    setting: ServingSetting, made: "Engine", scheme: Scheme, rate: float, share: float, seed: int, times, host_s: float
) -> dict:
    from toruslab.benchmarks.measure.serving_run import Seen as Sustained
    from toruslab.benchmarks.measure.serving_run import run_once, scheduler

    workload = _traffic(setting, rate, seed)
    window = workload.window_s(setting.warm_up)
    found: dict[str, dict[str, Any]] = {"throughput_per_s": {}, "normalised_s": {}}
    for kind in ("engine", "simulated"):
        metrics, sustained = Metrics(max_bs=setting.max_bs, window_s=window), Sustained(made)
        observers = [metrics, sustained]
        if kind == "engine":
            run_once(setting, made, scheme, workload, observers)
        else:
            simulate(workload.requests(), scheduler(setting, scheme), times, host_s=host_s, observers=observers)
        summary = metrics.summary()
        found["throughput_per_s"][kind] = sustained.sustained_per_s(window[0])
        found["normalised_s"][kind] = summary.normalised_s.median if summary.normalised_s else None
    return {
        "trace": setting.trace.name,
        "policy": scheme.name,
        "rate_per_s": rate,
        "share": share,
        "seed": seed,
        **found,
        "throughput_error": _error(found["throughput_per_s"]),
        "normalised_error": _error(found["normalised_s"]),
    }


def _error(pair: dict[str, float]) -> float:
    return pair["simulated"] / pair["engine"] - 1


if __name__ == "__main__":
    sys.exit(guarded(main))
