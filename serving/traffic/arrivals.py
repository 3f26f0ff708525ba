"""Arrival processes: Poisson, bursty (gamma), and given times. Open loop: no arrival waits for an answer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024
LEAST_CV, MOST_CV = 0.01, 100.0
"""Bounds of `Gamma.cv`. Below, all gaps are equal; above, nearly all are 0."""


class Arrivals(Protocol):
    """An arrival process."""

    def times(self, generator: np.random.Generator) -> Iterator[float]:
        """Yields the times of arrivals: seconds from 0 on, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Exponential gaps between arrivals.

    Args:
        rate: requests per second.

    Raises:
        ValueError: the rate is not positive.
    """

    rate: float

    def __post_init__(self):
        _check_rate(self.rate)

    def times(self, generator: np.random.Generator) -> Iterator[float]:
        return _sums(lambda: generator.exponential(1 / self.rate, _BLOCK))


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Gaps between arrivals from a gamma distribution.

    Args:
        rate: requests per second.
        cv: standard deviation of the gaps over their mean. 1 is Poisson, above 1 is bursty. Azure 2023: conversation
            1.09, code 13.

    Raises:
        ValueError: the rate is not positive, or the cv is not `LEAST_CV` to `MOST_CV`.
    """

    rate: float
    cv: float

    def __post_init__(self):
        _check_rate(self.rate)
        if not LEAST_CV <= self.cv <= MOST_CV:
            raise ValueError(f"cv={self.cv} must be positive, from {LEAST_CV} to {MOST_CV}")

    def times(self, generator: np.random.Generator) -> Iterator[float]:
        return _sums(lambda: generator.gamma(self.cv**-2, self.cv**2 / self.rate, _BLOCK))


@dataclass(frozen=True, kw_only=True)
class GivenTimes:
    """Arrivals at given times.

    Args:
        times_s: seconds from 0 on, in order.

    Raises:
        ValueError: the times are not in order, or begin before 0.
    """

    times_s: tuple[float, ...]

    def __post_init__(self):
        for before, after in zip((0.0, *self.times_s), self.times_s, strict=False):
            if not before <= after < math.inf:
                raise ValueError(f"times_s has {after} after {before}; times must not fall, and begin at 0 or later")

    def times(self, generator: np.random.Generator) -> Iterator[float]:
        return iter(self.times_s)


def _sums(draw: Callable[[], NDArray[np.float64]]) -> Iterator[float]:
    now_s = 0.0
    while True:
        for gap in draw().tolist():
            now_s += gap
            yield now_s


def _check_rate(rate: float) -> None:
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate} must be positive, in requests per second")
