"""Every variant of a pass against what XLA's partitioner makes by itself, as ratios within one run.

    python -m benchmarks.studies.ratio
    python -m benchmarks.studies.ratio --phase prefill

4 layers, E=512, F=2048, H=16, Q=64, vocabulary 1024, multiquery, parallel, batch 16, float32, 8 fake CPU devices as
2x2x2; a decode step at context 256, or a prefill of 256 tokens a sequence. All are timed in turns; ratios are of times
of the same turn. LAYOUT/ATTENTION/N takes N decode steps in a call; what is shown is one step's.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.models.weights import corpus
from toruslab.partitioning.plan.point import Point

DECODE = (
    "auto/batch auto/heads ws2d/batch ws2d/heads ws2d/batch-x ws2d+ring/batch ws2d+biring/batch ws2d+lean/batch "
    "ws2d+lean/heads ws2d+lean/batch-y ws1d/batch ws1d/heads ws1d+ring/batch ws1d+lean/batch ws1d+lean/heads "
    "ws1d+lean/batch-x ws1d+lean/batch-xy auto/batch/4 ws1d+lean/batch/4"
)
PREFILL = (
    "auto/batch auto/heads ws2d/batch ws2d/heads ws2d+ring/heads ws1d/heads ws1d+lean/heads wgx/batch wgx+ring/batch "
    "wgx+prefetch/batch wgxy/batch wgxyz/batch wgxyz+ring/batch wgxyz+biring/batch wgxyz+prefetch/batch"
)
MODEL = "toy-v1024"


def parser() -> Parser:
    """The options."""
    p = Parser(
        prog="python -m benchmarks.studies.ratio", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--phase", choices=["decode", "prefill"], default="decode", help="default: %(default)s")
    p.add_argument(
        "--layouts", help="LAYOUT/ATTENTION or LAYOUT/ATTENTION/N, with commas between; all are shares of the first"
    )
    p.add_argument("--repeats", type=int, default=40, help="turns (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="one row a line instead of a table")
    return p


def points(phase: str, layouts: Sequence[str]) -> list[Point]:
    """What is timed.

    Raises:
        InputError: what a point refuses.
    """
    sizes = {"context": 256} if phase == "decode" else {"length": 256}
    base = {"model": MODEL, "slice": "cpu:2x2x2", "phase": phase, "batch": 16, "weights": "f32"} | sizes
    found = []
    for name in layouts:
        layout, attention, steps, *more = [*name.split("/"), *["batch", "1"][name.count("/") :]]
        try:
            if more or not steps.isdecimal():
                raise ValueError("must be LAYOUT/ATTENTION or LAYOUT/ATTENTION/N")
            fields = {"layout": layout, "attention": attention, "steps_per_call": int(steps)}
            found.append(Point.from_json(base | fields))
        except ValueError as error:
            raise InputError(f"layouts: {name}: {error}") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parser().parse_args(argv)
    names = (
        options.layouts.split(",") if options.layouts else (DECODE if options.phase == "decode" else PREFILL).split()
    )
    todo = points(options.phase, names)
    if options.repeats < 2:
        raise InputError(f"repeats={options.repeats} must be at least 2")
    processes.join("cpu", 8, 1)

    from toruslab.benchmarks.measure.contenders import prepare
    from toruslab.benchmarks.measure.timing import interleaved

    ready, failed = [], []
    for name, point in zip(names, todo, strict=True):
        try:
            contender = prepare(point, 0, corpus.read())
            contender.step()  # whether there is memory to run it
            ready.append((name, contender))
        except Exception as error:  # it is said, and the others are timed
            failed.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            print(f"failed: {name}: {failed[-1]}", file=sys.stderr)
            if options.json:
                print(json.dumps({"point": point.to_json(), "source": "measured", "error": failed[-1]}))
    if not ready:
        return 1
    names, ready = [name for name, _ in ready], [contender for _, contender in ready]
    timings = interleaved([c.step for c in ready], repeats=options.repeats, budget_s=60)
    times = [[t / c.point.steps_per_call for t in timing.times_s] for c, timing in zip(ready, timings, strict=True)]
    table = Table()
    for heading in ("", "ms", "half within", "collectives", "kB a chip", f"share of {names[0]}", "half within"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, contender, taken in zip(names, ready, times, strict=True):
        row = contender.compiled_row
        shares = statistics.quantiles([a / b for a, b in zip(taken, times[0], strict=False)], n=4)
        low, median, high = statistics.quantiles(taken, n=4)
        numbers = {
            "latency_s": median,
            "quartiles_s": [low, high],
            "n_collectives": row["n_collectives"],
            "collective_bytes": row["collective_bytes"],
            "share": shares[1],
            "share_quartiles": [shares[0], shares[2]],
        }
        if options.json:
            print(json.dumps({"point": contender.point.to_json(), "source": "measured", **numbers}))
        table.add_row(
            name,
            f"{median * 1e3:.2f}",
            f"{low * 1e3:.2f}..{high * 1e3:.2f}",
            str(row["n_collectives"]),
            f"{row['collective_bytes'] / 1e3:,.0f}",
            f"{shares[1]:.2f}",
            f"{shares[0]:.2f}..{shares[2]:.2f}",
        )
    if not options.json:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
