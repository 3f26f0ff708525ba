"""The paper's own mesh, 4x4x4, on 64 fake devices; and two processes over one mesh. Each in processes of its own."""

import json
import os
import subprocess
import sys

import pytest

ON_64 = """
import dataclasses
from partitioning.mesh import fake_cpu_devices
fake_cpu_devices(64)
import numpy as np
from tests import battery
battery.BATCH = 64
config = dataclasses.replace(battery.model("parallel", 1), n_heads=64, n_kv_heads={kv}, d_ff=128, d_model=64)
bench = battery.Bench(config, {name!r}, {attention!r}, (4, 4, 4))
battery.check_chunk_then_decode(bench)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "kv"),
    [("ws1d", "heads", 1), ("ws2d", "batch", 1), ("ws2d", "heads", 64), ("wgxy", "heads", 1), ("wgxyz", "batch", 8)],
)
def test_64_devices(name, attention, kv):
    program = ON_64.format(name=name, attention=attention, kv=kv)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    command = ["--layouts", "ws2d,auto", "--attention", "batch", "--phases", "decode", "--batches", "8"]
    command += ["--repeats", "1", "--context", "16", "--json"]
    found = {}
    for processes in (1, 2):
        out = ["--processes", str(processes), "--out", str(tmp_path / str(processes))]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step_latency", *command, *out],
            capture_output=True,
            text=True,
            env=_environment(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {r["environment"]["n_processes"] for r in rows} == {processes}
        kept = ("collectives", "collective_bytes", "n_collectives", "unexplained")
        found[processes] = [[r["point"], r["source"], *(r.get(k) for k in kept)] for r in rows]
    assert found[1] == found[2]
    assert [f[1] for f in found[1]] == ["analytic", "compiled"] * 2 + ["measured"] * 2


def _environment() -> dict[str, str]:
    """Without the devices and flags that pytest's own process has asked for."""
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
