"""What a pass costs: seconds, bytes and fit of any point, from its plan and the chip's figures. Touches no device.

The collectives are the layout's own (`partitioning.plan.plan`); matmuls, attention and memory follow from the same
specs. What is beyond the data sheet is here and nowhere else:

- a matmul's multiply-adds and its memory traffic (weights, and activations in and out) overlap, not perfectly: the
  4-norm of the two, which is their maximum unless they are close;
- a collective over several axes runs axis after axis on that axis' ring (`interconnect.rate`);
- weights are gathered while the matmuls run, on rings that send one way, as looped einsums do: the 2-norm of both;
- of a layout with rings, instead, what runs is priced: a looped collective hides under its own matmul, as much of it
  as is done while something is on its way (all but the last piece), and the rest is exposed. Its sends have one link
  each, or two on a closed ring both ways round, and a hop each; all together they have the fixed cost of one collective
  [assumed]. The pieces of its matmul read their rows, or write and read float32 sums, each anew. The constants are
  those of plain layouts, fitted as if the authors had looped no activations, which they did: only the difference to
  the plain layout says something;
- of a layout that prefetches, weights that are gathered a layer ahead hide like the authors', on rings both ways;
- all other collectives are exposed;
- an all-to-all sends K messages, 0.1 us each [assumed].

A chip that `toruslab calibrate` has measured is priced from its samples instead (`partitioning.cost.measured`).

Five constants are fitted, on the 28 rows of Pope et al. 2022, Tables 2 and 3 and Figure B.1, for the chip v4 (its file
holds them); chips without fitted constants take v4's, which is an assumption. All estimates are of groups of points
with one layout and mesh at once, vectorised over everything else.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toruslab.partitioning.cost.measured import Moved, terms
from toruslab.partitioning.cost.memory import held_bytes, matmuls
from toruslab.partitioning.cost.sizes import PassSizes
from toruslab.partitioning.cost.traffic import Coefficients, Entry, coefficients
from toruslab.partitioning.layouts.layout import Axes, Layout
from toruslab.partitioning.layouts.moves import LANES, SUBLANES
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import FITTED, Chip, chip
from toruslab.partitioning.torus.mesh import Shape, Slice

MESSAGE_S = 1e-7
"""[assumed] what each of the K messages of an all-to-all costs its sender."""
ATTENTION_SHARE = 0.25
"""[assumed] share of the matmuls' rate that attention's small products and its softmax reach."""
CONVERSION_FLOPS = 64
"""[derived] what the matrix units could do while the vector unit turns one int8 number into bf16: on v4, 2 cores of
1024 lanes x 2 numbers at 1.05 GHz convert 4.3e12 a second, a 64th of 275e12."""
Constants = Mapping[str, float]
PARTS = {
    "body_s": "of one layer: matmuls and vector work",
    "attention_s": "of one layer: attention's multiply-adds",
    "converted_s": "of one layer: an int8 cache's conversion",
    "cache_s": "of one layer: reading the cache",
    "hidden_s": "of one layer: weights gathered under the matmuls",
    "open_s": "of one layer: collectives that nothing hides",
    "head_compute_s": "unembedding: multiply-adds",
    "head_memory_s": "unembedding: its table read, and embedding's rows",
}


@dataclass(frozen=True, kw_only=True)
class CollectiveCost:
    """One collective of the plan: bytes that one chip receives and seconds, of one execution; `count` a pass."""

    scope: str
    kind: str
    axes: Axes
    bytes: int
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one pass of a point costs.

    Args:
        latency_s: the whole pass, without dispatch and sampling's arithmetic; of several steps in a call one step, at
            their mean context (exact where the cost grows evenly with it): the call takes `steps_per_call` times that.
        stack_latency_s: the layers alone, as the paper's figures have it.
        compute_s, memory_s, collective_s: each if it were alone; they overlap as the module says.
        bound: the largest of the three.
        mfu: 2 x parameters x tokens over latency x chips x peak, as the paper counts: padding left out, but the
            embedding counted for every token, so that a model of few layers can pass 1.
        hbm_bytes_per_chip: weights, KV cache, and the activations and gathered weights that live at once.
        fits: whether that is within the chip's memory.
        terms: seconds that add up to the latency, by `measured_cost.TERMS`; of a calibrated chip only.
    """

    point: Point
    latency_s: float
    stack_latency_s: float
    compute_s: float
    memory_s: float
    collective_s: float
    bound: str
    mfu: float
    hbm_bytes_per_chip: int
    fits: bool
    collectives: tuple[CollectiveCost, ...]
    terms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields of `toruslab estimate`."""
        fields = {k: v for k, v in vars(self).items() if k not in ("point", "collectives", "terms")}
        fields |= {"terms": dict(self.terms)} if self.terms else {}
        return {
            "point": self.point.to_json(),
            "source": "analytic",
            **fields,
            "collectives": [vars(c) | {"axes": list(c.axes)} for c in self.collectives],
        }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimates of a group, as arrays (see `Estimate`)."""

    latency_s: Any
    stack_latency_s: Any
    compute_s: Any
    memory_s: Any
    collective_s: Any
    mfu: Any
    hbm_bytes_per_chip: Any
    hbm_bytes: float
    collectives: tuple[tuple[Entry | Moved, Any, Any], ...]
    n_layers: Any
    terms: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Seconds before they are joined, for passes that are not uniform: `PARTS`; not of a calibrated chip."""

    def at(self, row: int, point: Point) -> Estimate:
        """One of them."""

        def pick(array: Any) -> float:
            return float(array[row]) if np.ndim(array) else float(array)

        bounds = {k: pick(getattr(self, f"{k}_s")) for k in ("compute", "memory", "collective")}
        held = int(pick(self.hbm_bytes_per_chip))
        return Estimate(
            point=point,
            latency_s=pick(self.latency_s),
            stack_latency_s=pick(self.stack_latency_s),
            **{f"{k}_s": v for k, v in bounds.items()},
            bound=max(bounds, key=bounds.__getitem__),
            mfu=pick(self.mfu),
            hbm_bytes_per_chip=held,
            fits=held <= self.hbm_bytes,
            terms={k: pick(v) for k, v in self.terms.items()},
            collectives=tuple(
                CollectiveCost(
                    scope=entry.scope,
                    kind=entry.kind,
                    axes=entry.axes,
                    bytes=round(pick(n_bytes)),
                    count=int(pick(self.n_layers)) if entry.in_layer else 1,
                    seconds=pick(taken),
                )
                for entry, n_bytes, taken in self.collectives
            ),
        )


def constants_of(chip_: Chip) -> dict[str, float]:
    """The chip's fitted constants; or v4's, with no link faster than its own data sheet."""
    if chip_.fitted:
        return {name: chip_.fitted[name] for name in FITTED}
    return {**chip("v4").fitted, "link_efficiency": min(1.0, chip("v4").fitted["link_efficiency"])}


def price(
    layout: Layout,
    block: str,
    slice_: Slice,
    mesh: Shape,
    numbers: PassSizes,
    constants: Constants | None = None,
    *,
    overlap: bool = True,
    detail: bool = False,
) -> Cost:
    """The cost of many passes of one layout on one mesh.

    Args:
        layout: made for the mesh.
        block: `parallel` or `serial`.
        slice_: chip and torus.
        mesh: extents.
        numbers: everything else, as arrays.
        constants, overlap: see `estimate`.
        detail: list the collectives, too.
    """
    plan = coefficients(layout, block, slice_, mesh, overlap)
    chip_ = chip(slice_.chip)
    if chip_.machine:
        return _measured(plan, layout, block, mesh, numbers, chip_)
    c = constants_of(chip_) if constants is None else constants
    n, size = numbers, numbers.size
    n_chips = math.prod(mesh)
    rates = chip_.peak_flops_per_s
    bf16 = rates.get("bf16", rates.get("f32", 0.0))
    peak = np.where(n.act == 4, rates.get("f32", bf16 / 6), bf16)
    flops_rate, hbm_rate = peak * c["matmul_efficiency"], chip_.hbm_bytes_per_s * c["hbm_efficiency"]

    def split(field: str, rung: int = -1) -> tuple[int, ...]:
        return plan.splits[field, rung]

    # matmuls of one layer: rows here, inner and outer dimension here
    suffixes = [""] if block == "parallel" else ["", "_mlp"]
    compute = memory = matmul = 0.0
    hides: dict[Any, Any] = {}
    for inner, outer, weight, rows in matmuls(block):
        (a, b), t = split(weight), size["T"] / split(rows)[0]
        here = size[inner] * size[outer] / (a * b)
        taken = 2 * t * here / flops_rate + np.where(n.weight == 1, here * CONVERSION_FLOPS / peak, 0)
        moved = (here * n.weight + t * (size[inner] / a + size[outer] / b) * n.act) / hbm_rate
        under = (weight, "_mlp" if "_mlp" in inner + outer else "")
        if pieces := plan.looped.get(under):
            again = (pieces.inputs - 1) * size[inner] / a * n.act + 2 * pieces.sums * size[outer] / b * 4
            moved = moved + t * again / hbm_rate
        compute, memory = compute + taken, memory + moved
        both = (taken**4 + moved**4) ** 0.25
        matmul = matmul + both
        hides[under] = both * pieces.hides if pieces else 0.0

    # the vector unit's passes over the residual stream: a norm reads and writes, a sum reads two and writes one
    streams = 2 * size["T"] * size["E"] / math.prod(split("x")) + 3 * size["T"] * size["E"] / math.prod(split("x", 0))
    vector = len(suffixes) * streams * n.act / hbm_rate
    memory = memory + vector

    # attention of one layer: new tokens against what is cached, on average half of their own pass
    b_split, k_split = split("cache")[0], split("cache")[1]
    seen = n.first + (n.length + 1) / 2
    attention_flops = 4 * size["T"] / b_split * seen * size["H"] / split("q")[1] * size["Q"]
    tile = _tile(chip_)
    stored = np.ceil(size["Q"] / tile[1]) * tile[1]
    cached = 2 * size["B"] / b_split * size["K"] / k_split
    cache_bytes = cached * n.cached_bytes(stored)
    # the vector unit turns int8 into bf16 beside the matrix units
    converted_s = np.where(n.int8_cache, cached * stored * (n.first + n.length) * CONVERSION_FLOPS / peak, 0)
    products_s = attention_flops / (flops_rate * ATTENTION_SHARE)
    attention_s = np.maximum(products_s, converted_s)
    cache_s = cache_bytes * (n.first + n.length) / hbm_rate
    compute, memory = compute + attention_s, memory + cache_s
    attention = np.maximum(attention_s, cache_s)

    # collectives: those outside the layers, those in a layer that are exposed, and those hidden under its matmuls
    element = {"act": n.act, "weight": n.weight, "f32": 4.0, "i32": 4.0}
    taken_s: dict[Any, Any] = {"outside": 0.0, "exposed": 0.0, "hidden": 0.0} | dict.fromkeys(plan.looped, 0.0)
    for (where, dtype, dims), s_per_element in plan.moving.items():
        seconds = s_per_element / c["link_efficiency"] * element[dtype]
        for dim in dims:
            seconds = seconds * size[dim]
        taken_s[where] = taken_s[where] + seconds
    for where, (count, hops, messages) in plan.fixed.items():
        taken_s[where] = taken_s[where] + count * c["collective_s"] + hops * c["hop_s"] + messages * MESSAGE_S
    outside = taken_s["outside"]
    total = outside + n.n_layers * sum(seconds for where, seconds in taken_s.items() if where != "outside")
    left = sum(np.maximum(taken_s[under] - hides[under], 0.0) for under in plan.looped)
    stack = n.n_layers * (np.hypot(matmul + vector + attention, taken_s["hidden"]) + taken_s["exposed"] + left)
    # embedding and unembedding: look-ups read T rows, logits read the table once
    v, e_ = split("table")
    table = size["V"] * size["E"] / (v * e_)
    r_here = size["R"] / split("rows")[0]
    head_compute = 2 * r_here * size["E"] / split("rows")[1] * size["V"] / split("logits", 0)[1] / flops_rate
    head_memory = (table * n.act + size["T"] / split("embed", 0)[0] * size["E"] / e_ * 2 * n.act) / hbm_rate
    compute = compute * n.n_layers + head_compute
    memory = memory * n.n_layers + head_memory
    latency = stack + (head_compute**4 + head_memory**4) ** 0.25 + outside

    tokens = size["T"]
    return Cost(
        latency_s=latency,
        stack_latency_s=stack,
        compute_s=compute,
        memory_s=memory,
        collective_s=total,
        mfu=2 * n.n_params * tokens / (latency * n_chips * bf16),
        hbm_bytes_per_chip=held_bytes(plan.splits, plan.gathered, block, n, tile, together=layout.prefetch),
        hbm_bytes=chip_.hbm_bytes,
        collectives=_listed(plan, c, size, element) if detail else (),
        n_layers=n.n_layers,
        parts={
            "body_s": matmul + vector,
            "attention_s": products_s,
            "converted_s": converted_s,
            "cache_s": cache_s,
            "hidden_s": taken_s["hidden"],
            "open_s": taken_s["exposed"] + left,
            "head_compute_s": head_compute,
            "head_memory_s": head_memory,
        },
    )


def _tile(chip_: Chip) -> tuple[int, int]:
    """Positions and numbers of a head's width that a cache is stored in: a TPU's tiles are whole."""
    return (1, 1) if chip_.wrap == "switch" else (SUBLANES, LANES)


def _measured(plan: Coefficients, layout: Layout, block: str, mesh: Shape, n: PassSizes, chip_: Chip) -> Cost:
    """The same from a machine that was measured."""
    assert chip_.machine
    found = terms(layout, block, mesh, n, chip_.machine)
    seconds, latency = found.seconds, found.latency_s
    rates = chip_.peak_flops_per_s
    peak = rates.get("bf16", rates.get("f32"))
    return Cost(
        latency_s=latency,
        stack_latency_s=found.layers_s,
        compute_s=seconds["matmul_s"] + seconds["attention_s"] + seconds["other_s"],
        memory_s=seconds["weights_s"],
        collective_s=seconds["collective_s"],
        mfu=2 * n.n_params * n.size["T"] / (latency * math.prod(mesh) * peak),
        hbm_bytes_per_chip=held_bytes(plan.splits, plan.gathered, block, n, _tile(chip_), together=layout.prefetch),
        hbm_bytes=chip_.hbm_bytes,
        collectives=found.collectives,
        n_layers=n.n_layers,
        terms=seconds,
    )


def _listed(plan: Coefficients, c: Constants, size: Mapping[str, Any], element: Mapping[str, Any]) -> tuple:
    """Every collective with its bytes and seconds."""
    found = []
    for e in plan.entries:
        n_bytes = e.factor * element[e.dtype]
        for dim in e.dims:
            n_bytes = n_bytes * size[dim]
        messages = e.n_group if e.kind == "all-to-all" else 0
        start = e.starts * c["collective_s"] + e.hops * c["hop_s"] + messages * MESSAGE_S
        found.append((e, n_bytes, n_bytes * e.s_per_byte / c["link_efficiency"] + start))
    return tuple(found)
