"""The precision of matmuls."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def exact(dtype: DTypeLike) -> lax.Precision | None:
    """The `precision` of a matmul whose left side has this dtype: the highest for float32, else the default.

    By default, TPUs round float32 to bfloat16 before they multiply, and GPUs to TF32; neither equals the reference.
    A float32 product takes a TPU six bfloat16 passes. Chip files include this (`peak_flops_per_s.f32`).

    Example:
        >>> exact("bfloat16"), exact("float32").name
        (None, 'HIGHEST')
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
