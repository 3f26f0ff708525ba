"""A distribution of many numbers in little memory: exact for few numbers, narrow buckets for many."""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

EXACT = 65536
"""Most values that are kept exactly."""
_PER_OCTAVE = 128  # buckets between a value and its double: each is 0.54% wide


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """A distribution in six numbers: `median`, `p90` and `p99` are percentiles."""

    n: int
    mean: float
    median: float
    p90: float
    p99: float
    max: float


class Distribution:
    """Collects values of at least 0, in any order.

    Up to `EXACT` values, quantiles are exact, with linear interpolation. Beyond that, a quantile is the middle of a
    bucket, within 0.3% of the value of that rank. n, mean and max stay exact.

    Example:
        >>> values = Distribution()
        >>> values.add([3.0, 1.0, 2.0])
        >>> values.quantile(0.5), values.mean
        (2.0, 2.0)
    """

    def __init__(self):
        self._values = array("d")
        self._buckets: dict[int, int] = {}
        self._zeros = self._n_folded = 0
        self._sum = self._max = 0.0

    @property
    def n(self) -> int:
        return self._n_folded + len(self._values)

    @property
    def mean(self) -> float | None:
        return (self._sum + math.fsum(self._values)) / self.n if self.n else None

    def add(self, values: Iterable[float]) -> None:
        """Adds values."""
        self._values.extend(values)
        if len(self._values) > EXACT:
            self._fold()

    def quantile(self, share: float) -> float | None:
        """The value below which this share of the values is. None if there are no values."""
        if not self.n:
            return None
        if not self._n_folded:
            return float(np.quantile(self._values, share))
        self._fold()
        left = share * (self.n - 1) + 1 - self._zeros
        if left <= 0:
            return 0.0
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return min(2.0 ** ((bucket + 0.5) / _PER_OCTAVE), self._max)
        return self._max

    def percentiles(self) -> Percentiles | None:
        """The distribution in six numbers. None if there are no values."""
        mean, median, p90, p99 = self.mean, self.quantile(0.5), self.quantile(0.9), self.quantile(0.99)
        if mean is None or median is None or p90 is None or p99 is None:
            return None
        highest = max(self._max, *self._values) if self._values else self._max
        return Percentiles(n=self.n, mean=mean, median=median, p90=p90, p99=p99, max=highest)

    def _fold(self) -> None:
        if not self._values:
            return
        values = np.array(self._values)
        if (values < 0).any():
            raise ValueError(f"a value of {values.min()} is below 0")
        self._sum += math.fsum(self._values)
        self._max = max(self._max, float(values.max()))
        self._n_folded += values.size
        positive = values[values > 0]
        self._zeros += values.size - positive.size
        found, counts = np.unique(np.floor(np.log2(positive) * _PER_OCTAVE).astype(np.int64), return_counts=True)
        for bucket, count in zip(found.tolist(), counts.tolist(), strict=True):
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        self._values = array("d")
