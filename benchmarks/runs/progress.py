"""How far long work has come: a bar on a terminal, elsewhere a line on standard error every few seconds.

The lines come from a thread of their own, so that one long compilation or measurement is not silent either.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 10.0
"""Seconds between two lines."""


class Progress:
    """What a command is doing now, and how many of how many are done.

    Args:
        name: of the command; the lines begin with it.
        file: where lines go where there is no terminal; None: nothing is said.
    """

    def __init__(self, name: str, file: TextIO | None):
        self._name, self._file = name, file
        self._started_s = self._began_s = time.monotonic()
        self._what, self._done, self._first, self._total = "", 0, 0, None
        is_terminal = file is not None and file.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        clocks = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, *clocks, console=Console(file=file), transient=True, disable=not is_terminal)
        self._task = self.bar.add_task("")
        self._lines = file is not None and not is_terminal

    def begin(self, what: str, total: int | None = None, done: int = 0) -> None:
        """A new part of the work begins: `done` of `total` steps are there already."""
        self._what, self._done, self._first, self._total = what, done, done, total
        self._began_s = time.monotonic()
        self.bar.reset(self._task, description=what, total=total, completed=done)

    def advance(self, n: int = 1, what: str | None = None) -> None:
        """`n` more steps are done; `what` names the next one."""
        self.reach(self._done + n, self._total, what)

    def reach(self, done: int, total: int | None, what: str | None = None) -> None:
        """`done` of `total` steps are done."""
        self._done, self._total, self._what = done, total, self._what if what is None else what
        self.bar.update(self._task, completed=done, total=total, description=self._what)

    def line(self) -> str:
        """What is being done, how many of how many, the time so far and the time left."""
        now_s = time.monotonic()
        said = [f"{self._name}: {self._what}"]
        if self._total:
            said.append(f"{self._done:,} of {self._total:,}")
        said.append(f"{_clock(now_s - self._started_s)} so far")
        if self._total and self._done > self._first:
            left_s = (now_s - self._began_s) / (self._done - self._first) * (self._total - self._done)
            said.append(f"about {_clock(left_s)} left")
        return ", ".join(said)

    def _speak(self, every_s: float, ended: threading.Event) -> None:
        while not ended.wait(every_s):
            print(self.line(), file=self._file, flush=True)

    @contextmanager
    def shown(self, every_s: float) -> Iterator["Progress"]:
        """While this is open, the bar is drawn or the lines come."""
        ended = threading.Event()
        speaker = threading.Thread(target=self._speak, args=(every_s, ended), daemon=True)
        if self._lines:
            speaker.start()
        try:
            with self.bar:
                yield self
        finally:
            ended.set()
            if self._lines:
                speaker.join()


@contextmanager
def progress(name: str, *, speaks: bool = True, every_s: float = EVERY_S, **first: Any) -> Iterator[Progress]:
    """Opens the progress of a command on standard error.

    Args:
        name: of the command.
        speaks: whether this process says anything; of several, one does.
        every_s: seconds between two lines.
        first: of `Progress.begin`, for the first part of the work.
    """
    made = Progress(name, sys.stderr if speaks else None)
    if first:
        made.begin(**first)
    with made.shown(every_s):
        yield made


def _clock(seconds: float) -> str:
    """Minutes and seconds.

    Example:
        >>> _clock(83.4), _clock(3723)
        ('1:23', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
