"""Stage times fitted to batches of our own engine, for a simulation of that engine.

A pass costs what passes of its form cost, and more for every position that attention reads. A batch costs the sum over
its passes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from toruslab.serving.scheduling.batch import Batch

Form = tuple[int, int]
"""Single tokens and pieces of prompts in a pass, padded."""


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How the engine pads passes if attention is not split over the batch; see `serving.engine.engine.Sizes`."""

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
    """Thousands of positions that attention reads: for single tokens, and for all tokens of prompts."""
    singles = sum(work.start + 1 for work in batch.work if work.padded == 1 and not work.dead)
    pieces = sum(work.length * (work.start + work.length / 2) for work in batch.work if work.padded > 1)
    return singles / 1e3, pieces / 1e3


class EngineTimes:
    """`serving.simulation.simulator.StageTimes` of one stage, fitted to batches by least squares without negatives.

    Args:
        padding: of the engine.
        samples: batches, and the seconds that the stage took for each.

    Raises:
        ValueError: there are no samples.
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
        """Share of the samples' variance that the fit explains."""

    def __call__(self, batch: Batch) -> Sequence[float]:
        singles, pieces = reads(batch)
        passes_s = math.fsum(map(self._of, self.padding.passes(batch)))
        return (passes_s + singles * self._single_s + pieces * self._piece_s,)

    def _of(self, form: Form) -> float:
        """Seconds of a form. One that has no samples costs the same as the nearest larger form.

        If no form is larger, its cost is in proportion to the form with the most tokens, and at least that of every
        smaller form.
        """
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
    """Least squares without negative coefficients: drops the lowest coefficient until none is below zero."""
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(rows[:, kept], seconds, rcond=None)[0]
        if found.min() >= 0 or len(kept) == 1:
            fitted = np.zeros(rows.shape[1])
            fitted[kept] = np.maximum(found, 0)
            return fitted
        kept.pop(int(found.argmin()))
