"""The options that spell one point on a command line, for the commands that answer about one."""

import argparse
from collections.abc import Mapping
from typing import Any

from toruslab.benchmarks.runs.options import InputError
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.plan.point import CACHES, PHASES, WEIGHTS, Point

FIELDS = (
    *("model", "slice", "mesh", "phase", "batch", "length", "context", "layout", "attention", "weights"),
    *("cache", "steps_per_call", "accumulate", "remat"),
)


def add(p: argparse.ArgumentParser, *, model: str, slice_: str, batch: int, context: int, weights: str) -> None:
    """Adds the options, with a command's own defaults; `context` is decode's, prefill's is 0."""
    p.add_argument("point", nargs="?", help="a JSON point; or use the options")
    p.add_argument("--model", default=model, help="preset or config.json (default: %(default)s)")
    p.add_argument("--slice", default=slice_, help="CHIP:DIMS (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--phase", default="decode", help=", ".join(PHASES))
    p.add_argument("--batch", type=int, default=batch, help="default: %(default)s")
    p.add_argument("--length", type=int, default=1, help="default: %(default)s")
    p.add_argument("--context", type=int, help=f"default: {context} in decode, 0 in prefill")
    p.add_argument("--layout", default="ws2d", help=f"{', '.join(LAYOUTS)}; with variants: ws2d+lean")
    p.add_argument("--attention", default="batch", help="heads, batch, or batch-x, batch-xy...: over some of the axes")
    p.add_argument("--weights", default=weights, help=", ".join(WEIGHTS))
    p.add_argument("--cache", help=f"{', '.join(CACHES)}; default: a KV cache of the activations' dtype")
    p.add_argument(
        "--steps-per-call",
        type=int,
        default=1,
        metavar="N",
        help="decode steps in one call of the program; figures are of one (default: 1)",
    )
    p.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="train: a step's batch in N parts (default: 1)"
    )
    p.add_argument(
        "--remat",
        default="layer",
        help=f"train: what is worked out again for gradients, of {', '.join(REMAT)} (default: %(default)s)",
    )
    p.set_defaults(decode_context=context, point_defaults={name: p.get_default(name) for name in FIELDS})


def read(options: argparse.Namespace) -> Point:
    """The point that was asked for.

    Raises:
        InputError: what the point refuses.
    """
    if options.point is not None:
        refuse_beside("a JSON point", options)
    fields = {k: getattr(options, k) for k in FIELDS if getattr(options, k) is not None}
    fields.setdefault("context", options.decode_context if options.phase == "decode" else 0)
    try:
        return Point.from_json(fields if options.point is None else options.point)
    except ValueError as error:
        raise InputError(str(error)) from None


def per_call(point: Mapping[str, Any]) -> str:
    """For a heading: how many steps a call takes, where it is not one; how a training step goes about its batch."""
    steps, parts = point.get("steps_per_call", 1), point.get("accumulate", 1)
    said = f"{steps} steps a call (figures are of one), " if steps > 1 else ""
    said += f"in {parts} parts, " if parts > 1 else ""
    again = point.get("remat", "layer")
    return said + (f"remat {again}, " if again != "layer" else "")


def cached(point: Mapping[str, Any]) -> str:
    """After the weights: what the cache is kept as, where that is not the activations' dtype."""
    return f", {point['cache']} cache" if point.get("cache") else ""


def refuse_beside(what: str, options: argparse.Namespace) -> None:
    """Refuses options of a point beside points that are complete: they would be ignored.

    Raises:
        InputError: the first such option.
    """
    for name in ("point", *FIELDS) if what == "--points" else FIELDS:
        value = getattr(options, name)
        if value != options.point_defaults.get(name):
            raise InputError(f"{name}={value!r} stands beside {what}, which has its own; give one or the other")
