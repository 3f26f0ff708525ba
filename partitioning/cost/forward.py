"""What a forward pass costs: seconds, bytes and fit, from the plan and the chip's figures. Touches no device.

The collectives are those of the plan (`partitioning.plan`). Matmuls, attention and memory follow from the same specs.
What goes beyond the data sheet is decided here and nowhere else:

- The multiply-adds of a matmul and its memory traffic (weights, and activations in and out) overlap, but not perfectly.
  Their 4-norm is taken, which is the larger of the two unless they are close.
- A collective over several axes runs one axis after the other, each on that axis' ring (`links.rate`).
- Weights are gathered while the matmuls run, on rings that send one way, as looped einsums do: the 2-norm of both.
- All other collectives are exposed.
- An all-to-all sends K messages of 0.1 us each [assumed].

Layouts with rings are priced as they run:

- A collective overlaps its matmul except for the last piece. What that does not hide is exposed.
- Each of its permutes has one link, or two on a closed ring both ways, and a hop. All of them together have the fixed
  cost of one collective [assumed].
- The pieces of the matmul each read their rows again, or write and read float32 sums again.
- The constants are those of plain layouts. They were fitted as if the authors had looped no activations, which they
  did: only the difference to the plain layout means something.

Layouts that prefetch gather their weights a layer ahead. The gathers hide like the authors', on rings both ways.

Five constants are fitted, on the 28 rows of Pope et al. 2022, Tables 2 and 3 and Figure B.1, for the chip v4 (its file
holds them). Chips without fitted constants take v4's, which is an assumption.

A chip that `toruslab calibrate` has measured is priced from its samples instead (`partitioning.cost.measured`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toruslab.partitioning.cost.measured import terms
from toruslab.partitioning.cost.memory import cache_tile, held_bytes
from toruslab.partitioning.cost.sizes import PassSizes, matmuls
from toruslab.partitioning.cost.traffic import Coefficients, CollectiveCost, coefficients, n_messages
from toruslab.partitioning.layouts.layout import Layout
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
"""The fitted constants by name: `partitioning.torus.chip.FITTED`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the passes of a group cost, each field as an array with one number per pass (or as one number).

    Args:
        latency_s, stack_latency_s, compute_s, memory_s, collective_s, mfu, hbm_bytes_per_chip: see
            `partitioning.cost.estimate.Estimate`.
        hbm_bytes: memory of the chip.
        collectives: of the plan, in order; empty unless they were asked for.
        terms: seconds that add up to the latency; of a calibrated chip only.
        parts: seconds before they are joined, for passes that are not uniform; not of a calibrated chip. Of one layer:
            `body_s` (matmuls and vector work), `attention_s` (its multiply-adds), `converted_s` (an int8 cache's
            conversion), `cache_s` (reading the cache), `hidden_s` (weights gathered under the matmuls), `open_s`
            (collectives that nothing hides). Of the pass: `head_compute_s` (unembedding: multiply-adds) and
            `head_memory_s` (its table read, and embedding's rows).
    """

    latency_s: Any
    stack_latency_s: Any
    compute_s: Any
    memory_s: Any
    collective_s: Any
    mfu: Any
    hbm_bytes_per_chip: Any
    hbm_bytes: float
    collectives: tuple[CollectiveCost, ...]
    terms: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)


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
    n: PassSizes,
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
        n: the sizes of the passes.
        constants, overlap: see `partitioning.cost.estimate.estimate`.
        detail: list the collectives, too.
    """
    known = coefficients(layout, block, slice_, mesh, overlap)
    chip_ = chip(slice_.chip)
    if chip_.machine:
        return _measured(known, n, chip_)
    c = constants_of(chip_) if constants is None else constants
    size = n.size
    rates = chip_.peak_flops_per_s
    bf16 = rates.get("bf16", rates.get("f32", 0.0))
    peak = np.where(n.act == 4, rates.get("f32", bf16 / 6), bf16)
    flops_rate, hbm_rate = peak * c["matmul_efficiency"], chip_.hbm_bytes_per_s * c["hbm_efficiency"]

    def split(field: str, step: int = -1) -> tuple[int, ...]:
        return known.splits[field, step]

    # matmuls of one layer: rows, inner and outer dimension of one chip
    suffixes = [""] if block == "parallel" else ["", "_mlp"]
    compute = memory = matmul = 0.0
    hides: dict[Any, Any] = {}
    for inner, outer, weight, rows in matmuls(block):
        (a, b), t = split(weight), size["T"] / split(rows)[0]
        here = size[inner] * size[outer] / (a * b)
        taken = 2 * t * here / flops_rate + np.where(n.weight == 1, here * CONVERSION_FLOPS / peak, 0)
        moved = (here * n.weight + t * (size[inner] / a + size[outer] / b) * n.act) / hbm_rate
        under = (weight, "_mlp" if "_mlp" in inner + outer else "")
        if pieces := known.looped.get(under):
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
    width = cache_tile(chip_)[1]
    stored = np.ceil(size["Q"] / width) * width
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
    taken_s: dict[Any, Any] = {"outside": 0.0, "exposed": 0.0, "hidden": 0.0} | dict.fromkeys(known.looped, 0.0)
    for (where, dtype, dims), s_per_element in known.moving.items():
        seconds = s_per_element / c["link_efficiency"] * element[dtype]
        for dim in dims:
            seconds = seconds * size[dim]
        taken_s[where] = taken_s[where] + seconds
    for where, (count, hops, messages) in known.fixed.items():
        taken_s[where] = taken_s[where] + count * c["collective_s"] + hops * c["hop_s"] + messages * MESSAGE_S
    outside = taken_s["outside"]
    total = outside + n.n_layers * sum(seconds for where, seconds in taken_s.items() if where != "outside")
    left = sum(np.maximum(taken_s[under] - hides[under], 0.0) for under in known.looped)
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

    return Cost(
        latency_s=latency,
        stack_latency_s=stack,
        compute_s=compute,
        memory_s=memory,
        collective_s=total,
        mfu=2 * n.n_params * size["T"] / (latency * math.prod(mesh) * bf16),
        hbm_bytes_per_chip=held_bytes(known, n),
        hbm_bytes=chip_.hbm_bytes,
        collectives=_listed(known, c, n, element) if detail else (),
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


def _measured(known: Coefficients, n: PassSizes, chip_: Chip) -> Cost:
    """The same from a machine that was measured."""
    assert chip_.machine
    found = terms(known.layout, known.block, known.mesh, n, chip_.machine)
    rates = chip_.peak_flops_per_s
    peak = rates.get("bf16", rates.get("f32"))
    return Cost(
        latency_s=found.latency_s,
        stack_latency_s=found.layers_s,
        **found.bounds(),
        mfu=2 * n.n_params * n.size["T"] / (found.latency_s * math.prod(known.mesh) * peak),
        hbm_bytes_per_chip=held_bytes(known, n),
        hbm_bytes=chip_.hbm_bytes,
        collectives=found.collectives,
        terms=found.seconds,
    )


def _listed(known: Coefficients, c: Constants, n: PassSizes, element: Mapping[str, Any]) -> tuple[CollectiveCost, ...]:
    """Every collective with its bytes and seconds."""
    found = []
    for t, per_byte, hops in known.rates:
        n_bytes = t.factor * element[t.dtype]
        for dim in t.dims:
            n_bytes = n_bytes * n.size[dim]
        start = t.starts * c["collective_s"] + hops * c["hop_s"] + n_messages(t) * MESSAGE_S
        found.append(t.cost(n_bytes, n_bytes * per_byte / c["link_efficiency"] + start, n.n_layers))
    return tuple(found)
