"""Rows of `toruslab compile`, of which a page of `docs/` keeps what it needs."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from toruslab.benchmarks.runs.lines import read_lines
from toruslab.benchmarks.runs.options import InputError, Parser
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.plan.point import Point


def keep(name: str, about: str | None, argv: Sequence[str] | None, compact: Callable[[Row], Row], data: Path) -> int:
    """The command of a page: writes what `compact` leaves of the rows of all files to `data`, one a line."""
    p = Parser(prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("rows", nargs="+", help="files of rows that toruslab compile --json printed")
    options = p.parse_args(argv)
    kept = [compact(row) for path in options.rows for row in read_rows(path)]
    data.parent.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{data}: {len(kept)} rows")
    return 0


def read_rows(path: str) -> Iterable[Row]:
    """The rows of a file of `toruslab compile`."""
    for number, line in read_lines("rows", path):
        try:
            if isinstance(line, ValueError):
                raise line
            row = json.loads(line)
            Point.from_json(row["point"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is not a row of toruslab compile: {error}") from None
        if "error" in row:
            raise InputError(f"{path}, line {number} is of a point that failed: {row['error']}")
        yield row
