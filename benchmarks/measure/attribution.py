"""Attributes the time of operations that overlap: every moment of a device belongs to one operation.

Operations nest (a loop around its body) and run side by side (streams, threads). A moment belongs to the innermost
operation, and to a collective only if nothing else runs, so that an overlapped collective costs its exposed part. Fake
devices also share the cores of the host. Nothing here reads traces or programs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from toruslab.benchmarks.measure.profiler_events import Event

Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of one device's time that belongs to one operation. `waiting`: it waits for other devices."""

    start: float
    end: float
    name: str
    waiting: bool


def exclusive(events: Iterable[Event], ranks: Mapping[str, int]) -> list[Piece]:
    """Cuts the time of one device into pieces that do not overlap, in order.

    Args:
        events: of one device.
        ranks: name -> priority among operations that run at once. 0: contains others, unknown or missing; 1:
            collectives; 2: the rest. The highest rank wins, among equals the one that began last.
    """
    here = list(events)
    points: list[tuple[float, int, int]] = []  # time; 1 begins, 0 ends, 2 waiting changes; event
    for n, e in enumerate(here):
        if e.end > e.start:
            points += [(e.start, 1, n), (e.end, 0, n)]
            points += [(t, 2, n) for wait in e.waits for t in wait]
    running: dict[int, tuple[int, float, int]] = {}
    pieces: list[Piece] = []
    before = 0.0
    for time, begins, n in sorted(points):
        if running and time > before:
            _, _, top = max(running.values())
            middle = (before + time) / 2
            waiting = any(a <= middle < b for a, b in here[top].waits)
            pieces.append(Piece(start=before, end=time, name=here[top].name, waiting=waiting))
        if begins == 1:
            running[n] = (ranks.get(here[n].name, 0), here[n].start, n)
        elif begins == 0:
            del running[n]
        before = time
    return pieces


def core_seconds(pieces: Iterable[Piece], ranks: Mapping[str, int], cores: int) -> dict[str, float]:
    """The time that the cores spend on each operation: name -> nanoseconds of all cores over their number.

    Fake devices are threads. At every moment the threads that compute share the cores equally, at most one core each.
    The threads that move data share the cores that are left. Threads that wait use no core.

    Args:
        pieces: of all devices.
        ranks: as in `exclusive`.
        cores: of this machine.
    """
    here = [p for p in pieces if not p.waiting]
    points = sorted([(p.start, 1, n) for n, p in enumerate(here)] + [(p.end, 0, n) for n, p in enumerate(here)])
    running: tuple[dict[int, str], dict[int, str]] = ({}, {})  # that move, that compute
    spent: dict[str, float] = {}
    before = 0.0
    for time, begins, n in points:
        if time > before:
            left = float(cores)
            for group in reversed(running):
                share = min(1.0, left / len(group)) if group else 0.0
                left -= share * len(group)
                for name in group.values():
                    spent[name] = spent.get(name, 0.0) + share * (time - before) / cores
        group = running[ranks.get(here[n].name, 0) != 1]
        if begins:
            group[n] = here[n].name
        else:
            del group[n]
        before = time
    return spent


def length(pieces: Iterable[Piece]) -> float:
    """Nanoseconds that the pieces cover."""
    return sum(p.end - p.start for p in pieces)


def window(events: Iterable[Event]) -> Span:
    """The span from the first operation's start to the last one's end."""
    here = list(events)
    return min(e.start for e in here), max(e.end for e in here)
