"""Devices and processes: how a command gets its mesh, alone or with other processes.

Processes are local ones that this module starts, or one on every host of a slice. All of them run the same program.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toruslab.benchmarks.runs.parser import InputError, at_least
from toruslab.partitioning.torus.mesh import Shape, Slice, attach

if TYPE_CHECKING:
    from jax.sharding import Mesh

RANK, PORT = "TORUSLAB_PROCESS", "TORUSLAB_PORT"


def add_mesh(p: argparse.ArgumentParser) -> None:
    """Adds `--slice`, `--mesh`, `--platform` and `--processes`, for commands that measure on a mesh."""
    p.add_argument("--slice", default="cpu:2x2x2", help="CHIP:DIMS in mesh order")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--platform", choices=["cpu", "gpu", "tpu"], help="default: cpu or gpu as the slice says, else tpu")
    p.add_argument("--processes", type=at_least(1), default=1, help="local processes over one mesh")


def must_start(n_processes: int, n_chips: int) -> bool:
    """Whether this process must start the others, and not take part itself.

    Raises:
        InputError: the chips cannot be shared out among so many.
    """
    if n_chips % n_processes:
        raise InputError(f"processes={n_processes} does not divide the {n_chips} chips of the slice")
    return n_processes > 1 and not is_started()


def start_locally(module: str, argv: Sequence[str], n: int) -> int:
    """Runs `python -m module argv` in `n` processes on this machine; only the first one prints.

    When one process fails, the others are ended: they would wait for it for ever.

    Returns:
        The exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, *argv]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the others as well
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, RANK: str(rank), PORT: str(port)},
            stdout=None if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(n)
    ]
    try:
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            time.sleep(0.05)
        failed = [p.returncode for p in running if p.returncode]
        return failed[0] if failed else 0
    finally:
        for p in running:
            if p.poll() is None:
                p.terminate()
        for p in running:
            p.wait()


def platform_of(slice_: Slice, asked: str | None) -> str:
    """The platform of a slice's chips: `cpu` or `gpu` as it says, else `tpu`.

    Raises:
        InputError: another one was asked for.
    """
    wanted = slice_.chip if slice_.chip in ("cpu", "gpu") else "tpu"
    if asked not in (None, wanted):
        raise InputError(f"platform={asked!r} does not fit slice={slice_}, whose chips are {wanted}")
    return wanted


def is_started() -> bool:
    """Whether this process is one of several that `start_locally` made."""
    return RANK in os.environ


def join(platform: str, n_chips: int, n_processes: int) -> None:
    """Sets up this process's devices and, where there are several processes, connects them. Call before any JAX work.

    Args:
        platform: `cpu`, `gpu` or `tpu`.
        n_chips: places in the mesh, a multiple of `n_processes`. Every process has an equal part of fake CPU devices.
        n_processes: of `start_locally`, else 1. On a TPU slice of several hosts the processes find each other.
    """
    import jax

    from toruslab.partitioning.torus.mesh import fake_cpu_devices

    if platform == "cpu":
        fake_cpu_devices(n_chips // n_processes)
    if is_started():
        if platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            sys.stdout = os.fdopen(os.dup(1), "w")  # Gloo greets its peers on standard output, which is for rows
            os.dup2(2, 1)
        jax.distributed.initialize(f"127.0.0.1:{os.environ[PORT]}", n_processes, int(os.environ[RANK]))
    elif platform == "tpu":
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:  # no cluster here: the host's own chips
            print(f"one host: {str(error).splitlines()[0]}", file=sys.stderr)


def attached(
    slice_: Slice, shape: Shape, platform: str | None = None, n_processes: int = 1, *, explicit: bool = True
) -> "Mesh":
    """Joins the other processes and returns the mesh of the devices that are here.

    Args:
        slice_: chip and number of chips.
        shape: extents of the mesh.
        platform: as the option `--platform` asks for it.
        n_processes: of `start_locally`, else 1.
        explicit: whether mesh axes are of Explicit type.

    Raises:
        InputError: the devices are not here.
    """
    join(platform_of(slice_, platform), slice_.n_chips, n_processes)
    try:
        return attach(shape, chip=slice_.chip, explicit=explicit)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"slice={slice_}: {str(error).splitlines()[0]}") from None


def speaks() -> bool:
    """Whether this process prints and writes: of several, the first one does."""
    import jax

    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this process has all devices: a profile of a part of them would not be one of the step."""
    import jax

    return jax.process_count() == 1


def all_agree(value: bool) -> bool:
    """The first process's value, in every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value
