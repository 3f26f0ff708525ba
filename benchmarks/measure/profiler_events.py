"""Reads a trace of JAX's profiler: the operations that ran, with their device, step and times.

`partitioning.hlo.purposes` says what operations are for, `benchmarks.measure.attribution` shares the time out among
those that overlap. Uses JAX's own `ProfileData`, neither TensorBoard nor TensorFlow.

XLA:CPU: all fake devices are in the plane `/host:CPU`. Every operation has its `device_ordinal`. A line of the trace is
a thread. A device's program moves between threads: when an operation is not done at the end of its
thread's task, another thread continues. So the event of a loop may end long before the loop does. Events inside a
collective's event say when a device waits for others.

GPU, TPU: each device has a plane, `/device:GPU:0` with a line for each stream, `/device:TPU:0` with a line `XLA Ops`.
This follows the published format and has not been run there.
"""

import bisect
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

STEP = "toruslab-step"
"""The annotation around each step, on the host."""
_DEVICE = re.compile(r"/device:(?:GPU|TPU):(\d+)")
_WAITS = ("Wait:", "Wait for rendezvous")


class TraceError(ValueError):
    """A trace that lacks steps or devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One run of an operation, in nanoseconds of the trace's clock.

    `name` is the instruction's name, "" if the trace has none or another program ran it. `waits` are the spans in which
    it waited for other devices.
    """

    device: int
    step: int
    name: str
    start: float
    end: float
    waits: tuple[tuple[float, float], ...] = ()


def events(folder: Path, module: str) -> list[Event]:
    """The operations of all annotated steps.

    Args:
        folder: of one trace, as given to `jax.profiler.start_trace`.
        module: name of the program. Operations of other programs get no name.

    Raises:
        TraceError: there is no trace or no step, or the trace is cut short: a device did nothing in a step.
    """
    with warnings.catch_warnings():
        # JAX 0.12 raises this warning while it creates the types of a trace; as an error it would abort the process
        warnings.filterwarnings("ignore", r"builtin type \w+ has no __module__", DeprecationWarning)
        return _events(folder, module)


def _events(folder: Path, module: str) -> list[Event]:
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    if not files:
        raise TraceError("the profiler has written no trace")
    planes = list(ProfileData.from_file(str(files[-1])).planes)
    hosts = [p for p in planes if p.name.startswith("/host:CPU")]
    starts = sorted(e.start_ns for p in hosts for line in p.lines for e in line.events if e.name == STEP)
    if not starts:
        raise TraceError("the trace holds no step")
    found: list[Event] = []
    for plane in planes:
        if number := _DEVICE.fullmatch(plane.name):
            for line in _lines(plane):
                found += _read(line.events, starts, module, int(number[1]), every=True)
    if not found:
        for plane in hosts:
            for line in plane.lines:
                found += _read(line.events, starts, module, None, every=False)
    devices, did = {e.device for e in found}, {(e.device, e.step) for e in found}
    if not devices or len(did) < len(devices) * len(starts):
        raise TraceError(
            f"the trace is cut short: {len(devices)} devices, {len(starts)} steps, {len(did)} of them there"
        )
    return found


def _lines(plane: Any) -> list[Any]:
    """The lines with operations: a TPU has one beside those of modules and steps, a GPU one for each stream."""
    lines = list(plane.lines)
    return [line for line in lines if line.name == "XLA Ops"] or [x for x in lines if x.name.startswith("Stream")]


def _read(events: Iterable[Any], starts: list[float], module: str, device: int | None, *, every: bool) -> list[Event]:
    """The operations on one line. `every`: each event is an operation, not only those that name one."""
    spans = sorted(((e.start_ns, e.start_ns + e.duration_ns, e) for e in events), key=lambda s: (s[0], -s[1]))
    running: list[tuple[Event, list[tuple[float, float]]]] = []
    done: list[tuple[Event, list[tuple[float, float]]]] = []
    for start, end, event in spans:
        while running and running[-1][0].end <= start:
            running.pop()
        if event.name.startswith(_WAITS):
            if running:
                running[-1][1].append((start, end))
            continue
        stats = dict(event.stats)
        if start < starts[0] or not (every or "hlo_op" in stats):
            continue
        name = str(stats.get("hlo_op") or event.name).split(" = ")[0].lstrip("%")
        made = Event(
            device=int(stats.get("device_ordinal", 0)) if device is None else device,
            step=bisect.bisect(starts, start) - 1,
            name=name if str(stats.get("hlo_module", module)).split("(")[0] == module else "",
            start=start,
            end=end,
        )
        running.append((made, []))
        done.append(running[-1])
    return [
        Event(device=e.device, step=e.step, name=e.name, start=e.start, end=e.end, waits=tuple(waits)) if waits else e
        for e, waits in done
    ]
