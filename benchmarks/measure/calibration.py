"""Calibration of this machine: measures all building blocks, keeps them as a chip file, and finds the file that fits.

Nothing here measures the decoder as a whole. `benchmarks.measure.building_blocks` lists what is measured,
`benchmarks.measure.looped` times it, `benchmarks.measure.chip_file` is the format of the file. Imports no JAX until
something is measured, since a command chooses the platform first.
"""

import gc
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.runs.parser import InputError
from toruslab.benchmarks.runs.processes import all_agree
from toruslab.benchmarks.runs.rows import environment
from toruslab.partitioning.torus.calibrated import Machine
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.mesh import AXES

OUT = Path("results/calibrate")
REPEATS, QUICK_REPEATS = 6, 3


def calibrate(
    mesh: Any, dtypes: Sequence[str], repeats: int, *, quick: bool = False, each: Callable[[int, int, str], None]
) -> Machine:
    """Measures all building blocks on the devices of a mesh.

    Args:
        mesh: of `attach`.
        dtypes: of the weights. int8 adds bf16, the dtype of its activations and tables.
        repeats: rounds, see `benchmarks.measure.looped.measure`.
        quick: fewer sizes, and at most `QUICK_REPEATS` rounds.
        each: called with (steps done, all steps, the block's kind) after each compilation and each timing.
    """
    from toruslab.benchmarks.measure import building_blocks
    from toruslab.benchmarks.measure.looped import dispatch, measure

    platform = mesh.devices.flat[0].platform
    dtypes = list(dict.fromkeys(d for asked in dtypes for d in (asked, *(["bf16"] if asked == "int8" else []))))
    blocks = list(building_blocks.blocks(mesh, dtypes, platform, quick=quick))
    if quick:
        repeats = min(repeats, QUICK_REPEATS)
    done, total = 0, (repeats + 1) * len(blocks)

    def count(what: str) -> None:
        nonlocal done
        done += 1
        each(done, total, what)

    samples = [dispatch(mesh, repeats), *measure(blocks, mesh, repeats=repeats, each=count)]
    gc.collect()  # the programs and their gigabytes of arrays refer to each other
    shape = tuple(mesh.shape[a] for a in AXES)
    return Machine(n_devices=mesh.size, shared=platform == "cpu", mesh=shape, samples=tuple(samples))


def save(machine: Machine, mesh: Any, n_processes: int, path: Path | None = None) -> Path:
    """Writes the chip file to a path, or to `own_file`. Returns the path."""
    devices = list(mesh.devices.flat)
    path = path or own_file(mesh, n_processes)
    memory_bytes = chip_file.memory_of(devices[0], len(devices))
    chip_file.write(path, name_of(devices, n_processes), machine, memory_bytes, environment(seed=0))
    return path


def own_file(mesh: Any, n_processes: int) -> Path:
    """The path under which a calibration of these devices is kept."""
    return OUT / f"{name_of(list(mesh.devices.flat), n_processes)}.toml"


def name_of(devices: Sequence[Any], n_processes: int) -> str:
    """A machine's name: `cpu-fake-8`, or the kind of device and the number of devices."""
    if devices[0].platform == "cpu":
        return f"cpu-fake-{len(devices)}" + (f"-in-{n_processes}" if n_processes > 1 else "")
    return "-".join([*str(devices[0].device_kind).lower().split(), str(len(devices))])


def calibrated(path: Path, dtypes: Sequence[str] = ()) -> Chip:
    """The chip of a file that `toruslab calibrate` wrote.

    Args:
        path: of the file.
        dtypes: weights that it must have measured.

    Raises:
        InputError: the file cannot be read, is not of `toruslab calibrate`, or lacks a dtype.
    """
    try:
        found = chip(path)
    except ValueError as error:
        said = str(error)
        raise InputError(said if said.startswith("chip=") else f"chip={str(path)!r}: {said}") from None
    if not found.machine:
        raise InputError(f"chip={str(path)!r} has no [machine]: it must be a file of toruslab calibrate")
    try:
        for dtype in dtypes:
            found.machine.of("matmul", dtype)
    except ValueError as error:
        raise InputError(f"chip={str(path)!r}: {error}") from None
    return found


def fits_here(path: Path, dtypes: Sequence[str]) -> bool:
    """Whether a chip file describes this machine under this JAX, with these dtypes of weights.

    A file with collectives must have measured collective-permutes too, which older files lack. Initialises the JAX
    backend.
    """
    here = environment(seed=0)
    try:
        written = tomllib.loads(path.read_text())["machine"]
        there = written["environment"]
        known = {s["dtype"] for s in written["samples"] if s["what"] == "matmul"}
        moves = {s["what"] for s in written["samples"] if s.get("axes")}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if moves and "collective-permute" not in moves:
        return False
    return known.issuperset(dtypes) and all(
        there.get(k) == here[k] for k in ("jax", "jaxlib", "python", "platform", "device_kind", "cores")
    )


def chip_of(
    asked: str | None,
    kept: Path,
    mesh: Any,
    dtypes: Sequence[str],
    *,
    n_processes: int,
    speaks: bool,
    quick: bool,
    each: Callable[[int, int, str], None],
    warn: Callable[[str], None],
) -> Chip | None:
    """The calibrated chip that a run predicts from.

    A run that goes on takes the chip that it began with. A new run takes the file that was asked for, or this machine's
    own file, which is measured first if it is missing or was asked to be new.

    Args:
        asked: a chip file, "new", "none", or None for this machine's own file.
        kept: the copy of the chip file in the run's folder.
        mesh: the devices to measure.
        dtypes: of the weights.
        n_processes: processes over the mesh.
        speaks: whether this process writes. The others take part in the measurement and get None.
        quick: never measure; without a file that fits there are no predictions.
        each: see `calibrate`.
        warn: called with a sentence when there will be no predictions.
    """
    if asked == "none":
        return None
    own = own_file(mesh, n_processes)
    path = kept if all_agree(kept.exists()) else own if asked in (None, "new") else Path(asked)
    if path == own and (asked == "new" or not all_agree(fits_here(own, dtypes))):
        if quick:
            warn("no predictions: toruslab calibrate has not been run here")
            return None
        machine = calibrate(mesh, dtypes, REPEATS, each=each)
        if speaks:
            save(machine, mesh, n_processes)
    if not speaks:
        return None
    found = calibrated(path, dtypes)
    if path != kept:
        shutil.copyfile(path, kept)
    return found
