"""The options that spell one point, for the commands that answer about points: estimate, compile, explain, profile.

Also files of points, and how a point is named in a heading.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from toruslab.benchmarks.runs.parser import InputError, at_least, read_lines, refused
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.plan.point import CACHES, PHASES, WEIGHTS, Point

FIELDS = (
    *("model", "slice", "mesh", "phase", "batch", "length", "context", "layout", "attention", "weights"),
    *("cache", "steps_per_call", "accumulate", "remat"),
)


def add(p: argparse.ArgumentParser, *, model: str, slice_: str, batch: int, context: int, weights: str) -> None:
    """Adds the options with a command's own defaults. `context` is that of decode; other phases have 0."""
    p.add_argument("point", nargs="?", help="a JSON point; or use the options")
    p.add_argument("--model", default=model, help="preset or config.json")
    p.add_argument("--slice", default=slice_, help="CHIP:DIMS")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--phase", default="decode", help=f"{', '.join(PHASES)}")
    p.add_argument("--batch", type=int, default=batch, help="sequences")
    p.add_argument("--length", type=int, default=1, help="tokens of a sequence in this pass")
    p.add_argument("--context", type=int, help=f"cached tokens (default: {context} in decode, else 0)")
    p.add_argument("--layout", default="ws2d", help=f"{', '.join(LAYOUTS)}; with variants: ws2d+lean")
    p.add_argument("--attention", default="batch", help="heads, batch, or batch-x, batch-xy...: over some of the axes")
    p.add_argument("--weights", default=weights, help=f"{', '.join(WEIGHTS)}")
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
    p.add_argument("--remat", default="layer", help=f"train: what is recomputed for gradients, of {', '.join(REMAT)}")
    p.set_defaults(decode_context=context, point_defaults={name: p.get_default(name) for name in FIELDS})


def add_file(p: argparse.ArgumentParser) -> None:
    """Adds `--points`."""
    p.add_argument("--points", metavar="FILE", help="JSON points, one a line; - reads standard input")


def read(options: argparse.Namespace, check: Callable[[Point], object] = lambda point: None) -> Point:
    """The point that was asked for.

    Raises:
        InputError: what the point, or `check`, refuses.
    """
    if options.point is not None:
        _refuse_beside("a JSON point", options, FIELDS)
    fields = {k: getattr(options, k) for k in FIELDS if getattr(options, k) is not None}
    fields.setdefault("context", options.decode_context if options.phase == "decode" else 0)
    with refused():
        point = Point.from_json(fields if options.point is None else options.point)
        check(point)
    return point


def read_file(
    options: argparse.Namespace, check: Callable[[Point], object] = lambda point: None
) -> tuple[list[Point], int]:
    """The points of the file `--points`. A line that is no point is named on standard error; the others still count.

    Returns:
        The points in their order, and the number of lines that were refused.

    Raises:
        InputError: options of a point beside the file, or a file without points.
    """
    _refuse_beside("--points", options, ("point", *FIELDS))
    points: list[Point] = []
    n_refused = 0
    for number, found in of_file(options.points, check):
        if isinstance(found, Point):
            points.append(found)
        else:
            n_refused += 1
            print(f"error: {options.points}, line {number}: {found}", file=sys.stderr)
    if not points and not n_refused:
        raise InputError(f"points={options.points!r} holds no point")
    return points, n_refused


def of_file(
    where: str, check: Callable[[Point], object] = lambda point: None
) -> Iterator[tuple[int, Point | ValueError]]:
    """Every line of a file by its number: a point, or why it is none. Equal lines are read once."""
    known: dict[str, Point] = {}
    for number, text in read_lines("points", where):
        try:
            if isinstance(text, ValueError):
                raise text
            if text not in known:
                point = Point.from_json(text)
                check(point)
                known[text] = point
            yield number, known[text]
        except ValueError as error:
            yield number, error


def read_text(points: Sequence[Point], where: str | None, seed: int) -> str:
    """The text of `--text`, from which the prompts of all points are drawn.

    Raises:
        InputError: it cannot be read or is too short, or a model's vocabulary lacks bytes.
    """
    with refused():
        text = corpus.read(where)
        smallest = min(p.config.vocab for p in points)
        if smallest < byte_ids.VOCAB:
            raise ValueError(f"vocab={smallest} of the model is smaller than the byte tokenizer's {byte_ids.VOCAB}")
        corpus.prompts(1, max(p.length for p in points), seed, text)
    return text


def add_text(p: argparse.ArgumentParser) -> None:
    """Adds `--text` and `--seed`."""
    p.add_argument("--text", metavar="FILE", help="English text to take the tokens from (default: Python's own manual)")
    p.add_argument("--seed", type=at_least(0), default=0, help="of weights and prompts")


def _refuse_beside(what: str, options: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Refuses options of a point beside points that are complete: they would be ignored."""
    for name in names:
        value = getattr(options, name)
        if value != options.point_defaults.get(name):
            raise InputError(f"{name}={value!r} stands beside {what}, which has its own; give one or the other")


def heading(point: Mapping[str, Any], where: str | None = None, *, context: bool = True) -> str:
    """A point in one line, for a person.

    Args:
        point: as JSON.
        where: the slice as it is to be shown.
        context: whether the context is shown.
    """
    p = point
    cached_tokens = f"context {p['context']}, " if context else ""
    return (
        f"[bold]{p['model']} on {where or p['slice']}[/], {p['phase']}, {p['batch']} x {p['length']} tokens, "
        f"{cached_tokens}{_per_call(p)}{p['layout']}/{p['attention']}, {p['weights']} weights{cached(p)}"
    )


def _per_call(point: Mapping[str, Any]) -> str:
    """The steps of a call, the parts of a training step's batch and what is recomputed, where it is not the default."""
    steps, parts = point.get("steps_per_call", 1), point.get("accumulate", 1)
    said = f"{steps} steps a call (figures are of one), " if steps > 1 else ""
    said += f"in {parts} parts, " if parts > 1 else ""
    again = point.get("remat", "layer")
    return said + (f"remat {again}, " if again != "layer" else "")


def cached(point: Mapping[str, Any]) -> str:
    """The dtype of the KV cache, where it is not that of the activations."""
    return f", {point['cache']} cache" if point.get("cache") else ""


def sizes(point: Mapping[str, Any], where: str | None = None) -> list[str]:
    """A point as the first cells of a table's row, see `HEADINGS`."""
    p = point
    return [
        *(p["model"], where or p["slice"], p["phase"], f"{p['batch']} x {p['length']}", str(p["context"])),
        *(f"{p['layout']}/{p['attention']}", p["weights"] + cached(p)),
    ]


HEADINGS = ("model", "slice", "phase", "batch x length", "context", "layout", "weights")
