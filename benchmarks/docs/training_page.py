"""Tables of the page "A training step on a slice that is not here", from rows of `toruslab compile`.

toruslab compile --points docs/data/training_points.jsonl --json > rows.jsonl
python -m benchmarks.docs.training_page rows.jsonl     keeps what the page needs in docs/data/training.jsonl
python -m benchmarks.docs.generate docs/training.md    writes the tables anew
"""

import functools
import sys
from collections.abc import Callable, Sequence

from toruslab.benchmarks.docs import compiled_page as compiled
from toruslab.benchmarks.runs.parser import guarded
from toruslab.benchmarks.runs.rows import Row, keep

DATA = compiled.DATA.with_name("training.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("training_page", __doc__, argv, compiled.compact, DATA)


def everything() -> str:
    """A row for every point."""
    headings = (
        *("step", "GiB a chip", "analytic", "fits: compiler, analytic", "collectives", "not as planned", "unexplained"),
        *("compute s: compiler", "analytic compute", "whole step", "MFU"),
    )

    def cells(row: Row) -> list[str]:
        p, analytic = row["point"], row["analytic"]
        how = f"{p.get('accumulate', 1)} parts, remat {p.get('remat', 'layer')}"
        return [
            f"{p['batch']} x {p['length']}, {p['layout']}/{p['attention']}, {p['weights']}, {how}",
            *compiled.memory(row),
            f"{compiled.yes(row['fits'])}, {compiled.yes(analytic.fits)}",
            *compiled.collectives(row),
            compiled.compute(row, 1.0),
            f"{analytic.compute_s:,.2f}",
            f"{analytic.latency_s:,.1f}",
            f"{analytic.mfu:.0%}",
        ]

    return compiled.by_slice(compiled.data(DATA), headings, cells)


PARTS: dict[str, Callable[[], str]] = {
    "totals": functools.partial(compiled.totals, DATA),
    "departures": functools.partial(compiled.departures, DATA),
    "everything": everything,
}

if __name__ == "__main__":
    sys.exit(guarded(main))
