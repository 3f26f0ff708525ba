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
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toruslab.benchmarks.measure.calibration import calibrated, chip_of
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output, point_options, processes
from toruslab.benchmarks.runs.grid import DECODE_CONTEXT, GRIDS, PREFILL_LENGTHS, grid
from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, guarded, path, seconds
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row, environment, failure
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.plan.point import CACHES, Point
from toruslab.partitioning.torus.chip import Chip
from toruslab.partitioning.torus.mesh import AXES, Slice

if TYPE_CHECKING:
    from toruslab.benchmarks.measure.contenders import Contender

GRID_HELP = """wide: two models, two meshes of 8 chips, both phases, four batches: 208 points, ten minutes;
full: each model on each mesh"""
QUICK = {"attention": "batch", "batches": "8", "lengths": "64", "repeats": 5, "budget": 0.3, "profile": "none"}
"""The values of `--quick` for options that are not given."""
N_PROFILED_STEPS = 3


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab bench", __doc__)
    processes.add_mesh(p)
    p.add_argument("--model", default="toy", help="preset or config.json")
    p.add_argument("--layouts", default=",".join(LAYOUTS), help="with commas between them")
    p.add_argument("--attention", default="heads,batch", help="default: %(default)s, where it makes sense")
    p.add_argument("--phases", default="decode,prefill", help="of decode, prefill, train")
    p.add_argument("--batches", help="sequences per decode step (default: 8,128, or a chip each and 16 a chip)")
    p.add_argument("--context", type=int, default=DECODE_CONTEXT, help="cached tokens in decode")
    p.add_argument(
        "--steps-per-call",
        type=int,
        default=1,
        metavar="N",
        help="decode steps in one call of the program; rows are of one step",
    )
    p.add_argument(
        "--prefill-batch", type=int, help="sequences per prefill or training step (default: 8, or a chip each)"
    )
    lengths = ",".join(map(str, PREFILL_LENGTHS))
    p.add_argument("--lengths", default=lengths, help="tokens per sequence in prefill and training")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="a training step's batch in N parts")
    p.add_argument("--remat", default="layer", help=f"recomputed for gradients: {', '.join(REMAT)} (default: layer)")
    p.add_argument("--weights", default="f32", help="f32, bf16 or int8")
    p.add_argument("--cache", choices=CACHES, help="of the KV cache (default: the activations' dtype)")
    p.add_argument("--grid", choices=GRIDS, default="default", help=GRID_HELP)
    p.add_argument("--quick", action="store_true", help="one decode and one prefill cell, few repeats: under a minute")
    p.add_argument("--points", help="a file of JSON points, one a line (- for standard input), instead of the grid")
    point_options.add_text(p)
    p.add_argument("--repeats", type=at_least(1), default=20, help="times each step is timed")
    p.add_argument("--budget", type=seconds, default=1.5, metavar="S", help="seconds of timing per point")
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
        help="steps to profile; some: of each cell the fastest and the worst predicted layout",
    )
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, as it was started")
    p.add_argument("--out", type=path, default=Path("results/bench"), help="folder")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of tables")
    return p


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the values of `--quick`."""
    return run_folder.options_of(parser(), argv, QUICK)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a point failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = run_folder.as_started(options_of(argv), argv)
    options = options_of(argv)
    cells = grid(options)
    points = [p for cell in cells for p in cell]
    dtypes = sorted({p.weights for p in points})
    if options.chip not in (None, "none", "new"):
        calibrated(Path(options.chip), dtypes)
    text = point_options.read_text(points, options.text, options.seed)
    slice_ = Slice.parse(points[0].slice)
    is_fake = processes.platform_of(slice_, options.platform) == "cpu"
    left_out = ("out", "json", "points", "text", "resume")
    settings: Row = {k: str(v) for k, v in vars(options).items() if k not in left_out}
    settings |= {"points": [p.to_json() for p in points], "text": run_folder.digest(text)}
    opened = functools.partial(run_folder.open_run, options, settings, argv, others=("chip.toml",))
    if processes.must_start(options.processes, slice_.n_chips):
        if not is_fake:
            raise InputError(
                "processes is for fake CPU devices; on a TPU slice start the same command on every host without it"
            )
        if options.points == "-":
            raise InputError("points='-' cannot be shared by several processes; put the points in a file")
        with opened():  # refuses the folder before anything starts
            pass
        return processes.start_locally("toruslab.benchmarks.bench", argv, options.processes)
    mesh = processes.attached(slice_, points[0].mesh_shape, options.platform, options.processes)
    speaks = processes.speaks()
    with opened() if speaks else contextlib.nullcontext() as folder:
        with progress("toruslab bench", speaks=speaks, what="calibrating") as work:
            chip = chip_of(
                options.chip,
                options.out.resolve() / "chip.toml",
                mesh,
                dtypes,
                n_processes=options.processes,
                speaks=speaks,
                quick=options.quick,
                each=work.reach,
                warn=functools.partial(print, file=sys.stderr),
            )
            run = _Bench(options, folder, chip, text)
            work.begin("points", total=len(points))
            for cell in cells:
                for point in run.measure(cell):
                    work.advance(1, f"{point.phase} {point.layout}/{point.attention}")
            work.begin("drawing the report")
            if folder and not options.json:
                _report(folder)
        if not folder:
            return 0
        folder.finish()
        failed = [r for r in folder.rows if not folder.file.find(Point.from_json(r["point"]), r["source"])]
        return output.failures(failed, lambda r: f"{r['point']['layout']}/{r['point']['attention']} ")


def _report(folder: run_folder.RunFolder) -> None:
    """Prints the tables and writes the pictures."""
    from toruslab.benchmarks.reports.bench_report import show, write

    show(folder.rows, output.console())
    output.written(write(folder.rows, folder.path), as_json=False)


class _Bench:
    """Makes the rows of a bench.

    Args:
        options: of the command.
        folder: of the rows; None in a process that writes none.
        chip: to predict from.
        text: to take the tokens from.
    """

    def __init__(self, options: argparse.Namespace, folder: run_folder.RunFolder | None, chip: Chip | None, text: str):
        self.options, self.folder, self.chip, self.text = options, folder, chip, text
        self.environment = environment(options.seed)

    def add(self, point: Point, source: str, numbers: Row) -> None:
        """Keeps a row, unless an interrupted run has left it."""
        if self.folder and not self.folder.file.find(point, source):
            row = {"point": point.to_json(), "source": source, **numbers, "environment": self.environment}
            self.folder.add(row)

    def has(self, point: Point) -> bool:
        """Whether an interrupted run has measured the point; all processes agree on it."""
        return processes.all_agree(bool(self.folder and self.folder.file.find(point, "measured")))

    def measure(self, cell: list[Point]) -> Iterator[Point]:
        """Plans, compiles and times the points of a cell against each other; yields each when it is compiled."""
        from toruslab.benchmarks.measure.contenders import analytic, clear, prepare, shares
        from toruslab.benchmarks.measure.timing import interleaved

        options, priced = self.options, {}
        contenders: list[Contender] = []
        for point in cell:
            if not self.has(point):
                priced[point] = analytic(point, self.chip)
                self.add(point, "analytic", priced[point])
                work = functools.partial(prepare, point, options.seed, self.text, self.chip)
                if contender := self._try(point, "compiled", work):
                    self.add(point, "compiled", contender.compiled_row)
                    if self._try(point, "measured", lambda made=contender: made.step() or True):
                        contenders.append(contender)
            yield point
        calls = interleaved([c.step for c in contenders], repeats=options.repeats, budget_s=options.budget)
        timings = [t.per(c.point.steps_per_call) for c, t in zip(contenders, calls, strict=True)]
        errors = []
        for c, timing in zip(contenders, timings, strict=True):
            row = priced[c.point] if c.point.layout_value.explicit else c.compiled_row
            errors.append(abs(row["latency_s"] / timing.median_s - 1) if "terms" in row else 0.0)
        profiled = set(range(len(timings))) if options.profile == "all" else set()
        if options.profile == "some" and timings:
            medians = [timing.median_s for timing in timings]
            profiled = {medians.index(min(medians)), errors.index(max(errors))}
        for i, (c, timing) in enumerate(zip(contenders, timings, strict=True)):
            numbers = timing.numbers() | shares(priced[c.point], timing.median_s)
            if i in profiled and processes.is_alone():
                numbers["profile"] = _profile(c)
            self.add(c.point, "measured", numbers)
        clear()

    def _try(self, point: Point, source: str, work: Callable):
        """A point that fails is a row with its error; the others go on."""
        try:
            return work()
        except Exception as error:
            self.add(point, source, failure(error))
            return None


def _profile(contender: "Contender") -> Row:
    from toruslab.benchmarks.measure.profiling import profile

    point = contender.point
    mesh = dict(zip(AXES, point.mesh_shape, strict=True))
    try:
        steps = point.steps_per_call
        return profile(contender.step, contender.text, mesh=mesh, n_calls=N_PROFILED_STEPS, steps=steps).to_json()
    except Exception as error:  # the measured row still counts, and says that it has no profile
        found = failure(error)
        print(f"no profile of {point.layout}/{point.attention}: {found['error']}", file=sys.stderr)
        return found


if __name__ == "__main__":
    sys.exit(guarded(main))
