"""How good a run's predictions are, where layouts cross over, and whether two runs agree.

- Of a point: the relative error, predicted / measured - 1.
- Of a cell: Spearman's rank correlation, and the regret. The regret is the measured time of the layout that the model
  picks (the smallest prediction) over that of the best measured one, - 1.
- Of all cells: median, 90th percentile and worst of |error|, Spearman over all points, mean and worst regret.
- Of a family: the number of tokens from which on a weight-gathered layout beats all weight-stationary ones.

Comparators are layouts like all others, but take no part in the crossover. Sentences about quality are in `words`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from toruslab.benchmarks.reports.cells import Result, groups

if TYPE_CHECKING:  # only for annotations: at run time its module would import JAX
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
    """The cost of the layout that the model picks; `value` is 0 where that is the best one."""

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
    """One target and the number that was reached."""

    name: str
    words: str
    side: str
    limit: float
    value: float | None

    @property
    def met(self) -> bool | None:
        """None where the number is not known."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.side == "<=" else self.value >= self.limit


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the predictions of a run are; None where there is too little to say.

    Errors are absolute values. They are of the `n_points` points with a prediction among the `n_measured` measured.
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
        """All targets of `TARGETS`."""
        return [
            Target(name=name, words=words, side=side, limit=limit, value=getattr(self, name))
            for name, (words, side, limit) in TARGETS.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The numbers of the run, and for each target whether it is met."""
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


def regret(results: Iterable[Result]) -> Regret | None:
    """The regret of one cell.

    The model picks among the results with both a prediction and a measurement; there must be two. The best one may be
    any that was measured. Of equal predictions the slowest counts.
    """
    timed = [x for x in results if x.measured_s]
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
    measured = [(name, x) for name, results in cells.items() for x in results if x.measured_s]
    both = [(name, x) for name, x in measured if x.predicted_s]
    errors, correlation = _errors_and_spearman([x for _, x in both])
    of_cells = {name: _of_cell(results) for name, results in cells.items()}
    regrets = [c.regret.value for c in of_cells.values() if c.regret]
    worst = int(np.argmax(errors)) if errors else None
    return Quality(
        n_points=len(both),
        n_measured=len(measured),
        median_error=float(np.median(errors)) if errors else None,
        p90_error=float(np.quantile(errors, 0.9)) if errors else None,
        worst_error=max(errors, default=None),
        worst_point=None if worst is None else f"{both[worst][1].label}, {both[worst][0]}",
        spearman=correlation,
        mean_regret=float(np.mean(regrets)) if regrets else None,
        worst_regret=max(regrets, default=None),
        cells=of_cells,
    )


def _of_cell(results: Sequence[Result]) -> CellQuality:
    errors, correlation = _errors_and_spearman([x for x in results if x.relative_error is not None])
    return CellQuality(
        n_points=len(errors),
        median_error=float(np.median(errors)) if errors else None,
        spearman=correlation,
        regret=regret(results),
    )


def _errors_and_spearman(results: Sequence[Result]) -> tuple[list[float], float | None]:
    """Of results with both times: absolute errors, and the correlation of predicted and measured."""
    errors = [abs(x.relative_error) for x in results if x.relative_error is not None]
    return errors, spearman([x.predicted_s or 0 for x in results], [x.measured_s or 0 for x in results])


def agree(spreads: Iterable[tuple[float, float] | None]) -> bool | None:
    """Whether measurements of one point agree: their spreads have a time in common.

    Such runs differ by no more than their own spread. None where a run has no spread, or there are fewer than two runs.

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
    """The best weight-gathered time of a cell over its best weight-stationary one, and the better layout of the two."""

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
        for before, after in reversed(list(pairwise(self.duels[source]))):
            if after.ratio >= 1:
                return None
            if before.ratio >= 1:
                share = math.log(before.ratio) / math.log(before.ratio / after.ratio)
                return before.tokens * (after.tokens / before.tokens) ** share
        return None

    def says(self, source: Source) -> str | None:
        """In words; None where the family has fewer than two cells."""
        duels = self.duels[source]
        if len(duels) < 2:
            return None
        tokens = self.tokens(source)
        if tokens is not None:
            return f"from about {tokens:,.0f} tokens"
        if all(d.ratio < 1 for d in duels):
            return f"already at {duels[0].tokens:,} tokens"
        return f"not up to {duels[-1].tokens:,} tokens" if duels[-1].ratio >= 1 else None


def crossovers(cells: Mapping[str, Sequence[Result]]) -> list[Crossover]:
    """One for each family that has both kinds in some cell."""
    found: dict[str, dict[Source, list[Duel]]] = {}
    for results in cells.values():
        for source in SOURCES:
            if duel := _duel(results, source):
                of_family = found.setdefault(results[0].family, {"measured": [], "predicted": []})
                of_family[source].append(duel)
    for duels in found.values():
        for each in duels.values():
            each.sort(key=lambda d: d.tokens)
    return [Crossover(family=name, duels=duels) for name, duels in found.items()]


def crossover_sentences(cells: Mapping[str, Sequence[Result]]) -> list[str]:
    """Where the crossover is, one sentence for each family of at least two cells."""
    out = []
    for found in crossovers(cells):
        said = {source: found.says(source) for source in SOURCES}
        if any(said.values()):
            words = "; ".join(f"{source} {text}" for source, text in said.items() if text)
            out.append(f"Weight-gathered is faster than weight-stationary in {found.family}: {words}.")
    return out


def _duel(results: Sequence[Result], source: Source) -> Duel | None:
    best: dict[bool, tuple[float, str]] = {}
    for x in results:
        time = x.measured_s if source == "measured" else x.predicted_s
        if time is not None and x.is_gathered is not None:
            best[x.is_gathered] = min(best.get(x.is_gathered, (math.inf, "")), (time, x.label))
    if len(best) < 2:
        return None
    return Duel(tokens=results[0].tokens, ratio=best[True][0] / best[False][0], best=min(best.values())[1])
