"""How good the predictions of a run are, and whether two runs agree. From rows alone; no JAX.

Of a point: the relative error, predicted / measured - 1. Of a cell: Spearman's rank correlation, and the regret, that
is the measured time of the layout that the model picks (smallest predicted) over that of the best measured one, - 1.
Of the grid: median, 90th percentile and worst of |error|, Spearman over all points, mean and worst regret. Comparators
are layouts like all others here.

Decides the definitions and the targets; words and pictures are of the report.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from toruslab.benchmarks.reports.cells import Result, groups

if TYPE_CHECKING:
    from toruslab.benchmarks.runs.rows import Row

TARGETS = {
    "median_error": ("median of |error|", "<=", 0.20),
    "spearman": ("Spearman over all points", ">=", 0.95),
    "mean_regret": ("mean regret", "<=", 0.05),
    "worst_regret": ("worst regret", "<=", 0.25),
}
"""What a prediction should reach: words, side and limit of each number of `Quality`."""


@dataclass(frozen=True, kw_only=True)
class Regret:
    """What it costs to take the layout that the model picks; `value` is 0 where that is the best one."""

    value: float
    picked: str
    best: str


@dataclass(frozen=True, kw_only=True)
class CellQuality:
    """How good the predictions of one cell are; None where there is too little to say."""

    n_points: int
    median_error: float | None
    spearman: float | None
    regret: Regret | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target, what was reached, and whether that is enough; `met` is None where nothing was reached or missed."""

    name: str
    words: str
    side: str
    limit: float
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.side == "<=" else self.value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the predictions of a grid are, over its points with a prediction and a measurement.

    `n_points` of `n_measured` measured ones have both. Errors are absolute values. Numbers are None where there is too
    little to say.
    """

    n_points: int
    n_measured: int
    median_error: float | None
    p90_error: float | None
    worst_error: float | None
    worst_point: str | None
    spearman: float | None
    mean_regret: float | None
    worst_regret: float | None
    cells: Mapping[str, CellQuality]

    @property
    def targets(self) -> list[Target]:
        return [
            Target(name=name, words=words, side=side, limit=limit, value=getattr(self, name))
            for name, (words, side, limit) in TARGETS.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the cells', and by target whether it is met."""
        numbers = {k: v for k, v in vars(self).items() if k != "cells"}
        return numbers | {"targets_met": {t.name: t.met for t in self.targets}}


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1 up; equal values share the average of theirs.

    Example:
        >>> ranks([10, 30, 20, 30]).tolist()
        [1.0, 3.5, 2.0, 3.5]
    """
    _, index, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation; None for fewer than two pairs, or where one side is all equal."""
    if len(x) < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def regret(lines: Iterable[Result]) -> Regret | None:
    """The regret of one cell.

    The model can pick among the lines that have both a prediction and a measurement, of which there must be two. The
    best is that of all measured lines, also of those without a prediction. Of equal predictions the slowest counts.
    """
    timed = [x for x in lines if x.measured_s]
    choices = [x for x in timed if x.predicted_s]
    if len(choices) < 2:
        return None
    picked = min(choices, key=lambda x: (x.predicted_s, -(x.measured_s or 0)))
    best = min(timed, key=lambda x: x.measured_s or 0)
    assert picked.measured_s and best.measured_s
    return Regret(value=picked.measured_s / best.measured_s - 1, picked=picked.label, best=best.label)


def quality(rows: "Iterable[Row]") -> Quality:
    """How good the predictions of these rows are."""
    cells = groups(rows)
    everything = [(name, x) for name, lines in cells.items() for x in lines if x.measured_s]
    both = [(name, x) for name, x in everything if x.predicted_s]
    errors = _errors(x for _, x in both)
    of_cells = {name: _of_cell(lines) for name, lines in cells.items()}
    regrets = [c.regret.value for c in of_cells.values() if c.regret]
    worst = int(np.argmax(errors)) if errors else None
    return Quality(
        n_points=len(both),
        n_measured=len(everything),
        median_error=float(np.median(errors)) if errors else None,
        p90_error=float(np.quantile(errors, 0.9)) if errors else None,
        worst_error=max(errors, default=None),
        worst_point=None if worst is None else f"{both[worst][1].label}, {both[worst][0]}",
        spearman=spearman([x.predicted_s or 0 for _, x in both], [x.measured_s or 0 for _, x in both]),
        mean_regret=float(np.mean(regrets)) if regrets else None,
        worst_regret=max(regrets, default=None),
        cells=of_cells,
    )


def _of_cell(lines: Sequence[Result]) -> CellQuality:
    both = [x for x in lines if x.relative_error is not None]
    errors = _errors(both)
    return CellQuality(
        n_points=len(both),
        median_error=float(np.median(errors)) if errors else None,
        spearman=spearman([x.predicted_s or 0 for x in both], [x.measured_s or 0 for x in both]),
        regret=regret(lines),
    )


def _errors(lines: Iterable[Result]) -> list[float]:
    return [abs(x.relative_error) for x in lines if x.relative_error is not None]


def agree(spreads: Iterable[tuple[float, float] | None]) -> bool | None:
    """Whether measurements of one point agree: their spreads have a time in common.

    So the runs differ by no more than their own spread explains. None where a run has no spread, or there are fewer
    than two runs.

    Example:
        >>> agree([(1.0, 1.2), (1.1, 1.4)]), agree([(1.0, 1.2), (1.3, 1.4)]), agree([(1.0, 1.2), None])
        (True, False, None)
    """
    found = list(spreads)
    known = [s for s in found if s is not None]
    if len(known) < max(2, len(found)):
        return None
    return max(low for low, _ in known) <= min(high for _, high in known)


Source = Literal["measured", "predicted"]
SOURCES: tuple[Source, ...] = ("measured", "predicted")


@dataclass(frozen=True, kw_only=True)
class Duel:
    """The best weight-gathered and the best weight-stationary line of one cell, by one source of times."""

    tokens: int
    ratio: float
    best: str


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """The duels of one family by source, those of few tokens first."""

    family: str
    duels: Mapping[Source, list[Duel]]

    def tokens(self, source: Source) -> float | None:
        """Tokens from which on weight-gathered is faster: between two cells a straight line in the logarithms.

        None where it never is, or is from the first cell on, or is not at the last one.
        """
        duels = self.duels[source]
        for before, after in reversed(list(pairwise(duels))):
            if after.ratio >= 1:
                return None
            if before.ratio >= 1:
                share = math.log(before.ratio) / math.log(before.ratio / after.ratio)
                return before.tokens * (after.tokens / before.tokens) ** share
        return None

    def says(self, source: Source) -> str | None:
        """In words; None where there are fewer than two cells to say it of."""
        duels = self.duels[source]
        if len(duels) < 2:
            return None
        tokens = self.tokens(source)
        if tokens is not None:
            return f"from about {tokens:,.0f} tokens"
        if all(d.ratio < 1 for d in duels):
            return f"already at {duels[0].tokens:,} tokens"
        return f"not up to {duels[-1].tokens:,} tokens" if duels[-1].ratio >= 1 else None


def crossovers(cells: Mapping[str, list[Result]]) -> list[Crossover]:
    """One for each family that has both kinds in some cell."""
    found: dict[str, dict[Source, list[Duel]]] = {}
    for lines in cells.values():
        for source in SOURCES:
            duel = _duel(lines, source)
            if duel:
                of_family = found.setdefault(lines[0].family, {"measured": [], "predicted": []})
                of_family[source].append(duel)
    for duels in found.values():
        for each in duels.values():
            each.sort(key=lambda d: d.tokens)
    return [Crossover(family=name, duels=duels) for name, duels in found.items()]


def crossover_sentences(cells: Mapping[str, list[Result]]) -> list[str]:
    """Where the crossover is, one sentence for each family of at least two cells."""
    out = []
    for found in crossovers(cells):
        said = {source: found.says(source) for source in SOURCES}
        if any(said.values()):
            words = "; ".join(f"{source} {text}" for source, text in said.items() if text)
            out.append(f"Weight-gathered is faster than weight-stationary in {found.family}: {words}.")
    return out


def _duel(lines: list[Result], source: Source) -> Duel | None:
    times = [(x.measured_s if source == "measured" else x.predicted_s, x) for x in lines]
    timed = [(t, x) for t, x in times if t is not None and x.is_gathered is not None]
    gathered = min(((t, x.label) for t, x in timed if x.is_gathered), default=None)
    stationary = min(((t, x.label) for t, x in timed if not x.is_gathered), default=None)
    if gathered is None or stationary is None:
        return None
    return Duel(tokens=lines[0].tokens, ratio=gathered[0] / stationary[0], best=min(gathered, stationary)[1])
