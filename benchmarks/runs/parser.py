"""The command line: a parser whose errors are one sentence, types of options, and how a command ends.

Options that only some commands have are in `point_options`, `serving_options`, `training_options` and `weights_option`.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import toruslab


class InputError(ValueError):
    """Input that a command refuses; its text is the whole message."""


class Rule(Exception):
    """A value that an option's type refuses. `Parser` makes the sentence: field, value and rule.

    Args:
        value: as it was read.
        rule: what it must be; `{field}` stands for the option's name.
    """

    def __init__(self, value: Any, rule: str):
        super().__init__(value, rule)
        self.value, self.rule = value, rule


class _Help(argparse.RawTextHelpFormatter):
    """Adds an option's default to its help, unless the help speaks of one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        nothing = any(action.default is n for n in (None, False, argparse.SUPPRESS))
        says_it = "default" in text or nothing or not action.option_strings
        return text if says_it else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A command's options, with `--version`. Every error is one sentence, raised as InputError.

    Args:
        prog: the command, such as `toruslab bench`.
        description: the docstring of the command's module.
    """

    def __init__(self, prog: str, description: str | None, **more: Any):
        super().__init__(prog, description=description, **{"formatter_class": _Help, **more})
        self.add_argument("--version", action="version", version=f"toruslab {toruslab.__version__}")

    def error(self, message: str) -> NoReturn:
        """Refuses."""
        raise InputError(f"{message} ({self.prog} --help)")

    def add_moved(self, option: str, study: str) -> None:
        """An option that has become a study: refused with the name of the study."""
        self.add_argument(option, action=_Moved, nargs="*", const=study, help=argparse.SUPPRESS)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except Rule as error:
            rule = error.rule.replace("{field}", action.dest)
            raise InputError(f"{action.dest}={error.value!r} {rule}") from None

    def given(self, argv: Sequence[str]) -> dict[str, str]:
        """The options that a command line gives, also those that have their default's value: dest -> option string.

        Changes the defaults: call it on a parser that is used for nothing else.
        """
        names = {a.dest: a.option_strings[0] for a in self._actions if a.option_strings}
        nothing = object()
        self.set_defaults(**dict.fromkeys(names, nothing))
        found = vars(self.parse_args(argv))
        return {dest: name for dest, name in names.items() if found.get(dest, nothing) is not nothing}


class _Moved(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        raise InputError(f"{option_string} is a study now: run python -m benchmarks.studies.{self.const}")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an integer within bounds.

    Example:
        >>> p = Parser("toruslab bench", None)
        >>> _ = p.add_argument("--seed", type=at_least(0))
        >>> p.parse_args(["--seed", "-1"])
        Traceback (most recent call last):
        toruslab.benchmarks.runs.parser.InputError: seed=-1 must be at least 0
    """

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise Rule(value, f"must be at least {least}")
        if most is not None and value > most:
            raise Rule(value, f"must be at most {most}")
        return value

    integer.__name__ = "int"  # argparse names the type: "invalid int value"
    return integer


def number(allows: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    """The type of a number that `allows` accepts; `rule` is what the refusal says."""

    def real(text: str) -> float:
        value = float(text)
        if not allows(value):
            raise Rule(value, rule)
        return value

    real.__name__ = "float"
    return real


seconds = number(lambda s: 0 < s < float("inf"), "must be a positive number of seconds")
"""The type of a time."""
share = number(lambda s: 0 <= s < 1, "must be a share of the time, 0 <= {field} < 1")
"""The type of a part of a run's time."""


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """The type of a name from a closed set."""

    def known(text: str) -> str:
        if text not in choices:
            raise Rule(text, f"must be one of {', '.join(choices)}")
        return text

    return known


def path(text: str) -> Path:
    """The type of a path; an empty one is refused."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be a path")
    return Path(text)


def integers(field: str, text: str) -> list[int]:
    """Integers with commas between them.

    Raises:
        InputError: something else.
    """
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise InputError(f"{field}={text!r} must be integers with commas between them") from None


def read_lines(field: str, where: str) -> Iterator[tuple[int, str | ValueError]]:
    """Numbered lines that are not empty. A line of bytes that are no UTF-8 is an error and the others still come.

    Args:
        field: the option's name, for the message.
        where: a path, or - for standard input.

    Yields:
        The line's number from 1 on, and its text or what is wrong with its bytes.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        data = sys.stdin.buffer.read() if where == "-" else Path(where).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{field}={where!r} cannot be read: {error}") from None
    for number_, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                yield number_, line.decode()
            except UnicodeDecodeError as error:
                yield number_, ValueError(f"not UTF-8: {error.reason} at byte {error.start}")


@contextlib.contextmanager
def refused(form: str = "{}") -> Iterator[None]:
    """Makes the errors of what is read inside into refusals: a ValueError or OSError becomes an InputError.

    Args:
        form: of the sentence; the error's first line is filled in.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(form.format(str(error))) from None


def guarded(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; a refusal becomes one sentence on standard error.

    Returns:
        The exit code: the command's own, 2 for refused input, 130 when interrupted, 1 when nothing more can be written.
    """
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
