"""Eight fake CPU devices, strict dtype promotion; warnings are errors (pyproject)."""

import os

# LLVM's expensive passes are left out: the suite compiles hundreds of programs and runs each once. They come after
# everything that the tests look at; `make bench` checks plan against program with them in.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

from toruslab.partitioning.torus.mesh import fake_cpu_devices

fake_cpu_devices(8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
