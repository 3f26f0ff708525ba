"""The paper's own mesh, 4x4x4, on 64 fake devices, and two processes over one mesh. Each test starts processes."""

import json
import os
import subprocess
import sys

import pytest

ON_64 = """
import dataclasses
from toruslab.partitioning.torus.mesh import fake_cpu_devices
fake_cpu_devices(64)
from tests import battery
battery.BATCH = 64
for block, kv in (("parallel", 1), ("serial", 64)):
    config = dataclasses.replace(battery.model(block, 1), n_heads=64, n_kv_heads=kv, d_ff=128, d_model=64, n_layers=2)
    for name, attention in battery.legal():
        if block == "parallel" or attention == "heads":
            bench = battery.Bench(config, name, attention, (4, 4, 4))
            battery.check_mixed_lengths(bench)
            print(block, kv, name, attention, flush=True)
"""


@pytest.mark.slow
def test_64_devices():
    done = subprocess.run([sys.executable, "-c", ON_64], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert "rematerialization" not in done.stderr
    assert done.stdout.count("\n") == 13 + 6


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    command = ["--layouts", "ws2d,auto", "--attention", "batch", "--phases", "decode", "--batches", "8"]
    command += ["--repeats", "1", "--context", "16", "--json", "--chip", "none"]
    found = {}
    for processes in (1, 2):
        out = ["--processes", str(processes), "--out", str(tmp_path / str(processes))]
        done = subprocess.run(
            [sys.executable, "-m", "toruslab.benchmarks.bench", *command, *out],
            capture_output=True,
            text=True,
            env=_environment("XLA_FLAGS"),  # compiled as for users
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {r["environment"]["n_processes"] for r in rows} == {processes}
        kept = ("collectives", "collective_bytes", "n_collectives", "unexplained")
        found[processes] = [[r["point"], r["source"], *(r.get(k) for k in kept)] for r in rows]
    assert found[1] == found[2]
    assert [f[1] for f in found[1]] == ["analytic", "compiled"] * 2 + ["measured"] * 2


def _environment(*without: str) -> dict[str, str]:
    """Without the platform that pytest's own process has asked for."""
    return {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", *without)}


@pytest.mark.slow
def test_two_processes_calibrate_together(tmp_path):
    """As on a slice of two hosts: both take part, one writes, and the blocks with their turns are the same in each."""
    out = tmp_path / "chip.toml"
    command = ["--quick", "--repeats", "1", "--processes", "2", "--json", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "toruslab.benchmarks.calibrate", *command],
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) > 50 and {s["what"] for s in samples} >= {"matmul", "all-gather", "dispatch"}
    assert "n_devices = 8" in out.read_text()
