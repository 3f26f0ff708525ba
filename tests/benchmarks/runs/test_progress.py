"""Progress: lines on standard error where there is no terminal, also while one step takes long; none beside a bar."""

import io
import sys
import threading

from toruslab.benchmarks.runs.progress import Progress, progress

WAIT_S = 60
"""A test fails, and does not hang, when nothing is said for so long."""


class Listener(io.StringIO):
    """A file that is no terminal, and that tells when a line has come."""

    def __init__(self):
        super().__init__()
        self.heard = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if "\n" in text:
            self.heard.set()
        return written


def listened(monkeypatch) -> Listener:
    """Standard error from now on; pytest sets its own between the phases of a test, so this is no fixture."""
    listener = Listener()
    monkeypatch.setattr(sys, "stderr", listener)
    return listener


def test_one_long_step_is_not_silent(monkeypatch):
    """The step waits for the line about itself."""
    stderr = listened(monkeypatch)
    with progress("toruslab bench", every_s=0.01, what="compiling"):
        assert stderr.heard.wait(WAIT_S)
    first = stderr.getvalue().splitlines()[0]
    assert first.startswith("toruslab bench: compiling, 0:") and first.endswith("so far")


def test_a_line_says_how_many_of_how_many_and_the_time_left(monkeypatch):
    stderr = listened(monkeypatch)
    with progress("toruslab bench", every_s=0.01, what="points", total=26) as work:
        work.advance(13, "decode ws2d/batch")
        stderr.heard.clear()
        assert stderr.heard.wait(WAIT_S)
        assert stderr.heard.clear() is None and stderr.heard.wait(WAIT_S)
    last = stderr.getvalue().splitlines()[-1]
    assert last.startswith("toruslab bench: decode ws2d/batch, 13 of 26, 0:") and " left" in last


def test_nothing_is_said_after_the_end_or_by_a_silent_process(monkeypatch):
    stderr = listened(monkeypatch)
    with progress("toruslab bench", every_s=0.01, what="points"):
        pass
    said = stderr.getvalue()
    with progress("toruslab bench", speaks=False, every_s=0.001, what="points"):
        threading.Event().wait(0.05)
    assert stderr.getvalue() == said


def test_the_time_left_counts_from_where_a_resumed_run_begins():
    work = Progress("toruslab train", None)
    work.begin("steps", total=100, done=90)
    assert "left" not in work.line() and "90 of 100" in work.line()
    work.advance()
    assert "91 of 100" in work.line() and "left" in work.line()


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("toruslab bench", every_s=0.001, what="points", total=2) as work:
        work.advance()
        threading.Event().wait(0.05)
    assert "toruslab bench:" not in terminal.getvalue() and "points" in terminal.getvalue()
