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
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import environment
from toruslab.partitioning.torus.calibrated import Machine
from toruslab.partitioning.torus.mesh import AXES, Slice, attach, mesh_shape

OUT = Path("results/calibrate")
REPEATS, QUICK_REPEATS = 6, 3
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
    machine = calibrate(mesh, dtypes, options.repeats, console, quick=options.quick)
    if not speaks:
        return 0
    path = save(machine, mesh, options.processes, options.out)
    if options.json:
        for sample in machine.samples:
            print(json.dumps(chip_file.entry(sample)))
    else:
        out = Console(width=None if sys.stdout.isatty() else 120)
        chip_file.show(machine, out)
        if sheet := chip_file.data_sheet(jax.devices()[0].device_kind):
            out.print(chip_file.against(machine, sheet))
        print(path)
    return 0


def save(machine: Machine, mesh: Any, n_processes: int, path: Path | None = None) -> Path:
    """Writes the chip file, under the machine's own name unless a path is given."""
    devices = list(mesh.devices.flat)
    name = chip_file.name_of(devices, n_processes)
    path = path or OUT / f"{name}.toml"
    memory = chip_file.memory_of(devices[0], len(devices))
    chip_file.write(path, name, machine, memory, environment(seed=0))
    return path


def calibrate(mesh: Any, dtypes: Sequence[str], repeats: int, console: Console, *, quick: bool = False) -> Machine:
    """Measures everything on the devices of a mesh.

    Args:
        mesh: of `attach`.
        dtypes: of weights; beside int8 bf16 is measured as well, which its activations and tables are.
        repeats: see `microbench.measure`.
        console: where progress goes.
        quick: fewer sizes, and at most `QUICK_REPEATS`.
    """
    from toruslab.benchmarks.measure.blocks import blocks
    from toruslab.benchmarks.measure.looped import dispatch, measure

    platform = mesh.devices.flat[0].platform
    dtypes = list(dict.fromkeys(d for asked in dtypes for d in (asked, *(["bf16"] if asked == "int8" else []))))
    todo = list(blocks(mesh, dtypes, platform, quick=quick))
    if quick:
        repeats = min(repeats, QUICK_REPEATS)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=(repeats + 1) * len(todo))
        samples = [dispatch(mesh, repeats)]
        samples += measure(
            todo,
            mesh,
            repeats=repeats,
            each=lambda what: progress.update(task, advance=1, description=what),
        )
    gc.collect()  # gigabytes of arrays, in cycles with the programs that use them
    shape = tuple(mesh.shape[a] for a in AXES)
    return Machine(n_devices=mesh.size, shared=platform == "cpu", mesh=shape, samples=tuple(samples))


if __name__ == "__main__":
    sys.exit(guarded(main))
