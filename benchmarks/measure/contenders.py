"""The evidence for one point: its analytic row, its compiled row, and the step to time."""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from toruslab.benchmarks.measure.chip_file import data_sheet
from toruslab.benchmarks.measure.timing import RunOnce, stepper, training_stepper
from toruslab.benchmarks.runs.rows import Row
from toruslab.models.decoder.parameters import initial
from toruslab.models.programs.compiled import planned, program
from toruslab.models.programs.program import Program
from toruslab.models.programs.training import Trainer
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.measured import Terms, terms, with_collectives
from toruslab.partitioning.cost.sizes import PassSizes
from toruslab.partitioning.cost.training import training_terms
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.compare import compare
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import PLATFORMS, Chip
from toruslab.partitioning.torus.mesh import AXES, Shape, attach


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A point that is compiled and ready to be timed. `text` is its optimised program."""

    point: Point
    compiled_row: Row
    step: RunOnce
    text: str


def analytic(point: Point, chip: Chip | None = None) -> Row:
    """The analytic row of a point: its planned collectives, the bytes that one chip receives in a pass, and its price.

    Args:
        point: to price.
        chip: a calibrated chip to price it on; None: the data sheet of the point's own chip.
    """
    found = planned(point)
    explicit = point.layout_value.explicit
    priced = estimate(point).to_json() if explicit and point.chip not in PLATFORMS else {}
    numbers = {k: v for k, v in priced.items() if k not in ("point", "source", "collectives")}
    collectives = [dataclasses.asdict(p) for p in found]
    if chip and explicit:
        numbers |= _predicted(point, chip, collectives)
    return numbers | {
        "collectives": collectives,
        "collective_bytes": sum(p.bytes * p.count for p in found),
        "n_collectives": sum(p.count for p in found if not p.fused),
    }


def _predicted(point: Point, chip: Chip, collectives: list[Row]) -> Row:
    """The price of a pass on a calibrated chip. Writes the seconds of each collective into `collectives`."""
    found = _terms(point, chip)
    taken = [(c.scope, c.kind, c.axes, float(np.ravel(c.seconds)[0])) for c in found.collectives]
    for c in collectives:
        c["seconds"] = next((s for *key, s in taken if key == [c["scope"], c["kind"], c["axes"]]), None)
    seconds = {k: float(np.ravel(v)[0]) for k, v in found.seconds.items()}
    return {
        "latency_s": sum(seconds.values()),
        "terms": seconds,
        "chip": chip.name,
        "flops": float(np.ravel(found.flops)[0]),
        "memory_bytes": float(np.ravel(found.memory_bytes)[0]),
        "roofline": _roofline(point, chip),
    }


def _roofline(point: Point, chip: Chip) -> Row:
    """The peak rates of all chips together, by the devices' data sheet, or else the best that was measured."""
    import jax

    sheet = data_sheet(jax.devices()[0].device_kind)
    peaks = (sheet or chip).peak_flops_per_s
    rate = peaks.get("f32" if point.weights == "f32" else "bf16", max(peaks.values()))
    return {
        "flops_per_s": rate * point.n_chips,
        "bytes_per_s": (sheet or chip).hbm_bytes_per_s * point.n_chips,
        "of": f"the data sheet of {sheet.name}" if sheet else "the calibration",
    }


def shares(row: Row, latency_s: float) -> Row:
    """The shares of peak FLOP/s and of memory bandwidth that a measured pass reaches.

    Args:
        row: of `analytic`. Without a calibrated chip it has no roofline, and there are no shares.
        latency_s: measured.
    """
    if "roofline" not in row:
        return {}
    roof = row["roofline"]
    return {
        "flops_share": row["flops"] / latency_s / roof["flops_per_s"],
        "bandwidth_share": row["memory_bytes"] / latency_s / roof["bytes_per_s"],
    }


def _terms(point: Point, chip: Chip) -> Terms:
    assert chip.machine
    if point.phase == "train":
        return training_terms(point, chip)
    return terms(point.layout_value, point.config.block, point.mesh_shape, PassSizes.of([point]), chip.machine)


def prepare(point: Point, seed: int, text: str, chip: Chip | None = None) -> Contender:
    """Compiles a point for the devices here, compares it with its plan, and places its weights and tokens.

    The layout `auto` has no plan. With a calibrated chip it is priced here, by the collectives of its program.

    Args:
        point: to compile.
        seed: of weights and tokens.
        text: English text to take the tokens from.
        chip: a calibrated chip.
    """
    layout = point.layout_value
    made = program(point, point.config, _mesh(point.mesh_shape, point.chip, layout.explicit))
    compiled = made.compile()
    collectives = read(compiled.text, dict(zip(AXES, point.mesh_shape, strict=True)))
    steps = point.steps_per_call
    matched = compare(planned(point), collectives, steps=steps)
    row = {
        "compile_s": compiled.compile_s,
        "peak_bytes_per_chip": compiled.peak_bytes,
        "collectives": [dataclasses.asdict(m) for m in matched],
        "collective_bytes": sum((m.bytes or 0) * m.count for m in matched),
        "n_collectives": round(sum(c.trips / c.n_merged for c in collectives) / point.steps_per_call),
        "unexplained": sum(not m.explained for m in matched),
        "rematerialisations": len(compiled.warnings),
    }
    if chip and chip.machine and not layout.explicit:
        work = _terms(dataclasses.replace(point, layout="ws2d"), chip)
        seconds = with_collectives(work, collectives, chip.machine, point.n_chips)
        row |= {"latency_s": sum(seconds.values()), "terms": seconds, "chip": chip.name}
    if isinstance(made, Trainer):
        ids = corpus.windows(byte_ids.encode(text, bos=False), point.batch, point.length, seed, 0)
        step = training_stepper(made, compiled.executable, made.initial(seed), ids)
    else:
        ids = corpus.prompts(point.batch, point.length, seed, text)
        step = stepper(made, compiled.executable, _params(point, made, seed), ids, point.start)
    return Contender(point=point, compiled_row=row, step=step, text=compiled.text)


_placed: dict[tuple, nnx.State] = {}


def _params(point: Point, program: Program, seed: int) -> nnx.State:
    """The weights at rest, kept for the next layout with the same shardings."""
    layout = point.layout_value
    rest = (layout.table, layout.w_in[0], layout.w_kv[0], layout.w_out[0], layout.explicit)
    key = (point.model, point.weights, seed, rest, point.mesh_shape)
    if key not in _placed:
        made = initial(point.config, layout, program.mesh, seed=seed, dtype=program.dtype, int8=program.int8)
        _placed[key] = made
    return _placed[key]


def clear() -> None:
    """Drops the kept weights."""
    _placed.clear()


@functools.lru_cache(maxsize=8)
def _mesh(shape: Shape, chip: str, explicit: bool) -> Mesh:
    return attach(shape, chip=chip, explicit=explicit)
