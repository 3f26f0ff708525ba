"""The three kinds of evidence for one point, as rows hold them: planned, compiled, and the step that is measured."""

import dataclasses
import functools
from dataclasses import dataclass

from flax import nnx
from jax.sharding import Mesh

from benchmarks.rows import Row
from benchmarks.timing import Step, stepper
from models import text
from models.parameters import initial
from partitioning.chips import PLATFORMS
from partitioning.compiled import planned
from partitioning.cost import estimate
from partitioning.evidence import compare
from partitioning.hlo import read
from partitioning.mesh import AXES, Shape, attach
from partitioning.point import Point
from partitioning.program import Program


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A point that is compiled and ready to be timed; `text` is its optimised program."""

    point: Point
    compiled_row: Row
    step: Step
    text: str


def analytic(point: Point) -> Row:
    """What the layout alone says: its collectives, and the bytes that one chip receives in a pass."""
    found = planned(point)
    priced = {} if point.chip in PLATFORMS or not point.layout_value.explicit else estimate(point).to_json()
    numbers = {k: v for k, v in priced.items() if k not in ("point", "source", "collectives")}
    return numbers | {
        "collectives": [dataclasses.asdict(p) for p in found],
        "collective_bytes": sum(p.bytes * p.count for p in found),
        "n_collectives": sum(p.count for p in found),
    }


def prepare(point: Point, seed: int, corpus: str) -> Contender:
    """Compiles a point for the devices that are here, holds it against the plan, and places weights and text."""
    config, layout, pass_ = point.config, point.layout_value, point.pass_
    mesh = _mesh(point.mesh_shape, point.chip, layout.explicit)
    program = Program(config=config, layout=layout, mesh=mesh, pass_=pass_)
    compiled = program.compile()
    collectives = read(compiled.text, dict(zip(AXES, point.mesh_shape, strict=True)))
    matched = compare(planned(point), collectives)
    row = {
        "compile_s": compiled.compile_s,
        "peak_bytes_per_chip": compiled.peak_bytes,
        "collectives": [dataclasses.asdict(m) for m in matched],
        "collective_bytes": sum(c.bytes * c.trips for c in collectives),
        "n_collectives": sum(c.trips for c in collectives),
        "unexplained": sum(not m.explained for m in matched),
        "rematerialisations": len(compiled.warnings),
    }
    params = _params(point, program, seed)
    ids = text.prompts(point.batch, point.length, seed, corpus)
    step = stepper(program, compiled, params, ids, point.start)
    return Contender(point=point, compiled_row=row, step=step, text=compiled.text)


_placed: dict[tuple, nnx.State] = {}


def _params(point: Point, program: Program, seed: int) -> nnx.State:
    """Weights at rest, kept for the next layout that wants them in the same places."""
    layout = point.layout_value
    rest = (layout.table, layout.w_in[0], layout.w_kv[0], layout.w_out[0], layout.explicit)
    key = (point.model, point.weights, seed, rest, point.mesh_shape)
    if key not in _placed:
        made = initial(point.config, layout, program.mesh, seed=seed, dtype=program.dtype, int8=program.int8)
        _placed[key] = made
    return _placed[key]


def clear() -> None:
    """Lets go of the weights that were kept."""
    _placed.clear()


@functools.lru_cache(maxsize=8)
def _mesh(shape: Shape, chip: str, explicit: bool) -> Mesh:
    return attach(shape, chip=chip, explicit=explicit)
