"""The points of a bench: which layouts, phases and sizes are measured against each other.

A bench is a list of cells. The points of a cell differ in layout and attention only, and are timed in turn. Touches no
device.
"""

import argparse
import dataclasses
from collections.abc import Callable

from toruslab.benchmarks.runs.parser import integers, refused
from toruslab.benchmarks.runs.point_options import of_file
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
    """The cells that the options ask for.

    Raises:
        InputError: an option that no point can be made of.
    """
    with refused():
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


def _passes(options: argparse.Namespace) -> Callable[[str], list[dict]]:
    """The sizes of a phase's passes."""
    each = max(8, Slice.parse(options.slice).n_chips)
    batches = integers("batches", f"{each},{16 * each}" if options.batches is None else options.batches)
    lengths = integers("lengths", options.lengths)

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
    """Two models, two meshes of 8 chips, both phases, four batches. `full` has each model on each mesh."""
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
    """Every layout with every attention that it has an axis for, of one model, mesh and pass."""
    names, attentions = options.layouts.split(","), options.attention.split(",")
    legal = [a for a in attentions if _has_axis(names[0], a)]
    common = Point(layout=names[0], attention=[*legal, *attentions][0], **sizes)
    return [
        dataclasses.replace(common, layout=name, attention=attention)
        for name in names
        for attention in attentions
        if len(attentions) == 1 or _has_axis(name, attention)
    ]


def _has_axis(name: str, attention: str) -> bool:
    try:
        layout(name, attention, (2, 2, 2), 1)
    except NoAxisLeft:
        return False
    return True


def _from_file(path: str) -> list[list[Point]]:
    """The points of a file; those of one model, mesh and pass make a cell."""
    cells: dict[tuple, list[Point]] = {}
    for number, found in of_file(path):
        if isinstance(found, ValueError):
            raise ValueError(f"{path}, line {number}: {found}")
        p = found
        key = (p.model, p.mesh_shape, p.phase, p.batch, p.length, p.context, p.weights)
        key += (p.cache, p.steps_per_call, p.accumulate, p.remat)
        cells.setdefault(key, []).append(p)
    if not cells:
        raise ValueError(f"points={path!r} holds no point")
    slices = {p.slice for cell in cells.values() for p in cell}
    if len(slices) > 1:
        raise ValueError(f"points={path!r} names {len(slices)} slices; a run measures one")
    return list(cells.values())
