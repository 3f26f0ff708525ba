"""More than one process: local ones that this module starts, or one on every host of a slice.

Decides how processes find each other. What they compute is the same program in each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from toruslab.benchmarks.runs.options import InputError
from toruslab.partitioning.torus.mesh import Slice

RANK, PORT = "TORUSLAB_PROCESS", "TORUSLAB_PORT"


def start_locally(module: str, argv: Sequence[str], n: int) -> int:
    """Runs `python -m module argv` in `n` processes on this machine; the first one speaks. Returns the exit code.

    When one fails, the others, which would wait for it for ever, are ended.
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
        n_chips: places in the mesh, a multiple of `n_processes`; fake CPU devices are shared out evenly.
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
