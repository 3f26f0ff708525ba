"""The page "A training step on a slice that is not here": its tables, from rows of `toruslab compile`.

    toruslab compile --points docs/data/training_points.jsonl --json > rows.jsonl
    python -m benchmarks.docs.training_page rows.jsonl      keeps what the page needs of them in docs/data/training.jsonl
    python -m benchmarks.docs.generate docs/training.md         writes the tables anew (--check: are they those of the data?)

Reads rows and nothing else.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from toruslab.benchmarks.docs import compiled_page
from toruslab.benchmarks.runs.options import guarded
from toruslab.benchmarks.runs.rows import Row, keep

DATA = Path(__file__).parents[2] / "docs" / "data" / "training.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("training_page", __doc__, argv, compiled_page.compact, DATA)


def everything() -> str:
    """A line for every point."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in compiled_page.data(DATA):
        groups.setdefault((row["point"]["model"], row["point"]["slice"]), []).append(row)
    out: list[str] = []
    for (model, slice_), rows in groups.items():
        out += [
            f"### {model} on {slice_}",
            "",
            "| step | GiB a chip | analytic | fits: compiler, analytic | collectives | not as planned | unexplained | "
            "compute s: compiler | analytic compute | whole step | MFU |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *map(_line, rows),
            "",
        ]
    return "\n".join(out[:-1])


def _line(row: Row) -> str:
    p, analytic, error = row["point"], row["analytic"], compiled_page.memory_error(row)
    how = f"{p.get('accumulate', 1)} parts, " + f"remat {p.get('remat', 'layer')}"
    step = f"{p['batch']} x {p['length']}, {p['layout']}/{p['attention']}, {p['weights']}, {how}"
    peak = "?" if row["peak_bytes_per_chip"] is None else f"{row['peak_bytes_per_chip'] / 2**30:.2f}"
    beside = f"{analytic.hbm_bytes_per_chip / 2**30:.2f}" + ("" if error is None else f" ({error:+.1%})")
    fits = f"{'yes' if row['fits'] else 'no'}, {'yes' if analytic.fits else 'no'}"
    seen = f"{row['n_collectives']} | {row['n_collectives'] - row['n_as_planned']} | {row['unexplained']}"
    seconds = "" if row["compute_s"] is None else f"{row['compute_s']:,.2f}" + "+" * bool(row["n_unestimated"])
    return (
        f"| {step} | {peak} | {beside} | {fits} | {seen if row['n_layers'] else ' | | '} | {seconds} | "
        f"{analytic.compute_s:,.2f} | {analytic.latency_s:,.1f} | {analytic.mfu:.0%} |"
    )


PARTS: dict[str, Callable[[], str]] = {
    "totals": functools.partial(compiled_page.totals, DATA),
    "departures": functools.partial(compiled_page.departures, DATA),
    "everything": everything,
}

if __name__ == "__main__":
    sys.exit(guarded(main))
