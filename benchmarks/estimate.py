"""Analytic cost of one point, or of many. Touches no device.

    toruslab estimate --model palm-540b-h64 --slice v4:4x4x4 --phase decode --batch 64 --context 2048 --weights int8
    toruslab estimate '{"model":"palm-62b","slice":"v4:2x4x2",...}' --json
    toruslab estimate --points points.jsonl --json        (- reads standard input; one JSON point a line)

--exposed prices plain layouts without what the paper's authors hid. Layouts that loop or prefetch (+ring, +biring,
+prefetch) are priced as they run, and refused beside it. On a calibrated chip nothing hides, with it or without.

From a file every line that can be answered is answered, in order. A line that cannot is named on standard error with
its number, and the exit code is then 1.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from toruslab.benchmarks.runs import output, point_options
from toruslab.benchmarks.runs.parser import Parser, guarded, refused
from toruslab.benchmarks.runs.progress import progress
from toruslab.partitioning.cost.estimate import Estimate, estimate, estimate_many
from toruslab.partitioning.cost.limits import largest_batch, longest_context
from toruslab.partitioning.plan.point import Point


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a line of a file was refused."""
    p = Parser("toruslab estimate", __doc__)
    point_options.add(p, model="palm-540b-h64", slice_="v4:4x4x4", batch=64, context=2048, weights="bf16")
    point_options.add_file(p)
    p.add_argument("--exposed", action="store_true", help="weights gathered before the matmuls, not under them")
    p.add_argument("--json", action="store_true", help="one JSON object a point on standard output")
    options = p.parse_args(argv)

    def check(point: Point) -> None:
        if options.exposed and (point.layout_value.rings or point.layout_value.prefetch):
            raise ValueError(
                f"exposed is for plain layouts: layout={point.layout!r} says itself what runs under the matmuls, and "
                "is priced as it runs"
            )

    if options.points is not None:
        return _many(options, check)
    point = point_options.read(options, check)
    with refused():
        found = estimate(point, overlap=not options.exposed)
    if options.json:
        limits = {"max_batch": largest_batch(found.point), "max_context": longest_context(found.point)}
        output.print_rows([{**found.to_json(), **limits}])
    else:
        show(found, output.console())
    return 0


def _many(options, check) -> int:
    def priced(point: Point) -> None:
        if not point.layout_value.explicit:
            raise ValueError("layout='auto' has no plan to estimate")
        check(point)
        point.check_chip()

    with progress("toruslab estimate", what="points"):
        points, n_refused = point_options.read_file(options, priced)
        found = estimate_many(points, overlap=not options.exposed)
    if options.json:
        output.print_rows(e.to_json() for e in found)
    else:
        table(found, output.console(160))
    return 1 if n_refused else 0


def show(found: Estimate, console: Console) -> None:
    """One estimate for a person: the terms, and every collective."""
    p = found.point
    console.print(f"{point_options.heading(p.to_json(), context=p.phase != 'train')} (analytic)")
    console.print(
        f"latency {output.time(found.latency_s)} (layers alone {output.time(found.stack_latency_s)}), bound by "
        f"{found.bound}; MFU {found.mfu:.1%}"
    )
    console.print(
        f"each by itself: compute {output.time(found.compute_s)}, memory {output.time(found.memory_s)}, "
        f"collectives {output.time(found.collective_s)}"
    )
    console.print(f"{output.gib(found.hbm_bytes_per_chip)} a chip: {'fits' if found.fits else 'does not fit'}")
    listing = output.table(("scope", "collective", "MB a chip", "us", "times", "ms in the pass"), left=2)
    for c in found.collectives:
        taken = f"{c.seconds * 1e6:,.1f}", str(c.count), f"{c.seconds * c.count * 1e3:,.3f}"
        listing.add_row(c.scope, f"{c.kind}({''.join(c.axes)})", f"{c.bytes / 1e6:,.3f}", *taken)
    console.print(listing)
    batch, context = largest_batch(p), longest_context(p)
    also = "" if p.phase == "train" else f", context {'none' if context is None else context}"
    console.print(f"the slice holds, all else equal: batch {batch or 'none'}{also}")


def table(found: Sequence[Estimate], console: Console) -> None:
    """Many estimates for a person, a row each."""
    headings = (*point_options.HEADINGS, "latency", "layers", "bound", "MFU", "GiB", "fits")
    listing = output.table(headings, left=len(point_options.HEADINGS), title="analytic")
    for e in found:
        times = output.time(e.latency_s), output.time(e.stack_latency_s)
        memory = f"{e.hbm_bytes_per_chip / 2**30:.2f}", "yes" if e.fits else "no"
        listing.add_row(*point_options.sizes(e.point.to_json()), *times, e.bound, f"{e.mfu:.1%}", *memory)
    console.print(listing)


if __name__ == "__main__":
    sys.exit(guarded(main))
