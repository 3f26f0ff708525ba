"""Every variant of a pass against what XLA's partitioner makes by itself, as ratios within one run.

    python -m benchmarks.ratio
    python -m benchmarks.ratio --phase prefill

4 layers, E=512, F=2048, H=16, Q=64, vocabulary 1024, multiquery, parallel, batch 16, float32, 8 fake CPU devices as
2x2x2; a decode step at context 256, or a prefill of 256 tokens a sequence. All are timed in turns; ratios are of times
of the same turn.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import processes
from benchmarks.cli import InputError, Parser, guarded
from models import presets, text
from partitioning.point import Point

DECODE = (
    "auto/batch auto/heads ws2d/batch ws2d/heads ws2d/batch-x ws2d+lean/batch ws2d+lean/heads ws2d+lean/batch-y "
    "ws1d/batch ws1d/heads ws1d+lean/batch ws1d+lean/heads ws1d+lean/batch-x ws1d+lean/batch-xy"
)
PREFILL = (
    "auto/batch auto/heads ws2d/batch ws2d/heads ws1d/heads wgx/batch wgx/heads wgxy/batch wgxyz/batch "
    "ws1d+lean/heads ws2d+lean/heads"
)
MODEL = dataclasses.replace(presets.PRESETS["toy"], name="toy-v1024", vocab=1024)


def parser() -> Parser:
    """The options."""
    p = Parser(prog="python -m benchmarks.ratio", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--phase", choices=["decode", "prefill"], default="decode", help="default: %(default)s")
    p.add_argument("--layouts", help="LAYOUT/ATTENTION, separated by commas; the first is what others are a share of")
    p.add_argument("--repeats", type=int, default=40, help="turns (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="one row a line instead of a table")
    return p


def points(phase: str, layouts: Sequence[str]) -> list[Point]:
    """What is timed.

    Raises:
        InputError: what a point refuses.
    """
    sizes = {"context": 256} if phase == "decode" else {"length": 256}
    base = {"model": MODEL.name, "slice": "cpu:2x2x2", "phase": phase, "batch": 16, "weights": "f32"} | sizes
    found = []
    for name in layouts:
        layout, _, attention = name.partition("/")
        try:
            found.append(Point.from_json(base | {"layout": layout, "attention": attention or "batch"}))
        except ValueError as error:
            raise InputError(f"layouts: {name}: {error}") from None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parser().parse_args(argv)
    presets.PRESETS[MODEL.name] = MODEL
    names = (
        options.layouts.split(",") if options.layouts else (DECODE if options.phase == "decode" else PREFILL).split()
    )
    todo = points(options.phase, names)
    if options.repeats < 2:
        raise InputError(f"repeats={options.repeats} must be at least 2")
    processes.join("cpu", 8, 1)

    from benchmarks.contenders import prepare
    from benchmarks.timing import interleaved

    ready = [prepare(point, 0, text.corpus()) for point in todo]
    timings = interleaved([c.step for c in ready], repeats=options.repeats, budget_s=60)
    base = timings[0].times_s
    table = Table()
    for heading in ("", "ms", "half within", "collectives", "kB a chip", f"share of {names[0]}", "half within"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, contender, timing in zip(names, ready, timings, strict=True):
        row = contender.compiled_row
        shares = statistics.quantiles([a / b for a, b in zip(timing.times_s, base, strict=False)], n=4)
        low, high = timing.quartiles_s
        numbers = {
            "latency_s": timing.median_s,
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
            f"{timing.median_s * 1e3:.2f}",
            f"{low * 1e3:.2f}..{high * 1e3:.2f}",
            str(row["n_collectives"]),
            f"{row['collective_bytes'] / 1e3:,.0f}",
            f"{shares[1]:.2f}",
            f"{shares[0]:.2f}..{shares[2]:.2f}",
        )
    if not options.json:
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
