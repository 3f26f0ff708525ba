"""One run of `toruslab serve-bench`: traffic on the engine, and the numbers of its row.

A run counts only if nothing was compiled and no request was lost.
"""

import dataclasses
import functools
import os
import statistics
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from toruslab.benchmarks.runs.serving_setting import PAGE, PIECE, Scheme, ServingSetting, sizes_of_passes
from toruslab.benchmarks.runs.weights_option import chosen
from toruslab.models.decoder.quantise import quantise
from toruslab.models.decoder.reference import init
from toruslab.models.weights.packing import pack
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach
from toruslab.serving.engine.engine import Engine, Sizes
from toruslab.serving.engine.play import Served, serve
from toruslab.serving.engine.stage import Stage
from toruslab.serving.results.metrics import Metrics
from toruslab.serving.results.timeline import Timeline
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler
from toruslab.serving.traffic.arrivals import Arrivals, GivenTimes
from toruslab.serving.traffic.workload import Workload, prompt_ids


class Invalid(RuntimeError):
    """A run whose numbers do not count. `numbers` has them."""

    def __init__(self, why: str, numbers: dict[str, Any]):
        super().__init__(why)
        self.numbers = numbers


def engine(setting: ServingSetting, compiled: Callable[[int, int], None]) -> Engine:
    """The engine for all schemes of a setting, with compiled programs. `compiled`: see `Engine`.

    Raises:
        ValueError: the devices here do not suffice for the stages.
    """
    config, made, n = setting.config, setting.made, setting.stages
    is_int8, itemsize = setting.weights == "int8", 4 if setting.weights == "f32" else 2
    stages = [
        Stage(
            config=dataclasses.replace(config, n_layers=config.n_layers // n),
            layout=made,
            mesh=attach(setting.shape, chip=setting.slice.chip, explicit=made.explicit, first=i * _size(setting)),
            first=i == 0,
            last=i == n - 1,
            itemsize=itemsize,
            int8=is_int8,
        )
        for i in range(n)
    ]
    packed = engine_weights(setting)
    if is_int8:
        packed = quantise(packed, stages[0].dtype)
    singles, pieces = sizes_of_passes(setting.max_bs, stages[0].parts)
    sizes = Sizes(
        rows=setting.rows,
        n_slots=setting.n_slots,
        longest=setting.trace.longest,
        singles=singles,
        pieces=pieces,
        length=PIECE,
        page=PAGE,
        held=setting.held,
    )
    return Engine(stages, packed, sizes, compiled=compiled)


def engine_weights(setting: ServingSetting) -> dict[str, Any]:
    """The weights on the host, nested as `models.weights.packing.pack` does. A checkpoint is loaded by one device."""
    config = setting.config
    if setting.checkpoint is None:
        return pack(config, init(config, 0))
    mesh = attach((1, 1, 1), chip=setting.slice.chip)
    whole = layout("replicated", "heads", (1, 1, 1), config.n_kv_heads)
    params = chosen(None, setting.checkpoint, 0).params(whole, mesh, dtype=jnp.float32)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(params))


def _size(setting: ServingSetting) -> int:
    return setting.slice.n_chips // setting.stages


def measure(setting: ServingSetting, made: Engine, scheme: Scheme, rate: float, seed: int) -> dict[str, Any]:
    """Serves one trace at a rate (requests per second) and returns the numbers of its row.

    Raises:
        Invalid: a program was compiled meanwhile, or a request was lost.
    """
    workload = traffic(setting, setting.arrivals.at(rate), setting.requests, seed)
    metrics = Metrics(max_bs=setting.max_bs, window_s=workload.window_s(setting.warm_up), limits=setting.limits)
    seen = Seen(made)
    rss = resident_bytes()
    served = run_once(setting, made, scheme, workload, [metrics, seen])
    summary = dataclasses.asdict(metrics.summary())
    numbers = {
        **summary,
        "sustained_per_s": seen.sustained_per_s(workload.window_s(setting.warm_up)[0]),
        **dataclasses.asdict(served),
        "iteration_s": seen.busy_s / max(served.batches, 1),
        "wasted_share": 1 - served.tokens / served.computed if served.computed else None,
        "filling_share": 1 - seen.scheduled / served.computed if served.computed else None,
        "host_share": (served.host_s + served.sending_s) / seen.busy_s if seen.busy_s else None,
        "host_share_of_time": (served.host_s + served.sending_s) / served.end_s,
        "pages": made.pages.n_pages * made.parts,
        "pages_used_peak": seen.pages_peak,
        "rss_before_bytes": rss,
        "rss_after_bytes": resident_bytes(),
        "load_1m": round(os.getloadavg()[0], 2),
    }
    if served.compilations:
        raise Invalid(f"{served.compilations} programs were compiled in measured traffic; there must be none", numbers)
    lost = setting.requests - summary["returned"] - summary["refused"] - summary["cancelled"]
    if lost or summary["arrived"] != setting.requests:
        raise Invalid(f"{lost} of {setting.requests} requests were lost", numbers)
    return numbers


def warm(setting: ServingSetting, made: Engine) -> None:
    """Serves a short trace with every scheme, so that measured traffic meets nothing for the first time."""
    for scheme in setting.schemes:
        run_once(setting, made, scheme, _burst(setting, 8), [])


def capacity(setting: ServingSetting, made: Engine) -> float:
    """Requests per second in a burst of four full batches, by Orca's scheme or else the last one."""
    scheme = next((r for r in setting.schemes if r.policy.name == "orca"), setting.schemes[-1])
    n = 4 * setting.max_bs
    return n / statistics.median(run_once(setting, made, scheme, _burst(setting, n), []).end_s for _ in range(2))


def timeline(setting: ServingSetting, made: Engine, scheme: Scheme, rate: float) -> dict[str, Any]:
    """The timeline of a run's first requests, which Perfetto opens."""
    drawn = Timeline()
    n = min(setting.requests, 3 * setting.max_bs)
    run_once(setting, made, scheme, traffic(setting, setting.arrivals.at(rate), n, 0), [drawn])
    return drawn.to_json()


def resident_bytes() -> int | None:
    """Resident memory of this process, bytes. None if the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _burst(setting: ServingSetting, n: int) -> Workload:
    return traffic(setting, GivenTimes(times_s=(0.0,) * n), n, 0)


def traffic(setting: ServingSetting, when: Arrivals, n: int, seed: int) -> Workload:
    trace = setting.trace
    return Workload(n=n, arrivals=when, prompt=trace.prompt, output=trace.output, seed=seed)


def run_once(
    setting: ServingSetting, made: Engine, scheme: Scheme, workload: Workload, observers: Iterable[Observer]
) -> Served:
    """Serves a workload to its end."""
    prompt = functools.partial(prompt_ids, seed=workload.seed)
    return serve(workload.requests(), scheduler(setting, scheme), made, prompt, observers=list(observers))


def scheduler(setting: ServingSetting, scheme: Scheme) -> Scheduler:
    """An empty scheduler for a scheme."""
    return Scheduler(
        max_bs=setting.max_bs,
        n_slots=setting.n_slots,
        n_workers=scheme.n_workers,
        policy=scheme.policy,
        reservation=setting.reservation,
        model_max=setting.trace.longest,
    )


class Seen(Observer):
    """An observer for the numbers that `Metrics` lacks."""

    def __init__(self, made: Engine):
        self._engine = made
        self._returned_s = array("d")
        self._last_scheduled_s = 0.0
        self._busy_s: list[float] = []
        self.scheduled = self.pages_peak = 0

    @property
    def busy_s(self) -> float:
        """Seconds in which the busiest stage computed."""
        return max(self._busy_s, default=0.0)

    def sustained_per_s(self, start_s: float) -> float | None:
        """Returned requests per second from `start_s` until the last request started, while batches could be full."""
        returned_s = np.array(self._returned_s)
        length_s = self._last_scheduled_s - start_s
        inside = ((returned_s >= start_s) & (returned_s <= self._last_scheduled_s)).sum()
        return float(inside) / length_s if length_s > 0 else None

    def made(self, batch: Batch) -> None:
        self.scheduled += batch.computed
        self.pages_peak = max(self.pages_peak, self._engine.pages.in_use)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        self._busy_s += [0.0] * (stage + 1 - len(self._busy_s))
        self._busy_s[stage] += end_s - start_s

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self._returned_s.extend([now_s] * len(back))
        for request in back:
            assert request.scheduled_s is not None
            self._last_scheduled_s = max(self._last_scheduled_s, request.scheduled_s)
