"""Where the time of a step goes: a few traced steps, their time attributed to scopes and purposes.

`benchmarks.measure.profiler_events` reads the trace, `partitioning.hlo.purposes` says what each operation is for, and
`benchmarks.measure.attribution` shares out the time. The terms are means over all traced steps, and they add up:
operations, the time between them, and dispatch make the step. The profiler slows steps down, so that
`benchmarks.measure.timing` measures the latency without it.
"""

import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax

from toruslab.benchmarks.measure.attribution import core_seconds, exclusive, length, window
from toruslab.benchmarks.measure.profiler_events import STEP, Event, events
from toruslab.partitioning.hlo.purposes import UNKNOWN, Operation, Purpose, operations
from toruslab.partitioning.hlo.text import parse

KINDS: tuple[Purpose, ...] = get_args(Purpose)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one step.

    Args:
        device_s: of a device, mean over devices. Every moment counts once, for the innermost operation, and for a
            collective only if nothing else runs.
        work_s: on fake CPU devices the time of all cores over their number (`attribution.core_seconds`): the time
            that the work would take alone on all cores. On accelerators `device_s`.
        wait_s: the part of `device_s` in which a collective waits for other devices. None if traces do not tell.
    """

    device_s: float
    work_s: float
    wait_s: float | None


@dataclass(frozen=True, kw_only=True)
class ScopeTime(Spent):
    """Seconds of the operations of one scope and purpose.

    Args:
        scope: of the decoder; "" if there is none.
        kind: purpose of the operations.
        collective, axes: of a collective.
        count: operations per device and step. An asynchronous one counts once.
    """

    scope: str
    kind: Purpose
    collective: str | None = None
    axes: tuple[str, ...] = ()
    count: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of one step goes. `rows`, `between_s` and `dispatch_s` add up to `mean_s`.

    If a call takes several steps, all seconds are a step's share of the call.

    Args:
        n_steps: traced steps.
        n_devices: traced devices, all of them of this process.
        cores: that fake devices share; None for accelerators.
        step_s, mean_s: median and mean wall time of the traced steps, by the host's clock.
        rows: times by scope and kind, in the order in which they first run.
        between_s: time of a device between its first and last operation in which none ran.
        dispatch_s: time before a device's first operation, and from its last until the host has the result.
        unknown: names of operations that are not in the program's text. Their time is in `other`.
    """

    n_steps: int
    n_devices: int
    cores: int | None
    step_s: float
    mean_s: float
    rows: tuple[ScopeTime, ...]
    between_s: float
    dispatch_s: float
    unknown: tuple[str, ...]

    @property
    def by_kind(self) -> dict[Purpose, Spent]:
        """The total of every kind."""
        found = {}
        for kind in KINDS:
            rows = [r for r in self.rows if r.kind == kind]
            waits = [r.wait_s for r in rows if r.wait_s is not None]
            found[kind] = Spent(
                device_s=sum(r.device_s for r in rows),
                work_s=sum(r.work_s for r in rows),
                wait_s=None if self.cores is None else sum(waits),
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """All fields and `by_kind`."""
        return dataclasses.asdict(self) | {"by_kind": {k: dataclasses.asdict(s) for k, s in self.by_kind.items()}}


def profile(
    step: Callable[[], None],
    text: str,
    *,
    mesh: Mapping[str, int],
    n_calls: int = 5,
    steps: int = 1,
    keep: Path | None = None,
) -> Profile:
    """Runs a step a few times under JAX's profiler and attributes its time.

    Args:
        step: runs the program once and waits for it (`timing.stepper`). It must have run before.
        text: the optimised program (`Compiled.text`).
        mesh: axis name -> size, in mesh order.
        n_calls: calls to trace.
        steps: steps in one call.
        keep: a folder for the raw trace, for Perfetto or XProf.

    Raises:
        HloError: the text cannot be read.
        TraceError: the trace lacks steps, or is cut short; trace fewer calls.
    """
    known = operations(text, mesh)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would fill most of the trace
    options.host_tracer_level = 1  # enough for what is read here; the default, 2, slows small operations down
    with tempfile.TemporaryDirectory() as temporary:
        folder, times = Path(temporary), []
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for n in range(n_calls):
                with jax.profiler.StepTraceAnnotation(STEP, step_num=n):
                    started = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - started)
        finally:
            jax.profiler.stop_trace()
        found = events(folder, parse(text).name)
        if keep:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
    fake = jax.devices()[0].platform == "cpu"
    return attribute(found, known, times, cores=n_cores() if fake else None, steps=steps)


def attribute(
    found: Sequence[Event],
    known: Mapping[str, Operation],
    times_s: Sequence[float],
    *,
    cores: int | None,
    steps: int = 1,
) -> Profile:
    """Attributes the time of the steps to the operations.

    Args:
        found: the operations that ran, of all devices and steps.
        known: name -> operation of the program's text. Others count as `other`.
        times_s: seconds of every call, by the host's clock.
        cores: that the devices share; None for accelerators.
        steps: steps in one call.
    """
    ranks = {name: 0 if o.contains else 1 if o.purpose == "collective" else 2 for name, o in known.items()}
    runs: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for e in found:
        runs[e.step, e.device].append(e)
    pieces = {run: exclusive(its, ranks) for run, its in runs.items()}
    ran: dict[str, list[float]] = {}  # name -> nanoseconds, nanoseconds of waiting, number of runs
    for e in sorted(found, key=lambda e: e.start):
        ran.setdefault(e.name, [0.0, 0.0, 0.0])[2] += 1
    for p in (p for its in pieces.values() for p in its):
        ran[p.name][0] += p.end - p.start
        ran[p.name][1] += (p.end - p.start) * p.waiting
    spent: dict[str, float] = defaultdict(float)
    if cores is not None:
        for step in {step for step, _ in runs}:
            together = [p for (at, _), its in pieces.items() if at == step for p in its]
            for name, ns in core_seconds(together, ranks, cores).items():
                spent[name] += ns

    n_steps, each = len(times_s) * steps, 1e-9 / len(runs) / steps
    sums: dict[tuple, list[float]] = {}
    for name, (ns, waiting, n) in ran.items():
        o = known.get(name, UNKNOWN)
        work = ns * each if cores is None else spent[name] * 1e-9 / n_steps
        row = sums.setdefault((o.scope, o.purpose, o.collective, o.axes), [0.0, 0.0, 0.0, 0.0])
        for i, more in enumerate((ns * each, work, waiting * each, 0.0 if o.ends else n / len(runs) / steps)):
            row[i] += more
    rows = [
        ScopeTime(
            scope=scope,
            kind=kind,
            collective=collective,
            axes=axes,
            device_s=device_s,
            work_s=work_s,
            wait_s=None if cores is None else wait_s,
            count=count,
        )
        for (scope, kind, collective, axes), (device_s, work_s, wait_s, count) in sums.items()
    ]
    windows = sum(end - start for start, end in map(window, runs.values())) * each
    mean = statistics.fmean(times_s) / steps
    return Profile(
        n_steps=n_steps,
        n_devices=len({device for _, device in runs}),
        cores=cores,
        step_s=statistics.median(times_s) / steps,
        mean_s=mean,
        rows=tuple(rows),
        between_s=windows - sum(map(length, pieces.values())) * each,
        dispatch_s=mean - windows,
        unknown=tuple(name for name in ran if name not in known),
    )


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
