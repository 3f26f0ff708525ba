"""What a command writes: tables for people, JSON rows, the names of files, and the exit code for failed points."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toruslab.benchmarks.runs.rows import Row, line


def console(width: int = 120) -> Console:
    """Standard output: as wide as the terminal, or `width` columns where it is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def table(headings: Iterable[str], *, left: int = 1, title: str | None = None, **style: Any) -> Table:
    """An empty table: the first `left` columns are text, the others are numbers, aligned to the right."""
    made = Table(title=title, title_justify="left", **style)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < left else "right")
    return made


def time(seconds: float) -> str:
    """Seconds for a person.

    Example:
        >>> time(2.5), time(0.0123456)
        ('2.5 s', '12.35 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


def gib(n_bytes: int | None) -> str:
    """Bytes for a person.

    Example:
        >>> gib(3 * 2**29), gib(None)
        ('1.50 GiB', '?')
    """
    return "?" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line on standard output, at once."""
    for row in rows:
        print(line(row), flush=True)


def written(paths: Iterable[Path], as_json: bool = True) -> None:
    """Names the files that were written; on standard error where standard output is for rows."""
    for path in paths:
        print(path, file=sys.stderr if as_json else sys.stdout)


def failures(rows: Sequence[Row], what: Callable[[Row], str]) -> int:
    """Names the failed rows on standard error.

    Args:
        rows: of the command; those with an `error` have failed.
        what: names a row's point.

    Returns:
        The exit code: 1 where one has failed, else 0.
    """
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"failed: {what(row)}{row['error']}", file=sys.stderr)
    return 1 if failed else 0
