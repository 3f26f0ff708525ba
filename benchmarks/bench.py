"""The main job: for every layout and phase the planned, the compiled and the measured pass, side by side.

    toruslab bench
    toruslab bench --slice cpu:4x2x1 --layouts ws2d,wgxy --batches 8,64 --text novel.txt
    toruslab bench --processes 2
    toruslab bench --platform tpu --slice v5e:4x4 --weights bf16

Rows go to OUT/rows.jsonl as they are made, tables and pictures beside them at the end. A run that was interrupted
continues where it stopped when it is started again with the same options; a finished one starts afresh.
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toruslab.benchmarks.calibrate import progress_of
from toruslab.benchmarks.measure.calibration import calibrated, chip_of
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.folder import BenchRun
from toruslab.benchmarks.runs.grid import DECODE_CONTEXT, GRIDS, PREFILL_LENGTHS, grid
from toruslab.benchmarks.runs.options import InputError, Parser, guarded, path
from toruslab.benchmarks.runs.rows import Row, RowFile
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.plan.point import CACHES, Point
from toruslab.partitioning.torus.mesh import AXES, Slice, attach

if TYPE_CHECKING:
    from toruslab.benchmarks.measure.contenders import Contender

GRID_HELP = """wide: two models, two meshes of 8 chips, both phases, four batches: 208 points, ten minutes;
full: each model on each mesh"""
QUICK = {"attention": "batch", "batches": "8", "lengths": "64", "repeats": 5, "budget": 0.3, "profile": "none"}
"""What `--quick` takes for options that were left alone."""
N_PROFILED_STEPS = 3


def parser() -> Parser:
    """The options."""
    p = Parser(prog="toruslab bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--slice", default="cpu:2x2x2", help="CHIP:DIMS in mesh order (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: cpu or gpu as the slice says, else tpu")
    p.add_argument("--model", default="toy", help="preset or config.json (default: %(default)s)")
    p.add_argument("--layouts", default=",".join(LAYOUTS), help="default: %(default)s")
    p.add_argument("--attention", default="heads,batch", help="default: %(default)s, where it makes sense")
    p.add_argument("--phases", default="decode,prefill", help="of decode, prefill, train (default: %(default)s)")
    p.add_argument("--batches", help="sequences per decode step (default: 8,128, or a chip each and 16 a chip)")
    p.add_argument("--context", type=int, default=DECODE_CONTEXT, help="cached tokens in decode (default: %(default)s)")
    p.add_argument(
        "--steps-per-call",
        type=int,
        default=1,
        metavar="N",
        help="decode steps in one call of the program; rows are of one step (default: %(default)s)",
    )
    p.add_argument(
        "--prefill-batch", type=int, help="sequences per prefill or training step (default: 8, or a chip each)"
    )
    p.add_argument(
        "--lengths",
        default=",".join(map(str, PREFILL_LENGTHS)),
        help="tokens per sequence in prefill and training (default: %(default)s)",
    )
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="a training step's batch in N parts")
    p.add_argument(
        "--remat", default="layer", help=f"worked out again for gradients: {', '.join(REMAT)} (default: %(default)s)"
    )
    p.add_argument("--weights", default="f32", help="f32, bf16 or int8 (default: %(default)s)")
    p.add_argument("--cache", choices=CACHES, help="of the KV cache (default: the activations' dtype)")
    p.add_argument("--grid", choices=GRIDS, default="default", help=GRID_HELP)
    p.add_argument("--quick", action="store_true", help="one decode and one prefill cell, few repeats: under a minute")
    p.add_argument("--points", help="a file of JSON points, one a line (- for standard input), instead of the grid")
    p.add_argument("--text", metavar="FILE", help="English text to take the tokens from (default: Python's own manual)")
    p.add_argument("--repeats", type=int, default=20, help="times each step is timed (default: %(default)s)")
    p.add_argument(
        "--budget", type=float, default=1.5, metavar="S", help="seconds of timing per point (default: %(default)s)"
    )
    p.add_argument(
        "--chip",
        metavar="FILE",
        help="a file of toruslab calibrate to predict from, new to measure one now, or none\n"
        "(default: this machine's in results/calibrate, measured first if it is not there)",
    )
    p.add_argument(
        "--profile",
        choices=["none", "some", "all"],
        default="some",
        help="steps to profile; some: of each cell the fastest and the worst predicted layout (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, as it was started")
    p.add_argument("--processes", type=int, default=1, help="local processes over one mesh (default: %(default)s)")
    p.add_argument("--out", type=path, default=Path("results/bench"), help="folder (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of tables")
    return p


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `--quick` fills in those that were left alone."""
    return run_folder.options_of(parser(), argv, QUICK)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a point failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = options_of(argv)
    if options.resume:
        argv = [*run_folder.unfinished(options.out), "--out", str(options.out), *(["--json"] if options.json else [])]
        options = options_of(argv)
    for field, least in (("repeats", 1), ("processes", 1), ("seed", 0)):
        if getattr(options, field) < least:
            raise InputError(f"{field}={getattr(options, field)} must be at least {least}")
    if not 0 < options.budget < math.inf:
        raise InputError(f"budget={options.budget} must be a positive number of seconds")
    groups = grid(options)
    points = [p for group in groups for p in group]
    dtypes = sorted({p.weights for p in points})
    if options.chip not in (None, "none", "new"):
        calibrated(Path(options.chip), dtypes)
    first = points[0]
    text = _text(options, points)
    platform = processes.platform_of(Slice.parse(first.slice), options.platform)
    if first.n_chips % options.processes:
        raise InputError(f"processes={options.processes} does not divide the {first.n_chips} chips of the slice")
    if options.processes > 1 and not processes.is_started():
        if platform != "cpu":
            raise InputError(
                "processes is for fake CPU devices; on a TPU slice start the same command on every host without it"
            )
        if options.points == "-":
            raise InputError("points='-' cannot be shared by several processes; put the points in a file")
        with _opened(options, argv, points, text):  # refuses the folder before anything starts
            pass
        return processes.start_locally("toruslab.benchmarks.bench", argv, options.processes)
    processes.join(platform, first.n_chips, options.processes)
    try:
        mesh = attach(first.mesh_shape, chip=first.chip)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"slice={first.slice}: {str(error).splitlines()[0]}") from None

    import jax

    speaks = jax.process_index() == 0
    with _opened(options, argv, points, text) if speaks else contextlib.nullcontext() as rows:
        run = BenchRun(options, rows)
        console = Console(stderr=True, quiet=not speaks)
        with progress_of(console) as each:
            run.chip = chip_of(
                options.chip,
                run.folder / "chip.toml",
                mesh,
                dtypes,
                n_processes=options.processes,
                speaks=speaks,
                quick=options.quick,
                each=each,
                warn=functools.partial(print, file=sys.stderr),
            )
        _measure(groups, run, text, console)
        return _report(run) if rows else 0


def _opened(
    options: argparse.Namespace, argv: list[str], points: list[Point], text: str
) -> contextlib.AbstractContextManager[RowFile]:
    """The folder of the run."""
    left_out = ("out", "json", "points", "text", "resume")
    settings: Row = {k: str(v) for k, v in vars(options).items() if k not in left_out}
    settings |= {"points": [p.to_json() for p in points], "text": run_folder.digest(text)}
    return run_folder.open_run(options.out.resolve(), settings, argv)


def _measure(groups: list[list[Point]], run: BenchRun, text: str, console: Console) -> None:
    """All points, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("points", total=sum(map(len, groups)))
        for group in groups:
            for point in run_group(group, run, text):
                progress.update(task, advance=1, description=f"{point.phase} {point.layout}/{point.attention}")


def _report(run: BenchRun) -> int:
    """Prints the tables, unless rows were asked for, and writes the pictures; 1 when a point failed."""
    assert run.rows
    rows = run.rows.rows
    if not run.options.json:
        from toruslab.benchmarks.reports.bench_report import show, write

        show(rows, Console(width=None if sys.stdout.isatty() else 120))
        for written in write(rows, run.options.out):
            print(written)
    run.finish()
    failed = [r for r in rows if "error" in r and not run.rows.find(Point.from_json(r["point"]), r["source"])]
    for row in failed:
        print(f"failed: {row['point']['layout']}/{row['point']['attention']} {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _text(options: argparse.Namespace, points: list[Point]) -> str:
    try:
        text = corpus.read(options.text)
        smallest = min(p.config.vocab for p in points)
        if smallest < byte_ids.VOCAB:
            raise ValueError(f"vocab={smallest} of the model is smaller than the byte tokenizer's {byte_ids.VOCAB}")
        corpus.prompts(1, max(p.length for p in points), options.seed, text)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    return text


def run_group(group: list[Point], run: BenchRun, text: str) -> Iterator[Point]:
    """Plans, compiles and times the points of one group against each other; yields each as it is ready."""
    from toruslab.benchmarks.measure.contenders import Contender, analytic, clear, prepare, shares
    from toruslab.benchmarks.measure.timing import interleaved

    options, priced = run.options, {}
    todo = [p for p in group if not run.has(p)]
    contenders: list[Contender] = []
    for point in group:
        if point in todo:
            priced[point] = analytic(point, run.chip)
            run.add(point, "analytic", priced[point])
            work = functools.partial(prepare, point, options.seed, text, run.chip)
            contender = _try(run, point, "compiled", work)
            if contender:
                run.add(point, "compiled", contender.compiled_row)
                if _try(run, point, "measured", lambda contender=contender: contender.step() or True):
                    contenders.append(contender)
        yield point
    calls = interleaved([c.step for c in contenders], repeats=options.repeats, budget_s=options.budget)
    timings = [t.per(c.point.steps_per_call) for c, t in zip(contenders, calls, strict=True)]
    errors = {}
    for contender, timing in zip(contenders, timings, strict=True):
        row = priced[contender.point] if contender.point.layout_value.explicit else contender.compiled_row
        errors[contender.point] = abs(row["latency_s"] / timing.median_s - 1) if "terms" in row else 0.0
    medians = {c.point: t.median_s for c, t in zip(contenders, timings, strict=True)}
    profiled = set(medians) if options.profile == "all" else set()
    if options.profile == "some" and medians:
        profiled = {min(medians, key=medians.__getitem__), max(errors, key=errors.__getitem__)}
    for contender, timing in zip(contenders, timings, strict=True):
        numbers = timing.numbers() | shares(priced[contender.point], timing.median_s)
        if contender.point in profiled and _alone():
            numbers["profile"] = _profile(contender)
        run.add(contender.point, "measured", numbers)
    clear()


def _alone() -> bool:
    """Whether this process sees all devices: a profile of a part of them would not be one of the step."""
    import jax

    return jax.process_count() == 1


def _profile(contender: "Contender") -> Row:
    from toruslab.benchmarks.measure.profiling import profile

    mesh = dict(zip(AXES, contender.point.mesh_shape, strict=True))
    try:
        steps = contender.point.steps_per_call
        found = profile(contender.step, contender.text, mesh=mesh, n_calls=N_PROFILED_STEPS, steps=steps)
        return found.to_json()
    except Exception as error:  # a profile is beside the point: the measured row stands, and says so
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"no profile of {contender.point.layout}/{contender.point.attention}: {said}", file=sys.stderr)
        return {"error": said}


def _try(run: BenchRun, point: Point, source: str, work: Callable):
    """A point that fails is a row with its error; the others go on."""
    try:
        return work()
    except Exception as error:
        run.add(point, source, {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return None


if __name__ == "__main__":
    sys.exit(guarded(main))
