"""Sets up every test run: fake devices, strict dtypes, a compiler that optimises little, and its programs on disk."""

import os
import time
from pathlib import Path

# Compiled programs are shared by the workers, by the processes that tests start, and by the next run. The tests read
# scopes from a program's text, so a program whose scopes have changed is compiled again. Line numbers are left out of
# the programs: otherwise every edit would change them all.
os.environ.update(
    JAX_COMPILATION_CACHE_DIR=str(Path(__file__).parents[1] / ".jax_cache"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY="1",
    JAX_TRACEBACK_IN_LOCATIONS_LIMIT="0",
)

import jax
import pytest

from toruslab.partitioning.torus.mesh import fake_cpu_devices

# The suite compiles thousands of programs and runs most of them once, so XLA:CPU should generate code fast, not fast
# code. Each flag acts after the passes whose results the tests look at (partitioning, collectives, copies of buffers).
# `make bench` checks plans against programs of the full compiler.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # one LLVM module a program: the other cores have tests of their own
    "--xla_cpu_use_onednn=false",
    "--xla_cpu_use_xnnpack=false",
]
EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_CHOICE = jax.__version_info__ < (0, 11)  # later releases have fusion emitters only, and refuse the flag
if HAS_CHOICE:
    FLAGS.append(f"--{EMITTERS}=false")  # no MLIR pipeline for each fusion: a third of the compile time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

fake_cpu_devices(8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def fusion_emitters(monkeypatch) -> None:
    """Programs as users get them. Without fusion emitters XLA:CPU leaves copies outside of fusions, which are counted
    as findings there."""
    if HAS_CHOICE:
        compile_ = jax.stages.Lowered.compile
        monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_(lowered, {EMITTERS: True}))


DAYS = 7
"""How long a compiled program is kept."""


def pytest_sessionstart(session) -> None:
    if not hasattr(session.config, "workerinput"):  # the workers' parent, not a worker
        for program in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
            if time.time() - program.stat().st_mtime > DAYS * 86400:
                program.unlink(missing_ok=True)
