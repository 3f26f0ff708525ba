"""A machine as `toruslab calibrate` measured it: samples of the decoder's building blocks, and seconds between them.

This file turns samples into seconds for sizes that were not measured. `benchmarks.calibrate` takes the samples, and
`partitioning.cost.measured` knows which of them a pass needs. Everything was measured on all devices of the machine at
once. Fake devices share the cores, so the work of all of them adds up (`shared`). Imports no JAX.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DIMENSIONS = ("rows", "columns")
"""What a collective gathers or scatters of a tensor."""
NARROW = 512
"""Columns of the tensors on which collectives of all sizes were measured."""
SOFT = 0.2
"""Relative residual at which the loss of a fit turns from quadratic to linear."""
NEAR = 2**20
"""Elements of a KV cache that fit a processor's own cache. Elements beyond them have a coefficient of their own."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement, of one execution on every device at once.

    Args:
        what: the micro-benchmark: `matmul`, `stack`, `copy`, `attention`, `norm`, `activation`, `rope`, `dispatch`, or
            a kind of collective.
        dtype: `f32`, `bf16`, `int8`.
        sizes: by name, per device.
        axes, at: mesh axes of a collective, and whether it gathers or scatters `rows` or `columns`.
        seconds, low_s, high_s: median and quartiles of `repeats` executions.

    Raises:
        ValueError: an entry that is no number of seconds, no size, or no place.
    """

    what: str
    dtype: str
    sizes: Mapping[str, int] = field(hash=False)
    seconds: float
    low_s: float
    high_s: float
    repeats: int
    axes: str = ""
    at: str = ""

    @property
    def cost_s(self) -> float:
        """Seconds that a pass is charged: the first quartile, because other programs on the machine only add to a time.

        At least half of the median, because of a difference of two times little may be left."""
        return max(self.low_s, self.seconds / 2, 1e-9)

    def __post_init__(self):
        for name in ("seconds", "low_s", "high_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{self.what}: {name}={value!r} must be a number of seconds")
        if self.at and self.at not in DIMENSIONS:
            raise ValueError(f"{self.what}: at={self.at!r} must be one of {', '.join(DIMENSIONS)}")
        for name, value in self.sizes.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{self.what}: {name}={value!r} must be a size")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Seconds = `fixed_s` + the sum of `s_per[name]` x size. `residuals`: fitted over measured, minus 1, by sample."""

    fixed_s: float
    s_per: Mapping[str, float] = field(hash=False)
    residuals: tuple[float, ...]

    def __call__(self, **sizes: Any) -> Any:
        """Seconds for sizes (numbers or arrays)."""
        return sum((np.asarray(sizes.get(k, 0)) * v for k, v in self.s_per.items()), np.float64(self.fixed_s))


@dataclass(frozen=True, kw_only=True, eq=False)
class CollectiveTimes:
    """Seconds of a collective over bytes received, for one group of axes and tensors of one width."""

    axes: str
    n_group: int
    columns: int
    bytes: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The samples of one calibration.

    Args:
        n_devices: number of devices that ran at once.
        shared: whether they share the cores of the host (fake CPU devices). The work of all then adds up, so all times
            are proportional to the number of devices.
        mesh: extents of the mesh on which the collectives were measured.
        samples: what was measured.
    """

    n_devices: int
    shared: bool
    mesh: tuple[int, ...]
    samples: tuple[Sample, ...]

    def scale(self, n_devices: int) -> float:
        """The factor on all seconds for another number of devices."""
        return n_devices / self.n_devices if self.shared else 1.0

    def of(self, what: str, dtype: str) -> list[Sample]:
        """The samples of a micro-benchmark.

        Raises:
            ValueError: there are none of this dtype.
        """
        found = [s for s in self.samples if s.what == what and s.dtype == dtype]
        if not found:
            raise ValueError(f"the calibration has no {what} in {dtype}; run toruslab calibrate --dtypes {dtype}")
        return found

    def matmul_s(self, rows: Any, inner: Any, outer: Any, dtype: str) -> Any:
        """Seconds of a product [rows, inner] x [inner, outer] per device."""
        if ("matmul", dtype) not in self._interpolated:
            self._interpolated["matmul", dtype] = _rates(self.of("matmul", dtype))
        at_rows, at_weights, table = self._interpolated["matmul", dtype]
        macs = np.asarray(rows, float) * inner * outer
        return macs * np.exp(_bilinear(at_rows, at_weights, table, np.log(rows), np.log(np.multiply(inner, outer))))

    def copy_s(self, n_bytes: Any, stack_bytes: Any, dtype: str) -> Any:
        """Seconds to copy a layer's weights, `n_bytes`, out of the array of all layers, `stack_bytes`; per device."""
        found = sorted(self.of("copy", dtype), key=lambda s: s.sizes["stack"])
        stacks = np.log([s.sizes["stack"] for s in found])
        rates = [s.cost_s / s.sizes["bytes"] for s in found]
        return n_bytes * np.interp(np.log(np.maximum(stack_bytes, 1)), stacks, rates)

    def collective_s(self, kind: str, n_group: int, at: str, n_bytes: Any, columns: Any = 0, axes: str = "") -> Any:
        """Seconds of a collective, interpolated between sizes.

        The samples are those over the same axes, if there are more than two; else those of groups of as many devices;
        else the two groups next in size, with an interpolation between them.

        Args:
            kind: one of `links.CollectiveKind`.
            n_group: number of devices in the group.
            at: what is gathered or scattered: `rows`, `columns`, or empty.
            n_bytes: bytes that every device receives.
            columns: width of the tensor; 0 where it does not matter.
            axes: mesh axes of the group.

        Raises:
            ValueError: there is no sample of this kind.
        """
        curves = self._curves.get((kind, at), ())
        same = [c for c in curves if c.axes == axes and c.n_group == n_group and len(c.bytes) > 2]
        same = same or [c for c in curves if c.n_group == n_group]
        if same:
            return _between_widths(same, n_bytes, columns)
        sizes = sorted({c.n_group for c in curves})
        if not sizes:
            raise ValueError(f"the calibration has no sample of {kind}; run toruslab calibrate on more than one device")
        table = [_between_widths([c for c in curves if c.n_group == k], n_bytes, columns) for k in sizes]
        if len(sizes) == 1 or n_group < sizes[0]:
            return table[0] * max(1.0, n_group / sizes[0])
        above = next((i for i, k in enumerate(sizes) if k > n_group), len(sizes) - 1)
        low, high = sizes[above - 1], sizes[above]  # beyond the largest group the line goes on
        return np.maximum(
            table[above - 1] + (table[above] - table[above - 1]) * (n_group - low) / (high - low), table[above - 1]
        )

    @functools.cached_property
    def _curves(self) -> dict[tuple[str, str], tuple[CollectiveTimes, ...]]:
        """By (kind, at). Where a kind was not measured `at` this place, all samples of the kind count."""
        kinds = {s.what for s in self.samples if s.axes}
        found = {}
        for kind, at in itertools.product(kinds, ("", *DIMENSIONS)):
            some = [s for s in self.samples if s.what == kind]
            found[kind, at] = _curves_of([s for s in some if s.at == at] or some)
        return found

    def elements_s(self, what: str, elements: Any, dtype: str) -> Any:
        """Seconds of `norm`, `activation` or `rope` over `elements` per device, interpolated between sizes."""
        found = sorted(self.of(what, dtype), key=lambda s: s.sizes["elements"])
        x, y = np.array([(s.sizes["elements"], s.cost_s) for s in found], float).T
        return _piecewise(x, y, elements)

    def attention_s(self, *, rows: Any, cache: Any, scores: Any, macs: Any, length: Any, dtype: str) -> Any:
        """Seconds to write the cache and attend, per device. Decode steps and longer passes have a fit each.

        Args:
            rows: sequences.
            cache: elements of K and V that are read.
            scores, macs: attention scores, and multiply-adds.
            length: new tokens of a sequence.
            dtype: of the activations.
        """
        sizes = {"rows": rows, "cache": cache, "far": np.maximum(cache - NEAR, 0), "scores": scores, "macs": macs}
        decode, longer = self.attention_fits(dtype)
        return np.where(np.asarray(length) == 1, decode(**sizes), longer(**sizes))

    def attention_fits(self, dtype: str) -> tuple[Fit, Fit]:
        """The fits of decode steps and of longer passes. Their size `far` is the part of the cache beyond `NEAR`."""
        if ("attention", dtype) not in self._interpolated:
            found = self.of("attention", dtype)
            steps = [s for s in found if s.sizes["length"] == 1]
            longer = [s for s in found if s.sizes["length"] > 1]
            self._interpolated["attention", dtype] = _attention_fit(steps or found), _attention_fit(longer or found)
        return self._interpolated["attention", dtype]

    @functools.cached_property
    def _interpolated(self) -> dict[tuple[str, str], Any]:
        """By micro-benchmark and dtype; filled on demand, because the samples of a dtype may be missing."""
        return {}

    def collective_fit(self, kind: str, axes: str, at: str) -> Fit:
        """Fixed seconds and seconds per byte of a collective, for the tables: passes are priced from the samples."""
        found = [s for s in self.samples if s.what == kind and s.axes == axes and s.at == at and _width(s) == NARROW]
        return fit([{"bytes": s.sizes["bytes"]} for s in found], [s.cost_s for s in found])

    def collectives(self) -> list[tuple[str, str, str]]:
        """The measured collectives as (kind, axes, at)."""
        return sorted({(s.what, s.axes, s.at) for s in self.samples if s.axes})


def fit(sizes: Sequence[Mapping[str, int]], seconds: Sequence[float]) -> Fit:
    """Least squares of the relative residuals under a soft-L1 loss, so that one disturbed sample does not bend the fit.

    No coefficient is negative: sizes whose coefficient would be are left out.
    """
    names = [k for k in sizes[0] if len({s[k] for s in sizes}) > 1]
    y = np.asarray(seconds, float)
    columns = np.array([[1.0, *(float(s[k]) for k in names)] for s in sizes]) / y[:, None]
    weights = np.ones(len(y))
    x = _not_negative(columns, weights)
    for _ in range(20):
        weights = (1 + ((columns @ x - 1) / SOFT) ** 2) ** -0.25
        x = _not_negative(columns, weights)
    s_per = {k: float(x[i + 1]) for i, k in enumerate(names)}
    return Fit(fixed_s=float(x[0]), s_per=s_per, residuals=tuple(float(r) for r in columns @ x - 1))


def _not_negative(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises the weighted squares of `columns @ x - 1`."""
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    kept = list(range(columns.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(columns[:, kept] / scale[kept] * weights[:, None], weights, rcond=None)
        if len(kept) == 1 or found.min() >= 0:
            break
        kept.pop(int(np.argmin(found)))
    x = np.zeros(columns.shape[1])
    x[kept] = np.maximum(found, 0) / scale[kept]
    return x


def _width(sample: Sample) -> int:
    """Columns of a collective's tensor; small messages, which have one row, count as the narrowest."""
    return max(sample.sizes["columns"], NARROW)


def _between_widths(curves: Sequence[CollectiveTimes], n_bytes: Any, columns: Any) -> Any:
    """The mean of the curves of one width; between two widths an interpolation by the logarithm of the width.

    Messages smaller than any that was measured at the wider one take the narrower."""
    widths = sorted({c.columns for c in curves})
    n_bytes = np.asarray(n_bytes, float)
    by_width = []
    for width in widths:
        some = [c for c in curves if c.columns == width]
        full = [c for c in some if len(c.bytes) == max(len(c.bytes) for c in some)]
        seconds = np.mean([_piecewise(c.bytes, c.seconds, n_bytes) for c in full], axis=0)
        by_width.append((min(c.bytes[0] for c in full), seconds))
    found = by_width[0][1]
    for (low, high), (least, seconds) in zip(itertools.pairwise(widths), by_width[1:], strict=True):
        share = np.clip(np.log(np.maximum(columns, 1) / low) / np.log(high / low), 0, 1)
        found = np.where(n_bytes < least, found, found + (seconds - found) * share)
    return found


def _curves_of(samples: Sequence[Sample]) -> tuple[CollectiveTimes, ...]:
    """One for each group of axes and each width."""
    curves: dict[tuple, list[Sample]] = {}
    for s in sorted(samples, key=lambda s: s.sizes["bytes"]):
        curves.setdefault((s.axes, s.sizes["group"], _width(s)), []).append(s)
    return tuple(
        CollectiveTimes(
            axes=axes,
            n_group=k,
            columns=columns,
            bytes=np.array([s.sizes["bytes"] for s in some], float),
            seconds=np.array([s.cost_s for s in some]),
        )
        for (axes, k, columns), some in curves.items()
    )


def _attention_fit(samples: Sequence[Sample]) -> Fit:
    sizes = [{k: s.sizes[k] for k in ("rows", "cache", "scores", "macs")} for s in samples]
    return fit([z | {"far": max(z["cache"] - NEAR, 0)} for z in sizes], [s.cost_s for s in samples])


def _rates(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of the numbers of rows, of weights, and of the seconds per multiply-add [rows, weights]."""
    found = {(s.sizes["rows"], s.sizes["inner"] * s.sizes["outer"]): s for s in samples}
    rows, weights = (sorted({key[i] for key in found}) for i in (0, 1))
    table = [[_rate_of(found, r, w, weights) for w in weights] for r in rows]
    return np.log(rows), np.log(weights), np.log(table)


def _rate_of(found: Mapping[tuple[int, int], Sample], r: int, w: int, weights: Sequence[int]) -> float:
    """Seconds per multiply-add of the sample, or of the sample of as many rows that is nearest in weights."""
    if (r, w) in found:
        return found[r, w].cost_s / (r * w)
    near = min((v for v in weights if (r, v) in found), key=lambda v: abs(math.log(v / w)))
    return found[r, near].cost_s / (r * near)


def _bilinear(x: np.ndarray, y: np.ndarray, table: np.ndarray, at_x: Any, at_y: Any) -> Any:
    """Interpolates `table` [x, y] between its knots; beyond them the value at the border."""

    def place(knots: np.ndarray, value: Any):
        if len(knots) == 1:
            return np.zeros(np.shape(value), int), np.zeros(np.shape(value))
        value = np.clip(value, knots[0], knots[-1])
        i = np.clip(np.searchsorted(knots, value, side="right") - 1, 0, len(knots) - 2)
        return i, (value - knots[i]) / (knots[i + 1] - knots[i])

    at_x, at_y = np.broadcast_arrays(at_x, at_y)
    (i, u), (j, v) = place(x, at_x), place(y, at_y)
    i1, j1 = np.minimum(i + 1, len(x) - 1), np.minimum(j + 1, len(y) - 1)
    low, high = table[i, j] * (1 - v) + table[i, j1] * v, table[i1, j] * (1 - v) + table[i1, j1] * v
    return low * (1 - u) + high * u


def _piecewise(x: np.ndarray, y: np.ndarray, at: Any) -> Any:
    """Straight lines between the samples. Beyond the last the line goes on; below the first its value holds."""
    at = np.asarray(at, float)
    if len(x) == 1:
        return y[0] * np.maximum(at / x[0], 1)
    slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0)
    return np.interp(at, x, y) + np.maximum(at - x[-1], 0) * slope


def machine_from(table: Mapping[str, Any]) -> Machine:
    """A machine from the `machine` table of a chip file.

    Raises:
        ValueError: an entry that is wrong, by name.
    """
    names = {f.name: f for f in dataclasses.fields(Sample)}
    samples = []
    for entry in table.get("samples", []):
        if not isinstance(entry, dict):
            raise ValueError(f"machine: a sample must be a table, not {entry!r}")
        if unknown := sorted(set(entry) - set(names)):
            raise ValueError(f"machine: a sample has the unknown entry {unknown[0]!r}")
        try:
            samples.append(Sample(**entry))
        except TypeError as error:
            raise ValueError(f"machine: a sample is not complete: {error}") from None
    for key, kind in (("n_devices", int), ("shared", bool), ("mesh", list)):
        if not isinstance(table.get(key), kind):
            raise ValueError(f"machine: field {key!r} is missing or not of type {kind.__name__}")
    return Machine(
        n_devices=table["n_devices"], shared=table["shared"], mesh=tuple(table["mesh"]), samples=tuple(samples)
    )
