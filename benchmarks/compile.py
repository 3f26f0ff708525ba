"""Compiled evidence: what XLA makes of a point's step, against the plan. Also for TPU slices that are not here.

    toruslab compile --model palm-540b-h64 --slice v4:4x4x4 --batch 64 --context 2048 --weights int8
    toruslab compile '{"model":"toy","slice":"cpu:2x2x2",...}' --json
    toruslab compile --points points.jsonl --json        (- reads standard input; one JSON point a line)
    toruslab compile --slice v5e:4x4 --model llama-3-70b --max-batch --max-context

TPUs (v4, v5e, v5p, v6e) are compiled for by libtpu: pip install 'toruslab[tpu]'. Slices of cpu are fake devices, of
gpu those that are here. Nothing is allocated and nothing runs. What was compiled once is kept in OUT, under the point
and the versions of everything that decides the program, and not compiled again. A line of a file that cannot be
answered is named on standard error, the others are answered, and the exit code is then 1.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from toruslab.benchmarks.runs import point_options
from toruslab.benchmarks.runs.options import InputError, Parser, guarded, read_lines
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import PLATFORMS, chip
from toruslab.partitioning.torus.mesh import Slice, fake_cpu_devices

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")
"""What of the environment changes programs."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(prog="toruslab compile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    point_options.add(p, model="palm-540b-h64", slice_="v4:4x4x4", batch=64, context=2048, weights="bf16")
    p.add_argument("--points", metavar="FILE", help="JSON points, one a line; - reads standard input")
    p.add_argument("--max-batch", action="store_true", help="also the largest batch that compiles to fit")
    p.add_argument("--max-context", action="store_true", help="also the longest context that compiles to fit")
    p.add_argument("--attached", action="store_true", help="the TPUs that are here, not a description of the slice")
    p.add_argument("--hlo", type=Path, metavar="DIR", help="write the optimised programs there, too")
    p.add_argument("--fresh", action="store_true", help="compile again what was kept")
    p.add_argument("--out", type=Path, default=Path("results/compile"), help="folder (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="one JSON object a point on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a point failed or a line was refused."""
    options = parser().parse_args(argv)
    options.flags = {name: os.environ.get(name, "") for name in FLAGS}
    points, refused = _points(options)
    for name in ("max_batch", "max_context"):
        if getattr(options, name) and (known := [p for p in points if p.chip in PLATFORMS]):
            option = name.replace("_", "-")
            raise InputError(f"--{option} needs a chip whose memory is known; slice={known[0].slice} has none")
    if options.max_context and any(p.phase == "train" for p in points):
        raise InputError("--max-context is for phases prefill and decode: training has no context")
    _prepare(points, options.attached)
    for field, folder in (("out", options.out / "kept"), ("hlo", options.hlo)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{field}={str(getattr(options, field))!r} cannot be written: {error.strerror}") from None

    rows: list[Row] = []
    progress = Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with progress:
        task = progress.add_task("points", total=len(points))
        for point in points:
            progress.update(task, description=f"{point.slice} {point.phase} {point.layout}/{point.attention}")
            rows.append(_row(point, options))
            progress.advance(task)
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        console = Console(width=None if sys.stdout.isatty() else 140)
        if len(rows) == 1 and "error" not in rows[0]:
            show(rows[0], console)
        else:
            table(rows, console)
    failed = [r for r in rows if "error" in r]
    for row in failed:
        print(f"failed: {json.dumps(row['point'])}: {row['error']}", file=sys.stderr)
    return 1 if failed or refused else 0


def _points(options: argparse.Namespace) -> tuple[list[Point], int]:
    """The points that were asked for, and how many lines of a file were refused."""
    from toruslab.partitioning.torus.described import check

    if options.points is not None:
        point_options.refuse_beside("--points", options)
    else:
        point = point_options.read(options)
        try:
            check(Slice.parse(point.slice))
        except ValueError as error:
            raise InputError(str(error)) from None
        return [point], 0
    points: list[Point] = []
    refused = 0
    for number, line in read_lines("points", options.points):
        try:
            if isinstance(line, ValueError):
                raise line
            point = Point.from_json(line)
            check(Slice.parse(point.slice))
            points.append(point)
        except ValueError as error:
            refused += 1
            print(f"error: {options.points}, line {number}: {error}", file=sys.stderr)
    if not points and not refused:
        raise InputError(f"points={options.points!r} holds no point")
    return points, refused


def _prepare(points: Sequence[Point], attached: bool) -> None:
    """This process's devices: as many fake ones as a point wants; none of an accelerator that only is described."""
    import jax

    from toruslab.partitioning.torus.described import mismatch

    if any(p.chip == "cpu" for p in points):
        fake_cpu_devices(max(p.n_chips for p in points if p.chip == "cpu"))
    elif not attached and all(p.chip not in PLATFORMS for p in points):
        jax.config.update("jax_platforms", "cpu")
    if any(p.chip not in PLATFORMS for p in points) and (warning := mismatch()):
        print(f"warning: {warning}", file=sys.stderr)


def _row(point: Point, options: argparse.Namespace) -> Row:
    """A point's row, from the kept ones if it is there; a failure is a row with its error and what came before it."""
    asked = [name for name in ("max_batch", "max_context") if getattr(options, name)]
    row: Row = {"point": point.to_json(), "source": "compiled"}
    try:
        row |= _kept(options, point, "evidence", lambda: _evidence(point, options))
        for name in asked:
            row |= _kept(options, point, name, functools.partial(_limit, point, options, name))
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        row["error"] = f"{type(error).__name__}: {said}"
    return row


def _evidence(point: Point, options: argparse.Namespace) -> Row:
    from toruslab.models.programs.compiled import evidence
    from toruslab.partitioning.torus.described import versions

    path = None
    if options.hlo:
        model = point.config.name if point.model.endswith(".json") else point.model
        parts = (model, point.slice, point.phase, point.batch, point.layout, point.attention, point.weights)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, parts)))
        path = options.hlo / f"{name}-{_key(point, 'evidence', options)[:8]}.txt"
    found = evidence(point, attached=options.attached, keep=path).to_json()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"host_peak_bytes": used, "versions": versions(Slice.parse(point.slice))}


def _limit(point: Point, options: argparse.Namespace, name: str) -> Row:
    from toruslab.models.programs import compiled, limit_search

    def fits(changed: Point) -> bool:
        found = _kept(options, changed, "fits", lambda: {"fits": compiled.fits(changed, attached=options.attached)})
        size = changed.batch if name == "max_batch" else changed.context
        print(f"{name}: {size} {'fits' if found['fits'] else 'does not fit'}", file=sys.stderr)
        return found["fits"]

    return {name: getattr(limit_search, name)(point, fits)}


def _kept(options: argparse.Namespace, point: Point, what: str, make: Callable[[], Row]) -> Row:
    """What was made for the point by these versions, or is made now and kept."""
    path = options.out / "kept" / f"{_key(point, what, options)}.json"
    if not options.fresh and not (what == "evidence" and options.hlo):
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # not there, or half of it: it is made again
            pass
    row = make()
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(row))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    return row


def _key(point: Point, what: str, options: argparse.Namespace) -> str:
    """A name for what these versions, this code and these flags make of the point."""
    from toruslab.partitioning.torus.described import versions

    slice_ = Slice.parse(point.slice)
    config = repr(point.config)  # the file behind a model's name may have changed
    known: dict[str, Any] = {"point": point.to_json(), "config": config, "what": what, "attached": options.attached}
    known |= {"versions": versions(slice_), "source": _source(), "flags": options.flags}
    if point.chip == "gpu" or options.attached:
        import jax

        known["device"] = jax.devices()[0].device_kind
    if point.chip not in PLATFORMS:
        known["chip"] = repr(chip(point.chip))
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    """A digest of the code that decides programs and how they are read."""
    root = Path(__file__).parent.parent
    files = sorted(f for folder in ("partitioning", "models") for f in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def show(row: Row, console: Console) -> None:
    """One row for a person."""
    p, analytic = row["point"], row["analytic"] or {}
    console.print(
        f"[bold]{p['model']} on {_where(p)}[/], {p['phase']}, {p['batch']} x {p['length']} tokens, context "
        f"{p['context']}, {point_options.per_call(p)}{p['layout']}/{p['attention']}, {p['weights']} weights"
        f"{point_options.cached(p)}"
    )
    made = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    console.print(f"compiled in {row['compile_s']:.1f} s by {made}")
    if row["refused"]:
        console.print(f"[bold]does not fit[/]: {row['refused']}")
        wanted = analytic.get("hbm_bytes_per_chip")
        console.print(f"{_gib(row['peak_bytes_per_chip'])} wanted a chip, analytic {_gib(wanted)}")
        if not row["n_layers"]:
            console.print("nor does a program of a few layers, so there is none to look at")
            return
        console.print(f"below, a program of {row['n_layers']} layers stands for all")
    else:
        console.print(
            f"{_gib(row['peak_bytes_per_chip'])} a chip: arguments {_gib(row['argument_bytes'])}, temporaries "
            f"{_gib(row['temporary_bytes'])}; analytic {_gib(analytic.get('hbm_bytes_per_chip'))}; "
            f"{ {True: 'fits', False: 'does not fit', None: 'memory of the device unknown'}[row['fits']] }"
        )
    for name in ("max_batch", "max_context"):
        if name in row:
            most = "none" if row[name] is None else row[name]
            console.print(f"{name.replace('_', ' ')} that compiles to fit, all else equal: {most}")
    listing = Table(title="the program against the plan", title_justify="left")
    for heading in ("scope", "program", "kB a chip", "times", "plan, kB a chip", "verdict", "how"):
        listing.add_column(heading, justify="right" if "kB" in heading or heading == "times" else "left")
    for c in row["collectives"]:
        axes = f"({''.join(c['axes'])})"
        listing.add_row(
            c["scope"],
            f"{c['kind']}{axes}" if c["kind"] else "",
            "" if c["bytes"] is None else f"{c['bytes'] / 1e3:,.2f}",
            str(c["count"]),
            _plan(c),
            c["verdict"],
            (c["algorithm"] or "") + (f" async, beside {_time(c['hidden_s'] or 0)}" if c["asynchronous"] else ""),
        )
    console.print(listing)
    console.print(f"{row['unexplained']} unexplained; {row['extra_bytes'] / 1e6:,.3f} MB a chip beyond the plan")
    for finding in row["findings"]:
        console.print(f"finding: {finding}")
    if row["compute_s"] is not None:
        parts = "; ".join(f"{scope} {_time(s)}" for scope, s in list(row["compute_by_scope"].items())[:8])
        missing = f" ({row['n_unestimated']} instructions have no estimate)" if row["n_unestimated"] else ""
        console.print(f"compute by the compiler's own estimate {_time(row['compute_s'])}{missing}: {parts}")
    if row["latency_s"] is not None:
        console.print(
            f"analytic: compute {_time(analytic['compute_s'])}, memory {_time(analytic['memory_s'])}, collectives "
            f"{_time(analytic['collective_s'])}, together {_time(analytic['latency_s'])}"
        )
        console.print(
            f"compiler's compute + analytic collectives, none overlapped: {_time(row['latency_s'])} (layers alone "
            f"{_time(row['stack_latency_s'])}); without dispatch and the gaps between instructions. "
            f"{row['overlapped'] or 0:.0%} of the collectives' time has computation beside it in the compiled program."
        )


def table(rows: Sequence[Row], console: Console) -> None:
    """Many rows for a person, a line each."""
    listing = Table(title="compiled", title_justify="left")
    for heading in ("model", "slice", "phase", "batch x length", "context", "layout", "weights"):
        listing.add_column(heading)
    for heading in ("GiB", "analytic", "fits", "unexplained", "not as planned", "compute ms", "compile s"):
        listing.add_column(heading, justify="right")
    for row in rows:
        p = row["point"]
        of_point = [p["model"], _where(p), p["phase"], f"{p['batch']} x {p['length']}", str(p["context"])]
        of_point += [f"{p['layout']}/{p['attention']}", p["weights"] + point_options.cached(p)]
        if "error" in row:
            listing.add_row(*of_point, "failed")
            continue
        listing.add_row(
            *of_point,
            _gib(row["peak_bytes_per_chip"]),
            _gib((row["analytic"] or {}).get("hbm_bytes_per_chip")),
            {True: "yes", False: "no", None: ""}[row["fits"]],
            str(row["unexplained"]),
            str(sum(c["verdict"] != "as planned" for c in row["collectives"])),
            "" if row["compute_s"] is None else f"{row['compute_s'] * 1e3:,.2f}",
            f"{row['compile_s']:.1f}",
        )
    console.print(listing)


def _plan(c: Row) -> str:
    if not c["planned_kind"]:
        return ""
    return f"{c['planned_kind']} {c['planned_bytes'] / 1e3:,.2f}" if c["planned_bytes"] else "(part of it)"


def _where(point: Row) -> str:
    return point["slice"] + (f" as {point['mesh']}" if point.get("mesh") else "")


def _gib(n: int | None) -> str:
    return "?" if n is None else f"{n / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


if __name__ == "__main__":
    sys.exit(guarded(main))
