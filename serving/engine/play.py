"""Serving: requests as they arrive, the scheduler, the engine, and what came out.

Decides when the host looks for arrivals, and when it waits. It never waits for tokens while there is a batch to make.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from toruslab.serving.engine.engine import Engine, Flight
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler

POLL_S = 1e-4
COMPILED = "/jax/core/compile/backend_compile_duration"
_n = 0


def _heard(event: str, duration_secs: float, **details: str | int) -> None:
    global _n
    _n += event == COMPILED


jax.monitoring.register_event_duration_secs_listener(_heard)


class Clock(Protocol):
    """What time it is, in seconds since the run began."""

    def now_s(self) -> float: ...

    def wait(self, until_s: float, flight: Flight | None) -> bool:
        """Returns at `until_s`, or when the flight's tokens are there; then True."""
        ...


class Wall:
    """The real one."""

    def __init__(self):
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began_s

    def wait(self, until_s: float, flight: Flight | None) -> bool:
        """See `Clock`. Where nothing but the flight can come, its tokens are left to be waited for."""
        while flight is None or until_s < float("inf"):
            left_s = until_s - self.now_s()
            if left_s <= 0 or (flight and flight.ready):
                break
            time.sleep(min(left_s, POLL_S) if flight else left_s)
        return flight is not None and (until_s == float("inf") or flight.ready)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a run was.

    Args:
        end_s: when the last batch returned.
        batches, tokens: iterations, and tokens of requests that they computed.
        computed: tokens that passes computed, with all that fills them up.
        host_s: seconds of the host's own work: scheduling, filling in passes, taking tokens back.
        sending_s: of the threads that send passes off, for all stages; seconds of their processor.
        compilations: while it ran; a measurement must have none.
    """

    end_s: float
    batches: int
    tokens: int
    computed: int
    host_s: float
    sending_s: float
    compilations: int


def serve(
    requests: Iterable[Request],
    scheduler: Scheduler,
    engine: Engine,
    prompt: Callable[[Request], np.ndarray],
    *,
    clock: Clock | None = None,
    stop: int | None = None,
    observers: Sequence[Observer] = (),
    returned: Callable[[Request, np.ndarray], None] = lambda request, ids: None,
    cancelled: Iterable[tuple[float, int]] = (),
) -> Served:
    """Serves all requests to their end.

    Args:
        requests: in order of arrival, taken one by one, when they are due by the clock.
        scheduler, engine: without requests; `scheduler.max_bs * n_workers` must not exceed the engine's rows, its
            `n_slots` and `model_max` not the engine's.
        prompt: a request's token ids.
        clock: a new `Wall` if None.
        stop: an id that ends a request.
        observers: are told everything.
        returned: gets each request that goes back, with its new ids.
        cancelled: (seconds, id), in order: requests to be cancelled then.

    Raises:
        ValueError: scheduler and engine that do not fit, a prompt that is not as long as its request says, or what
            `Scheduler.arriving` or `Engine.admit` refuse.
        Exception: what a stage raised. The engine can serve again afterwards, with another scheduler.
    """
    _check(scheduler, engine)
    clock = clock or Wall()
    engine.clear(clock.now_s)
    arrivals, leaving = scheduler.arriving(requests), deque(cancelled)
    coming = next(arrivals, None)
    flights: deque[Flight] = deque()
    batches = tokens = computed = 0
    host_s, compilations = 0.0, Compilations()
    while True:
        mark = time.perf_counter()
        now_s = clock.now_s()
        while coming is not None and coming.arrival_s <= now_s:
            _submit(scheduler, engine, coming, prompt)
            for observer in observers:
                observer.arrived(coming)
            coming = next(arrivals, None)
        while leaving and leaving[0][0] <= now_s:
            _, id = leaving.popleft()
            if (gone := scheduler.cancel(id)) is not None:
                engine.forget(id)
                for observer in observers:
                    observer.cancelled(gone, now_s)
        while (batch := scheduler.next_batch(clock.now_s())) is not None:
            flights.append(engine.start(batch))
            batches, tokens, computed = batches + 1, tokens + batch.tokens, computed + flights[-1].tokens
            for observer in observers:
                observer.made(batch)
        host_s += time.perf_counter() - mark

        oldest = flights[0] if flights else None
        may_start = scheduler.n_in_flight < scheduler.n_workers
        due_s = coming.arrival_s if coming is not None and (may_start or oldest is None) else float("inf")
        if oldest is None:
            if coming is None:
                break
            clock.wait(due_s, None)
            continue
        if not clock.wait(min(due_s, leaving[0][0]) if leaving else due_s, oldest):
            continue

        found, spans = engine.finish(oldest)
        mark = time.perf_counter()
        flights.popleft()
        now_s = clock.now_s()
        stopped = [request for request, token in found.items() if token == stop]
        back = scheduler.complete(oldest.batch, now_s, stopped)
        for one in spans:
            for stage, (begin_s, end_s) in enumerate(one):
                for observer in observers:
                    observer.stage(oldest.batch, stage, begin_s, end_s)
        for observer in observers:
            observer.completed(oldest.batch, now_s, back, scheduler.reserved, scheduler.used)
        for request in back:
            returned(request, engine.tokens(request.id, request.prompt))
            engine.forget(request.id)
        host_s += time.perf_counter() - mark
    return Served(
        end_s=clock.now_s(),
        batches=batches,
        tokens=tokens,
        computed=computed,
        host_s=host_s,
        sending_s=engine.sending_s,
        compilations=compilations.n,
    )


def _submit(scheduler: Scheduler, engine: Engine, request: Request, prompt: Callable[[Request], np.ndarray]) -> None:
    """Refusals are part of a run; any other error is not."""
    try:
        scheduler.submit(request)
    except ValueError:
        if request.state != "refused":
            raise
        return
    ids = prompt(request)
    if len(ids) != request.prompt:
        raise ValueError(f"request {request.id}: prompt={request.prompt} tokens, but {len(ids)} ids came")
    engine.admit(request.id, ids, request.max_output)


def _check(scheduler: Scheduler, engine: Engine) -> None:
    if held := scheduler.n_waiting + scheduler.n_rows:
        raise ValueError(f"the scheduler holds {held} requests of another run; it must hold none")
    sizes = engine.sizes
    rows = scheduler.max_bs * scheduler.n_workers
    if rows > sizes.rows:
        raise ValueError(f"max_bs*n_workers={rows} exceeds the engine's rows={sizes.rows}")
    if scheduler.n_slots > sizes.n_slots:
        raise ValueError(f"n_slots={scheduler.n_slots} exceeds the engine's n_slots={sizes.n_slots}")
    if scheduler.model_max > sizes.longest:
        raise ValueError(f"model_max={scheduler.model_max} exceeds the engine's longest={sizes.longest}")


class Compilations:
    """Compilations of this process since it was made."""

    def __init__(self):
        self._before = _n

    @property
    def n(self) -> int:
        """How many there were."""
        return _n - self._before
