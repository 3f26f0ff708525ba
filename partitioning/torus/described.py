"""The devices that a program is compiled for: attached ones, or TPUs that exist only as a description.

libtpu contains the real TPU compiler, and the compiler needs no more than a description of the slice. A program that is
compiled for a described slice cannot run here.
"""

import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.sharding import AxisType, Mesh

from toruslab.partitioning.torus.chip import PLATFORMS
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, attach, place_on_torus

TPUS = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
"""Chips that libtpu describes -> number of cores. Two cores compile as one (megacore)."""
HOST = (2, 2, 1)
"""The chips of one host along each axis, if the slice has as many."""
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud machine to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # the host has no accelerator, but libtpu complains without a type
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class NoCompiler(ValueError):
    """There is no compiler here for this chip."""


def target(slice_: Slice, shape: Shape, *, explicit: bool = True, attached: bool = False) -> Mesh:
    """The mesh of devices to compile a program for.

    Args:
        slice_: chip and torus. `cpu` and `gpu` must be attached; TPUs need not be.
        shape: extents of the mesh.
        explicit: axes of Explicit type; Auto otherwise (for the layout `auto`).
        attached: use attached TPUs instead of a description.

    Raises:
        NoCompiler: a chip that libtpu does not describe, or no libtpu.
        ValueError: extents that libtpu refuses, or devices that are not attached.
    """
    if slice_.chip in PLATFORMS or attached:
        return attach(shape, chip=slice_.chip, explicit=explicit)
    devices = describe(slice_)
    placed = place_on_torus(devices, shape)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 3)


def check(slice_: Slice) -> None:
    """Refuses slices that nothing here compiles for, without touching a backend.

    Raises:
        NoCompiler: names the chip and says what to do.
    """
    if slice_.chip in PLATFORMS:
        return
    if slice_.chip not in TPUS:
        raise NoCompiler(
            f"slice={slice_}: nothing compiles for chip {slice_.chip} from here; known are {', '.join(TPUS)} "
            "(libtpu), cpu (fake devices), and gpu (attached)"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(
            f"slice={slice_}: compiling for TPUs needs libtpu, which is not installed: pip install 'toruslab[tpu]'"
        )


def describe(slice_: Slice) -> list:
    """The chips of a TPU slice as compile-only devices, one for each chip.

    Raises:
        NoCompiler: see `check`.
        ValueError: libtpu refuses the slice; the message is its own.
    """
    from jax.experimental import topologies

    check(slice_)
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    n_axes = 3 if TPUS[slice_.chip] == 2 else 2
    dims = (*slice_.dims, 1, 1)[: max(n_axes, len(slice_.dims))]
    described = {"chips_per_host_bounds": tuple(map(min, (*dims, 1)[:3], HOST)), "num_slices": 1}
    if TPUS[slice_.chip] == 2:
        described["chip_config_name"] = "megacore"
    name = f"{slice_.chip}:{'x'.join(map(str, dims))}"
    try:
        devices = list(topologies.get_topology_desc(name, platform="tpu", **described).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ValueError(f"slice={slice_}: {str(error).splitlines()[0]}") from None
    if len(devices) != math.prod(dims):
        raise ValueError(f"slice={slice_}: libtpu describes {len(devices)} devices, not {math.prod(dims)} chips")
    return devices


def mismatch() -> str | None:
    """A warning if libtpu is not the version that JAX was released with, else None. Such pairs fail in odd ways."""
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(r"libtpu==(\S+?)\.\*;", requirement.replace(" ", ""))
        here = importlib.metadata.version("libtpu")
        if found and here != found[1] and not here.startswith(found[1] + "."):
            return (
                f"libtpu {here} is not the one that jax {jax.__version__} was released with ({found[1]}): "
                "pip install 'toruslab[tpu]'"
            )
    return None


def versions(slice_: Slice) -> dict[str, str]:
    """The versions of the packages that decide what is compiled."""
    names = ["jax", "jaxlib", "flax"] + (["libtpu"] if slice_.chip in TPUS else [])
    return {name: importlib.metadata.version(name) for name in names}
