"""Rows put together by point, and points by cell: the start of every table and picture of a report.

- A *result* is one point with its rows of all sources.
- A *cell* holds results that may be compared with each other: they differ in layout and attention only.
- A *family* holds cells that differ in batch and length only.

Missing, non-finite and failed numbers are None. Nothing is replaced by a default.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only for annotations: at run time its module would import JAX
    from toruslab.benchmarks.runs.rows import Row

COMPARATORS = ("replicated", "auto")
TERMS: tuple[str, ...] = ("matmul_s", "attention_s", "weights_s", "other_s", "collective_s", "dispatch_s")


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def seconds(value: object) -> float | None:
    """A finite time above zero, or None."""
    found = number(value)
    return found if found is not None and found > 0 else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One point, and its row of each source."""

    point: "Row"
    rows: "dict[str, Row]"

    @property
    def label(self) -> str:
        """Layout/attention."""
        return f"{self.point.get('layout', '')}/{self.point.get('attention', '')}"

    @property
    def tokens(self) -> int:
        """B*L, the new tokens of the pass."""
        return self.point.get("batch", 1) * self.point.get("length", 1)

    @property
    def family(self) -> str:
        """The name of its family."""
        return f"{self.point.get('phase', '?')}{_conditions(self.point)}"

    @property
    def is_auto(self) -> bool:
        """Whether XLA chose the layout: such a point has no plan."""
        return self.point.get("layout") == "auto"

    def row(self, source: str) -> "Row":
        """The row of a source; empty where there is none or the point failed."""
        found = self.rows.get(source, {})
        return {} if "error" in found else found

    def number(self, source: str, field: str) -> float | None:
        """A number of a source."""
        return number(self.row(source).get(field))

    @property
    def error(self) -> str | None:
        """The first failure, in the order of the sources."""
        return next((f"{s}: {r['error']}" for s, r in self.rows.items() if "error" in r), None)

    @property
    def _priced(self) -> "Row":
        """The row with the prediction: the analytic one, for `auto` the compiled one."""
        return self.row("compiled" if self.is_auto else "analytic")

    @property
    def predicted_s(self) -> float | None:
        """The predicted time of the pass."""
        return seconds(self._priced.get("latency_s"))

    @property
    def terms(self) -> dict[str, float]:
        """Seconds of the prediction by term, those of `TERMS` first; empty where it has none."""
        terms = self._priced.get("terms")
        if not isinstance(terms, dict):
            return {}
        named = [*TERMS, *(name for name in terms if name not in TERMS)]
        return {name: value for name in named if (value := number(terms.get(name))) is not None}

    @property
    def measured_s(self) -> float | None:
        """The median of all repetitions."""
        return seconds(self.row("measured").get("latency_s"))

    @property
    def quartiles_s(self) -> tuple[float, float] | None:
        """The interval that holds the middle half of all repetitions."""
        return self._interval("quartiles_s")

    @property
    def spread_s(self) -> tuple[float, float] | None:
        """The interval that holds the middle 90% of all repetitions; the quartiles in rows without it."""
        return self._interval("spread_s") or self.quartiles_s

    def _interval(self, field: str) -> tuple[float, float] | None:
        found = self.row("measured").get(field)
        if not isinstance(found, list | tuple) or len(found) != 2:
            return None
        low, high = map(seconds, found)
        return None if low is None or high is None or low > high else (low, high)

    @property
    def relative_error(self) -> float | None:
        """Predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1 if self.predicted_s and self.measured_s else None

    @property
    def collectives(self) -> "list[Row]":
        """The collectives of the plan; of the compiled program for `auto`."""
        found = self._priced.get("collectives")
        rows = [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []
        return [c for c in rows if c.get("kind") and number(c.get("bytes")) is not None]

    @property
    def is_gathered(self) -> bool | None:
        """Whether weights move, by the plan, else by the layout's name. None for comparators and unknown names."""
        name = str(self.point.get("layout", ""))
        if name in COMPARATORS:
            return None
        if self.collectives:
            return any(str(c.get("scope", "")).endswith("/w_in") for c in self.collectives)
        return name.startswith("wg") if name[:2] in ("ws", "wg") else None


def groups(rows: "Iterable[Row]") -> dict[str, list[Result]]:
    """Results by cell, in the order of the rows. If a source has several rows, the last successful one counts."""
    found: dict[str, dict[str, Result]] = {}
    for row in rows:
        result = Result(point=row["point"], rows={})
        known = found.setdefault(title(result.point), {}).setdefault(result.label, result).rows
        if "error" not in row or "error" in known.get(row["source"], {"error": None}):
            known[row["source"]] = row
    return {name: list(results.values()) for name, results in found.items()}


def title(point: "Row") -> str:
    """The name of a point's cell: everything but layout and attention."""
    length = point.get("length", 1)
    sizes = f"batch {point.get('batch', '?')}" + (f" x {length} tokens" if length > 1 else "")
    return f"{point.get('phase', '?')}, {sizes}{_conditions(point)}"


def _conditions(point: "Row") -> str:
    """What the cells of a family share besides the phase."""
    context = f", context {point['context']}" if point.get("context") else ""
    context += f", {point['steps_per_call']} steps a call" if point.get("steps_per_call", 1) != 1 else ""
    context += f", {point['accumulate']} parts" if point.get("accumulate", 1) != 1 else ""
    context += f", remat {point['remat']}" if point.get("remat", "layer") != "layer" else ""
    where = str(point.get("slice", "?")) + (f" as {point['mesh']}" if point.get("mesh") else "")
    cached = f", {point['cache']} cache" if point.get("cache") else ""
    return f"{context}, {point.get('model', '?')} {point.get('weights', 'bf16')}{cached} on {where}"


def families(cells: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """All results by family, those of few tokens first."""
    found: dict[str, list[Result]] = {}
    for result in (x for results in cells.values() for x in results):
        found.setdefault(result.family, []).append(result)
    return {name: sorted(results, key=lambda x: x.tokens) for name, results in found.items()}


def labels(results: Iterable[Result]) -> list[str]:
    """Layout/attention of the results, each once."""
    return list(dict.fromkeys(x.label for x in results))


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One row of a profile: a scope and a kind of work.

    Args:
        scope, what: of the program; the work, or the collective with its axes.
        count: executions in a step.
        predicted_s: the price of all of them, for collectives.
        device_s: time of a device.
        wait_s: the part of it that waits for other devices.
        work_s: time of the cores.
    """

    scope: str
    what: str
    count: float | None
    predicted_s: float | None
    device_s: float | None
    wait_s: float | None
    work_s: float | None


def traced(profile: "Row", collectives: "Iterable[Row]") -> list[Traced]:
    """A profile's rows, each collective beside its price.

    Args:
        profile: of a measured row.
        collectives: of an analytic row, with `seconds` of one execution.
    """
    priced: dict[tuple, float] = {}
    for c in collectives:
        if (taken := number(c.get("seconds"))) is not None:
            key = (c.get("scope"), c.get("kind"), tuple(c.get("axes") or ()))
            priced[key] = priced.get(key, 0.0) + taken * (number(c.get("count")) or 1)
    found = []
    rows = profile.get("rows")
    for r in rows if isinstance(rows, list | tuple) else []:
        if not isinstance(r, dict):
            continue
        kind, axes = r.get("collective"), tuple(r.get("axes") or ())
        found.append(
            Traced(
                scope=str(r.get("scope", "")),
                what=f"{kind}({''.join(axes)})" if kind else str(r.get("kind", "")),
                predicted_s=priced.get((r.get("scope"), kind, axes)),
                **{field: number(r.get(field)) for field in ("count", "device_s", "wait_s", "work_s")},
            )
        )
    return found
