"""Measures this machine, building block by building block, and writes it down as a chip.

    toruslab calibrate                                   8 fake CPU devices
    toruslab calibrate --slice cpu:4x2x1 --dtypes f32,bf16
    toruslab calibrate --platform gpu --slice gpu:1
    toruslab estimate --slice results/calibrate/cpu-fake-8.toml:2x2x2 --model toy --weights f32 --batch 8 --context 256

Matmuls over sizes and dtypes, copies of weights out of a stack, attention, norms, activations, every collective over
every group of axes, sends along every axis, dispatch: medians and quartiles, all blocks in turn, round after round.
Nothing is measured of the decoder as a whole: what a step takes is predicted from these numbers, never fitted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.measure.calibration import OUT, REPEATS, calibrate, save
from toruslab.benchmarks.reports import calibration_tables
from toruslab.benchmarks.runs import output, processes
from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, guarded, refused
from toruslab.benchmarks.runs.progress import progress
from toruslab.partitioning.torus.mesh import Slice, mesh_shape

DTYPES = ("f32", "bf16", "int8")


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab calibrate", __doc__)
    processes.add_mesh(p)
    p.add_argument("--dtypes", help=f"of the weights (default: f32 on cpu, else bf16; known: {', '.join(DTYPES)})")
    p.add_argument("--repeats", type=at_least(1), default=REPEATS, help="times each block is timed")
    p.add_argument("--quick", action="store_true", help="fewer sizes and repeats: half a minute, less exact")
    p.add_argument("--out", type=Path, help=f"file to write (default: {OUT}/NAME.toml)")
    p.add_argument("--json", action="store_true", help="samples on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    with refused():
        slice_ = Slice.parse(options.slice)
        shape = mesh_shape(slice_, options.mesh)
    platform = processes.platform_of(slice_, options.platform)
    dtypes = (options.dtypes or ("f32" if platform == "cpu" else "bf16")).split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtypes={options.dtypes!r}: {dtype!r} is not one of {', '.join(DTYPES)}")
    if options.out:
        chip_file.check(options.out)
    if processes.must_start(options.processes, slice_.n_chips):
        return processes.start_locally("toruslab.benchmarks.calibrate", argv, options.processes)
    mesh = processes.attached(slice_, shape, options.platform, options.processes)
    with progress("toruslab calibrate", speaks=processes.speaks(), what="compiling") as work:
        machine = calibrate(mesh, dtypes, options.repeats, quick=options.quick, each=work.reach)
    if not processes.speaks():
        return 0
    path = save(machine, mesh, options.processes, options.out)
    if options.json:
        output.print_rows(map(chip_file.entry, machine.samples))
    else:
        console = output.console()
        calibration_tables.show(machine, console)
        if sheet := chip_file.data_sheet(mesh.devices.flat[0].device_kind):
            console.print(calibration_tables.against(machine, chip_file.memory_rate(machine)[0], sheet))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
