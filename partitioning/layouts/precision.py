"""How exactly matmuls multiply. Touches no device."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def exact(dtype: DTypeLike) -> lax.Precision | None:
    """The `precision` of a matmul whose left side has this dtype: that of float32 for float32.

    By default TPUs round float32 to bfloat16 before they multiply, and GPUs to TF32: neither is equal to the reference.
    A float32 product takes a TPU six passes of bfloat16, which chip files price (`peak_flops_per_s.f32`).

    Example:
        >>> exact("bfloat16"), exact("float32").name
        (None, 'HIGHEST')
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
