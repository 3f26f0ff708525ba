"""Compiled evidence: what XLA makes of a point's step, against the plan. Also for TPU slices that are not here.

    toruslab compile --model palm-540b-h64 --slice v4:4x4x4 --batch 64 --context 2048 --weights int8
    toruslab compile '{"model":"toy","slice":"cpu:2x2x2",...}' --json
    toruslab compile --points points.jsonl --json        (- reads standard input; one JSON point a line)
    toruslab compile --slice v5e:4x4 --model llama-3-70b --max-batch --max-context

TPUs (v4, v5e, v5p, v6e) are compiled for by libtpu: pip install 'toruslab[tpu]'. Slices of cpu are fake devices, of
gpu those that are here. Nothing is allocated and nothing runs. Results are kept in OUT, under the point and the
versions of everything that decides the program, and are not compiled again. A line of a file that cannot be answered
is named on standard error, the others are answered, and the exit code is then 1.
"""

import argparse
import functools
import json
import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from toruslab.benchmarks.runs import output, point_options
from toruslab.benchmarks.runs.folder import writable
from toruslab.benchmarks.runs.kept import FLAGS, kept, key
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row, failure
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import PLATFORMS
from toruslab.partitioning.torus.mesh import Slice, fake_cpu_devices


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab compile", __doc__)
    point_options.add(p, model="palm-540b-h64", slice_="v4:4x4x4", batch=64, context=2048, weights="bf16")
    point_options.add_file(p)
    p.add_argument("--max-batch", action="store_true", help="also the largest batch that compiles to fit")
    p.add_argument("--max-context", action="store_true", help="also the longest context that compiles to fit")
    p.add_argument("--attached", action="store_true", help="the TPUs that are here, not a description of the slice")
    p.add_argument("--hlo", type=Path, metavar="DIR", help="write the optimised programs there, too")
    p.add_argument("--fresh", action="store_true", help="compile again what was kept")
    p.add_argument("--out", type=Path, default=Path("results/compile"), help="folder")
    p.add_argument("--json", action="store_true", help="one JSON object a point on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a point failed or a line was refused."""
    from toruslab.partitioning.torus.described import check

    options = parser().parse_args(argv)
    options.flags = {name: os.environ.get(name, "") for name in FLAGS}

    def described(point: Point) -> None:
        check(Slice.parse(point.slice))

    if options.points is not None:
        points, n_refused = point_options.read_file(options, described)
    else:
        points, n_refused = [point_options.read(options, described)], 0
    for name in ("max_batch", "max_context"):
        if getattr(options, name) and (known := [p for p in points if p.chip in PLATFORMS]):
            option = name.replace("_", "-")
            raise InputError(f"--{option} needs a chip whose memory is known; slice={known[0].slice} has none")
    if options.max_context and any(p.phase == "train" for p in points):
        raise InputError("--max-context is for phases prefill and decode: training has no context")
    _prepare(points, options.attached)
    writable(options.out / "kept")
    if options.hlo:
        writable(options.hlo, "hlo")

    rows: list[Row] = []
    with progress("toruslab compile", what="points", total=len(points)) as done:
        for point in points:
            done.advance(0, f"{point.slice} {point.phase} {point.layout}/{point.attention}")
            rows.append(_row(point, options))
            done.advance()
            if options.json:
                output.print_rows(rows[-1:])
    if not options.json and len(rows) == 1 and "error" not in rows[0]:
        show(rows[0], output.console(140))
    elif not options.json:
        table(rows, output.console(140))
    return max(output.failures(rows, lambda row: f"{json.dumps(row['point'])}: "), min(n_refused, 1))


def _prepare(points: Sequence[Point], attached: bool) -> None:
    """This process's devices: as many fake ones as a point wants; none of an accelerator that is only described."""
    import jax

    from toruslab.partitioning.torus.described import mismatch

    if any(p.chip == "cpu" for p in points):
        fake_cpu_devices(max(p.n_chips for p in points if p.chip == "cpu"))
    elif not attached and all(p.chip not in PLATFORMS for p in points):
        jax.config.update("jax_platforms", "cpu")
    if any(p.chip not in PLATFORMS for p in points) and (warning := mismatch()):
        print(f"warning: {warning}", file=sys.stderr)


def _row(point: Point, options: argparse.Namespace) -> Row:
    """A point's row. A failure is a row with its error and what came before it."""
    row: Row = {"point": point.to_json(), "source": "compiled"}
    try:
        row |= kept(options, point, "evidence", lambda: _evidence(point, options))
        for name in ("max_batch", "max_context"):
            if getattr(options, name):
                row |= kept(options, point, name, functools.partial(_limit, point, options, name))
    except Exception as error:
        row |= failure(error)
    return row


def _evidence(point: Point, options: argparse.Namespace) -> Row:
    from toruslab.models.programs.compiled import evidence
    from toruslab.partitioning.torus.described import versions

    path = None
    if options.hlo:
        model = point.config.name if point.model.endswith(".json") else point.model
        parts = (model, point.slice, point.phase, point.batch, point.layout, point.attention, point.weights)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, parts)))
        path = options.hlo / f"{name}-{key(point, 'evidence', options)[:8]}.txt"
    found = evidence(point, attached=options.attached, keep=path).to_json()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"host_peak_bytes": used, "versions": versions(Slice.parse(point.slice))}


def _limit(point: Point, options: argparse.Namespace, name: str) -> Row:
    from toruslab.models.programs import compiled, limit_search

    def fits(changed: Point) -> bool:
        found = kept(options, changed, "fits", lambda: {"fits": compiled.fits(changed, attached=options.attached)})
        size = changed.batch if name == "max_batch" else changed.context
        print(f"{name}: {size} {'fits' if found['fits'] else 'does not fit'}", file=sys.stderr)
        return found["fits"]

    return {name: getattr(limit_search, name)(point, fits)}


def show(row: Row, console: Console) -> None:
    """One row for a person."""
    p, analytic, time, gib = row["point"], row["analytic"] or {}, output.time, output.gib
    console.print(point_options.heading(p, _where(p)))
    made = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    console.print(f"compiled in {row['compile_s']:.1f} s by {made}")
    peak, wanted = gib(row["peak_bytes_per_chip"]), gib(analytic.get("hbm_bytes_per_chip"))
    if row["refused"]:
        console.print(f"[bold]does not fit[/]: {row['refused']}")
        console.print(f"{peak} wanted a chip, analytic {wanted}")
        if not row["n_layers"]:
            console.print("nor does a program of a few layers, so there is none to look at")
            return
        console.print(f"below, a program of {row['n_layers']} layers stands for all")
    else:
        fits = {True: "fits", False: "does not fit", None: "memory of the device unknown"}[row["fits"]]
        parts = f"arguments {gib(row['argument_bytes'])}, temporaries {gib(row['temporary_bytes'])}"
        console.print(f"{peak} a chip: {parts}; analytic {wanted}; {fits}")
    for name in ("max_batch", "max_context"):
        if name in row:
            most = "none" if row[name] is None else row[name]
            console.print(f"{name.replace('_', ' ')} that compiles to fit, all else equal: {most}")
    console.print(_collectives(row["collectives"]))
    console.print(f"{row['unexplained']} unexplained; {row['extra_bytes'] / 1e6:,.3f} MB a chip beyond the plan")
    for finding in row["findings"]:
        console.print(f"finding: {finding}")
    if row["compute_s"] is not None:
        parts = "; ".join(f"{scope} {time(s)}" for scope, s in list(row["compute_by_scope"].items())[:8])
        missing = f" ({row['n_unestimated']} instructions have no estimate)" if row["n_unestimated"] else ""
        console.print(f"compute by the compiler's own estimate {time(row['compute_s'])}{missing}: {parts}")
    if row["latency_s"] is not None:
        console.print(
            f"analytic: compute {time(analytic['compute_s'])}, memory {time(analytic['memory_s'])}, collectives "
            f"{time(analytic['collective_s'])}, together {time(analytic['latency_s'])}"
        )
        console.print(
            f"compiler's compute + analytic collectives, none overlapped: {time(row['latency_s'])} (layers alone "
            f"{time(row['stack_latency_s'])}); without dispatch and the gaps between instructions. "
            f"{row['overlapped'] or 0:.0%} of the collectives' time has computation beside it in the compiled program."
        )


def _collectives(found: Sequence[Row]):
    listing = output.table((), title="the program against the plan")
    for heading in ("scope", "program", "kB a chip", "times", "plan, kB a chip", "verdict", "how"):
        listing.add_column(heading, justify="right" if "kB" in heading or heading == "times" else "left")
    for c in found:
        program = f"{c['kind']}({''.join(c['axes'])})" if c["kind"] else ""
        size = "" if c["bytes"] is None else f"{c['bytes'] / 1e3:,.2f}"
        planned = f"{c['planned_kind']} {c['planned_bytes'] / 1e3:,.2f}" if c["planned_bytes"] else "(part of it)"
        beside = f" async, beside {output.time(c['hidden_s'] or 0)}" if c["asynchronous"] else ""
        times = str(c["count"]), planned if c["planned_kind"] else "", c["verdict"]
        listing.add_row(c["scope"], program, size, *times, (c["algorithm"] or "") + beside)
    return listing


def table(rows: Sequence[Row], console: Console) -> None:
    """Many rows for a person, a line each."""
    numbers = ("GiB", "analytic", "fits", "unexplained", "not as planned", "compute ms", "compile s")
    headings = (*point_options.HEADINGS, *numbers)
    listing = output.table(headings, left=len(point_options.HEADINGS), title="compiled")
    for row in rows:
        of_point = point_options.sizes(row["point"], _where(row["point"]))
        if "error" in row:
            listing.add_row(*of_point, "failed")
            continue
        listing.add_row(
            *of_point,
            output.gib(row["peak_bytes_per_chip"]),
            output.gib((row["analytic"] or {}).get("hbm_bytes_per_chip")),
            {True: "yes", False: "no", None: ""}[row["fits"]],
            str(row["unexplained"]),
            str(sum(c["verdict"] != "as planned" for c in row["collectives"])),
            "" if row["compute_s"] is None else f"{row['compute_s'] * 1e3:,.2f}",
            f"{row['compile_s']:.1f}",
        )
    console.print(listing)


def _where(point: Row) -> str:
    return point["slice"] + (f" as {point['mesh']}" if point.get("mesh") else "")


if __name__ == "__main__":
    sys.exit(guarded(main))
