"""The main job: for every layout and phase the planned, the compiled and the measured pass, side by side.

    toruslab bench
    toruslab bench --slice cpu:4x2x1 --layouts ws2d,wgxy --batches 8,64 --text novel.txt
    toruslab bench --processes 2
    toruslab bench --platform tpu --slice v5e:4x4 --weights bf16

Rows go to OUT/rows.jsonl as they are made, tables and pictures beside them at the end. A run that was interrupted
continues where it stopped when it is started again with the same options; a finished one starts afresh.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import processes
from benchmarks.cli import InputError, Parser, guarded
from benchmarks.lines import read_lines
from benchmarks.rows import Row, Rows, changes, commit, environment
from models import text
from partitioning.layouts import LAYOUTS, NoAxisLeft, layout
from partitioning.mesh import Slice, attach
from partitioning.point import Point

DECODE_CONTEXT = 256
PREFILL_LENGTHS = (16, 256)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(prog="toruslab bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--slice", default="cpu:2x2x2", help="CHIP:DIMS in mesh order (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: cpu or gpu as the slice says, else tpu")
    p.add_argument("--model", default="toy", help="preset or config.json (default: %(default)s)")
    p.add_argument("--layouts", default=",".join(LAYOUTS), help="default: %(default)s")
    p.add_argument("--attention", default="heads,batch", help="default: %(default)s, where it makes sense")
    p.add_argument("--phases", default="decode,prefill", help="default: %(default)s")
    p.add_argument("--batches", help="sequences per decode step (default: 8,128, or a chip each and 16 a chip)")
    p.add_argument("--context", type=int, default=DECODE_CONTEXT, help="cached tokens in decode (default: %(default)s)")
    p.add_argument("--prefill-batch", type=int, help="sequences per prefill (default: 8, or a chip each)")
    p.add_argument(
        "--lengths",
        default=",".join(map(str, PREFILL_LENGTHS)),
        help="tokens per sequence in prefill (default: %(default)s)",
    )
    p.add_argument("--weights", default="f32", help="f32, bf16 or int8 (default: %(default)s)")
    p.add_argument("--points", help="a file of JSON points, one a line (- for standard input), instead of the grid")
    p.add_argument("--text", metavar="FILE", help="English text to take the tokens from (default: Python's own manual)")
    p.add_argument("--repeats", type=int, default=20, help="times each step is timed (default: %(default)s)")
    p.add_argument(
        "--budget", type=float, default=1.5, metavar="S", help="seconds of timing per point (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--processes", type=int, default=1, help="local processes over one mesh (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("results/bench"), help="folder (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a point failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    for field, least in (("repeats", 1), ("processes", 1), ("seed", 0)):
        if getattr(options, field) < least:
            raise InputError(f"{field}={getattr(options, field)} must be at least {least}")
    if not 0 < options.budget < math.inf:
        raise InputError(f"budget={options.budget} must be a positive number of seconds")
    groups = grid(options)
    points = [p for group in groups for p in group]
    first = points[0]
    corpus = _text(options, points)
    wanted = first.chip if first.chip in ("cpu", "gpu") else "tpu"
    platform = options.platform or wanted
    if platform != wanted:
        raise InputError(f"platform={platform!r} does not fit slice={first.slice}, whose chips are {wanted}")
    if first.n_chips % options.processes:
        raise InputError(f"processes={options.processes} does not divide the {first.n_chips} chips of the slice")
    if options.processes > 1 and not processes.is_started():
        if platform != "cpu":
            raise InputError(
                "processes is for fake CPU devices; on a TPU slice start the same command on every host without it"
            )
        if options.points == "-":
            raise InputError("points='-' cannot be shared by several processes; put the points in a file")
        Rows(options.out / "rows.jsonl")  # refuses damaged results before anything starts
        return processes.start_locally("benchmarks.step_latency", argv, options.processes)
    processes.join(platform, first.n_chips, options.processes)
    try:
        attach(first.mesh_shape, chip=first.chip)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"slice={first.slice}: {str(error).splitlines()[0]}") from None

    import jax

    speaks = jax.process_index() == 0
    run = Run(options, speaks, [p.to_json() for p in points], corpus)
    console = Console(stderr=True, quiet=not speaks)
    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("points", total=len(points))
        for group in groups:
            for point in run_group(group, run, corpus):
                progress.update(task, advance=1, description=f"{point.phase} {point.layout}/{point.attention}")
    if not run.rows:
        return 0
    if not options.json:
        from benchmarks.report import show, write

        show(run.rows.rows, Console(width=None if sys.stdout.isatty() else 120))
        for path in write(run.rows.rows, options.out):
            print(path)
    run.finish()
    failed = [r for r in run.rows.rows if "error" in r and not run.rows.find(Point.from_json(r["point"]), r["source"])]
    for row in failed:
        print(f"failed: {row['point']['layout']}/{row['point']['attention']} {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def grid(options: argparse.Namespace) -> list[list[Point]]:
    """The points, in groups that are timed against each other.

    Raises:
        InputError: an option that no point can be made of.
    """
    try:
        if options.points is not None:
            return _from_file(options.points)
        names, attentions = options.layouts.split(","), options.attention.split(",")
        each = max(8, Slice.parse(options.slice).n_chips)
        passes = {
            "decode": [
                (b, 1, options.context)
                for b in _numbers("batches", f"{each},{16 * each}" if options.batches is None else options.batches)
            ],
            "prefill": [(options.prefill_batch or each, n, 0) for n in _numbers("lengths", options.lengths)],
        }
        groups = []
        for phase in options.phases.split(","):
            for batch, length, context in passes.get(phase, [(1, 1, 1)]):
                common = Point(
                    model=options.model,
                    slice=options.slice,
                    mesh=options.mesh,
                    phase=phase,
                    batch=batch,
                    length=length,
                    context=context,
                    layout=names[0],
                    attention=_first_legal(names[0], attentions),
                    weights=options.weights,
                )
                groups.append(
                    [
                        dataclasses.replace(common, layout=name, attention=attention)
                        for name in names
                        for attention in attentions
                        if len(attentions) == 1 or _makes_sense(name, attention)
                    ]
                )
        return groups
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _from_file(path: str) -> list[list[Point]]:
    groups: dict[tuple, list[Point]] = {}
    for number, line in read_lines("points", path):
        try:
            if isinstance(line, ValueError):
                raise line
            point = Point.from_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        groups.setdefault((point.phase, point.batch, point.length, point.context), []).append(point)
    if not groups:
        raise ValueError(f"points={path!r} holds no point")
    slices = {(p.slice, p.mesh_shape) for group in groups.values() for p in group}
    if len(slices) > 1:
        raise ValueError(f"points={path!r} names {len(slices)} slices or meshes; a run measures one")
    return list(groups.values())


def _numbers(field: str, value: str) -> list[int]:
    try:
        return [int(n) for n in value.split(",")]
    except ValueError:
        raise ValueError(f"{field}={value!r} must be integers with commas between them") from None


def _makes_sense(name: str, attention: str) -> bool:
    try:
        layout(name, attention, (2, 2, 2), 1)
    except NoAxisLeft:
        return False
    return True


def _first_legal(name: str, attentions: list[str]) -> str:
    return next((a for a in attentions if _makes_sense(name, a)), attentions[0])


def _text(options: argparse.Namespace, points: list[Point]) -> str:
    try:
        corpus = text.corpus(options.text)
        smallest = min(p.config.vocab for p in points)
        if smallest < text.VOCAB:
            raise ValueError(f"vocab={smallest} of the model is smaller than the byte tokenizer's {text.VOCAB}")
        text.prompts(1, max(p.length for p in points), options.seed, corpus)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    return corpus


class Run:
    """Where the rows of one run go, and what an interrupted one has left."""

    def __init__(self, options: argparse.Namespace, speaks: bool, points: list[Row], corpus: str):
        self.options = options
        folder: Path = options.out.resolve()
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("out", "json", "points", "text")}
        settings |= {"points": points, "text": _digest(corpus), "commit": commit(), "changes": _digest(changes())}
        marker, done = folder / "settings.json", folder / "finished"
        try:
            if speaks and folder.exists() and (done.exists() or _load(marker) != settings):
                Rows(folder / "rows.jsonl")  # damaged results are never moved away unseen
                _put_aside(folder)
            if speaks:
                folder.mkdir(parents=True, exist_ok=True)
                marker.write_text(json.dumps(settings, indent=1))
            self.rows = Rows(folder / "rows.jsonl") if speaks else None
        except OSError as error:
            raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None
        self.environment = environment(options.seed)
        if options.json and self.rows:
            for row in self.rows.rows:
                print(json.dumps(row), flush=True)

    def add(self, point: Point, source: str, numbers: Row) -> None:
        """Keeps a row, and prints it under `--json`; not a second time what an interrupted run has left."""
        if self.rows and not self.rows.find(point, source):
            row = {"point": point.to_json(), "source": source, **numbers, "environment": self.environment}
            self.rows.add(row)
            if self.options.json:
                print(json.dumps(row), flush=True)

    def has(self, point: Point) -> bool:
        """Whether an earlier, interrupted run has measured the point; all processes agree on it."""
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        found = bool(self.rows and self.rows.find(point, "measured"))
        return bool(multihost_utils.broadcast_one_to_all(np.array(found))) if jax.process_count() > 1 else found

    def finish(self) -> None:
        """Marks the run as finished: the next one starts afresh."""
        (self.options.out / "finished").touch()


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _digest(text_: str) -> str:
    return hashlib.sha256(text_.encode()).hexdigest()[:16]


def _put_aside(folder: Path) -> None:
    """Moves an earlier run's folder away; its results stay, under a number."""
    if not (folder / "rows.jsonl").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    shutil.move(folder, aside)


def run_group(group: list[Point], run: Run, corpus: str) -> Iterator[Point]:
    """Plans, compiles and times the points of one group against each other; yields each as it is ready."""
    from benchmarks.contenders import Contender, analytic, clear, prepare

    todo = [p for p in group if not run.has(p)]
    contenders: list[Contender] = []
    for point in group:
        if point in todo:
            run.add(point, "analytic", analytic(point))
            contender = _try(run, point, "compiled", lambda point=point: prepare(point, run.options.seed, corpus))
            if contender:
                run.add(point, "compiled", contender.compiled_row)
                if _try(run, point, "measured", lambda contender=contender: contender.step() or True):
                    contenders.append(contender)
        yield point

    from benchmarks.timing import interleaved

    options = run.options
    timings = interleaved([c.step for c in contenders], repeats=options.repeats, budget_s=options.budget)
    for contender, timing in zip(contenders, timings, strict=True):
        run.add(contender.point, "measured", timing.numbers())
    clear()


def _try(run: Run, point: Point, source: str, work: Callable):
    """A point that fails is a row with its error; the others go on."""
    try:
        return work()
    except Exception as error:
        run.add(point, source, {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        return None


if __name__ == "__main__":
    sys.exit(guarded(main))
