"""Analytic cost of one point, or of many. Touches no device.

    toruslab estimate --model palm-540b-h64 --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --weights int8
    toruslab estimate '{"model":"palm-62b","slice":"v4:2x4x2",...}' --json
    toruslab estimate --points points.jsonl --json        (- reads standard input; one JSON point a line)

--exposed prices plain layouts without what the paper's authors hid; layouts that loop or prefetch (+ring, +biring,
+prefetch) are priced as they run, and refused beside it. On a calibrated chip nothing hides, with it or without.

From a file every line that can be answered is answered, in order; a line that cannot is named on standard error with
its number, and the exit code is then 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from toruslab.benchmarks.runs import point_options
from toruslab.benchmarks.runs.options import InputError, Parser, guarded, read_lines
from toruslab.partitioning.cost.estimate import Estimate, estimate, estimate_many
from toruslab.partitioning.cost.limits import largest_batch, longest_context
from toruslab.partitioning.plan.point import Point


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a line of a file was refused."""
    p = Parser(prog="toruslab estimate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    point_options.add(p, model="palm-540b-h64", slice_="v4:4x4x4", batch=64, context=2048, weights="bf16")
    p.add_argument("--points", metavar="FILE", help="JSON points, one a line; - reads standard input")
    p.add_argument("--exposed", action="store_true", help="weights gathered before the matmuls, not under them")
    p.add_argument("--json", action="store_true", help="one JSON object a point on standard output")
    options = p.parse_args(argv)
    if options.points is not None:
        point_options.refuse_beside("--points", options)
        return _many(options.points, options.json, options.exposed)
    point = point_options.read(options)
    try:
        _check(point, options.exposed)
        found = estimate(point, overlap=not options.exposed)
    except ValueError as error:
        raise InputError(str(error)) from None
    if options.json:
        limits = {"max_batch": largest_batch(found.point), "max_context": longest_context(found.point)}
        print(json.dumps({**found.to_json(), **limits}))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def _check(point: Point, exposed: bool) -> None:
    """Refuses `--exposed` where it would say nothing: a variant that overlaps is priced as it runs."""
    if exposed and (point.layout_value.rings or point.layout_value.prefetch):
        raise ValueError(
            f"exposed is for plain layouts: layout={point.layout!r} says itself what runs under the matmuls, and is "
            "priced as it runs"
        )


def _many(path: str, as_json: bool, exposed: bool) -> int:
    points: list[Point] = []
    refused = 0
    known: dict[str, Point] = {}
    for number, line in read_lines("points", path):
        try:
            if isinstance(line, ValueError):
                raise line
            if line not in known:
                point = Point.from_json(line)
                if not point.layout_value.explicit:
                    raise ValueError("layout='auto' has no plan to estimate")
                _check(point, exposed)
                point.check_chip()
                known[line] = point
            points.append(known[line])
        except ValueError as error:
            refused += 1
            print(f"error: {path}, line {number}: {error}", file=sys.stderr)
    if not points and not refused:
        raise InputError(f"points={path!r} holds no point")
    found = estimate_many(points, overlap=not exposed)
    if as_json:
        sys.stdout.writelines(json.dumps(e.to_json()) + "\n" for e in found)
    else:
        table(found, Console(width=None if sys.stdout.isatty() else 160))
    return 1 if refused else 0


def show(found: Estimate, console: Console) -> None:
    """One estimate for a person: the terms, and every collective."""
    p = found.point
    cached = "" if p.phase == "train" else f"context {p.context}, "
    console.print(
        f"[bold]{p.model} on {p.slice}[/], {p.phase}, {p.batch} x {p.length} tokens, {cached}"
        f"{point_options.per_call(p.to_json())}{p.layout}/{p.attention}, {p.weights} weights"
        f"{point_options.cached(p.to_json())} (analytic)"
    )
    console.print(
        f"latency {_time(found.latency_s)} (layers alone {_time(found.stack_latency_s)}), bound by {found.bound}; "
        f"MFU {found.mfu:.1%}"
    )
    console.print(
        f"each by itself: compute {_time(found.compute_s)}, memory {_time(found.memory_s)}, "
        f"collectives {_time(found.collective_s)}"
    )
    console.print(f"{found.hbm_bytes_per_chip / 2**30:.2f} GiB a chip: {'fits' if found.fits else 'does not fit'}")
    listing = Table()
    for heading in ("scope", "collective", "MB a chip", "us", "times", "ms in the pass"):
        listing.add_column(heading, justify="left" if heading in ("scope", "collective") else "right")
    for c in found.collectives:
        listing.add_row(
            c.scope,
            f"{c.kind}({''.join(c.axes)})",
            f"{c.bytes / 1e6:,.3f}",
            f"{c.seconds * 1e6:,.1f}",
            str(c.count),
            f"{c.seconds * c.count * 1e3:,.3f}",
        )
    console.print(listing)
    batch, context = largest_batch(p), longest_context(p)
    also = "" if p.phase == "train" else f", context {'none' if context is None else context}"
    console.print(f"the slice holds, all else equal: batch {batch or 'none'}{also}")


def table(found: Sequence[Estimate], console: Console) -> None:
    """Many estimates for a person, a line each."""
    listing = Table(title="analytic", title_justify="left")
    for heading in ("model", "slice", "phase", "batch x length", "context", "layout", "weights"):
        listing.add_column(heading)
    for heading in ("latency", "layers", "bound", "MFU", "GiB", "fits"):
        listing.add_column(heading, justify="right")
    for e in found:
        p = e.point
        listing.add_row(
            p.model,
            p.slice,
            p.phase,
            f"{p.batch} x {p.length}",
            str(p.context),
            f"{p.layout}/{p.attention}",
            p.weights + point_options.cached(p.to_json()),
            _time(e.latency_s),
            _time(e.stack_latency_s),
            e.bound,
            f"{e.mfu:.1%}",
            f"{e.hbm_bytes_per_chip / 2**30:.2f}",
            "yes" if e.fits else "no",
        )
    console.print(listing)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


if __name__ == "__main__":
    sys.exit(guarded(main))
