"""What a training step costs: forward, backward and update of a point of the phase `train`. Touches no device.

The forward pass of one part of the batch is priced as a prefill of whole sequences with all logits, by
`partitioning.cost.forward`, or by `partitioning.cost.measured` on a machine that was calibrated; from it:

- a matmul's gradient is two matmuls of its size, so that layers cost three forward passes, and a fourth where they are
  run again;
- attention has all L x L scores, twice as many as are seen; above two blocks of queries their scores are made anew once
  more (`models.decoder.attention.causal`);
- collectives are those of the plan, one by one; those of a layer's weights and of their gradients hide under the
  matmuls as far as `estimate` lets gathers hide, all others are exposed;
- the loss reads and writes float32 logits [R, V'] four times [assumed];
- the update reads and writes, of what a chip owns, gradient, weights and two moments in float32.

The constants are those that were fitted to inference; no training step was measured on a TPU.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from toruslab.models.attention_blocks import BLOCK
from toruslab.partitioning.cost.forward import CollectiveCost, Constants, Estimate, constants_of, price
from toruslab.partitioning.cost.measured import Terms, collective_s, splits, terms
from toruslab.partitioning.cost.memory import matmuls, working_bytes
from toruslab.partitioning.cost.sizes import PassSizes
from toruslab.partitioning.cost.traffic import coefficients
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.layouts.ownership import owned
from toruslab.partitioning.plan.plan import Planned, letters, parameters, plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer
from toruslab.partitioning.torus.calibrated import Machine
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.links import permute_rate, rate
from toruslab.partitioning.torus.mesh import AXES, Slice

LOSS_PASSES, UPDATE_PASSES = 4, 7
"""How often the loss reads or writes its float32 logits [assumed]; and the update what it works on."""
LIVE_COPIES = 3
"""[assumed] of what a layer's forward pass holds, how many its backward pass does: values, their gradients, and what
one of them is on its way to; seen in programs for 64 TPU v4."""


def training_estimate(point: Point, constants: Constants | None = None, *, overlap: bool = True) -> Estimate:
    """The cost of one training step.

    Args:
        point: of the phase `train`.
        constants, overlap: see `partitioning.cost.forward.estimate`.

    Returns:
        The estimate; `mfu` counts 6 x parameters x tokens, and no layer twice.

    Raises:
        ValueError: as `partitioning.cost.forward.estimate`.
    """
    chip_ = chip(point.chip)
    measured = training_terms(point, chip_) if chip_.machine else None
    found = _bounds(measured) if measured else _analytic(point, chip_, constants, overlap)
    bounds = {k: found[f"{k}_s"] for k in ("compute", "memory", "collective")}
    rates = chip_.peak_flops_per_s
    peak = rates.get("bf16", rates.get("f32", 0.0))
    held = held_bytes(point, _forward(point))
    return Estimate(
        point=point,
        latency_s=found["latency_s"],
        stack_latency_s=found["stack_latency_s"],
        **{f"{k}_s": v for k, v in bounds.items()},
        bound=max(bounds, key=bounds.__getitem__),
        mfu=6 * point.config.n_params * point.tokens / (found["latency_s"] * point.n_chips * peak),
        hbm_bytes_per_chip=held,
        fits=held <= chip_.hbm_bytes,
        terms=dict(measured.seconds) if measured else {},
        collectives=tuple(
            CollectiveCost(scope=p.scope, kind=p.kind, axes=p.axes, bytes=p.bytes, count=p.count, seconds=s)
            for p, s in found["collectives"]
        ),
    )


def _bounds(measured: Terms[Planned]) -> dict[str, Any]:
    """The seconds of an estimate, of terms that add up."""
    of = measured.seconds
    return {
        "latency_s": measured.latency_s,
        "stack_latency_s": measured.layers_s,
        "compute_s": of["matmul_s"] + of["attention_s"] + of["other_s"],
        "memory_s": of["weights_s"],
        "collective_s": of["collective_s"],
        "collectives": [(p, s) for p, _, s in measured.collectives],
    }


def _forward(point: Point) -> PassSizes:
    """The sizes of the forward pass of one part of the batch, with all logits."""
    rows = point.batch // point.accumulate
    n = PassSizes.of([dataclasses.replace(point, phase="prefill", batch=rows, accumulate=1, remat="layer")])
    return dataclasses.replace(n, size={**n.size, "R": n.size["T"]})


def _analytic(point: Point, chip_: Chip, constants: Constants | None, overlap: bool) -> dict[str, Any]:
    """The seconds of an estimate, by the chip's data sheet."""
    layout, config, mesh, slice_ = point.layout_value, point.config, point.mesh_shape, Slice.parse(point.slice)
    n = _forward(point)
    forward = price(layout, config.block, slice_, mesh, n, constants, overlap=overlap)
    parts = {k: float(np.ravel(v)[0]) for k, v in forward.parts.items()}
    c = constants_of(chip_) if constants is None else constants
    planned = [
        (p, _seconds(p, layout, slice_, chip_, mesh, c, overlap)) for p in plan(layout, config, point.pass_, mesh)
    ]
    rate_ = chip_.hbm_bytes_per_s * c["hbm_efficiency"]
    layers, times, again = point.config.n_layers, point.accumulate, int(point.remat == "layer")
    scores = 2 * point.length / (point.length + 1) * (3 + again + (point.length > 2 * BLOCK))
    attention = parts["attention_s"] * scores
    compute = parts["body_s"] * (3 + again) + attention
    hidden = math.fsum(s * p.count for p, s in planned if _is_weight(p))
    exposed = math.fsum(s * p.count for p, s in planned if of_a_layer(p.scope) and not _is_weight(p))
    outside = math.fsum(s * p.count for p, s in planned if not of_a_layer(p.scope))
    computed = times * layers * compute
    hides = overlap and not point.layout_value.rings
    stack = (math.hypot(computed, hidden) if hides else computed + hidden) + exposed
    loss_bytes = LOSS_PASSES * 4 * _held(point, n, "logits", -1)
    head = times * (3 * (parts["head_compute_s"] ** 4 + parts["head_memory_s"] ** 4) ** 0.25 + loss_bytes / rate_)
    update = UPDATE_PASSES * 4 * _owned_elements(point) / rate_
    one = {k: float(np.ravel(getattr(forward, f"{k}_s"))[0]) for k in ("compute", "memory")}
    return {
        "latency_s": stack + head + outside + update,
        "stack_latency_s": stack,
        "compute_s": times * ((one["compute"] - parts["head_compute_s"]) * (3 + again) + 3 * parts["head_compute_s"]),
        "memory_s": times * ((one["memory"] - parts["head_memory_s"]) * (3 + again) + 3 * parts["head_memory_s"])
        + update,
        "collective_s": hidden + exposed + outside,
        "collectives": planned,
    }


def training_terms(point: Point, chip_: Chip) -> Terms[Planned]:
    """A training step on a chip whose building blocks were measured: all terms add up, as in `measured_cost`.

    Args:
        point: of the phase `train`, with a plan, on as many of the machine's devices.
        chip_: of `toruslab calibrate`; the point's own may be another, such as `cpu`.

    Returns:
        The terms; `flops` counts no layer twice.
    """
    machine = chip_.machine
    assert machine
    layout, config, mesh = point.layout_value, point.config, point.mesh_shape
    n, size, act = _forward(point), _forward(point).size, "f32" if point.weights == "f32" else "bf16"
    forward = terms(layout, config.block, mesh, n, machine)
    of = {k: float(np.ravel(v)[0]) for k, v in forward.seconds.items()}
    scale, split = machine.scale(point.n_chips), splits(layout, mesh)

    def elements(kind: str, elements: float) -> float:
        return float(np.ravel(machine.elements_s(kind, np.float64(elements), "f32"))[0]) * scale

    rows, inner, outer = (
        size["R"] / split["rows", -1][0],
        size["E"] / split["rows", -1][1],
        size["V"] / split["logits", 0][1],
    )
    head = float(np.ravel(machine.matmul_s(rows, inner, outer, act))[0]) * scale
    loss = elements("activation", _held(point, n, "logits", -1)) * LOSS_PASSES / 2
    update = elements("norm", _owned_elements(point)) * UPDATE_PASSES / 2
    planned = plan(layout, config, point.pass_, mesh)
    moved = [_measured_s(p, machine, mesh) * scale for p in planned]
    in_layers = math.fsum(s * p.count for p, s in zip(planned, moved, strict=True) if of_a_layer(p.scope))
    times, layers = point.accumulate, 3 + int(point.remat == "layer")
    seconds = {
        "matmul_s": times * ((of["matmul_s"] - head) * layers + 3 * head),
        "weights_s": times * of["weights_s"] * layers,
        "attention_s": times * of["attention_s"] * layers,
        "other_s": times * (of["other_s"] * layers + loss) + update,
        "collective_s": math.fsum(s * p.count for p, s in zip(planned, moved, strict=True)),
        "dispatch_s": of["dispatch_s"],
    }
    outside = times * (3 * head + loss) + update + seconds["dispatch_s"] + seconds["collective_s"] - in_layers
    return Terms(
        seconds=seconds,
        layers_s=math.fsum(seconds.values()) - outside,
        flops=3 * times * forward.flops,
        memory_bytes=layers * times * forward.memory_bytes,
        collectives=tuple((p, p.bytes, s) for p, s in zip(planned, moved, strict=True)),
    )


def _is_weight(p: Planned) -> bool:
    """Whether it moves a layer's weights, or their gradient within the layers."""
    return of_a_layer(p.scope) and p.scope.rsplit("/", 1)[-1] in ("w_in", "w_kv", "w_out")


def _seconds(
    p: Planned, layout: Layout, slice_: Slice, chip_: Chip, mesh: Any, c: Mapping[str, float], overlap: bool
) -> float:
    """Of one execution."""
    torus = None if chip_.wrap == "switch" else (*slice_.dims, 1, 1)[: max(3, len(slice_.dims))]
    if p.kind == "collective-permute":
        per_byte, hops = permute_rate(p.axes[0], mesh, chip_, torus, ways=layout.rings)
    else:
        per_byte, hops = rate(p.kind, p.axes, mesh, chip_, torus, one_way=_is_weight(p) and overlap)
    start = 0.0 if p.rides else c["collective_s"] + hops * c["hop_s"]
    return p.bytes * per_byte / c["link_efficiency"] + start


def _measured_s(p: Planned, machine: Machine, mesh: Any) -> float:
    """The same from a calibration; along which dimension is not said: columns are assumed."""
    if p.rides:
        return 0.0
    k = math.prod(mesh[AXES.index(a)] for a in p.axes)
    at = "rows" if p.kind == "all-reduce" else "columns"
    return float(np.ravel(collective_s(machine, p.kind, k, at, np.float64(p.bytes), 0, "".join(p.axes)))[0])


def _owned_elements(point: Point) -> int:
    """Parameters whose moments a chip keeps."""
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    size = letters(point.config, point.pass_, point.layout_value, point.mesh_shape)
    return sum(
        _part([size[d] for d in dims], owned(spec, [size[d] for d in dims], sizes), sizes)
        for dims, spec in parameters(point.layout_value, point.config).values()
    )


def _resting_elements(point: Point) -> int:
    """Parameters that a chip holds."""
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    size = letters(point.config, point.pass_, point.layout_value, point.mesh_shape)
    found = parameters(point.layout_value, point.config).values()
    return sum(_part([size[d] for d in dims], spec, sizes) for dims, spec in found)


def _part(shape: list[int], spec: Any, sizes: Mapping[str, int]) -> int:
    parts = (math.prod(sizes[a] for a in axes_of(e)) for e in entries(spec))
    return math.prod(shape) // math.prod(parts)


def _held(point: Point, n: PassSizes, field: str, rung: int) -> float:
    """Elements of an activation that a chip holds, where its ladder begins (0) or ends (-1)."""
    dims = {"logits": "RV", "rows": "RE", "x": "TE"}[field]
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    spec = getattr(point.layout_value, field)[rung]
    parts = [math.prod(sizes[a] for a in axes_of(e)) for e in entries(spec)]
    return math.prod(float(np.ravel(n.size[d])[0]) / k for d, k in zip(dims, parts, strict=True))


def fits(point: Point) -> bool:
    """Whether a training step fits the memory of its chips."""
    return held_bytes(point, _forward(point)) <= chip(point.chip).hbm_bytes


def held_bytes(point: Point, n: PassSizes) -> int:
    """Bytes per chip at the peak of a step.

    All the time: the state (parameters; two moments, and beside bfloat16 master weights, float32, where they are
    owned), the gradients of all layers as the backward pass makes them, of a batch in parts also their sums; each
    layer's input, or all that it made, with the gathered weights or without (`dataflow.REMAT`); and the copy of the
    input projections, laid out for the forward pass, that XLA:TPU makes once a step. Beside these the larger of two:
    the logits, as partial sums, and scattered with their gradient in float32; and a layer's backward pass, of a serial
    layer with what both blocks made.

    Compared with arguments and temporaries of programs for TPU v4 and v5e (docs/training.md).
    """
    parts = held_parts(point, n)
    return int(sum(v for k, v in parts.items() if k not in ("logits", "layer")) + max(parts["logits"], parts["layer"]))


def held_parts(point: Point, n: PassSizes) -> dict[str, float]:
    """The parts of `held_bytes`."""
    layout, config = point.layout_value, point.config
    act = 4 if point.weights == "f32" else 2
    resting, mine = _resting_elements(point), _owned_elements(point)
    found = coefficients(layout, config.block, Slice.parse(point.slice), point.mesh_shape, True)
    used = {
        weight: float(np.ravel(n.size[inner] * n.size[outer])[0]) / math.prod(found.splits[weight, -1]) * act
        for inner, outer, weight, _ in matmuls(config.block)
    }

    def at_rest(weight: str) -> float:
        shapes = [(a, b) for a, b, name, _ in matmuls(config.block) if name == weight]
        whole = sum(float(np.ravel(n.size[a] * n.size[b])[0]) for a, b in shapes)
        return whole / math.prod(found.splits[weight, 0])

    moving = math.fsum(held for weight, held in used.items() if found.gathered[weight])
    without_logits = dataclasses.replace(n, size={**n.size, "R": n.size["B"]})
    blocks = ("parallel",) if config.block == "parallel" else ("parallel", "serial")  # attention's; the larger of both
    zero = np.float64(0)
    working = math.fsum(float(np.ravel(working_bytes(found.splits, b, without_logits, zero))[0]) for b in blocks)
    partial, ends = (_held(point, n, "logits", rung) for rung in (0, -1))
    kept = {"layer": _held(point, n, "x", 0) * act, "weights": working, "none": working + moving}[point.remat]
    return {
        "state": resting * act + mine * (8 if act == 4 else 12),
        "sums": 4.0 * resting if point.accumulate > 1 else 0.0,
        "kept": config.n_layers * kept,
        "logits": act * partial + 2 * 4 * ends + _held(point, n, "rows", -1) * act,
        "layer": LIVE_COPIES * (working + moving),
        "gradients": float(act * resting),
        "relaid": act * config.n_layers * at_rest("w_in"),
    }
