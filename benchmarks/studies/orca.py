"""Orca's Figure 10 by simulation: the paper's models, slices, trace and policies, and the paper's points beside it.

    python -m benchmarks.studies.orca --out results/orca
    python -m benchmarks.studies.orca --fit

Three constants are fitted, on panel (b) alone (GPT-3 175B, 2 stages of 8 A100 40 GB); `--fit` fits them anew. The other
panels are predictions with the same constants. The ladder goes from the baseline to Orca, one change at a time.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from toruslab.benchmarks.reports.style import Panel, Picture, log_axes, sheets
from toruslab.benchmarks.reports.tables import Column, DataTable
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row, line
from toruslab.partitioning.published.papers import data
from toruslab.serving.scheduling.policies import ORCA, REQUEST_LEVEL, REQUEST_LEVEL_EARLY, SHORTEST_PROMPT, Policy
from toruslab.serving.simulation.pricing import Pipeline, Pricing
from toruslab.serving.simulation.scenario import Scenario, highest_rate
from toruslab.serving.simulation.simulator import Server
from toruslab.serving.traffic.arrivals import Poisson
from toruslab.serving.traffic.lengths import ORCA_OUTPUT, ORCA_PROMPT
from toruslab.serving.traffic.workload import Workload

FITTED = {"matmul_efficiency": 0.364, "hbm_efficiency": 0.534, "baseline_slowdown": 1.325}
"""Fitted on Figure 10(b).

- Shares of the A100's peak rates that Orca's engine reaches: on Orca's four peaks and its curve of max_bs 32 up to 6
  requests/s.
- Slowdown of the baseline's engine: on its two peaks and its rate in `HEADLINE`, for the smallest worst error.
"""
ASSUMED = {"link_efficiency": 1.0, "collective_s": 3.84e-6, "hop_s": 1e-6}
"""Not fitted: NVLink's full rate, v4's cost of a collective, one pass through the switch: 2% of an iteration."""
PANELS = {"orca-13b": (1, 1), "orca-101b": (1, 8), "orca-175b": (2, 8), "orca-341b": (4, 8)}
"""Model -> stages, and chips of each [Orca, Table 1]."""
LIMIT_S = 0.19
"""Normalised latency at which the paper states its factor of 36.9."""
HEADLINE = {"orca32": 6.81, "ft1": 0.185}
"""Requests/s at that latency [Orca, section 6.2]."""
MOST_PROMPT = ORCA_PROMPT.high


@dataclass(frozen=True, kw_only=True)
class ServingSystem:
    """A serving system of the figure.

    Args:
        name: as in the data file.
        policy, max_bs: of its scheduler.
        in_flight: batches in the pipeline; None for one per stage.
        baseline: whether it runs on the baseline's engine.
    """

    name: str
    policy: Policy
    max_bs: int
    in_flight: int | None = None
    baseline: bool = False


SYSTEMS = (
    *(ServingSystem(name=f"orca{n}", policy=ORCA, max_bs=n) for n in (1, 8, 16, 32)),
    *(ServingSystem(name=f"ft{n}", policy=SHORTEST_PROMPT, max_bs=n, in_flight=1, baseline=True) for n in (1, 8)),
)
"""A micro-batch of the baseline is its whole batch: one is in the pipeline at a time."""

LADDER = (
    (
        "the baseline, batches of 1",
        ServingSystem(name="0", policy=SHORTEST_PROMPT, max_bs=1, in_flight=1, baseline=True),
    ),
    ("Orca's engine", ServingSystem(name="1", policy=SHORTEST_PROMPT, max_bs=1, in_flight=1)),
    ("batches of 8 by the shortest prompt", ServingSystem(name="2", policy=SHORTEST_PROMPT, max_bs=8, in_flight=1)),
    ("whole prompts, padded", ServingSystem(name="3", policy=REQUEST_LEVEL, max_bs=8, in_flight=1)),
    ("batches of 32", ServingSystem(name="4", policy=REQUEST_LEVEL, max_bs=32, in_flight=1)),
    ("a batch in flight for each stage", ServingSystem(name="5", policy=REQUEST_LEVEL, max_bs=32)),
    ("early return", ServingSystem(name="6", policy=REQUEST_LEVEL_EARLY, max_bs=32)),
    ("refill: Orca", ServingSystem(name="7", policy=ORCA, max_bs=32)),
)
"""From the baseline to Orca, one change at a time."""


def scenario(system: ServingSystem, model: str = "orca-175b", fitted: dict[str, float] | None = None) -> Scenario:
    """The server of a system, for one of the paper's models."""
    constants = dict(FITTED if fitted is None else fitted)
    slowdown = constants.pop("baseline_slowdown")
    stages, n_chips = PANELS[model]
    pipeline = Pipeline(model=model, slice=f"a100-40:{n_chips}", stages=stages, layout="ws1d+lean", attention="heads")
    return Scenario(
        server=Server(
            times=Pricing(pipeline, constants | ASSUMED, slowdown=slowdown if system.baseline else 1.0),
            n_stages=stages,
            n_chips=pipeline.n_chips,
            max_bs=system.max_bs,
            slots=pipeline.slots(system.max_bs * MOST_PROMPT, system.max_bs),
            policy=system.policy,
            in_flight=system.in_flight,
        )
    )


def trace(rate: float, n: int, seed: int = 0) -> Workload:
    """The paper's trace: Poisson arrivals, prompts of 32 to 512 tokens, outputs of 1 to 128, no early stop."""
    return Workload(n=n, arrivals=Poisson(rate=rate), prompt=ORCA_PROMPT, output=ORCA_OUTPUT, seed=seed)


def latency_s(case: Scenario, rate: float, n: int, seed: int = 0) -> float:
    """Median normalised latency of a run."""
    summary, _ = case.run(trace(rate, n, seed))
    assert summary.normalised_s
    return summary.normalised_s.median


def peak_per_s(case: Scenario, n: int, seed: int = 0) -> float:
    """Throughput under unlimited load, from n requests or 20 batches, whichever is more."""
    return case.peak_per_s(trace(1.0, max(n, 20 * case.server.max_bs), seed))


def rate_at_limit(case: Scenario, n: int, seed: int = 0) -> float | None:
    """The rate at which the median normalised latency reaches `LIMIT_S`."""
    top = 1.05 * peak_per_s(case, n, seed)
    return highest_rate(lambda rate: latency_s(case, rate, n, seed) <= LIMIT_S, top)


def compare(n: int, seed: int = 0, tick: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """Panel (b) beside the paper: peaks, latencies below saturation, and rates at the limit.

    Args:
        n: requests of each run.
        seed: of the traces.
        tick: called after each run.

    Returns:
        Rows of line, what, at (requests/s; of latencies), simulated, published and error (a share).
    """
    paper = data("orca_fig10_175b")
    rows = []

    def add(line: str, what: str, simulated: float, published: float, at: float | None = None) -> None:
        error = simulated / published - 1
        rows.append(
            {"figure": "10b", "line": line, "what": what, "at": at, "simulated": simulated, "published": published}
            | {"error": error}
        )
        tick()

    for system in SYSTEMS:
        case, points = scenario(system), paper[system.name]
        peak = max(rate for rate, _ in points)
        add(system.name, "peak, requests/s", peak_per_s(case, n, seed), peak)
        for rate, ms in points:
            if rate <= 0.9 * peak:  # beyond, a latency says how long the trace was
                add(system.name, "latency, ms/token", latency_s(case, rate, n, seed) * 1e3, ms, rate)
        if system.name in HEADLINE:
            found = rate_at_limit(case, n, seed)
            add(system.name, "requests/s at 190 ms/token", found or 0.0, HEADLINE[system.name])
    return rows


def predict(models: Iterable[str], n: int, seed: int = 0, tick: Callable[[], Any] = lambda: None) -> list[dict]:
    """Other panels with the same constants: peaks, and latencies at a low load."""
    rows = []
    for model in models:
        for system in SYSTEMS:
            case = scenario(system, model)
            peak = peak_per_s(case, n, seed)
            low_s = latency_s(case, 0.02 * peak if system.max_bs > 1 else 0.1 * peak, n, seed)
            rows += [
                {"figure": model, "line": system.name, "what": "peak, requests/s", "at": None, "simulated": peak},
                {"figure": model, "line": system.name, "what": "latency at a low load, ms/token", "at": None}
                | {"simulated": low_s * 1e3},
            ]
            tick()
    return rows


def ladder(n: int, seed: int = 0, tick: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """Rates at `LIMIT_S` from the baseline to Orca, one change after another: the parts of the paper's factor."""
    rows, first = [], None
    for what, system in LADDER:
        rate = rate_at_limit(scenario(system), n, seed) or 0.0
        first = first or rate
        rows.append({"figure": "ladder", "step": what, "rate": rate, "factor": rate / first if first else None})
        tick()
    return rows


def fit(n: int, seed: int = 0, rounds: int = 6) -> dict[str, float]:
    """Fits the three constants to the data that `FITTED` names.

    The first two are fitted by least squares of the logarithms, with equal weight of peaks and curve, on grids that
    shrink.
    """
    paper = data("orca_fig10_175b")
    orca = [c for c in SYSTEMS if not c.baseline]
    peaks = {name: max(rate for rate, _ in paper[name]) for name in paper if name != "source"}

    def error(matmul: float, hbm: float) -> float:
        fitted = {"matmul_efficiency": matmul, "hbm_efficiency": hbm, "baseline_slowdown": 1.0}
        cases = {c.name: scenario(c, fitted=fitted) for c in orca}
        peak = [np.log(peak_per_s(case, n, seed) / peaks[name]) ** 2 for name, case in cases.items()]
        curve = [
            np.log(latency_s(cases["orca32"], rate, n, seed) * 1e3 / ms) ** 2
            for rate, ms in paper["orca32"]
            if rate <= 6
        ]
        return float(np.mean(peak) + np.mean(curve))

    best, width = (0.4, 0.52), 1.2
    known: dict[tuple[float, float], float] = {}
    for _ in range(rounds):
        grid = [(best[0] * width**i, best[1] * width**j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        for at in grid:
            if at not in known:
                known[at] = error(*at)
        best = min(grid, key=lambda at: known[at])
        width **= 0.6
        print(f"{best[0]:.4f} {best[1]:.4f} {known[best]:.6f}", file=sys.stderr)
    fitted = {"matmul_efficiency": best[0], "hbm_efficiency": best[1], "baseline_slowdown": 1.3}
    for _ in range(3):
        cases = {c.name: scenario(c, fitted=fitted) for c in SYSTEMS if c.baseline}
        ratios = [peak_per_s(case, n, seed) / peaks[name] for name, case in cases.items()]
        ratios.append((rate_at_limit(cases["ft1"], n, seed) or 0.01) / HEADLINE["ft1"])
        fitted["baseline_slowdown"] *= float(np.sqrt(max(ratios) * min(ratios)))
    return fitted


def figure_10b(n: int, seed: int) -> Picture:
    """Figure 10(b): simulated lines and the paper's points."""
    return Picture(
        name="orca_10b",
        heading="Orca, Figure 10(b)",
        says="Line: simulated; mark: paper.",
        panels=[
            Panel(
                title="Orca, Figure 10(b): GPT-3 175B, 2 x 8 A100 40 GB",
                draw=lambda axes: _curves(axes, n, seed),
                height_in=4.8,
            )
        ],
    )


def _curves(axes: Any, n: int, seed: int) -> None:
    paper = data("orca_fig10_175b")
    for i, system in enumerate(SYSTEMS):
        case = scenario(system)
        peak = peak_per_s(case, n, seed)
        served, latency = [], []
        for share in (0.02, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97, 1.05, 1.3):
            summary, _ = case.run(trace(share * peak, n, seed))
            if summary.normalised_s and summary.throughput_per_s:
                served.append(min(summary.throughput_per_s, peak))
                latency.append(summary.normalised_s.median * 1e3)
        axes.plot(served, latency, color=f"C{i}", linestyle="--" if system.baseline else "-")
        x, y = zip(*paper[system.name], strict=True)
        label = f"{'baseline' if system.baseline else 'Orca'}, max_bs {system.max_bs}"
        axes.plot(x, y, "os^Dvx"[i], color=f"C{i}", markersize=5, label=label)
    axes.axhline(LIMIT_S * 1e3, color="black", linewidth=0.6, linestyle=":")
    axes.set(
        xlabel="requests per second that are served", ylabel="median normalised latency, ms a token", ylim=(40, 2500)
    )
    log_axes(axes, "xy")
    axes.legend(title="line: simulated\nmark: paper", fontsize="small")


def ladder_picture(rows: Sequence[Row]) -> Picture:
    """From the baseline to Orca, one change at a time."""
    steps = [r for r in rows if r["figure"] == "ladder"][::-1]
    heading = "From the baseline to Orca, one change at a time"
    panel = Panel(title=heading, draw=lambda axes: _ladder(axes, steps), height_in=4.0)
    return Picture(name="ladder", heading=heading, says="", panels=[panel])


def _ladder(axes: Any, steps: Sequence[Row]) -> None:
    rates = [r["rate"] for r in steps]
    axes.barh([r["step"] for r in steps], rates, color="C0")
    for i, row in enumerate(steps):
        axes.annotate(f" {row['factor']:.3g} x", (row["rate"], i), va="center", fontsize=8)
    axes.set(xlabel="requests per second at 190 ms a token")
    axes.set_xlim(min(rates) / 2, max(rates) * 2)  # room for the text beside the longest bar
    log_axes(axes, "x")


def parser() -> Parser:
    """The options."""
    p = Parser("python -m benchmarks.studies.orca", __doc__)
    p.add_argument("--requests", type=int, default=1000, help="of each run (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the traces (default: %(default)s)")
    p.add_argument("--fit", action="store_true", help="fit the three constants anew and print them")
    p.add_argument("--out", type=Path, help="folder of the rows and pictures")
    p.add_argument("--json", action="store_true", help="one JSON row a line on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study."""
    options = parser().parse_args(argv)
    n, seed = options.requests, options.seed
    for field, least in (("requests", 1), ("seed", 0)):
        if getattr(options, field) < least:
            raise InputError(f"{field}={getattr(options, field)} must be at least {least}")
    if options.fit:
        print(fit(n, seed))
        return 0
    if options.out is not None:
        run_folder.writable(options.out)
    others = [m for m in PANELS if m != "orca-175b"]
    with progress("orca", what="the paper's points, the ladder, other models", total=50) as bar:
        rows = compare(n, seed, bar.advance) + ladder(n, seed, bar.advance) + predict(others, n, seed, bar.advance)
        figures = sheets(figure_10b(n, seed), ladder_picture(rows)) if options.out else {}
    if options.out is not None:
        for path in run_folder.save(options.out, "rows", rows, figures):
            print(path, file=sys.stderr)
    if options.json:
        print("\n".join(map(line, rows)))
    else:
        show(rows, output.console(170))
    return 0


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the figure, the ladder and the other panels as tables."""
    constants = ", ".join(f"{k} {v}" for k, v in FITTED.items())
    console.print(f"GPT-3 175B, 2 stages of 8 A100 40 GB; fitted on this figure: {constants}")
    console.print(
        _table(
            [r for r in rows if r["figure"] == "10b"], ("line", "what", "at", "simulated", "published", "error")
        ).rich()
    )
    console.print("Requests/s at 190 ms a token, one change after another")
    console.print(_table([r for r in rows if r["figure"] == "ladder"], ("step", "rate", "factor")).rich())
    console.print("Predicted with the same constants, nothing fitted")
    console.print(
        _table([r for r in rows if r["figure"].startswith("orca-")], ("figure", "line", "what", "simulated")).rich()
    )


def _table(rows: Sequence[Row], fields: Sequence[str]) -> DataTable:
    def text(value: Any, field: str) -> str:
        if isinstance(value, float):
            return f"{value:+.1%}" if field == "error" else f"{value:.3g}"
        return "" if value is None else str(value)

    names = ("line", "what", "figure", "step")
    columns = [Column(f, lambda row, f=f: text(row[f], f), numeric=f not in names) for f in fields]
    return DataTable(title="", columns=columns, records=rows)


if __name__ == "__main__":
    sys.exit(guarded(main))
