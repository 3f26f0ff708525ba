"""The largest batch and the longest context that the compiler accepts, found by compiling.

`partitioning.cost.limits` computes the same limits from the memory model. They are the first guesses here.
"""

import dataclasses
from collections.abc import Callable

from toruslab.partitioning.cost.limits import MOST, largest_batch, longest_context, step_of_batches
from toruslab.partitioning.plan.point import Point

CONTEXT_STEP = 128
"""Contexts are tried in whole tiles of a TPU."""
FIRST_STRIDE = 1 / 32
"""Distance of the second try from the first guess, as a share of the guess."""


def max_batch(point: Point, fits: Callable[[Point], bool]) -> int | None:
    """The largest batch whose step fits, all else equal.

    Args:
        point: any batch; it is replaced.
        fits: whether a point fits, such as `models.programs.compiled.fits`.

    Returns:
        A multiple of the number of parts that the layout splits the batch into, to about a thousandth; None if not even
        the smallest batch fits.
    """
    step = step_of_batches(point)
    guess = (largest_batch(point) if point.layout_value.explicit else None) or step
    return _last(_coarse(step, guess), guess, lambda n: fits(dataclasses.replace(point, batch=n)))


def max_context(point: Point, fits: Callable[[Point], bool]) -> int | None:
    """The longest context whose step fits: a multiple of `CONTEXT_STEP`, or the shortest context; None if none fits."""
    guess = (longest_context(point) if point.layout_value.explicit else None) or CONTEXT_STEP
    least = 1 if point.phase == "decode" else 0

    def fits_context(n: int) -> bool:
        return fits(dataclasses.replace(point, context=n))

    found = _last(_coarse(CONTEXT_STEP, guess), guess, fits_context)
    return least if found is None and fits_context(least) else found


def _coarse(step: int, guess: int) -> int:
    """The multiple of `step` that is about a thousandth of the guess, at least `step`."""
    return step * max(1, guess // step // 1024)


def _last(step: int, guess: int, fits: Callable[[int], bool]) -> int | None:
    """The largest multiple of `step` that fits, searched outwards from the guess and then by bisection.

    Everything below a number that fits must fit too.
    """
    k = min(max(1, guess // step), MOST // step)
    below, above = 0, MOST // step + 1  # `below` fits or is 0; `above` does not fit or is out of range
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
