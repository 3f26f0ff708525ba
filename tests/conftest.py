"""Sets up every test run: eight fake CPU devices, strict dtype promotion, and a compiler that optimises little."""

import os

import jax

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
if jax.__version_info__ < (0, 11):  # later releases know no other way of generating code, and refuse the flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # no MLIR pipeline for each fusion: a third of the time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

fake_cpu_devices(8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
