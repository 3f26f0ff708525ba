"""The folder of one run: its rows, its settings, the calibration that it predicts from, what an interrupted one left.

Decides when a run goes on and when it starts afresh. What is measured is `benchmarks.bench`'s.
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

from toruslab.benchmarks.runs.options import InputError, Parser
from toruslab.benchmarks.runs.rows import Row, RowFile, changes, commit, environment, line, of_a_point
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import Chip

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class BenchRun:
    """Where the rows of one run go, what it predicts from, and what an interrupted one has left.

    Args:
        options: of the command.
        rows: of the folder; None in a process that writes none.
    """

    def __init__(self, options: argparse.Namespace, rows: RowFile | None):
        self.options, self.rows = options, rows
        self.chip: Chip | None = None
        self.folder = options.out.resolve()
        self.environment = environment(options.seed)
        if options.json and self.rows:
            for row in self.rows.rows:
                print(line(row), flush=True)

    def add(self, point: Point, source: str, numbers: Row) -> None:
        """Keeps a row, and prints it under `--json`; not a second time what an interrupted run has left."""
        if self.rows and not self.rows.find(point, source):
            row = {"point": point.to_json(), "source": source, **numbers, "environment": self.environment}
            self.rows.add(row)
            if self.options.json:
                print(line(row), flush=True)

    def has(self, point: Point) -> bool:
        """Whether an earlier, interrupted run has measured the point; all processes agree on it."""
        return all_agree(bool(self.rows and self.rows.find(point, "measured")))

    def finish(self) -> None:
        """Marks the run as finished: the next one starts afresh."""
        (self.options.out / "finished").touch()


@contextlib.contextmanager
def open_run(
    folder: Path, settings: Row, argv: Sequence[str], check: Callable[[Row], object] = of_a_point, *others: str
) -> Iterator[RowFile]:
    """A run's folder, kept from other runs: a run that was left there with the same settings goes on, another one is
    put aside.

    Args:
        folder: of the run.
        settings: what the rows depend on, besides the code.
        argv: the options, for `unfinished`.
        check: of a row, see `benchmarks.runs.rows.read`.
        others: files that the run keeps beside the rows, to be forgotten with them.

    Yields:
        The rows that are there already.

    Raises:
        InputError: damaged rows, a folder that cannot be written, or that another run is in.
    """
    settings = settings | {"commit": commit(), "changes": digest(changes())}
    marker = folder / "settings.json"
    with contextlib.ExitStack() as held:
        try:
            with claim(folder):
                if (folder / "finished").exists() or _load(marker) != settings:
                    RowFile(folder / "rows.jsonl", check)  # damaged results are never moved away unseen
                    put_aside(folder)
                    for name in ("chip.toml", "finished", *others):
                        (folder / name).unlink(missing_ok=True)
            held.enter_context(claim(folder))
            (folder / "argv.json").write_text(json.dumps(_without(list(argv), "--out", "--json", "--resume")))
            marker.write_text(json.dumps(settings, indent=1))
            rows = RowFile(folder / "rows.jsonl", check)
        except OSError as error:
            raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None
        yield rows


def options_of(parser: Parser, argv: Sequence[str], quick: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a run; `--quick` fills in those that were left alone, also where the default was given.

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


def _without(argv: list[str], *names: str) -> list[str]:
    """The arguments without these options; `--out` takes its value with it."""
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
    """Moves an earlier run's folder away; its results stay, under a number."""
    if not (folder / "rows.jsonl").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, aside)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made where it lacks; a process that dies lets go of it.

    The lock is on the folder itself, so nothing is left in it, and it goes with a folder that is moved. A file system
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


def all_agree(value: bool) -> bool:
    """What the first process says."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def writable(folder: Path) -> None:
    """Makes the folder, and refuses one that nothing can be written to.

    Raises:
        InputError: why.
    """
    probe = folder / ".part"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out={str(folder)!r} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None


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
