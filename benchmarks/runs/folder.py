"""The folder of a run: its rows and settings, kept from other runs, and when an interrupted run goes on.

Also the plain output folder of a command: checked before the work, filled after it. What is measured is not here.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toruslab.benchmarks.runs.output import print_rows
from toruslab.benchmarks.runs.parser import InputError, Parser
from toruslab.benchmarks.runs.rows import Row, RowFile, changes, commit, line, of_a_point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunFolder:
    """The rows of one run, those of an interrupted run included.

    Args:
        path: of the folder.
        check: of a row, see `benchmarks.runs.rows.read`.
        as_json: whether every row is printed as well, those that are there already first.

    Raises:
        DamagedResults: see `benchmarks.runs.rows.RowFile`.
    """

    def __init__(self, path: Path, check: Callable[[Row], object], as_json: bool):
        self.path, self._as_json = path, as_json
        self.file = RowFile(path / "rows.jsonl", check)
        if as_json:
            print_rows(self.rows)

    @property
    def rows(self) -> list[Row]:
        return self.file.rows

    def add(self, row: Row) -> None:
        """Writes a row, and prints it under `--json`."""
        self.file.add(row)
        if self._as_json:
            print_rows([row])

    def finish(self) -> None:
        """Marks the run as finished: the next one starts afresh."""
        (self.path / "finished").touch()


@contextlib.contextmanager
def open_run(
    options: argparse.Namespace,
    settings: Row,
    argv: Sequence[str],
    check: Callable[[Row], object] = of_a_point,
    others: Sequence[str] = (),
) -> Iterator[RunFolder]:
    """Opens the folder `--out` of a run and keeps other runs out of it.

    A run that was left there with the same settings goes on. Another one is put aside, under a number.

    Args:
        options: with `out` and `json`.
        settings: what the rows depend on, besides the code.
        argv: the command line, for `unfinished`.
        check: of a row, see `benchmarks.runs.rows.read`.
        others: files beside the rows that a run which starts afresh must not find.

    Raises:
        InputError: damaged rows, a folder that cannot be written, or that another run is in.
    """
    folder: Path = options.out.resolve()
    settings = settings | {"commit": commit(), "changes": digest(changes())}
    marker = folder / "settings.json"
    with contextlib.ExitStack() as held:
        try:
            with claim(folder):
                if (folder / "finished").exists() or _load(marker) != settings:
                    RowFile(folder / "rows.jsonl", check)  # damaged results are never moved away unseen
                    put_aside(folder)
                    for name in ("finished", *others):
                        (folder / name).unlink(missing_ok=True)
            held.enter_context(claim(folder))
            (folder / "argv.json").write_text(json.dumps(_without(list(argv), "--out", "--json", "--resume")))
            marker.write_text(json.dumps(settings, indent=1))
            opened = RunFolder(folder, check, options.json)
        except OSError as error:
            raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None
        yield opened


def options_of(parser: Parser, argv: Sequence[str], quick: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a run. `--quick` fills in those that the command line does not give.

    Raises:
        InputError: others beside `--resume` than those of where rows go.
    """
    options, given = parser.parse_args(argv), parser.given(argv)
    if options.resume and (others := given.keys() - {"resume", "out", "json"}):
        named = ", ".join(given[name] for name in sorted(others))
        raise InputError(f"{named} beside --resume: a run goes on as it was started; leave one of them out")
    if options.quick:
        for name, value in quick.items():
            if name not in given:
                setattr(options, name, value)
    return options


def as_started(options: argparse.Namespace, argv: list[str]) -> list[str]:
    """The command line of a run; under `--resume` that of the run in `--out`.

    Raises:
        InputError: see `unfinished`.
    """
    if not options.resume:
        return argv
    return [*unfinished(options.out), "--out", str(options.out), *(["--json"] if options.json else [])]


def unfinished(folder: Path) -> list[str]:
    """The options of the run that was left in a folder.

    Raises:
        InputError: there is none, or it was finished, or the code is not what it was.
    """
    settings, argv = _load(folder / "settings.json"), _load(folder / "argv.json")
    if not isinstance(settings, dict) or not isinstance(argv, list) or (folder / "finished").exists():
        raise InputError(f"out={str(folder)!r} holds no unfinished run; start it without --resume")
    if (settings.get("commit"), settings.get("changes")) != (commit(), digest(changes())):
        raise InputError(
            f"out={str(folder)!r} was measured with the code of commit {settings.get('commit')}, which is not what is "
            "here; start it anew without --resume"
        )
    return argv


def _without(argv: list[str], *names: str) -> list[str]:
    """The arguments without these options, and without the value of `--out`."""
    kept, skip = [], False
    for word in argv:
        name = word.split("=")[0]
        if not skip and name not in names:
            kept.append(word)
        skip = not skip and name == "--out" and "=" not in word
    return kept


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def digest(text_: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text_.encode()).hexdigest()[:16]


def put_aside(folder: Path) -> None:
    """Renames the folder of an earlier run: FOLDER.1, or the first number that is free."""
    if not (folder / "rows.jsonl").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, aside)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if it does not exist. A process that dies releases it.

    The lock is on the folder itself, so that nothing is left in it and that it moves with the folder. A file system
    without such locks (some network ones) guards nothing.

    Raises:
        InputError: another run is in it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"out={str(folder)!r} is in use by another run; wait for it or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in {errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}:
                raise
        yield
    finally:
        os.close(opened)


def writable(folder: Path, field: str = "out") -> None:
    """Makes a folder, and refuses one that nothing can be written to.

    Args:
        folder: to write to.
        field: the option's name, for the message.

    Raises:
        InputError: why.
    """
    probe = folder / ".part"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{field}={str(folder)!r} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{field}={str(folder)!r} cannot be written: {error.strerror}") from None


def save(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], figures: "Mapping[str, Figure]") -> list[Path]:
    """Writes the rows as NAME.jsonl and every figure as SVG and PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.jsonl"]
    paths[0].write_text("".join(line(row) + "\n" for row in rows))
    for called, figure in figures.items():
        for suffix in ("svg", "png"):
            paths.append(folder / f"{called}.{suffix}")
            figure.savefig(paths[-1], dpi=150)
    return paths
