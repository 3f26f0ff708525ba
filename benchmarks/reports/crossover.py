"""Where weight-gathered layouts overtake weight-stationary ones, measured and predicted.

Of every cell the best of either kind, whatever its attention; of every family of cells the ratio of the two against the
tokens of a pass, and where it falls through 1. Comparators take no part. No JAX.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from toruslab.benchmarks.reports.cells import Line

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


def crossovers(cells: Mapping[str, list[Line]]) -> list[Crossover]:
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


def sentences(cells: Mapping[str, list[Line]]) -> list[str]:
    """Where the crossover is, one sentence for each family of at least two cells."""
    out = []
    for found in crossovers(cells):
        said = {source: found.says(source) for source in SOURCES}
        if any(said.values()):
            words = "; ".join(f"{source} {text}" for source, text in said.items() if text)
            out.append(f"Weight-gathered is faster than weight-stationary in {found.family}: {words}.")
    return out


def _duel(lines: list[Line], source: Source) -> Duel | None:
    times = [(x.measured_s if source == "measured" else x.predicted_s, x) for x in lines]
    timed = [(t, x) for t, x in times if t is not None and x.is_gathered is not None]
    gathered = min(((t, x.label) for t, x in timed if x.is_gathered), default=None)
    stationary = min(((t, x.label) for t, x in timed if not x.is_gathered), default=None)
    if gathered is None or stationary is None:
        return None
    return Duel(tokens=lines[0].tokens, ratio=gathered[0] / stationary[0], best=min(gathered, stationary)[1])
