"""Result rows: one JSON object a line, written as they are made and never rewritten.

A row has a point, the `source` of its numbers (analytic, compiled, measured, published), the numbers, and the
environment in which they were taken. Tables and pictures are drawn from rows alone.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toruslab.benchmarks.runs.parser import InputError, Parser, read_lines
from toruslab.partitioning.plan.point import Point

Row = dict[str, Any]


class DamagedResults(InputError):
    """A results file that holds something else than rows."""


def of_a_point(row: Row) -> None:
    """Refuses what has no point, or no source."""
    Point.from_json(row["point"])
    if not isinstance(row["source"], str):
        raise TypeError


class RowFile:
    """A file of rows that grows. A row that was added is on the disk, whatever ends the process afterwards.

    Args:
        path: the `.jsonl` file; made on the first `add`.
        check: see `read`.

    Raises:
        DamagedResults: a line that is no row. A last line without its newline is dropped: interrupted runs leave one.
    """

    def __init__(self, path: Path, check: Callable[[Row], object] = of_a_point):
        self.path = path
        self.rows = list(read(path, check)) if path.exists() else []

    def add(self, row: Row) -> None:
        """Appends a row; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("r+b" if text else "wb") as file:
            file.seek(text.rfind(b"\n") + 1)  # over what an interrupted write left
            file.truncate()
            file.write(line(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def find(self, point: Point, source: str) -> Row | None:
        """The row of a point from a source; None if there is none that succeeded."""
        key = point.to_json()
        return next((r for r in self.rows if r["point"] == key and r["source"] == source and "error" not in r), None)


def line(row: Mapping[str, Any]) -> str:
    """A row as JSON, without its newline.

    Raises:
        ValueError: a number that JSON does not have, NaN or an infinity.

    Example:
        >>> line({"rate": 2.0, "missing": None})
        '{"rate": 2.0, "missing": null}'
    """
    return json.dumps(row, allow_nan=False)


def read(path: Path, check: Callable[[Row], object] = of_a_point) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: of the file.
        check: raises ValueError, KeyError or TypeError of what is no row.

    Raises:
        DamagedResults: names the file and the line.
    """
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines[:-1], 1):
        try:
            row = json.loads(text)
            check(row)
        except (ValueError, KeyError, TypeError):
            raise DamagedResults(
                f"{path}, line {number} is not a result row; mend or move the file, nothing was changed in it"
            ) from None
        yield row


def failure(error: Exception) -> Row:
    """The part of a row that says why its point failed.

    Example:
        >>> failure(RuntimeError("no memory\\nleft"))
        {'error': 'RuntimeError: no memory'}
    """
    said = str(error).splitlines()[0] if str(error) else ""
    return {"error": f"{type(error).__name__}: {said}"}


def environment(seed: int) -> Row:
    """Versions, platform, device kind, cores, load, commit, date, seed. Initialises the JAX backend."""
    import jax

    device = jax.devices()[0]
    return {
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "n_devices": jax.device_count(),
        "n_processes": jax.process_count(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def commit() -> str | None:
    """The checkout's commit, `+` behind it when files differ; None outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head.strip() + ("+" if changes() else "") if head else None


def changes() -> str:
    """The differences from the commit."""
    return _git("diff", "HEAD")


def _git(*args: str) -> str:
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def keep(name: str, about: str | None, argv: Sequence[str] | None, compact: Callable[[Row], Row], data: Path) -> int:
    """The command of a page of docs/: writes the rows of all files to `data`, each shortened by `compact`."""
    p = Parser(prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("rows", nargs="+", help="files of rows that toruslab compile --json printed")
    options = p.parse_args(argv)
    kept = [compact(row) for path in options.rows for row in of_compile(path)]
    data.parent.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{data}: {len(kept)} rows")
    return 0


def of_compile(path: str) -> Iterable[Row]:
    """The rows of a file of `toruslab compile`."""
    for number, text in read_lines("rows", path):
        try:
            if isinstance(text, ValueError):
                raise text
            row = json.loads(text)
            Point.from_json(row["point"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is not a row of toruslab compile: {error}") from None
        if "error" in row:
            raise InputError(f"{path}, line {number} is of a point that failed: {row['error']}")
        yield row
