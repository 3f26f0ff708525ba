"""Where the time of a step goes: a trace of a few steps, attributed by scope to what the operations are for.

Decides what a profile says. `benchmarks.measure.profiler_events` reads the trace, `benchmarks.measure.attribution` shares out the time,
`partitioning.hlo.operations` says what each operation is for. The terms are means over all traced steps, none dropped, and
add up: operations, the time between them, and dispatch are the step. A traced step is slower than one that is not: the
latency is `benchmarks.measure.timing`'s to say.
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
from toruslab.partitioning.hlo.operations import UNKNOWN, Operation, Work, operations
from toruslab.partitioning.hlo.text import parse

KINDS: tuple[Work, ...] = get_args(Work)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one step.

    Args:
        device_s: of a device, mean over devices: every moment counts once, for the innermost operation, and for a
            collective only where nothing else runs.
        work_s: on fake CPU devices what the cores spend, over their number (`attribution.core_seconds`): what it
            would take alone if it kept all cores busy. On accelerators `device_s`.
        wait_s: the part of `device_s` in which a collective waits for other devices; None where traces do not tell.
    """

    device_s: float
    work_s: float
    wait_s: float | None


@dataclass(frozen=True, kw_only=True)
class ScopeTime(Spent):
    """What the operations of one scope and kind take.

    Args:
        scope: the decoder's own names; "" for what has none.
        kind: what the operations are for.
        collective, axes: of a collective.
        count: operations of a device and step; an asynchronous one counts once.
    """

    scope: str
    kind: Work
    collective: str | None = None
    axes: tuple[str, ...] = ()
    count: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of one step goes; `rows`, `between_s` and `dispatch_s` add up to `mean_s`.

    Of a program that takes several steps in one call, all of it is a step's part of the call.

    Args:
        n_steps, n_devices: that were traced; devices of this process.
        cores: that fake devices share; None for accelerators.
        step_s, mean_s: median and mean of the traced steps' wall time, by the host's clock.
        rows: by scope and kind, in the order in which they first run.
        between_s: of a device, between its first operation and its last, in none.
        dispatch_s: before a device's first operation, and from its last until the host has the result.
        unknown: names of operations that the program's text does not have; their time is in `other`.
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
    def by_kind(self) -> dict[Work, Spent]:
        """The totals, of every kind."""
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
        """All fields, and the totals by kind."""
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
    """Runs a step a few times under JAX's profiler and says where its time goes.

    Args:
        step: runs the program once and waits for it, as `timing.stepper` makes it; it must have run before.
        text: the optimised program, as `Compiled.text`.
        mesh: axis name -> size, in mesh order.
        n_calls: that are traced.
        steps: in one call.
        keep: a folder to leave the raw trace in, for Perfetto or XProf.

    Raises:
        HloError: a text that cannot be read.
        TraceError: a trace without the steps, or one that is cut short: trace fewer.
    """
    known = operations(text, mesh)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the trace
    options.host_tracer_level = 1  # has all that is read here; the default, 2, slows many small operations down
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
    """Shares the time of the steps out among the operations.

    Args:
        found: the operations that ran, of all devices and steps.
        known: what they are for; what is missing is `other`.
        times_s: of every call, by the host's clock.
        cores: that the devices share; None for devices with cores of their own.
        steps: in one call.
    """
    ranks = {name: 0 if o.contains else 1 if o.work == "collective" else 2 for name, o in known.items()}
    runs: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for e in found:
        runs[e.step, e.device].append(e)
    pieces = {run: exclusive(its, ranks) for run, its in runs.items()}
    ran: dict[str, list[float]] = {}  # name -> nanoseconds, of these waiting, times
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
        row = sums.setdefault((o.scope, o.work, o.collective, o.axes), [0.0, 0.0, 0.0, 0.0])
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
