"""The decode step of ws2d/batch against what XLA's partitioner makes by itself, as a ratio within one run.

    python -m benchmarks.ratio

4 layers, E=512, F=2048, H=16, Q=64, vocabulary 1024, multiquery, parallel, batch 16, cache 256, float32, 8 fake CPU
devices. Two forms of `auto`: `as written`, and `row by row`, where the cache is written with one update per batch row,
a form that XLA can only partition by gathering (the form that layouts run on their own few rows).
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence

from benchmarks import processes
from benchmarks.cli import Parser, guarded
from models import cache, presets, text

CONTENDERS = (
    ("ws2d/batch", "ws2d", "batch", cache.FEW_ROWS),
    ("ws2d/heads", "ws2d", "heads", cache.FEW_ROWS),
    ("auto/batch, as written", "auto", "batch", cache.FEW_ROWS),
    ("auto/batch, row by row", "auto", "batch", 16),
    ("auto/heads, as written", "auto", "heads", cache.FEW_ROWS),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    p = Parser(prog="python -m benchmarks.ratio", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--repeats", type=int, default=40)
    repeats = p.parse_args(argv).repeats
    processes.join("cpu", 8, 1)

    from benchmarks.contenders import prepare
    from benchmarks.timing import interleaved
    from partitioning.point import Point

    presets.PRESETS["toy-v1024"] = dataclasses.replace(presets.PRESETS["toy"], name="toy-v1024", vocab=1024)
    point = Point(
        model="toy-v1024",
        slice="cpu:2x2x2",
        phase="decode",
        batch=16,
        context=256,
        layout="ws2d",
        attention="batch",
        weights="f32",
    )
    steps, found = [], []
    for label, layout, attention, rows in CONTENDERS:
        cache.FEW_ROWS = rows
        contender = prepare(dataclasses.replace(point, layout=layout, attention=attention), 0, text.corpus())
        steps.append(contender.step)
        found.append((label, contender.compiled_row))
    timings = interleaved(steps, repeats=repeats, budget_s=60)
    ours = timings[0].times_s
    print(
        f"{'':24}{'ms':>8}{'half within':>16}{'collectives':>12}{'kB a chip':>11}   ws2d/batch as a share (half within)"
    )
    for (label, row), timing in zip(found, timings, strict=True):
        low, high = timing.quartiles_s
        shares = [a / b for a, b in zip(ours, timing.times_s, strict=True)]
        q1, middle, q3 = statistics.quantiles(shares, n=4)
        print(
            f"{label:24}{timing.median_s * 1e3:8.2f}{f'{low * 1e3:.2f}..{high * 1e3:.2f}':>16}{row['n_collectives']:12}"
            f"{row['collective_bytes'] / 1e3:11,.0f}   {middle:.2f} ({q1:.2f}..{q3:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
