"""The command line's options: a parser whose errors are one sentence, and the types that options share."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """Input that a command refuses; its text is the whole message."""


class Parser(argparse.ArgumentParser):
    """Options whose errors are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuses."""
        raise InputError(f"{message} ({self.prog} --help)")

    def given(self, argv: Sequence[str]) -> dict[str, str]:
        """The options that stand in a command line, whatever their values: their names in the code, and as they are
        written. Of a parser that is used for nothing else."""
        names = {a.dest: a.option_strings[0] for a in self._actions if a.option_strings}
        nothing = object()
        self.set_defaults(**dict.fromkeys(names, nothing))
        found = vars(self.parse_args(argv))
        return {dest: name for dest, name in names.items() if found.get(dest, nothing) is not nothing}


def path(text: str) -> Path:
    """A path that is not empty: an option's type."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be a path")
    return Path(text)


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


def guarded(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; refused input becomes one sentence on standard error."""
    try:
        return command(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a closed descriptor: what was written stays
        print(f"error: {error}", file=sys.stderr)
        return 1
