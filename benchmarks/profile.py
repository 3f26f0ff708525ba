"""Where the time of one step goes: matmuls, attention, each collective, copies of weights, the rest. Measured.

    toruslab profile
    toruslab profile --phase prefill --batch 8 --length 256 --layout wgxyz
    toruslab profile '{"model":"toy","slice":"cpu:2x2x2",...}' --json
    toruslab profile --keep trace        then open trace/plugins/profile/*/*.trace.json.gz in ui.perfetto.dev

The step is compiled, timed without the profiler, and traced for a few steps. Every operation has the scope of the
decoder in which it was written, which is also the name of the plan's tensor there.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toruslab.benchmarks.measure.calibration import calibrated, fits_here, own_file
from toruslab.benchmarks.reports.cells import traced
from toruslab.benchmarks.runs import output, point_options, processes
from toruslab.benchmarks.runs.folder import writable
from toruslab.benchmarks.runs.parser import Parser, at_least, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row, environment, failure
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import AXES, Slice

LATENCY_REPEATS, LATENCY_BUDGET_S = 20, 1.5
NUMBERS = ("device ms", "of these waiting", "share of the step", "work ms")


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab profile", __doc__)
    point_options.add(p, model="toy", slice_="cpu:2x2x2", batch=8, context=256, weights="f32")
    p.add_argument("--steps", type=at_least(1), default=5, help="calls that are traced")
    point_options.add_text(p)
    p.add_argument(
        "--chip",
        type=Path,
        metavar="FILE",
        help="a file of toruslab calibrate, whose price stands beside (default: this machine's, where there is one)",
    )
    p.add_argument("--keep", type=Path, metavar="DIR", help="leave the raw trace there, for Perfetto or XProf")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when the point failed."""
    options = parser().parse_args(argv)
    point = point_options.read(options)
    text = point_options.read_text([point], options.text, options.seed)
    if options.keep:
        writable(options.keep, "keep")
    mesh = processes.attached(Slice.parse(point.slice), point.mesh_shape)
    own = own_file(mesh, 1)
    path = options.chip or (own if fits_here(own, [point.weights]) else None)
    priced = predicted(point, path) if path and point.layout_value.explicit else {}
    with progress("toruslab profile", speaks=processes.speaks(), what="compiling, timing and tracing the step"):
        row = measure(point, options, text)
    if processes.speaks() and options.json:
        output.print_rows([row])
    elif processes.speaks() and "error" not in row:
        show(row, output.console(), priced)
    return output.failures([row], lambda row: "")


def predicted(point: Point, path: Path) -> Row:
    """The analytic row of a point, from a calibrated chip.

    Raises:
        InputError: the file is none of `toruslab calibrate`.
    """
    from toruslab.benchmarks.measure.contenders import analytic

    return analytic(point, calibrated(path, [point.weights]))


def measure(point: Point, options: argparse.Namespace, text: str) -> Row:
    """A point's row: `profile` as `profiling.Profile.to_json` has it, beside the latency without the profiler."""
    from toruslab.benchmarks.measure.contenders import clear, prepare
    from toruslab.benchmarks.measure.profiling import profile
    from toruslab.benchmarks.measure.timing import interleaved

    row: Row = {"point": point.to_json(), "source": "measured"}
    try:
        made = prepare(point, options.seed, text)
        (timing,) = interleaved([made.step], repeats=LATENCY_REPEATS, budget_s=LATENCY_BUDGET_S)
        steps = point.steps_per_call
        mesh = dict(zip(AXES, point.mesh_shape, strict=True))
        found = profile(made.step, made.text, mesh=mesh, n_calls=options.steps, steps=steps, keep=options.keep)
        row |= timing.per(steps).numbers() | {"profile": found.to_json()}
    except Exception as error:
        row |= failure(error)
    clear()
    return row | {"environment": environment(options.seed)}


def show(row: Row, console: Console, analytic: Row | None = None) -> None:
    """A row for a person, beside an analytic row that was priced from a calibrated chip, where there is one."""
    found = row["profile"]
    console.print(point_options.heading(row["point"]))
    shared = f" on {found['cores']} cores" if found["cores"] else ""
    console.print(
        f"{_ms(row['latency_s'])} ms a step; {_ms(found['step_s'])} ms under the profiler (median of "
        f"{found['n_steps']}, mean {_ms(found['mean_s'])} ms), {found['n_devices']} devices{shared}"
    )
    terms = {k.removesuffix("_s"): s for k, s in analytic["terms"].items()} if analytic else None
    console.print(by_scope(found, analytic["collectives"] if analytic else ()))
    console.print(totals(found, terms | {"step": sum(terms.values())} if terms else None))
    if found["unknown"]:
        console.print(f"not in the program's text, and counted as other: {', '.join(found['unknown'])}")


def by_scope(found: Mapping[str, Any], collectives: Iterable[Row] = ()) -> Table:
    """A profile's rows, in the order in which they run.

    Args:
        found: `Profile.to_json`.
        collectives: of an analytic row, with the seconds that each is priced at.
    """
    collectives = list(collectives)
    headings = ("scope", "kind", "times", *NUMBERS, *(["priced ms"] if collectives else []))
    listing = output.table(headings, left=2, title="by scope")
    for r, t in zip(found["rows"], traced(dict(found), collectives), strict=True):
        priced = [_ms(t.predicted_s)] if collectives else []
        listing.add_row(t.scope, t.what, f"{t.count or 0:,.0f}", *_numbers(r, found), *priced)
    return listing


def totals(found: Mapping[str, Any], analytic: Mapping[str, float] | None = None) -> Table:
    """A profile by kind, with the time that is in no operation.

    Args:
        found: `Profile.to_json`.
        analytic: kind -> seconds of a step by a model, for a column beside; also of `between`, `dispatch` and `step`.
    """
    listing = output.table(("kind", *NUMBERS, *(["analytic ms"] if analytic is not None else [])), title="by kind")
    lines = {kind: _numbers(spent, found) for kind, spent in found["by_kind"].items()}
    work = _ms(sum(spent["work_s"] for spent in found["by_kind"].values()))
    for name, key in (("between", "between_s"), ("dispatch", "dispatch_s"), ("step", "mean_s")):
        share = f"{found[key] / found['mean_s']:.1%}"
        lines[name] = (_ms(found[key]), "", share, work if name == "step" else "")
    for name, numbers in lines.items():
        beside = [_ms(analytic.get(name))] if analytic is not None else []
        listing.add_row(name, *numbers, *beside, end_section=name in ("other", "dispatch"))
    return listing


def _numbers(spent: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    waiting = _ms(spent["wait_s"]) if spent["wait_s"] else ""
    return _ms(spent["device_s"]), waiting, f"{spent['device_s'] / found['mean_s']:.1%}", _ms(spent["work_s"])


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.3f}"


if __name__ == "__main__":
    sys.exit(guarded(main))
