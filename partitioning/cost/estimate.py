"""The analytic cost of points: a forward pass by `partitioning.cost.forward`, a training step by
`partitioning.cost.training`. Touches no device.
"""

from collections.abc import Sequence

from toruslab.partitioning.cost.forward import Constants, Estimate, price
from toruslab.partitioning.cost.sizes import PassSizes
from toruslab.partitioning.cost.training import training_estimate
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import Slice


def estimate(point: Point, constants: Constants | None = None, *, overlap: bool = True) -> Estimate:
    """The cost of one point.

    Args:
        point: what to price.
        constants: the fitted ones (`FITTED`); the chip's own by default.
        overlap: plain layouts gather weights while matmuls run, as the paper's authors did it; otherwise before them,
            on rings that send both ways, as our decoder does it. Of no effect on layouts with rings: these are priced
            as they run.

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
    """The cost of many points, in their order; points that share layout, slice and mesh are worked out together."""
    together: dict[tuple, list[int]] = {}
    found: dict[int, Estimate] = {}
    for i, p in enumerate(points):
        if p.phase == "train":
            found[i] = training_estimate(p, constants, overlap=overlap)
            continue
        config = p.config
        key = (p.slice, p.mesh_shape, p.layout_value, config.block, config.gated)
        together.setdefault(key, []).append(i)
    for (slice_, mesh, layout, block, _), members in together.items():
        group = [points[i] for i in members]
        numbers = PassSizes.of(group)
        cost = price(layout, block, Slice.parse(slice_), mesh, numbers, constants, overlap=overlap, detail=True)
        for row, i in enumerate(members):
            found[i] = cost.at(row, points[i])
    return [found[i] for i in range(len(points))]
