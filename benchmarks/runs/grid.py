"""The points of a bench: which layouts, phases and sizes are measured against each other.

Decides the cells, each a list of points that differ in layout and attention only and are timed in turn. Touches no
device.
"""

import argparse
import dataclasses

from toruslab.benchmarks.runs.options import InputError, read_lines
from toruslab.partitioning.layouts.layout import NoAxisLeft
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import Slice

DECODE_CONTEXT = 256
PREFILL_LENGTHS = (16, 256)
GRIDS = ("default", "wide", "full")
WIDE = (("toy", "2x2x2"), ("toy-s", "4x2x1"))
BATCHES = (8, 16, 32, 64)
WIDE_LENGTH = 16


def grid(options: argparse.Namespace) -> list[list[Point]]:
    """The points, in groups that are timed against each other.

    Raises:
        InputError: an option that no point can be made of.
    """
    try:
        if options.points is not None:
            return _from_file(options.points)
        if options.grid != "default":
            return _wide(options)
        phases = options.phases.split(",")
        if (options.accumulate != 1 or options.remat != "layer") and "train" not in phases:
            field = "accumulate" if options.accumulate != 1 else "remat"
            raise ValueError(f"{field} is for phase='train' only, and phases={options.phases!r} has none")
        passes = _passes(options)
        common = {"model": options.model, "slice": options.slice, "mesh": options.mesh, "weights": options.weights}
        common |= {"cache": options.cache}
        return [_cell(options, common | sizes) for phase in phases for sizes in passes(phase)]
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _passes(options: argparse.Namespace):
    """phase -> the sizes of its passes."""
    each = max(8, Slice.parse(options.slice).n_chips)
    batches = _numbers("batches", f"{each},{16 * each}" if options.batches is None else options.batches)
    lengths = _numbers("lengths", options.lengths)

    def of(phase: str) -> list[dict]:
        if phase in ("prefill", "train"):
            batch = options.prefill_batch or each * (max(1, options.accumulate) if phase == "train" else 1)
            how = {"accumulate": options.accumulate, "remat": options.remat} if phase == "train" else {}
            return [{"phase": phase, "batch": batch, "length": n, "context": 0} | how for n in lengths]
        numbers = batches if phase == "decode" else batches[:1]  # Point refuses any other phase by name
        decode = {"phase": phase, "context": options.context, "steps_per_call": options.steps_per_call}
        return [decode | {"batch": b} for b in numbers]

    return of


def _wide(options: argparse.Namespace) -> list[list[Point]]:
    """Two models, two meshes of the same 8 chips, both phases, four batches; `full`: each model on each mesh."""
    slice_ = Slice.parse(options.slice)
    if slice_.n_chips != 8:
        raise ValueError(f"slice={options.slice} has {slice_.n_chips} chips; grid={options.grid!r} is made for 8")
    pairs = WIDE if options.grid == "wide" else [(m, s) for m, _ in WIDE for _, s in WIDE]
    cells = []
    for model, mesh in pairs:
        where = {"model": model, "slice": options.slice, "weights": options.weights, "cache": options.cache}
        where |= {} if mesh == str(slice_).split(":")[1] else {"mesh": mesh}
        for batch in BATCHES:
            decode = {"phase": "decode", "context": options.context, "steps_per_call": options.steps_per_call}
            cells.append(where | decode | {"batch": batch})
            cells.append(where | {"phase": "prefill", "batch": batch, "length": WIDE_LENGTH, "context": 0})
    return [_cell(options, cell) for cell in cells]


def _cell(options: argparse.Namespace, sizes: dict) -> list[Point]:
    """Every layout and attention that makes sense, of one model, mesh and pass."""
    names, attentions = options.layouts.split(","), options.attention.split(",")
    common = Point(layout=names[0], attention=_first_legal(names[0], attentions), **sizes)
    return [
        dataclasses.replace(common, layout=name, attention=attention)
        for name in names
        for attention in attentions
        if len(attentions) == 1 or _makes_sense(name, attention)
    ]


def _from_file(path: str) -> list[list[Point]]:
    groups: dict[tuple, list[Point]] = {}
    for number, line in read_lines("points", path):
        try:
            if isinstance(line, ValueError):
                raise line
            point = Point.from_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        of = (point.model, point.mesh_shape, point.phase, point.batch, point.length, point.context, point.weights)
        of += (point.cache, point.steps_per_call, point.accumulate, point.remat)
        groups.setdefault(of, []).append(point)
    if not groups:
        raise ValueError(f"points={path!r} holds no point")
    slices = {p.slice for group in groups.values() for p in group}
    if len(slices) > 1:
        raise ValueError(f"points={path!r} names {len(slices)} slices; a run measures one")
    return list(groups.values())


def _numbers(field: str, value: str) -> list[int]:
    try:
        return [int(n) for n in value.split(",")]
    except ValueError:
        raise ValueError(f"{field}={value!r} must be integers with commas between them") from None


def _makes_sense(name: str, attention: str) -> bool:
    try:
        layout(name, attention, (2, 2, 2), 1)
    except NoAxisLeft:
        return False
    return True


def _first_legal(name: str, attentions: list[str]) -> str:
    return next((a for a in attentions if _makes_sense(name, a)), attentions[0])
