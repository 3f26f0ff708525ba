"""The harness of the measured studies: points timed in turns on fake CPU devices, and ratios within one turn.

All steps of a group are timed in turns, so that a slow moment of the machine slows them alike. A ratio is always of two
times of the same turn. Which points are timed, and what is said of them, is in the studies.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toruslab.benchmarks.runs.parser import InputError
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row
from toruslab.models.weights import corpus
from toruslab.partitioning.plan.point import Point

if TYPE_CHECKING:
    from toruslab.benchmarks.measure.timing import Timing


@dataclass(frozen=True, kw_only=True)
class TimedPoint:
    """A point that was timed, or the reason why it was not.

    Args:
        point: as asked for.
        compiled: the row of its compiled program.
        timing: of its calls; None where it failed.
        beside: the timing of the step that was timed beside it, if there is one.
        error: why it failed; empty where it did not.
    """

    point: Point
    compiled: Row
    timing: "Timing | None" = None
    beside: "Timing | None" = None
    error: str = ""


def measured(
    points: Sequence[Point],
    *,
    repeats: int,
    budget_s: float,
    seed: int = 0,
    beside: Callable[[Point], Callable[[], None]] | None = None,
) -> list[TimedPoint]:
    """Prepares the points and times them in turns. The devices must be there (`processes.join`).

    Args:
        points: one group.
        repeats: turns.
        budget_s: seconds of timing for each step, about.
        seed: of the weights.
        beside: makes a step that is timed in turns with its point.
    """
    from toruslab.benchmarks.measure.contenders import clear, prepare
    from toruslab.benchmarks.measure.timing import interleaved

    found: list[TimedPoint] = []
    steps = []
    with progress("study", what="compiling", total=len(points)) as bar:
        for point in points:
            try:
                contender = prepare(point, seed, corpus.read())
                contender.step()  # whether there is memory to run it
                steps += [contender.step, *([beside(point)] if beside else [])]
                found.append(TimedPoint(point=point, compiled=contender.compiled_row))
            except Exception as error:  # the others are timed
                said = str(error).splitlines()[0] if str(error) else ""
                found.append(TimedPoint(point=point, compiled={}, error=f"{type(error).__name__}: {said}"))
            bar.advance()
        bar.begin("timing in turns")
        timings = iter(interleaved(steps, repeats=repeats, budget_s=budget_s))
    out = [
        x
        if x.error
        else TimedPoint(
            point=x.point, compiled=x.compiled, timing=next(timings), beside=next(timings) if beside else None
        )
        for x in found
    ]
    clear()
    return out


def shares(times_s: Sequence[float], of_s: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios of two timings, turn by turn: low, median, high.

    Example:
        >>> shares([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
        (0.5, 1.0, 1.5)
        >>> shares([1.0], [2.0])
        (0.5, 0.5, 0.5)
    """
    found = [a / b for a, b in zip(times_s, of_s, strict=False)]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return low, middle, high


def failures(timed: Sequence[TimedPoint], names: Sequence[str]) -> int:
    """Names the points that failed on standard error; returns the exit code, 1 where there are any."""
    for x, name in zip(timed, names, strict=True):
        if x.error:
            print(f"failed: {name}: {x.error}", file=sys.stderr)
    return 1 if any(x.error for x in timed) else 0


def at_least(options: object, **least: int) -> None:
    """Refuses options below their least value.

    Raises:
        InputError: names the option, its value and the rule.
    """
    for field, value in least.items():
        if getattr(options, field) < value:
            raise InputError(f"{field}={getattr(options, field)} must be at least {value}")


def integers(field: str, text: str) -> list[int]:
    """Integers with commas between them.

    Raises:
        InputError: names the option.

    Example:
        >>> integers("steps", "1,4,16")
        [1, 4, 16]
    """
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise InputError(f"{field}={text!r} must be integers with commas between them") from None
