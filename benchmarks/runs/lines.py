"""Lines of a file or of standard input, decoded one by one, so that a bad one does not take the others with it."""

import sys
from collections.abc import Iterator
from pathlib import Path

from toruslab.benchmarks.runs.options import InputError


def read_lines(field: str, where: str) -> Iterator[tuple[int, str | ValueError]]:
    """Numbered lines that are not empty: their text, or what is wrong with their bytes.

    Args:
        field: the option's name, for the message.
        where: a path, or - for standard input.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        data = sys.stdin.buffer.read() if where == "-" else Path(where).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{field}={where!r} cannot be read: {error}") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                yield number, ValueError(f"not UTF-8: {error.reason} at byte {error.start}")
