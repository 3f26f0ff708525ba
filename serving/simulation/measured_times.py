"""Stage times from a table of measurements, in place of the analytic model."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from toruslab.serving.scheduling.batch import Batch

FIELDS = ("stage", "tokens", "context", "seconds")


class StageTable:
    """`serving.simulation.simulator.StageTimes` from a table of measurements.

    A row is one measurement: `{"stage": 0, "tokens": 33, "context": 9000, "seconds": 0.012}`. `tokens` are all computed
    tokens of the batch, with padding and dead places. `context` is the number of positions that attention reads, summed
    over the requests of the batch, their own tokens included.

    For each number of tokens, the seconds are a line over the context: by least squares, not falling, flat if there is
    only one context. Lines are interpolated between two numbers of tokens, and extrapolated above the last. Fewer
    tokens than the fewest cost the same as the fewest.

    Args:
        rows: objects with `FIELDS`.

    Raises:
        ValueError: a field breaks a rule, or a stage has no rows.

    Example:
        >>> from toruslab.serving.scheduling.batch import Work
        >>> sizes = [(1, 0), (1, 5), (9, 0), (9, 5)]
        >>> table = StageTable(
        ...     {"stage": 0, "tokens": t, "context": c, "seconds": 1e-3 * t + 1e-6 * c} for t, c in sizes
        ... )
        >>> table(Batch(number=0, made_s=0.0, work=(Work(0, 3, 1, 1, True, False), Work(1, 0, 4, 4, True, False))))
        (0.005008,)
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        found: dict[int, dict[int, list[tuple[float, float]]]] = {}
        for number, row in enumerate(rows, 1):
            _check(number, row)
            found.setdefault(row["stage"], {}).setdefault(row["tokens"], []).append((row["context"], row["seconds"]))
        if sorted(found) != list(range(len(found))) or not found:
            raise ValueError(f"stages {sorted(found)} must be 0, 1, ... without a gap")
        self._stages = [
            (sorted(by_tokens), [_line(by_tokens[t]) for t in sorted(by_tokens)])
            for by_tokens in (found[stage] for stage in sorted(found))
        ]

    @property
    def n_stages(self) -> int:
        return len(self._stages)

    @classmethod
    def parse(cls, lines: Iterable[str]) -> "StageTable":
        """From JSON lines.

        Raises:
            ValueError: a line is not JSON, or not a row.
        """
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"row {number} is not JSON: {error}") from None
        return cls(rows)

    def __call__(self, batch: Batch) -> tuple[float, ...]:
        tokens = context = 0
        for work in batch.work:
            tokens += work.padded
            context += work.start + work.padded
        return tuple([max(0.0, self._seconds(stage, tokens, context)) for stage in self._stages])

    @staticmethod
    def _seconds(stage: tuple[list[int], list[tuple[float, float]]], tokens: int, context: int) -> float:
        at, lines = stage
        i = bisect_left(at, tokens)
        if i == 0 or len(at) == 1:
            base, slope = lines[0]
            return base + slope * context
        low, high = (i - 1, i) if i < len(at) else (len(at) - 2, len(at) - 1)
        share = (tokens - at[low]) / (at[high] - at[low])
        (base, slope), (base_2, slope_2) = lines[low], lines[high]
        return base + share * (base_2 - base) + (slope + share * (slope_2 - slope)) * context


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, by least squares."""
    x, y = np.array(points, float).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-300))
    slope = max(slope, 0.0) if x.max() > x.min() else 0.0
    return float(y.mean() - slope * x.mean()), slope


def _check(number: int, row: Any) -> None:
    if not isinstance(row, Mapping) or not all(field in row for field in FIELDS):
        raise ValueError(f"row {number} must be an object with {', '.join(FIELDS)}")
    for field in FIELDS:
        value = row[field]
        kind = (int, float) if field == "seconds" else int
        least = 1 if field == "tokens" else 0
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < 1e12:
            raise ValueError(f"row {number}: {field}={value!r} must be a number of at least {least}")
