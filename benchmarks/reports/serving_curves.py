"""Findings from rows of `toruslab serve-bench`: curves, throughput at a common latency, ratios, spread over seeds.

Failed runs are left out. Missing numbers are None. Tables and pictures are in `serving_report`.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from toruslab.benchmarks.runs.rows import Row
from toruslab.serving.results.metrics import goodput

MULTIPLE = 190 / 58
"""The common latency, as a multiple of the lowest at low load: the paper compares at 190 ms a token, its Orca takes
58 at low load."""
OverSeeds = tuple[float, float, float]
"""Median, lowest and highest over the seeds."""


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The throughput at which a latency is reached, requests per second.

    `bound` is "" between two rates, "≥" if no rate reached that latency, "≤" if all rates were beyond it.
    """

    per_s: float
    bound: str = ""


@dataclass(frozen=True, kw_only=True)
class LatencyCurve:
    """Runs of one scheme with one seed, by rising rate: rate, sustained throughput, median normalised latency."""

    points: tuple[tuple[float, float, float], ...]

    @property
    def saturation_per_s(self) -> float:
        """The highest throughput."""
        return max(per_s for _, per_s, _ in self.points)

    def at(self, latency_s: float) -> Reached:
        """The throughput at which the latency first passes `latency_s`, between two runs along its logarithm.

        Example:
            >>> curve = LatencyCurve(points=((1.0, 1.0, 0.1), (2.0, 2.0, 0.2), (4.0, 3.0, 0.8)))
            >>> curve.at(0.4).per_s, curve.at(0.05), curve.at(1.0)
            (2.5, Reached(per_s=1.0, bound='≤'), Reached(per_s=3.0, bound='≥'))
        """
        before: tuple[float, float] | None = None
        for _, per_s, found_s in self.points:
            if found_s > latency_s:
                if before is None:
                    return Reached(per_s=per_s, bound="≤")
                share = math.log(latency_s / before[1]) / math.log(found_s / before[1])
                return Reached(per_s=before[0] + share * (per_s - before[0]))
            before = per_s, found_s
        return Reached(per_s=self.saturation_per_s, bound="≥")


@dataclass(frozen=True, kw_only=True)
class SchemeResult:
    """The numbers of one scheme.

    Args:
        name, request_level: of the scheme.
        saturation_per_s: its highest throughput.
        low_load_s: median normalised latency at the lowest rate.
        at_latency_per_s, bound: throughput at the common latency, and the bounds of all seeds.
        itl_p99_s, ttft_p90_s, wasted_share, host_share, iteration_s: at the reference rate.
        goodput_per_s: None without limits.
        refused: number of requests that the scheduler refused, in all runs.
    """

    name: str
    request_level: bool
    saturation_per_s: OverSeeds | None
    low_load_s: OverSeeds | None
    at_latency_per_s: OverSeeds | None
    bound: str
    itl_p99_s: OverSeeds | None
    ttft_p90_s: OverSeeds | None
    wasted_share: OverSeeds | None
    host_share: OverSeeds | None
    iteration_s: OverSeeds | None
    goodput_per_s: OverSeeds | None
    refused: int


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All numbers of the report. Throughputs and ratios are of the seeds with which a scheme has run at every rate.

    Args:
        lines: the schemes, in the order of the table's lines.
        latency_s: the common latency.
        reference_per_s: the rate at which tails and shares are taken.
        strongest: the request-level scheme with the highest throughput at the common latency.
        ratio: Orca's throughput at that latency over that of the best request-level scheme, seed by seed.
        ratio_bound: "≥" if for some seed Orca's curve never reached the latency, or the baseline's began beyond it;
            "≤" the other way round; "~" both.
        saturation_ratio: the same of the highest throughputs.
    """

    lines: tuple[SchemeResult, ...]
    latency_s: float
    reference_per_s: float
    strongest: str | None
    ratio: OverSeeds | None
    ratio_bound: str
    saturation_ratio: OverSeeds | None


def good(rows: Iterable[Row]) -> list[Row]:
    """The last successful run of each scheme, rate and seed."""
    return list({(r["rung"], r["rate_per_s"], r["seed"]): r for r in rows if "error" not in r}.values())


def curves(rows: Iterable[Row]) -> dict[str, dict[int, LatencyCurve]]:
    """For each scheme, its curve with each seed."""
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = {}
    for row in good(rows):
        if row["sustained_per_s"] and row["normalised_s"]:
            point = row["rate_per_s"], row["sustained_per_s"], row["normalised_s"]["median"]
            found.setdefault(row["rung"], {}).setdefault(row["seed"], []).append(point)
    return {
        name: {seed: LatencyCurve(points=tuple(sorted(points))) for seed, points in sorted(seeds.items())}
        for name, seeds in sorted(found.items(), key=lambda item: _order(item[0]))
    }


def findings(rows: Sequence[Row]) -> Findings | None:
    """The findings; None where no scheme has a curve."""
    rows, of = good(rows), curves(rows)
    if not of:
        return None
    # only rates with a known throughput: at some, too few requests return
    rates = sorted({point[0] for seeds in of.values() for curve in seeds.values() for point in curve.points})
    low = {
        name: _spread([point[2] for curve in seeds.values() for point in curve.points if point[0] == rates[0]])
        for name, seeds in of.items()
    }
    latency_s = MULTIPLE * min(found[0] for found in low.values() if found)
    reference = rates[len(rates) // 2]
    # a curve without one of the rates, because a run failed, would look as if it ended early
    of = {name: {s: c for s, c in seeds.items() if len(c.points) == len(rates)} for name, seeds in of.items()}
    reached = {name: {seed: curve.at(latency_s) for seed, curve in seeds.items()} for name, seeds in of.items()}
    is_baseline = {row["rung"]: row["request_level"] for row in rows}
    lines = []
    for name, seeds in of.items():
        mine = [row for row in rows if row["rung"] == name]
        there = [row for row in mine if row["rate_per_s"] == reference]
        lines.append(
            SchemeResult(
                name=name,
                request_level=is_baseline[name],
                saturation_per_s=_spread([curve.saturation_per_s for curve in seeds.values()]),
                low_load_s=low[name],
                at_latency_per_s=_spread([found.per_s for found in reached[name].values()]),
                bound="".join(dict.fromkeys(found.bound for found in reached[name].values())),
                itl_p99_s=_spread([row["itl_s"]["p99"] for row in there if row["itl_s"]]),
                ttft_p90_s=_spread([row["ttft_s"]["p90"] for row in there if row["ttft_s"]]),
                **{
                    field: _spread([row[field] for row in there if row[field] is not None])
                    for field in ("wasted_share", "host_share", "iteration_s")
                },
                goodput_per_s=_goodput(mine),
                refused=sum(row["refused"] for row in mine),
            )
        )
    baselines = [line for line in lines if line.request_level and line.at_latency_per_s]
    strongest = max(baselines, key=lambda line: (line.at_latency_per_s or (0.0,))[0], default=None)
    ratio, bound = _ratio(reached, is_baseline)
    saturations = {n: {s: Reached(per_s=c.saturation_per_s) for s, c in seeds.items()} for n, seeds in of.items()}
    return Findings(
        lines=tuple(lines),
        latency_s=latency_s,
        reference_per_s=reference,
        strongest=strongest.name if strongest else None,
        ratio=ratio,
        ratio_bound=bound,
        saturation_ratio=_ratio(saturations, is_baseline)[0],
    )


def _ratio(reached: dict[str, dict[int, Reached]], is_baseline: dict[str, bool]) -> tuple[OverSeeds | None, str]:
    found, bounds = [], set()
    for seed, orca in reached.get("orca", {}).items():
        others = [seeds[seed] for name, seeds in reached.items() if is_baseline[name] and seed in seeds]
        if others:
            best = max(others, key=lambda other: other.per_s)
            found.append(orca.per_s / best.per_s)
            opposite = {"≥": "≤", "≤": "≥", "": ""}
            bounds |= {orca.bound, opposite[best.bound]} - {""}
    return _spread(found), bounds.pop() if len(bounds) == 1 else "~" if bounds else ""


def _goodput(rows: Sequence[Row]) -> OverSeeds | None:
    """The goodput: 0 where no rate was low enough, None without limits."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["within_limits"] is not None:
            by_seed.setdefault(row["seed"], []).append((row["rate_per_s"], row["within_limits"]))
    return _spread([goodput(runs) or 0.0 for runs in by_seed.values()])


def _spread(values: Sequence[Any]) -> OverSeeds | None:
    return (statistics.median(values), min(values), max(values)) if values else None


def _order(name: str) -> tuple[int, str]:
    kinds = ("shortest-prompt", "request-level", "orca", "chunked")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name
