"""Where the time of one step goes: matmuls, attention, each collective, copies of weights, the rest. Measured.

    toruslab profile
    toruslab profile --phase prefill --batch 8 --length 256 --layout wgxyz
    toruslab profile '{"model":"toy","slice":"cpu:2x2x2",...}' --json
    toruslab profile --keep trace        then open trace/plugins/profile/*/*.trace.json.gz in ui.perfetto.dev

The step is compiled, timed without the profiler, and traced for a few steps. Every operation has the scope of the
decoder in which it was written, so that a row stands beside the plan's stage of that name.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toruslab.benchmarks.measure.calibration import calibrated, fits_here, own_file
from toruslab.benchmarks.reports.cells import traced
from toruslab.benchmarks.runs import point_options, processes
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import Row, environment
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import AXES, attach

LATENCY_REPEATS, LATENCY_BUDGET_S = 20, 1.5


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(prog="toruslab profile", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    point_options.add(p, model="toy", slice_="cpu:2x2x2", batch=8, context=256, weights="f32")
    p.add_argument("--steps", type=int, default=5, help="calls that are traced (default: %(default)s)")
    p.add_argument("--text", metavar="FILE", help="English text to take the tokens from (default: Python's own manual)")
    p.add_argument("--seed", type=int, default=0)
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
    for field, least in (("steps", 1), ("seed", 0)):
        if getattr(options, field) < least:
            raise InputError(f"{field}={getattr(options, field)} must be at least {least}")
    point = point_options.read(options)
    try:
        text = corpus.read(options.text)
        if point.config.vocab < byte_ids.VOCAB:
            raise ValueError(
                f"vocab={point.config.vocab} of the model is smaller than the tokenizer's {byte_ids.VOCAB}"
            )
        corpus.prompts(1, point.length, options.seed, text)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    try:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"keep={str(options.keep)!r} cannot be written: {error.strerror}") from None
    processes.join(point.chip if point.chip in ("cpu", "gpu") else "tpu", point.n_chips, 1)
    try:
        mesh = attach(point.mesh_shape, chip=point.chip)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"slice={point.slice}: {str(error).splitlines()[0]}") from None

    import jax

    own = own_file(mesh, 1)
    path = options.chip or (own if fits_here(own, [point.weights]) else None)
    priced = predicted(point, path) if path and point.layout_value.explicit else {}
    row = measure(point, options, text)
    if jax.process_index() == 0 and options.json:
        print(json.dumps(row), flush=True)
    elif jax.process_index() == 0 and "error" not in row:
        show(row, Console(width=None if sys.stdout.isatty() else 120), priced)
    if "error" in row:
        print(f"failed: {row['error']}", file=sys.stderr)
    return 1 if "error" in row else 0


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
        contender = prepare(point, options.seed, text)
        (timing,) = interleaved([contender.step], repeats=LATENCY_REPEATS, budget_s=LATENCY_BUDGET_S)
        steps = point.steps_per_call
        mesh = dict(zip(AXES, point.mesh_shape, strict=True))
        found = profile(
            contender.step, contender.text, mesh=mesh, n_calls=options.steps, steps=steps, keep=options.keep
        )
        row |= timing.per(steps).numbers() | {"profile": found.to_json()}
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        row["error"] = f"{type(error).__name__}: {said}"
    clear()
    return row | {"environment": environment(options.seed)}


def show(row: Row, console: Console, analytic: Row | None = None) -> None:
    """A row for a person; beside it an analytic row that was priced from a calibrated chip, where there is one."""
    p, found = row["point"], row["profile"]
    console.print(
        f"[bold]{p['model']} on {p['slice']}[/], {p['phase']}, {p['batch']} x {p['length']} tokens, context "
        f"{p['context']}, {point_options.per_call(p)}{p['layout']}/{p['attention']}, {p['weights']} weights"
        f"{', ' + p['cache'] + ' cache' if p.get('cache') else ''}"
    )
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
    """A profile's rows, in the order in which they run; `collectives`: of an analytic row, with what each is priced."""
    listing = Table(title="by scope", title_justify="left")
    for heading in ("scope", "kind"):
        listing.add_column(heading)
    collectives = list(collectives)
    headings = ("times", "device ms", "of these waiting", "share of the step", "work ms")
    for heading in (*headings, *(["priced ms"] if collectives else [])):
        listing.add_column(heading, justify="right")
    for r, t in zip(found["rows"], traced(dict(found), collectives), strict=True):
        priced = [_ms(t.predicted_s)] if collectives else []
        listing.add_row(t.scope, t.what, f"{t.count or 0:,.0f}", *_numbers(r, found), *priced)
    return listing


def totals(found: Mapping[str, Any], analytic: Mapping[str, float] | None = None) -> Table:
    """A profile by kind, with what is no operation.

    Args:
        found: `Profile.to_json`.
        analytic: kind -> seconds of a step by a model, to stand beside; also for `between`, `dispatch` and `step`.
    """
    listing = Table(title="by kind", title_justify="left")
    listing.add_column("kind")
    for heading in ("device ms", "of these waiting", "share of the step", "work ms"):
        listing.add_column(heading, justify="right")
    if analytic is not None:
        listing.add_column("analytic ms", justify="right")
    lines = {kind: _numbers(spent, found) for kind, spent in found["by_kind"].items()}
    for name, seconds in (
        ("between", found["between_s"]),
        ("dispatch", found["dispatch_s"]),
        ("step", found["mean_s"]),
    ):
        lines[name] = (_ms(seconds), "", f"{seconds / found['mean_s']:.1%}", "")
    work = sum(spent["work_s"] for spent in found["by_kind"].values())
    lines["step"] = (*lines["step"][:3], _ms(work))
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
