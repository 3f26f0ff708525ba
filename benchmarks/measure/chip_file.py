"""The chip file of a calibrated machine: writing it, and the data sheet of the devices that it describes.

The samples are `partitioning.torus.calibrated`'s records. `partitioning.torus.chip` reads the file.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toruslab.benchmarks.runs.parser import InputError
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.torus.calibrated import Machine, Sample
from toruslab.partitioning.torus.chip import Chip, chip, names


def write(path: Path, name: str, machine: Machine, memory_bytes: int, measured: Row) -> Chip:
    """Writes a machine as a chip file, whole or not at all. Returns the chip that it reads back.

    Args:
        path: the `.toml` file.
        name: of the chip.
        machine: with all samples.
        memory_bytes: of one device.
        measured: the environment of the measurement (`rows.environment`).

    Raises:
        InputError: the path cannot be written, or does not end in .toml.
    """
    check(path)
    part = _part(path)
    try:
        part.write_text("\n".join(_lines(name, machine, memory_bytes, measured)) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"out={str(path)!r} cannot be written: {error.strerror}") from None
    return chip(path)


def check(path: Path) -> None:
    """Refuses a path that cannot be written to, before a measurement is made for it.

    Raises:
        InputError: the path cannot be written, or does not end in .toml.
    """
    if path.suffix != ".toml":
        raise InputError(f"out={str(path)!r} must end in .toml, as chip files do")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _part(path).touch()
        _part(path).unlink()
    except OSError as error:
        raise InputError(f"out={str(path)!r} cannot be written: {error.strerror}") from None


def _part(path: Path) -> Path:
    return path.with_suffix(".toml.part")


def _lines(name: str, machine: Machine, memory_bytes: int, measured: Row):
    where = f"{measured['device_kind']}, {measured['cores']} cores, JAX {measured['jax']}"
    source = f"measured by toruslab calibrate, {measured['date']}: {where}"
    yield f"# {machine.n_devices} devices ({where}), written by toruslab calibrate. Times are of all devices at once."
    yield f"name = {json.dumps(name)}"
    for dtype in dict.fromkeys(s.dtype for s in machine.samples if s.what == "matmul"):
        rate = max(2 * _macs(s) / s.cost_s for s in machine.of("matmul", dtype))
        yield from _figure(f"peak_flops_per_s.{dtype}", rate, f"{source}: the fastest matmul")
    rate, how = memory_rate(machine)
    yield from _figure("hbm_bytes", memory_bytes, f"{source}: the memory there is, shared out")
    yield from _figure("hbm_bytes_per_s", rate, f"{source}: {how}")
    links = [s.sizes["bytes"] / s.cost_s for s in machine.samples if s.what == "all-gather"]
    yield from _figure("link_bytes_per_s", max(links, default=rate), f"{source}: the fastest all-gather")
    for field, value in (("n_links", 1), ("torus_axes", 0), ("wrap", "switch"), ("hop_s", 0.0)):
        yield from _figure(field, value, "nothing is known of links: collectives are measured as they are")
    yield from _figure("max_dims", [4096, 4096, 4096], "no limit")
    yield from _figure("max_chips", 4096, "no limit")
    yield "\n[machine]"
    for field in ("n_devices", "shared", "mesh"):
        yield f"{field} = {json.dumps(getattr(machine, field))}"
    for key in ("date", "commit", "load_1m", "python", "jax", "jaxlib", "platform", "device_kind", "cores"):
        if measured.get(key) is not None:
            yield f"environment.{key} = {json.dumps(measured[key])}"
    for sample in machine.samples:
        yield "\n[[machine.samples]]"
        for key, value in entry(sample).items():
            yield f"{key} = {_inline(value)}"


def _figure(name: str, value: Any, source: str):
    yield f"\n[{name}]\nvalue = {json.dumps(value)}\nsource = {json.dumps(source)}"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def entry(sample: Sample) -> dict[str, Any]:
    """A sample's fields without the empty ones."""
    return {k: v for k, v in dataclasses.asdict(sample).items() if v != ""}


def memory_rate(machine: Machine) -> tuple[float, str]:
    """Bytes per second at which one device reads weights, and a sentence that says how it was found.

    Fake devices copy weights out of the stack before a matmul. Accelerators read them in the matmul.
    """
    copies = [s.sizes["bytes"] / s.cost_s for s in machine.samples if s.what == "copy"]
    if machine.shared:
        return min(copies), "copies out of the largest stack of weights"
    itemsize = {"f32": 4, "bf16": 2, "int8": 1}
    few = [s for s in machine.samples if s.what == "matmul" and s.sizes["rows"] <= 8]
    rates = [s.sizes["inner"] * s.sizes["outer"] * itemsize[s.dtype] / s.cost_s for s in few]
    return max(rates, default=min(copies)), "the fastest matmul of at most 8 rows, by the weights that it reads"


def _macs(s: Sample) -> int:
    return s.sizes["rows"] * s.sizes["inner"] * s.sizes["outer"]


def data_sheet(device_kind: str) -> Chip | None:
    """The catalogued chip of a kind of device, as JAX names it. None for fake and unknown devices.

    Example:
        >>> data_sheet("NVIDIA H200").name, data_sheet("TPU v5 lite").name, data_sheet("cpu")
        ('h200', 'v5e', None)
    """
    kind = device_kind.lower().replace(" lite", "e").replace("sxm4-40gb", "40")
    longest_first = sorted(names(), key=len, reverse=True)
    return next((chip(name) for name in longest_first if re.search(rf"(^|[ -]){name}($|[ -])", kind)), None)


def memory_of(device: Any, n_devices: int) -> int:
    """Bytes of memory of a device. A fake device has a share of the host's memory."""
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // n_devices
