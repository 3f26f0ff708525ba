"""Symmetric int8: how floats become integers and scales.

Weights have one scale for each output channel of a matrix; keys and values have one for each position and head. The
decoder converts the integers to the activations' dtype, multiplies, and scales the result. Weight-gathered layouts
gather the integers. The embedding is not quantised. Pope et al. 2022, section 3.6.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from toruslab.partitioning.layouts.layout import WEIGHTS

SCALE = "_scale"
"""The suffix of a matrix's scales: `w_in_scale` [n, C] beside `w_in` [n, E, C]."""


def quantise(params: Mapping[str, Any], dtype) -> dict[str, Any]:
    """Nested parameters (NumPy or JAX arrays) with every matrix as int8 and its scales in `dtype` beside it.

    The integers are computed with the scales already rounded to `dtype`, so that a coarse dtype adds no error.

    Example:
        >>> import numpy as np
        >>> small = quantise({"w_in": np.array([[[1.0, -0.5], [0.25, 0.25]]])}, np.float32)
        >>> small["w_in"].tolist(), small["w_in_scale"].round(5)
        ([[[127, -127], [32, 64]]], array([[0.00787, 0.00394]], dtype=float32))
    """
    found: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found[name] = quantise(value, dtype)
        elif name in WEIGHTS:
            found[name + SCALE] = scale = scales_of(value, dtype)
            found[name] = integers(value, scale)
        else:
            found[name] = value
    return found


def scales_of(matrix: Any, dtype) -> Any:
    """[..., n, m] -> [..., m]: the scale of every column, by which its integers are multiplied."""
    scale = (abs(matrix.astype("float32")).max(axis=-2) / 127).astype(dtype)
    return scale + (scale == 0).astype(dtype)  # a column of zeros, as padding heads have


def integers(matrix: Any, scale: Any) -> Any:
    """`matrix` [..., n, m], or some of its rows, as int8 with the scales [..., m] of its columns."""
    wide = matrix.astype("float32") / scale.astype("float32")[..., None, :]
    return wide.round().clip(-127, 127).astype("int8")


def dequantise(params: Mapping[str, Any]) -> dict[str, Any]:
    """Quantised parameters as floats, in the scales' dtype."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            found[name] = dequantise(value)
        elif name + SCALE in params:
            scale = params[name + SCALE]
            found[name] = value.astype(scale.dtype) * scale[..., None, :]
        elif not name.endswith(SCALE):
            found[name] = value
    return found


def quantise_rows(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """`x` [..., Q] as int8, and one scale for each [...] in `dtype`.

    Example:
        >>> integers, scale = quantise_rows(jnp.array([[2.54, -1.27], [0.0, 0.0]]), jnp.float32)
        >>> integers.tolist(), [round(s, 5) for s in scale.tolist()]
        ([[127, -64], [0, 0]], [0.02, 1.0])
    """
    wide = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(wide), axis=-1) / 127).astype(dtype)
    scale = jnp.where(scale == 0, jnp.ones_like(scale), scale)  # all zeros, as in the padding of a tile
    integers = jnp.clip(jnp.round(wide / scale.astype(jnp.float32)[..., None]), -127, 127)
    return integers.astype(jnp.int8), scale
