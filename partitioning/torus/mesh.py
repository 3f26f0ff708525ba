"""The torus: slices of chips, the mesh over them, and the devices of the mesh.

How `CHIP:DIMS` is read, which device has which place in the mesh, and the types of its axes. No other module chooses
devices or axis types. What is sharded over the axes is decided in `partitioning.layouts.layout`.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES: tuple[str, ...] = ("x", "y", "z")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Slice:
    """A slice of chips, `CHIP:DIMS`: the name of the chip and the extents of the torus in mesh order (x, y, z).

    Example:
        >>> Slice.parse("v4:4x4x8").n_chips
        128
    """

    chip: str
    dims: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Reads `v4:4x4x4`, `v5e:4x4`, `cpu:8`, `gpu:1`.

        Raises:
            ValueError: another form, an extent of zero, or too many chips.
        """
        match = re.fullmatch(r"([A-Za-z0-9_.\-/]+):(\d{1,7}(?:x\d{1,7}){0,2})", str(text), re.ASCII)
        if not match:
            raise ValueError(
                f"slice={text!r} must be CHIP:DIMS with one to three extents, such as cpu:2x2x2 or v5e:4x4"
            )
        dims = tuple(int(d) for d in match[2].split("x"))
        if min(dims) < 1 or math.prod(dims) > 2**20:
            raise ValueError(f"slice={text!r}: every extent must be at least 1, and their product at most {2**20}")
        return cls(match[1], dims)

    @property
    def n_chips(self) -> int:
        return math.prod(self.dims)

    def __str__(self) -> str:
        return f"{self.chip}:{'x'.join(map(str, self.dims))}"


def mesh_shape(slice_: Slice, mesh: str | Sequence[int] | None = None) -> Shape:
    """The extents (X, Y, Z) of the mesh over a slice: the slice's own, or `mesh` where it is given.

    Raises:
        ValueError: a mesh that is not one to three positive extents, or that has more or fewer places than the slice
            has chips.

    Example:
        >>> mesh_shape(Slice.parse("v5e:4x4")), mesh_shape(Slice.parse("v5e:4x4"), "2x4x2")
        ((4, 4, 1), (2, 4, 2))
    """
    if mesh is None:
        dims = slice_.dims
    else:
        text = mesh if isinstance(mesh, str) else "x".join(map(str, mesh))
        dims = tuple(map(int, text.split("x"))) if re.fullmatch(r"\d{1,7}(x\d{1,7}){0,2}", text, re.ASCII) else ()
        if not 1 <= len(dims) <= 3 or min(dims) < 1:
            raise ValueError(f"mesh={mesh!r} must be one to three positive extents, such as 2x2x2")
        if math.prod(dims) != slice_.n_chips:
            raise ValueError(f"mesh={mesh!r} has {math.prod(dims)} places, slice={slice_} has {slice_.n_chips} chips")
    x, y, z = (*dims, 1, 1)[:3]
    return (x, y, z)


FAKE_DEVICE_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_cpu_multi_thread_eigen=false"
"""Fake devices share the cores, so a device gains nothing from running its own operations in parallel. A decode step of
4 layers on 8 devices and 2 cores took 17 to 20 ms without these flags and 13 ms with them."""


def fake_cpu_devices(n: int) -> None:
    """Asks for `n` fake CPU devices in this process. Call it before anything touches a JAX backend."""
    os.environ["XLA_FLAGS"] = f"{FAKE_DEVICE_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)


def attach(shape: Shape, *, chip: str, explicit: bool = True, first: int = 0) -> Mesh:
    """A mesh of attached devices, over all processes.

    Args:
        shape: extents (X, Y, Z).
        chip: the slice's chip, for the message and to tell CPU and GPU from TPU.
        explicit: axes of Explicit type; Auto otherwise (for the layout `auto`).
        first: index of the mesh's first device, because stages of a pipeline have meshes of their own.

    Returns:
        A mesh with axes x, y, z. TPU devices are ordered by their coordinates, so that mesh axes are torus axes.

    Raises:
        ValueError: fewer devices than the mesh has places, or devices of another platform.
    """
    devices = jax.devices()
    platform = devices[0].platform
    wanted = chip if chip in ("cpu", "gpu") else "tpu"
    if platform != wanted:
        raise ValueError(f"slice chip {chip!r} needs {wanted} devices, but the platform here is {platform!r}")
    n = math.prod(shape)
    if len(devices) < first + n:
        raise ValueError(f"mesh={'x'.join(map(str, shape))} needs {first + n} devices, but there are {len(devices)}")
    devices = devices[first:] if first else devices
    placed = place_on_torus(devices, shape) if platform == "tpu" else np.array(devices[:n]).reshape(shape)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 3)


def place_on_torus(devices, shape: Shape):
    """TPU devices by their coordinates where the mesh is the slice itself; JAX's assignment where it folds the axes."""
    from jax.experimental import mesh_utils

    ordered = sorted(devices, key=lambda d: (*d.coords, getattr(d, "core_on_chip", 0)))
    bounds = tuple(max(d.coords[i] for d in devices) + 1 for i in range(3))
    if bounds == tuple(shape):
        return np.array(ordered).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
