"""What a training step costs: forward, backward and update of a point of the phase `train`. Touches no device.

The forward pass of one part of the batch is priced as a prefill of whole sequences with all logits, by
`partitioning.cost.forward`, or by `partitioning.cost.measured` on a calibrated machine. The rest follows from it:

- The gradient of a matmul is two matmuls of its size, so layers cost three forward passes. They cost a fourth where
  they are recomputed.
- Attention computes all L x L scores, twice as many as are seen. Above two blocks of queries it recomputes them once
  more (`models.decoder.attention.causal`).
- Collectives are those of the plan, one by one. Those of a layer's weights and of their gradients hide under the
  matmuls as far as `estimate` lets gathers hide. All others are exposed.
- The loss reads and writes float32 logits [R, V'] four times [assumed].
- The update reads and writes gradient, weights and two moments in float32, for the part that a chip owns.

The constants are those that were fitted to inference. No training step was measured on a TPU.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from toruslab.models.attention_blocks import BLOCK
from toruslab.partitioning.cost.forward import Constants, Cost, constants_of, price
from toruslab.partitioning.cost.measured import Terms, collective_s, terms
from toruslab.partitioning.cost.memory import working_bytes
from toruslab.partitioning.cost.sizes import PassSizes, matmuls
from toruslab.partitioning.cost.traffic import CollectiveCost, coefficients, collective_rate, splits
from toruslab.partitioning.layouts.layout import axes_of, entries
from toruslab.partitioning.layouts.ownership import owned
from toruslab.partitioning.plan.plan import Planned, plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer
from toruslab.partitioning.plan.tensors import letters, parameters
from toruslab.partitioning.torus.calibrated import Machine
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.mesh import AXES, Slice

LOSS_PASSES = 4
"""[assumed] how often the loss reads or writes its float32 logits."""
UPDATE_PASSES = 7
"""How often the update reads or writes an array in float32: it reads gradient, weights and two moments, and writes the
last three."""
LIVE_COPIES = 3
"""[assumed] how many copies of what a layer's forward pass holds its backward pass holds: the values, their gradients,
and what one of them is on its way to. Seen in programs for 64 TPU v4."""


def price_training(point: Point, constants: Constants | None = None, *, overlap: bool = True) -> Cost:
    """The cost of one training step.

    Args:
        point: of the phase `train`.
        constants, overlap: see `partitioning.cost.estimate.estimate`.

    Returns:
        The cost, in plain numbers. `mfu` counts 6 x parameters x tokens, and no layer twice.

    Raises:
        ValueError: as `partitioning.cost.estimate.estimate`.
    """
    chip_ = chip(point.chip)
    if chip_.machine:
        measured = training_terms(point, chip_)
        found: dict[str, Any] = {
            "latency_s": measured.latency_s,
            "stack_latency_s": measured.layers_s,
            "collectives": measured.collectives,
            "terms": measured.seconds,
            **measured.bounds(),
        }
    else:
        found = _from_data_sheet(point, chip_, constants, overlap)
    rates = chip_.peak_flops_per_s
    peak = rates.get("bf16", rates.get("f32", 0.0))
    return Cost(
        **found,
        mfu=6 * point.config.n_params * point.tokens / (found["latency_s"] * point.n_chips * peak),
        hbm_bytes_per_chip=held_bytes(point),
        hbm_bytes=chip_.hbm_bytes,
    )


def _from_data_sheet(point: Point, chip_: Chip, constants: Constants | None, overlap: bool) -> dict[str, Any]:
    """Seconds and collectives of a `Cost`."""
    layout, config, mesh, slice_ = point.layout_value, point.config, point.mesh_shape, Slice.parse(point.slice)
    n = _forward_sizes(point)
    forward = price(layout, config.block, slice_, mesh, n, constants, overlap=overlap)
    parts = {k: _number(v) for k, v in forward.parts.items()}
    c = constants_of(chip_) if constants is None else constants

    def seconds(p: Planned) -> float:
        one_way = of_a_layer(p.scope) and _is_weight(p) and overlap
        per_byte, hops = collective_rate(p.kind, p.axes, mesh, slice_, chip_, ways=layout.rings, one_way=one_way)
        start = 0.0 if p.fused else c["collective_s"] + hops * c["hop_s"]
        return p.bytes * per_byte / c["link_efficiency"] + start

    planned = plan(layout, config, point.pass_, mesh)
    priced = _priced(planned, map(seconds, planned))
    hidden = math.fsum(c.seconds * c.count for c in priced if c.in_layer and _is_weight(c))
    exposed = math.fsum(c.seconds * c.count for c in priced if c.in_layer and not _is_weight(c))
    outside = math.fsum(c.seconds * c.count for c in priced if not c.in_layer)
    rate = chip_.hbm_bytes_per_s * c["hbm_efficiency"]
    times, recomputes = point.accumulate, int(point.remat == "layer")
    scores = 2 * point.length / (point.length + 1) * (3 + recomputes + (point.length > 2 * BLOCK))
    computed = times * config.n_layers * (parts["body_s"] * (3 + recomputes) + parts["attention_s"] * scores)
    stack = (math.hypot(computed, hidden) if overlap and not layout.rings else computed + hidden) + exposed
    loss_bytes = LOSS_PASSES * 4 * _held_elements(point, n, "logits", -1)
    head = times * (3 * (parts["head_compute_s"] ** 4 + parts["head_memory_s"] ** 4) ** 0.25 + loss_bytes / rate)
    update = UPDATE_PASSES * 4 * _elements(point)[1] / rate

    def passes(total: Any, head: float) -> float:
        """Seconds of all passes, from those of one forward pass and of its head."""
        return times * ((_number(total) - head) * (3 + recomputes) + 3 * head)

    return {
        "latency_s": stack + head + outside + update,
        "stack_latency_s": stack,
        "compute_s": passes(forward.compute_s, parts["head_compute_s"]),
        "memory_s": passes(forward.memory_s, parts["head_memory_s"]) + update,
        "collective_s": hidden + exposed + outside,
        "collectives": priced,
    }


def training_terms(point: Point, chip_: Chip) -> Terms:
    """A training step on a chip whose building blocks were measured. All terms add up, as in `cost.measured`.

    Args:
        point: of the phase `train`, with a plan, on as many of the machine's devices.
        chip_: of `toruslab calibrate`; the point's own may be another, such as `cpu`.

    Returns:
        The terms, in plain numbers; `flops` counts no layer twice.
    """
    machine = chip_.machine
    assert machine
    layout, config, mesh = point.layout_value, point.config, point.mesh_shape
    n, act = _forward_sizes(point), "f32" if point.weights == "f32" else "bf16"
    forward = terms(layout, config.block, mesh, n, machine)
    of = {k: _number(v) for k, v in forward.seconds.items()}
    scale, split = machine.scale(point.n_chips), splits(layout, mesh)

    def elements_s(what: str, elements: float) -> float:
        return _number(machine.elements_s(what, np.float64(elements), "f32")) * scale

    rows = n.size["R"] / split["rows", -1][0]
    inner, outer = n.size["E"] / split["rows", -1][1], n.size["V"] / split["logits", 0][1]
    head = _number(machine.matmul_s(rows, inner, outer, act)) * scale
    loss = elements_s("activation", _held_elements(point, n, "logits", -1)) * LOSS_PASSES / 2
    update = elements_s("norm", _elements(point)[1]) * UPDATE_PASSES / 2
    planned = plan(layout, config, point.pass_, mesh)
    priced = _priced(planned, (_measured_s(p, machine, mesh) * scale for p in planned))
    times, passes = point.accumulate, 3 + int(point.remat == "layer")
    seconds = {
        "matmul_s": times * ((of["matmul_s"] - head) * passes + 3 * head),
        "weights_s": times * of["weights_s"] * passes,
        "attention_s": times * of["attention_s"] * passes,
        "other_s": times * (of["other_s"] * passes + loss) + update,
        "collective_s": math.fsum(c.seconds * c.count for c in priced),
        "dispatch_s": of["dispatch_s"],
    }
    in_layers = math.fsum(c.seconds * c.count for c in priced if c.in_layer)
    outside = times * (3 * head + loss) + update + seconds["dispatch_s"] + seconds["collective_s"] - in_layers
    return Terms(
        seconds=seconds,
        layers_s=math.fsum(seconds.values()) - outside,
        flops=3 * times * forward.flops,
        memory_bytes=passes * times * forward.memory_bytes,
        collectives=priced,
    )


def fits(point: Point) -> bool:
    """Whether a training step fits the memory of its chips."""
    return held_bytes(point) <= chip(point.chip).hbm_bytes


def held_bytes(point: Point) -> int:
    """Bytes per chip at the peak of a training step.

    Alive all the time:

    - the state: parameters, two moments, and float32 master weights beside bfloat16 ones, where they are owned;
    - the gradients of all layers as the backward pass makes them, and their sums where the batch is in parts;
    - what is kept of each layer (`plan.passes.REMAT`): its input, or all that it made, with or without the gathered
      weights;
    - the copy of the input projections, in the layout of the forward pass, that XLA:TPU makes once a step.

    Beside these the larger of two: the logits, as partial sums, and scattered with their gradient in float32; or a
    layer's backward pass, in a serial layer with what both blocks made.

    Compared with arguments and temporaries of programs for TPU v4 and v5e (docs/training.md).
    """
    layout, config, mesh = point.layout_value, point.config, point.mesh_shape
    n = _forward_sizes(point)
    size = {k: _number(v) for k, v in n.size.items()}
    act = 4 if point.weights == "f32" else 2
    known = coefficients(layout, config.block, Slice.parse(point.slice), mesh, True)
    split = known.splits
    resting, mine = _elements(point)
    used = {
        weight: size[inner] * size[outer] / math.prod(split[weight, -1]) * act
        for inner, outer, weight, _ in matmuls(config.block)
    }
    w_in = sum(size[inner] * size[outer] for inner, outer, weight, _ in matmuls(config.block) if weight == "w_in")
    moving = math.fsum(held for weight, held in used.items() if known.gathered[weight])
    without_logits = dataclasses.replace(n, size={**n.size, "R": n.size["B"]})
    blocks = ("parallel",) if config.block == "parallel" else ("parallel", "serial")  # attention's; the larger of both
    working = math.fsum(_number(working_bytes(split, b, without_logits, np.float64(0))) for b in blocks)
    kept = {
        "layer": _held_elements(point, n, "x", 0) * act,
        "weights": working,
        "none": working + moving,
    }[point.remat]
    partial, ends = (_held_elements(point, n, "logits", step) for step in (0, -1))
    logits = act * partial + 2 * 4 * ends + _held_elements(point, n, "rows", -1) * act
    state = resting * act + mine * (8 if act == 4 else 12)
    sums = 4.0 * resting if point.accumulate > 1 else 0.0
    gradients, relaid = float(act * resting), act * config.n_layers * (w_in / math.prod(split["w_in", 0]))
    always = state + sums + config.n_layers * kept + gradients + relaid
    return int(always + max(logits, LIVE_COPIES * (working + moving)))


def _forward_sizes(point: Point) -> PassSizes:
    """The sizes of the forward pass of one part of the batch, with all logits."""
    rows = point.batch // point.accumulate
    n = PassSizes.of([dataclasses.replace(point, phase="prefill", batch=rows, accumulate=1, remat="layer")])
    return dataclasses.replace(n, size={**n.size, "R": n.size["T"]})


def _number(array: Any) -> float:
    """The number of a group of one pass."""
    return float(np.ravel(array)[0])


def _priced(planned: Sequence[Planned], seconds: Iterable[float]) -> tuple[CollectiveCost, ...]:
    return tuple(
        CollectiveCost(
            scope=p.scope,
            kind=p.kind,
            axes=p.axes,
            in_layer=of_a_layer(p.scope),
            bytes=p.bytes,
            count=p.count,
            seconds=s,
        )
        for p, s in zip(planned, seconds, strict=True)
    )


def _is_weight(c: Planned | CollectiveCost) -> bool:
    """Whether it moves weights, or their gradient."""
    return c.scope.rsplit("/", 1)[-1] in ("w_in", "w_kv", "w_out")


def _measured_s(p: Planned, machine: Machine, mesh: Sequence[int]) -> float:
    """Seconds of one execution, from a calibration. The plan does not say along which dimension it gathers: columns are
    assumed."""
    if p.fused:
        return 0.0
    k = math.prod(mesh[AXES.index(a)] for a in p.axes)
    at = "rows" if p.kind == "all-reduce" else "columns"
    return _number(collective_s(machine, p.kind, k, at, np.float64(p.bytes), 0, "".join(p.axes)))


def _elements(point: Point) -> tuple[int, int]:
    """Parameters that a chip holds, and those whose moments it keeps."""
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    size = letters(point.config, point.pass_, point.layout_value, point.mesh_shape)
    resting = mine = 0
    for dims, spec in parameters(point.layout_value, point.config).values():
        shape = [size[d] for d in dims]
        resting += _part(shape, spec, sizes)
        mine += _part(shape, owned(spec, shape, sizes), sizes)
    return resting, mine


def _part(shape: Sequence[int], spec: Any, sizes: Mapping[str, int]) -> int:
    return math.prod(shape) // math.prod(sizes[a] for entry in entries(spec) for a in axes_of(entry))


def _held_elements(point: Point, n: PassSizes, field: str, step: int) -> float:
    """Elements of an activation that a chip holds, where its ladder begins (0) or ends (-1)."""
    parts = splits(point.layout_value, point.mesh_shape)[field, step]
    dims = {"logits": "RV", "rows": "RE", "x": "TE"}[field]
    return math.prod(_number(n.size[d]) / k for d, k in zip(dims, parts, strict=True))
