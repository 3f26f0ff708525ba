"""The analytic cost of points: the one function that commands and tests call, and the record that it returns.

How a forward pass is priced is in `partitioning.cost.forward`, a training step in `partitioning.cost.training`.
Touches no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toruslab.partitioning.cost.forward import Constants, Cost, price
from toruslab.partitioning.cost.sizes import PassSizes
from toruslab.partitioning.cost.traffic import CollectiveCost
from toruslab.partitioning.cost.training import price_training
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import Slice


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one pass of a point costs.

    Args:
        point: what was priced.
        latency_s: seconds of the whole pass, without dispatch and without the arithmetic of sampling. With several
            steps in a call: seconds of one step at their mean context, which is exact where the cost grows linearly
            with the context. The call takes `steps_per_call` times that.
        stack_latency_s: seconds of the layers alone, as in the paper's figures.
        compute_s, memory_s, collective_s: seconds of each alone. They overlap, so they do not add up to the latency.
        bound: the largest of the three.
        mfu: 2 x parameters x tokens over latency x chips x peak, as the paper counts: padding is left out, but the
            embedding is counted for every token, so that a model of few layers can pass 1. In training 6 x.
        hbm_bytes_per_chip: weights, KV cache, and the activations and gathered weights that are alive at the peak.
        fits: whether that is within the chip's memory.
        collectives: the plan's, in order.
        terms: seconds that add up to the latency, by `partitioning.cost.measured.TERMS`; of a calibrated chip only.
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
            "collectives": [c.to_json() for c in self.collectives],
        }


def estimate(point: Point, constants: Constants | None = None, *, overlap: bool = True) -> Estimate:
    """The cost of one point.

    Args:
        point: what to price.
        constants: the fitted ones (`partitioning.torus.chip.FITTED`); the chip's own by default.
        overlap: plain layouts gather weights while matmuls run, as the paper's authors did it. Otherwise they gather
            before the matmuls, on rings that send both ways, as our decoder does it. Layouts with rings are priced as
            they run, whatever this is.

    Raises:
        ValueError: a chip without a data sheet (`cpu`, `gpu`), a slice that it does not have, or `auto`, which has no
            plan.

    Example: PaLM 540B on 64 TPU v4 chips, a decode step of 64 sequences; 28.4 ms were measured.
        >>> found = estimate(Point(model="palm-540b-h64", slice="v4:4x4x4", phase="decode", batch=64, context=2048,
        ...                        layout="ws2d", attention="batch", weights="int8"))
        >>> abs(found.latency_s / 28.4e-3 - 1) < 0.05
        True
    """
    return estimate_many([point], constants, overlap=overlap)[0]


def estimate_many(
    points: Sequence[Point], constants: Constants | None = None, *, overlap: bool = True
) -> list[Estimate]:
    """The cost of many points, in their order. Points that share layout, slice and mesh are priced together."""
    together: dict[tuple, list[int]] = {}
    found: dict[int, Estimate] = {}
    for i, p in enumerate(points):
        if p.phase == "train":
            found[i] = _estimate(p, price_training(p, constants, overlap=overlap), 0)
            continue
        config = p.config
        key = (p.slice, p.mesh_shape, p.layout_value, config.block, config.gated)
        together.setdefault(key, []).append(i)
    for (slice_, mesh, layout, block, _), members in together.items():
        sizes = PassSizes.of([points[i] for i in members])
        cost = price(layout, block, Slice.parse(slice_), mesh, sizes, constants, overlap=overlap, detail=True)
        for row, i in enumerate(members):
            found[i] = _estimate(points[i], cost, row)
    return [found[i] for i in range(len(points))]


def _estimate(point: Point, cost: Cost, row: int) -> Estimate:
    """One of a group of passes that were priced together."""

    def pick(array: Any) -> float:
        return float(array[row]) if isinstance(array, np.ndarray) and array.ndim else float(array)

    bounds = {k: pick(getattr(cost, f"{k}_s")) for k in ("compute", "memory", "collective")}
    held = int(pick(cost.hbm_bytes_per_chip))
    return Estimate(
        point=point,
        latency_s=pick(cost.latency_s),
        stack_latency_s=pick(cost.stack_latency_s),
        **{f"{k}_s": v for k, v in bounds.items()},
        bound=max(bounds, key=bounds.__getitem__),
        mfu=pick(cost.mfu),
        hbm_bytes_per_chip=held,
        fits=held <= cost.hbm_bytes,
        terms={k: pick(v) for k, v in cost.terms.items()},
        collectives=tuple(
            CollectiveCost(
                scope=c.scope,
                kind=c.kind,
                axes=c.axes,
                in_layer=c.in_layer,
                bytes=round(pick(c.bytes)),
                count=int(pick(c.count)),
                seconds=pick(c.seconds),
            )
            for c in cost.collectives
        ),
    )
