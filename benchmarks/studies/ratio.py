"""Every variant of a pass against what XLA's partitioner makes by itself, as ratios within one run.

    python -m benchmarks.studies.ratio
    python -m benchmarks.studies.ratio --phase prefill

4 layers, E=512, F=2048, H=16, Q=64, vocabulary 1024, multiquery, parallel, batch 16, float32, 8 fake CPU devices as
2x2x2; a decode step at context 256, or a prefill of 256 tokens a sequence. All are timed in turns; ratios are of times
of the same turn. LAYOUT/ATTENTION/N takes N decode steps in a call; what is shown is one step's.
"""

import json
import statistics
import sys
from collections.abc import Sequence

from toruslab.benchmarks.reports.tables import Column, DataTable
from toruslab.benchmarks.runs import output, processes
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.studies import ratios
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
    p = Parser("python -m benchmarks.studies.ratio", __doc__)
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
    """Runs the study; returns 1 when a point failed."""
    options = parser().parse_args(argv)
    names = (
        options.layouts.split(",") if options.layouts else {"decode": DECODE, "prefill": PREFILL}[options.phase].split()
    )
    todo = points(options.phase, names)
    ratios.at_least(options, repeats=2)
    processes.join("cpu", 8, 1)
    timed = ratios.measured(todo, repeats=options.repeats, budget_s=60)
    code = ratios.failures(timed, names)
    if options.json:
        for x in timed:
            if x.error:
                print(json.dumps({"point": x.point.to_json(), "source": "measured", "error": x.error}))
    ready = [(name, x) for name, x in zip(names, timed, strict=True) if not x.error]
    if not ready:
        return code
    rows = [row | {"name": name} for (name, _), row in zip(ready, numbers([x for _, x in ready]), strict=True)]
    if options.json:
        print("\n".join(json.dumps({k: v for k, v in row.items() if k != "name"}) for row in rows))
    else:
        output.console().print(table(rows).rich())
    return code


def numbers(timed: Sequence[ratios.TimedPoint]) -> list[Row]:
    """A row for each point: seconds of one step, its collectives, its share of the first point's."""
    times = [x.timing.per(x.point.steps_per_call).times_s for x in timed if x.timing]
    rows = []
    for x, taken in zip(timed, times, strict=True):
        low, median, high = statistics.quantiles(taken, n=4)
        low_share, share, high_share = ratios.shares(taken, times[0])
        rows.append(
            {
                "point": x.point.to_json(),
                "source": "measured",
                "latency_s": median,
                "quartiles_s": [low, high],
                "n_collectives": x.compiled["n_collectives"],
                "collective_bytes": x.compiled["collective_bytes"],
                "share": share,
                "share_quartiles": [low_share, high_share],
            }
        )
    return rows


def table(rows: Sequence[Row]) -> DataTable:
    """The rows for a person."""
    return DataTable(
        title="",
        records=rows,
        columns=[
            Column("", lambda r: r["name"], numeric=False),
            Column("ms", lambda r: f"{r['latency_s'] * 1e3:.2f}"),
            Column("half within", lambda r: "..".join(f"{s * 1e3:.2f}" for s in r["quartiles_s"])),
            Column("collectives", lambda r: str(r["n_collectives"])),
            Column("kB a chip", lambda r: f"{r['collective_bytes'] / 1e3:,.0f}"),
            Column(f"share of {rows[0]['name']}", lambda r: f"{r['share']:.2f}"),
            Column("half within", lambda r: "..".join(f"{s:.2f}" for s in r["share_quartiles"])),
        ],
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
