"""Measures this machine, building block by building block, and writes it down as a chip.

    toruslab calibrate                                   8 fake CPU devices
    toruslab calibrate --slice cpu:4x2x1 --dtypes f32,bf16
    toruslab calibrate --platform gpu --slice gpu:1
    toruslab estimate --slice results/calibrate/cpu-fake-8.toml:2x2x2 --model toy --weights f32 --batch 8 --context 256

Matmuls over sizes and dtypes, copies of weights out of a stack, attention, norms, activations, every collective over
every group of axes, sends along every axis, dispatch: medians and quartiles, all blocks in turn, round after round.
Nothing is measured of the decoder as a whole: what a step takes is predicted from these numbers, never fitted.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.measure.calibration import OUT, REPEATS, calibrate, save
from toruslab.benchmarks.reports import calibration_tables
from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.partitioning.torus.mesh import Slice, attach, mesh_shape

DTYPES = ("f32", "bf16", "int8")


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(prog="toruslab calibrate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--slice", default="cpu:2x2x2", help="CHIP:DIMS in mesh order (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: cpu or gpu as the slice says, else tpu")
    p.add_argument("--dtypes", help="of the weights (default: f32 on cpu, else bf16; known: f32, bf16, int8)")
    p.add_argument("--repeats", type=int, default=REPEATS, help="times each block is timed (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="fewer sizes and repeats: half a minute, less exact")
    p.add_argument("--processes", type=int, default=1, help="local processes over one mesh (default: %(default)s)")
    p.add_argument("--out", type=Path, help=f"file to write (default: {OUT}/NAME.toml)")
    p.add_argument("--json", action="store_true", help="samples on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    for field in ("repeats", "processes"):
        if getattr(options, field) < 1:
            raise InputError(f"{field}={getattr(options, field)} must be at least 1")
    try:
        slice_ = Slice.parse(options.slice)
        shape = mesh_shape(slice_, options.mesh)
    except ValueError as error:
        raise InputError(str(error)) from None
    platform = processes.platform_of(slice_, options.platform)
    dtypes = (options.dtypes or ("f32" if platform == "cpu" else "bf16")).split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtypes={options.dtypes!r}: {dtype!r} is not one of {', '.join(DTYPES)}")
    if options.out:
        chip_file.check(options.out)
    if slice_.n_chips % options.processes:
        raise InputError(f"processes={options.processes} does not divide the {slice_.n_chips} chips of the slice")
    if options.processes > 1 and not processes.is_started():
        return processes.start_locally("toruslab.benchmarks.calibrate", argv, options.processes)
    processes.join(platform, slice_.n_chips, options.processes)
    try:
        mesh = attach(shape, chip=slice_.chip)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"slice={slice_}: {str(error).splitlines()[0]}") from None
    import jax

    speaks = jax.process_index() == 0
    console = Console(stderr=True, quiet=not speaks)
    with progress_of(console) as each:
        machine = calibrate(mesh, dtypes, options.repeats, quick=options.quick, each=each)
    if not speaks:
        return 0
    path = save(machine, mesh, options.processes, options.out)
    if options.json:
        for sample in machine.samples:
            print(json.dumps(chip_file.entry(sample)))
    else:
        out = Console(width=None if sys.stdout.isatty() else 120)
        calibration_tables.show(machine, out)
        if sheet := chip_file.data_sheet(jax.devices()[0].device_kind):
            out.print(calibration_tables.against(machine, chip_file.memory_rate(machine)[0], sheet))
        print(path)
    return 0


@contextlib.contextmanager
def progress_of(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a console, as `benchmarks.measure.calibration.calibrate` reports to one."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


if __name__ == "__main__":
    sys.exit(guarded(main))
