"""How fast the planner prices points, beside a plain loop of the same cost model. Touches no device.

python -m benchmarks.studies.planner_speed
python -m benchmarks.studies.planner_speed --json
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.planner import search
from toruslab.partitioning.cost.space import BATCHES, Job, Space


def speed(repeats: int = 5) -> list[dict[str, Any]]:
    """Points per second of the planner and of a plain loop over `estimate`, interleaved in one run.

    The planner's points are those that went through the cost model. All of `search` is timed, refusals and pairs too.
    The loop's points are drawn from the planner's and are made outside the clock. Seconds are CPU seconds of this
    process, so that its neighbours do not count, and caches are warm.

    Args:
        repeats: rounds that count; the one before them warms the caches.

    Returns:
        A row per contestant: points, points_per_s (median), lowest, highest, times_the_loop.
    """
    everything = tuple(range(1, 1025))
    grids = {
        "planner, batches 1..1024, decode": (everything, Job(phase="decode", prompt=2047)),
        "planner, the default batches, decode": (BATCHES, Job(phase="decode", prompt=2047)),
        "planner, the default batches, request": (BATCHES, Job(prompt=1984, output=64)),
    }
    spaces = {k: (Space(model="palm-540b-h64", slices=("v4:4x4x4",), batches=b), w) for k, (b, w) in grids.items()}
    plan = search(*next(iter(spaces.values())))
    drawn = np.random.default_rng(0).choice(len(plan), 1000, replace=False)
    points = [plan.points(int(i))["decode"] for i in drawn]
    rates: dict[str, list[float]] = {}
    counts = {"plain loop of cost.estimate": len(points)}
    for repeat in range(repeats + 1):
        for name, (space, workload) in spaces.items():
            started = time.process_time()
            counts[name] = search(space, workload).n_priced
            rates.setdefault(name, []).append(counts[name] / (time.process_time() - started))
        started = time.process_time()
        for point in points:
            estimate(point)
        rates.setdefault("plain loop of cost.estimate", []).append(len(points) / (time.process_time() - started))
        if not repeat:  # the first round warms the caches
            rates.clear()
    loop = statistics.median(rates["plain loop of cost.estimate"])
    return [
        {
            "benchmark": name,
            "points": counts[name],
            "points_per_s": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "times_the_loop": statistics.median(found) / loop,
        }
        for name, found in rates.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study."""
    p = Parser("python -m benchmarks.studies.planner_speed", __doc__)
    p.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    options = p.parse_args(argv)
    with progress("planner_speed", what="interleaved runs"):
        found = speed()
    if options.json:
        output.print_rows(found)
        return 0
    headings = ("", "points", "points/s", "lowest..highest", "x the loop")
    title = "Points a second of CPU time, median of 5 interleaved runs"
    table = output.table(headings, title=title, title_style="bold")
    for r in found:
        rates = f"{r['points_per_s']:,.0f}", f"{r['lowest']:,.0f}..{r['highest']:,.0f}", f"{r['times_the_loop']:.0f}"
        table.add_row(r["benchmark"], f"{r['points']:,}", *rates)
    output.console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
