"""Plays a trace of requests through the scheduler and the engine.

Decides when the host takes arrivals and when it waits. It never waits for tokens while it can make a batch. Nothing
here listens to a network: a server is another program.
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
"""Seconds between two looks at a flight while the host also waits for an arrival."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_n_compiled = 0  # programs, by this process


def _count_compilations(event: str, duration_secs: float, **details: str | int) -> None:
    global _n_compiled
    _n_compiled += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


class Clock(Protocol):
    """Tells the time in seconds since the run began, and waits."""

    def now_s(self) -> float: ...

    def wait(self, until_s: float, flight: Flight | None) -> bool:
        """Waits until `until_s` or until the flight's tokens have come out. Returns whether they have."""
        ...


class Wall:
    """The clock on the wall."""

    def __init__(self):
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._began_s

    def wait(self, until_s: float, flight: Flight | None) -> bool:
        """See `Clock`. Returns True at once if nothing else can happen before the flight's tokens."""
        while flight is None or until_s < float("inf"):
            left_s = until_s - self.now_s()
            if left_s <= 0 or (flight and flight.ready):
                break
            time.sleep(min(left_s, POLL_S) if flight else left_s)
        return flight is not None and (until_s == float("inf") or flight.ready)


@dataclass(frozen=True, kw_only=True)
class Served:
    """The totals of a run.

    Args:
        end_s: when the last batch returned, seconds.
        batches: iterations.
        tokens: tokens of requests that were computed.
        computed: tokens that the passes computed, padding included.
        host_s: seconds in which the host scheduled, described passes and took tokens back.
        sending_s: processor seconds of the threads that dispatch passes, summed over stages.
        compilations: programs compiled during the run. A measurement must have none.
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
        requests: in order of arrival. Each is taken when it is due by the clock.
        scheduler: holds no requests. Its `max_bs * n_workers`, `n_slots` and `model_max` must fit the engine's sizes.
        engine: forgets earlier requests.
        prompt: returns a request's token ids [prompt].
        clock: None: a new `Wall`.
        stop: id of the token that ends a request.
        observers: get all events.
        returned: called with each request that returns and its output ids.
        cancelled: (seconds, request id) in order of time: requests to cancel.

    Raises:
        ValueError: the scheduler does not fit the engine, a prompt has another length than its request says, or
            `Scheduler.arriving` or `Engine.admit` refuses a request.
        Exception: a stage raised it. The engine can serve again with another scheduler.
    """
    _check(scheduler, engine)
    clock = clock or Wall()
    engine.clear(clock.now_s)
    arrivals, leaving = scheduler.arriving(requests), deque(cancelled)
    coming = next(arrivals, None)
    flights: deque[Flight] = deque()
    batches = tokens = computed = 0
    host_s, compiled_before = 0.0, _n_compiled
    while True:
        mark = time.perf_counter()
        now_s = clock.now_s()
        while coming is not None and coming.arrival_s <= now_s:
            if scheduler.offer(coming):
                ids = prompt(coming)
                if len(ids) != coming.prompt:
                    raise ValueError(f"request {coming.id}: prompt={coming.prompt} tokens, but {len(ids)} ids came")
                engine.admit(coming.id, ids, coming.max_output)
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
        compilations=_n_compiled - compiled_before,
    )


def _check(scheduler: Scheduler, engine: Engine) -> None:
    if held := scheduler.n_waiting + scheduler.n_started:
        raise ValueError(f"the scheduler holds {held} requests of another run; it must hold none")
    sizes = engine.sizes
    rows = scheduler.max_bs * scheduler.n_workers
    if rows > sizes.rows:
        raise ValueError(f"max_bs*n_workers={rows} exceeds the engine's rows={sizes.rows}")
    if scheduler.n_slots > sizes.n_slots:
        raise ValueError(f"n_slots={scheduler.n_slots} exceeds the engine's n_slots={sizes.n_slots}")
    if scheduler.model_max > sizes.longest:
        raise ValueError(f"model_max={scheduler.model_max} exceeds the engine's longest={sizes.longest}")
