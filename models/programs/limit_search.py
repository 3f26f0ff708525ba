"""The largest batch and the longest context that the compiler takes, found by compiling."""

import dataclasses
from collections.abc import Callable

from toruslab.partitioning.cost.limits import MOST, largest_batch, longest_context, step_of_batches
from toruslab.partitioning.plan.point import Point

CONTEXT_STEP = 128
"""Contexts are tried in whole tiles of a TPU."""
FIRST_STRIDE = 1 / 32
"""How far from the analytic limit the first try on its other side lies, as a share of it."""


def max_batch(point: Point, fits: Callable[[Point], bool]) -> int | None:
    """The largest batch whose step fits, all else equal; None where not even the smallest does.

    Args:
        point: its own batch does not matter.
        fits: whether a point fits, as `models.programs.compiled.fits` says.

    Returns:
        A multiple of what the layout splits the batch into, to about a thousandth.
    """
    step = step_of_batches(point)
    guess = (largest_batch(point) if point.layout_value.explicit else None) or step
    return _last(_coarse(step, guess), guess, lambda n: fits(dataclasses.replace(point, batch=n)))


def max_context(point: Point, fits: Callable[[Point], bool]) -> int | None:
    """The longest context, in steps of `CONTEXT_STEP` or else the shortest, whose step fits; None where none does."""
    guess = (longest_context(point) if point.layout_value.explicit else None) or CONTEXT_STEP
    least = 1 if point.phase == "decode" else 0

    def fits_context(n: int) -> bool:
        return fits(dataclasses.replace(point, context=n))

    found = _last(_coarse(CONTEXT_STEP, guess), guess, fits_context)
    return least if found is None and fits_context(least) else found


def _coarse(step: int, guess: int) -> int:
    """A multiple of the step that is about a thousandth of the guess, or the step."""
    return step * max(1, guess // step // 1024)


def _last(step: int, guess: int, fits: Callable[[int], bool]) -> int | None:
    """The largest multiple of `step` that fits, if fitting ends once for all: outwards from the guess, then between."""
    k = min(max(1, guess // step), MOST // step)
    below, above = 0, MOST // step + 1  # the first fits or is 0, the second does not fit or is out of reach
    stride = max(1, int(k * FIRST_STRIDE))
    up = fits(k * step)
    below, above = (k, above) if up else (below, k)
    while above - below > 1:
        if up and above > MOST // step:
            k = min(below + stride, above - 1)
        elif not up and below == 0:
            k = max(above - stride, 1)
        else:
            k = (below + above) // 2
        stride *= 2
        below, above = (k, above) if fits(k * step) else (below, k)
    return below * step or None
