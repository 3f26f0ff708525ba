"""The fit of the cost model's five constants to published latencies, and its error on latencies it has not seen."""

from collections.abc import Sequence

import numpy as np

from toruslab.partitioning.cost.estimate import estimate_many
from toruslab.partitioning.cost.forward import FITTED, Constants
from toruslab.partitioning.published.papers import Published, answer

SOFT = 0.05
"""Log error at which the soft-L1 loss of the fit turns from quadratic to linear."""
UNITS = np.array([1.0, 1.0, 1.0, 1e-6, 1e-6])
LOW, HIGH = np.array([0.3, 0.3, 0.3, 0.0, 0.0]), np.array([1.5, 1.5, 1.5, np.inf, np.inf])
START = (0.8, 0.8, 1.0, 5.0, 1.0)


def fit(published: Sequence[Published], start: Constants | None = None) -> dict[str, float]:
    """The five constants that minimise the log errors under a soft-L1 loss of scale `SOFT`.

    Damped Gauss-Newton, with the loss as weights. The constants stay within `LOW` and `HIGH`.

    Args:
        published: the latencies to fit.
        start: the constants to start from; `START` by default.

    Returns:
        The constants by name: `partitioning.torus.chip.FITTED`.
    """
    points = [p.point for p in published]
    wanted = np.log([p.compared_s for p in published])
    of_stack = np.array([p.stack_s is not None for p in published])

    def residuals(x: np.ndarray) -> np.ndarray:
        found = estimate_many(points, dict(zip(FITTED, x * UNITS, strict=True)))
        both = np.array([(e.latency_s, e.stack_latency_s) for e in found])
        return np.log(np.where(of_stack, both[:, 1], both[:, 0])) - wanted

    def loss(r: np.ndarray) -> float:
        return float(np.sum(np.sqrt(1 + (r / SOFT) ** 2) - 1))

    x = np.array(START) if start is None else np.array([start[name] for name in FITTED]) / UNITS
    damping, r = 1e-3, residuals(x)
    for _ in range(200):
        step = 1e-6 * np.maximum(x, 0.1)
        J = np.stack([(residuals(x + h) - r) / h[i] for i, h in enumerate(np.diag(step))], axis=1)
        weight = 1 / np.sqrt(1 + (r / SOFT) ** 2)
        slope, curve = J.T @ (weight * r), J.T @ (weight[:, None] * J)
        free = ~((x <= LOW) & (slope > 0) | (x >= HIGH) & (slope < 0))
        while damping < 1e9:
            damped = (curve + damping * np.diag(np.diag(curve)))[np.ix_(free, free)]
            tried = x.copy()
            tried[free] -= np.linalg.solve(damped, slope[free])
            tried = np.clip(tried, LOW, HIGH)
            r_tried = residuals(tried)
            if loss(r_tried) <= loss(r):
                break
            damping *= 4
        else:
            break
        moved, x, r, damping = np.max(np.abs(tried - x)), tried, r_tried, damping / 8
        if moved < 1e-6:
            break
    return dict(zip(FITTED, map(float, x * UNITS), strict=True))


def leave_one_out(published: Sequence[Published], fitted: Constants) -> list[float]:
    """The relative error of each latency under constants that were fitted on all the others."""
    others = [[p for p in published if p is not left_out] for left_out in published]
    return [answer(p, fit(rest, fitted))["error"] for p, rest in zip(published, others, strict=True)]
