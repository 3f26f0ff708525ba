"""A chip: its rates, its memory and its links, every figure with its source; which slices of it are legal.

The figures are in `torus/chips/`, one TOML file per chip. To describe a chip of your own, copy one and name it by its
path. How fast a collective is on a chip is in `partitioning.torus.links`, how fast a pass is in `partitioning.cost`.
Imports no JAX.
"""

import difflib
import functools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from toruslab.partitioning.torus.calibrated import Machine, machine_from

Wrap = Literal["cubes_of_4", "axis_of_16", "none", "switch"]
PLATFORMS = ("cpu", "gpu", "tpu")
_FIGURES = ("hbm_bytes", "hbm_bytes_per_s", "link_bytes_per_s", "n_links", "torus_axes", "wrap", "hop_s", "max_dims")
_FIGURES += ("max_chips",)
_OPTIONAL = ("clock_hz",)
FITTED = ("matmul_efficiency", "hbm_efficiency", "link_efficiency", "collective_s", "hop_s")
"""The constants of `partitioning.cost.forward` that are fitted to measurements. A chip has all of them or none."""


@dataclass(frozen=True, kw_only=True)
class OtherFigure:
    """What another source says about one of a chip's figures."""

    field: str
    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip and its place in an interconnect.

    Args:
        name: as in `v4:4x4x4`.
        peak_flops_per_s: dense FLOP/s by dtype (`bf16`, `int8`, `f32`, ...); a multiply-add counts two.
        hbm_bytes, hbm_bytes_per_s: memory of one chip and its bandwidth.
        link_bytes_per_s: bandwidth of one link, one way.
        n_links: links of one chip; a torus has two per axis.
        torus_axes: 3, 2 or 1; 0 where the chips are joined by a switch.
        wrap: which axes close to rings: `cubes_of_4` (all, when the slice is made of whole 4x4x4 cubes),
            `axis_of_16` (an axis of exactly 16), `none`, or `switch`.
        hop_s: latency of a message from a chip to its neighbour.
        max_dims, max_chips: the largest slice, per axis and in all.
        clock_hz: clock of the matrix units, where it can be derived; else None.
        fitted: constants that were fitted to measurements, by name.
        machine: what `toruslab calibrate` measured. It prices passes instead of the figures above.
        sources: the source of each figure (dotted for tables: `peak_flops_per_s.bf16`); of a fitted constant, the
            points that it was fitted on.
        others: figures on which other sources differ.

    Raises:
        ValueError: a figure that is not positive, or links, axes and wrap that contradict each other.
    """

    name: str
    peak_flops_per_s: Mapping[str, float] = field(hash=False)
    hbm_bytes: int
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    n_links: int
    torus_axes: int
    wrap: Wrap
    hop_s: float
    max_dims: tuple[int, ...]
    max_chips: int
    clock_hz: float | None = None
    fitted: Mapping[str, float] = field(default_factory=dict, hash=False)
    machine: Machine | None = field(default=None, hash=False, repr=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False, compare=False)
    others: tuple[OtherFigure, ...] = field(default=(), hash=False, repr=False, compare=False)

    def __post_init__(self):
        figures: dict[str, Any] = {f"peak_flops_per_s.{k}": v for k, v in self.peak_flops_per_s.items()}
        figures |= {k: getattr(self, k) for k in ("hbm_bytes", "hbm_bytes_per_s", "link_bytes_per_s", "max_chips")}
        figures |= {f"max_dims[{i}]": size for i, size in enumerate(self.max_dims)}
        if self.clock_hz is not None:
            figures["clock_hz"] = self.clock_hz
        for key, value in figures.items():
            if not _is_number(value) or value == 0:
                raise ValueError(f"{self.name}: {key}={value!r} must be a positive number")
        if self.fitted and set(self.fitted) != set(FITTED):
            raise ValueError(f"{self.name}: fitted must hold all of {', '.join(FITTED)}, or nothing")
        for key, value in self.fitted.items():
            least = 0.0 if key.endswith("_s") else 1e-3
            if not _is_number(value, least):
                raise ValueError(f"{self.name}: fitted.{key}={value!r} must be a number of at least {least}")
        if "bf16" not in self.peak_flops_per_s and "f32" not in self.peak_flops_per_s:
            raise ValueError(f"{self.name}: peak_flops_per_s must have bf16 or f32")
        if not isinstance(self.hop_s, int | float) or not 0 <= self.hop_s < math.inf:
            raise ValueError(f"{self.name}: hop_s={self.hop_s!r} must be a number that is not negative")
        if self.wrap not in get_args(Wrap):
            raise ValueError(f"{self.name}: wrap={self.wrap!r} must be one of {', '.join(get_args(Wrap))}")
        if self.torus_axes not in (0, 1, 2, 3):
            raise ValueError(f"{self.name}: torus_axes={self.torus_axes!r} must be 0 (a switch), 1, 2 or 3")
        if (self.torus_axes == 0) != (self.wrap == "switch"):
            raise ValueError(f"{self.name}: torus_axes={self.torus_axes} and wrap={self.wrap!r} contradict each other")
        if self.torus_axes and self.n_links != 2 * self.torus_axes:
            raise ValueError(f"{self.name}: n_links={self.n_links} must be two for each of {self.torus_axes} axes")
        if not isinstance(self.n_links, int) or self.n_links < 1:
            raise ValueError(f"{self.name}: n_links={self.n_links!r} must be a positive integer")

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in `dtype`.

        Raises:
            ValueError: the chip's file gives no rate for it.

        Example:
            >>> chip("v5e").peak("int8") / chip("v5e").peak("bf16")
            2.0
        """
        if dtype not in self.peak_flops_per_s:
            known = ", ".join(self.peak_flops_per_s)
            raise ValueError(f"dtype={dtype!r} has no peak rate on chip {self.name}; it has {known}")
        return self.peak_flops_per_s[dtype]

    def check_slice(self, dims: Sequence[int]) -> None:
        """Accepts the extents of a slice, in any order of the axes, or says which rule they break.

        Args:
            dims: number of chips along each axis; axes of 1 may be given or left out.

        Raises:
            ValueError: too many axes, an axis or a slice too long, or a slice that is neither whole 4x4x4 cubes
                nor a part of one.

        Example:
            >>> chip("v5e").check_slice((4, 4, 4))
            Traceback (most recent call last):
            ...
            ValueError: slice 4x4x4 has 3 axes longer than 1, but v5e is a torus of 2
        """
        text = "x".join(str(size) for size in dims)
        if not dims or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in dims):
            raise ValueError(f"slice {text or '()'} must have positive whole extents")
        if math.prod(dims) > self.max_chips:
            raise ValueError(
                f"slice {text} has {math.prod(dims)} chips, but {self.name} joins at most {self.max_chips}"
            )
        if self.wrap == "switch":
            return
        longer = sorted((size for size in dims if size > 1), reverse=True)
        if len(longer) > self.torus_axes:
            raise ValueError(
                f"slice {text} has {len(longer)} axes longer than 1, but {self.name} is a torus of {self.torus_axes}"
            )
        for size, limit in zip(longer, sorted(self.max_dims, reverse=True), strict=False):
            if size > limit:
                raise ValueError(f"slice {text} has an axis of {size}, but {self.name} allows at most {limit}")
        whole = len(dims) == 3 and all(size % 4 == 0 for size in dims)
        if self.wrap == "cubes_of_4" and not whole and any(size not in (1, 2, 4) for size in dims):
            raise ValueError(
                f"slice {text} is neither whole 4x4x4 cubes (every axis a multiple of 4) nor a part of one "
                f"(every axis 1, 2 or 4), as {self.name} wants"
            )


def names() -> tuple[str, ...]:
    """The names of the chips that come with the package, in alphabetical order."""
    files = resources.files("toruslab.partitioning.torus").joinpath("chips").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def chip(name_or_path: str | Path) -> Chip:
    """The chip with this name, or the one that a TOML file describes.

    Args:
        name_or_path: a name in `names()`, or a path that ends in `.toml` (copy one of `torus/chips/` to start from).

    Raises:
        ValueError: an unknown name (with the nearest known one), an attached platform's name, or a bad file.

    Example:
        >>> v4 = chip("v4")
        >>> v4.n_links * v4.link_bytes_per_s  # the 270 GB/s of Pope et al. 2022
        270000000000.0
    """
    text = str(name_or_path)
    if text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"chip={text!r}: there is no such file")
        return _read(text, path.stat().st_mtime_ns)
    return _catalogued(text)


@functools.lru_cache(maxsize=64)
def _read(text: str, changed: int) -> Chip:
    """The chip of a file that was last `changed` at this time, so that an edited file is read again."""
    del changed
    return _parse(Path(text).read_text(encoding="utf-8"), text)


@functools.cache
def _catalogued(name: str) -> Chip:
    if name in PLATFORMS:
        raise ValueError(
            f"chip={name!r} is an attached platform and has no data sheet: run `toruslab calibrate` to measure it, "
            "then give the path of the file that it writes"
        )
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"chip={name!r} is not known: {hint}known are {', '.join(names())}, or a path to a .toml file")
    file = resources.files("toruslab.partitioning.torus").joinpath("chips", f"{name}.toml")
    return _parse(file.read_text(encoding="utf-8"), f"{name}.toml")


def _is_number(value: object, least: float = 0.0) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


def _parse(text: str, where: str) -> Chip:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: not TOML: {error}") from error
    if not isinstance(data.get("name"), str):
        raise ValueError(f"{where}: field 'name' is missing or not a text")
    sources: dict[str, str] = {}
    others: list[OtherFigure] = []

    def figure(key: str, table: Any, origin: str = "source") -> Any:
        if not isinstance(table, dict) or "value" not in table or not isinstance(table.get(origin), str):
            raise ValueError(f"{where}: field {key!r} must be a table with 'value' and {origin!r}")
        if unknown := sorted(set(table) - {"value", origin, "others"}):
            raise ValueError(f"{where}: field {key!r} has the unknown entry {unknown[0]!r}")
        sources[key] = table[origin]
        for other in table.get("others", []):
            if not isinstance(other, dict) or set(other) != {"value", "source"}:
                raise ValueError(f"{where}: every entry of 'others' of {key!r} needs 'value' and 'source'")
            others.append(OtherFigure(field=key, value=other["value"], source=other["source"]))
        return table["value"]

    tables = ("peak_flops_per_s", "fitted", "machine")
    if unknown := sorted(set(data) - {"name", *tables, *_FIGURES, *_OPTIONAL}):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}")
    for key in ("peak_flops_per_s", *_FIGURES):
        if key not in data:
            raise ValueError(f"{where}: field {key!r} is missing")
    for key in tables:
        if not isinstance(data.get(key, {}), dict):
            raise ValueError(f"{where}: field {key!r} must be a table of figures")
    peaks = {k: figure(f"peak_flops_per_s.{k}", v) for k, v in data["peak_flops_per_s"].items()}
    fitted = {k: figure(f"fitted.{k}", v, "on") for k, v in data.get("fitted", {}).items()}
    values: dict[str, Any] = {key: figure(key, data[key]) for key in (*_FIGURES, *_OPTIONAL) if key in data}
    if not isinstance(values["max_dims"], list):
        raise ValueError(f"{where}: max_dims={values['max_dims']!r} must be a list of extents")
    values["max_dims"] = tuple(values["max_dims"])
    for key in ("hbm_bytes", "n_links", "torus_axes", "max_chips"):
        if isinstance(values[key], float) and values[key].is_integer():
            values[key] = int(values[key])
    try:
        machine = machine_from(data["machine"]) if "machine" in data else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Chip(
        name=data["name"],
        machine=machine,
        peak_flops_per_s=peaks,
        fitted=fitted,
        sources=sources,
        others=tuple(others),
        **values,
    )
