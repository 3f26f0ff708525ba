"""Stage times of our own engine, from batches that it has run: what a simulation of this very engine needs.

A stage takes for a pass what passes of its form take (`serving.engine.engine` pads them to few forms), and more for every
position that attention reads: of single tokens, and of pieces of prompts, each token of which reads them. A batch takes
the sum over its passes. Fitted by least squares, nothing below zero.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.serving.scheduling.batch import Batch

Form = tuple[int, int]
"""Single tokens and pieces of a pass."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How an engine whose attention is not split over the batch pads passes; see `serving.engine.engine.Sizes`."""

    singles: tuple[int, ...]
    pieces: tuple[int, ...]
    length: int

    def passes(self, batch: Batch) -> list[Form]:
        """The forms of a batch's passes.

        Example:
            >>> from toruslab.serving.scheduling.batch import Work
            >>> work = (Work(0, 9, 1, 1, True, False), Work(1, 0, 70, 70, True, False))
            >>> batch = Batch(number=0, made_s=0.0, work=work)
            >>> Padding(singles=(4, 8), pieces=(0, 2, 4), length=16).passes(batch)
            [(4, 4), (4, 2)]
        """
        singles = sum(work.padded == 1 for work in batch.work)
        pieces = sum(-(-work.padded // self.length) for work in batch.work if work.padded > 1)
        n = max(-(-singles // self.singles[-1]), -(-pieces // self.pieces[-1]))
        found = []
        for i in range(n):
            here = min(max(singles - i * self.singles[-1], 0), self.singles[-1])
            there = min(max(pieces - i * self.pieces[-1], 0), self.pieces[-1])
            found.append((next(s for s in self.singles if s >= here), next(p for p in self.pieces if p >= there)))
        return found


def reads(batch: Batch) -> tuple[float, float]:
    """Positions that attention reads, thousands: for single tokens, and for all tokens of prompts."""
    singles = sum(work.start + 1 for work in batch.work if work.padded == 1 and not work.dead)
    pieces = sum(work.length * (work.start + work.length / 2) for work in batch.work if work.padded > 1)
    return singles / 1e3, pieces / 1e3


class MeasuredTimes:
    """`serving.simulation.simulator.StageTimes` of one stage.

    Args:
        padding: the engine's.
        samples: batches, and the seconds that the stage took for each.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, padding: Padding, samples: Iterable[tuple[Batch, float]]):
        self.padding, samples = padding, list(samples)
        if not samples:
            raise ValueError("samples must be at least one batch")
        forms = sorted({form for batch, _ in samples for form in padding.passes(batch)})
        at = {form: i for i, form in enumerate(forms)}
        rows = np.zeros((len(samples), len(forms) + 2))
        for row, (batch, _) in zip(rows, samples, strict=True):
            for form in padding.passes(batch):
                row[at[form]] += 1
            row[len(forms) :] = reads(batch)
        seconds = np.array([taken for _, taken in samples])
        fitted = _least_squares(rows, seconds)
        self._form_s = dict(zip(forms, fitted[: len(forms)].tolist(), strict=True))
        self._single_s, self._piece_s = fitted[len(forms) :].tolist()
        off, spread = seconds - rows @ fitted, seconds - seconds.mean()
        self.explained = 1 - float((off @ off) / max(spread @ spread, 1e-300))
        """Share of the samples' variance."""

    def __call__(self, batch: Batch) -> Sequence[float]:
        singles, pieces = reads(batch)
        passes_s = math.fsum(map(self._of, self.padding.passes(batch)))
        return (passes_s + singles * self._single_s + pieces * self._piece_s,)

    def _of(self, form: Form) -> float:
        """A form that was never met takes as long as the nearest larger one; where none is, in proportion to the one
        with the most tokens, and not less than a smaller one."""
        if form not in self._form_s:
            larger = [s for f, s in self._form_s.items() if f[0] >= form[0] and f[1] >= form[1]]
            tokens = {f: f[0] + f[1] * self.padding.length for f in self._form_s}
            most = max(tokens, key=tokens.__getitem__)
            wanted = form[0] + form[1] * self.padding.length
            smaller = [s for f, s in self._form_s.items() if f[0] <= form[0] and f[1] <= form[1]]
            beyond = max([self._form_s[most] * wanted / tokens[most], *smaller])
            self._form_s[form] = min(larger) if larger else beyond
        return self._form_s[form]


def _least_squares(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """With no factor below zero: what would be is left out, the lowest first."""
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], seconds, rcond=None)[0]
        if found.min() >= 0 or len(kept) == 1:
            fitted = np.zeros(rows.shape[1])
            fitted[kept] = np.maximum(found, 0)
            return fitted
        kept.pop(int(found.argmin()))


FIELDS = ("stage", "tokens", "context", "seconds")


class StageTable:
    """`serving.simulation.simulator.StageTimes` from measurements.

    For each number of tokens a straight line over the context (least squares; flat where there is one context only, and
    where it would fall), between two numbers of tokens a straight line; fewer tokens than the fewest take as long as
    these, more than the most go on as between the last two.

    Args:
        rows: objects with `FIELDS`.

    Raises:
        ValueError: field, value and rule; or a stage without rows.

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
            _check_row(number, row)
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
            ValueError: a line that is no such row.
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
    x, y = np.array(points, float).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-300))
    slope = max(slope, 0.0) if x.max() > x.min() else 0.0
    return float(y.mean() - slope * x.mean()), slope


def _check_row(number: int, row: Any) -> None:
    if not isinstance(row, Mapping) or not all(field in row for field in FIELDS):
        raise ValueError(f"row {number} must be an object with {', '.join(FIELDS)}")
    for field in FIELDS:
        value = row[field]
        kind = (int, float) if field == "seconds" else int
        least = 1 if field == "tokens" else 0
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value < 1e12:
            raise ValueError(f"row {number}: {field}={value!r} must be a number of at least {least}")
