"""How to partition a transformer decoder over a 3D torus of chips, before anybody rents the slice.

One `Point` (model, slice, phase, sizes, layout) is the question; each function below answers it in its own way:

- `estimate(point)`: its analytic cost, from the layout's plan and the chip's data sheet. Needs no device.
- `explain(point)`: one layer's ladder of collectives, with bytes and seconds for each step. Needs no device.
- `compile(point)`: what XLA makes of its step, matched against the plan; also for TPU slices that are not attached.
- `plan(...)`: layouts, meshes and slices ranked for a goal, with the refused ones and the reason. Needs no device.

`LAYOUTS`, `layout(name, ...)` and `load_model(name_or_path)` give the values that a point names.

Each name is imported from its room when it is first used: `import toruslab` itself loads neither JAX nor NumPy.

Example: PaLM 540B on 64 TPU v4 chips, one decode step of 64 sequences. 28.4 ms were measured.
    >>> import toruslab
    >>> point = toruslab.Point(model="palm-540b-h64", slice="v4:4x4x4", phase="decode", batch=64, context=2048,
    ...                        layout="ws2d", attention="batch", weights="int8")
    >>> f"{toruslab.estimate(point).latency_s * 1e3:.1f} ms"
    '28.4 ms'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toruslab.models.presets import model as load_model
    from toruslab.models.programs.compiled import evidence as compile
    from toruslab.partitioning.cost.estimate import estimate
    from toruslab.partitioning.cost.explain import steps as explain
    from toruslab.partitioning.cost.planner import plan
    from toruslab.partitioning.layouts.catalogue import LAYOUTS
    from toruslab.partitioning.layouts.variants import layout
    from toruslab.partitioning.plan.point import Point

__version__ = "0.2.0"
__all__ = ["LAYOUTS", "Point", "__version__", "compile", "estimate", "explain", "layout", "load_model", "plan"]

_ROOMS = {
    "LAYOUTS": "partitioning.layouts.catalogue:LAYOUTS",
    "Point": "partitioning.plan.point:Point",
    "compile": "models.programs.compiled:evidence",
    "estimate": "partitioning.cost.estimate:estimate",
    "explain": "partitioning.cost.explain:steps",
    "layout": "partitioning.layouts.variants:layout",
    "load_model": "models.presets:model",
    "plan": "partitioning.cost.planner:plan",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        room, _, defined = _ROOMS[name].partition(":")
        value = getattr(importlib.import_module(f"toruslab.{room}"), defined)
        globals()[name] = value
        return value
    import difflib

    near = difflib.get_close_matches(name, __all__, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(__all__)}"
    raise AttributeError(f"module 'toruslab' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return __all__
