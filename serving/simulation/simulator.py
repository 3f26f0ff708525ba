"""A run on a virtual clock: the scheduler as it is, and a pipeline whose stages only take time.

Decides when things happen, from the seconds that each stage takes for a batch. Where these come from is the caller's
matter. The same input gives the same run to the last bit.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.policies import ORCA, Policy
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.reservation import OWN, Reservation
from toruslab.serving.scheduling.scheduler import Scheduler

StageTimes = Callable[[Batch], Sequence[float]]
"""Seconds that each stage takes for a batch, in the order of the pipeline; as many for every batch."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A slice, or several in a row, and how it is scheduled.

    Args:
        times: see `StageTimes`.
        n_stages, n_chips: of the whole pipeline.
        max_bs, slots, policy, reservation: see `serving.scheduling.scheduler.Scheduler`.
        in_flight: batches in flight at most; None: one for each stage.
        host_s: seconds of host work for each batch.
    """

    times: StageTimes
    n_stages: int
    n_chips: int
    max_bs: int
    slots: int
    policy: Policy = ORCA
    reservation: Reservation = OWN
    in_flight: int | None = None
    host_s: float = 0.0

    def scheduler(self) -> Scheduler:
        """An empty one.

        Raises:
            ValueError: a size below one.
        """
        return Scheduler(
            max_bs=self.max_bs,
            n_slots=self.slots,
            n_workers=self.n_stages if self.in_flight is None else self.in_flight,
            policy=self.policy,
            reservation=self.reservation,
        )


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was run.

    Args:
        end_s: when the last batch returned.
        batches: iterations.
        tokens: tokens of requests that were scheduled, prompts and outputs.
        works: parts of batches that were scheduled: one for each request and iteration, dead rows included.
    """

    end_s: float
    batches: int
    tokens: int
    works: int


def simulate(
    requests: Iterable[Request],
    scheduler: Scheduler,
    stage_times: StageTimes,
    *,
    host_s: float = 0.0,
    observers: Sequence[Observer] = (),
) -> Simulation:
    """Runs all requests to their end.

    A batch enters a stage when it has left the one before and that stage is free, the first one after the host has
    prepared it; the host prepares one batch at a time, in `host_s` seconds. At equal times requests arrive and batches
    return before the next batch is made.

    Args:
        requests: in order of arrival; taken one by one. Each needs an `output`, or runs to its maximum.
        scheduler: an empty one.
        stage_times: see `StageTimes`.
        host_s: seconds of host work for each batch.
        observers: are told everything.

    Raises:
        ValueError: what `Scheduler.arriving` refuses; stage times that are negative, none, or not as many as before.
    """
    arrivals = scheduler.arriving(requests)
    coming = next(arrivals, None)
    flying: deque[tuple[Batch, float]] = deque()
    free_s: list[float] = []
    host_free_s = now_s = 0.0
    batches = tokens = works = 0
    while coming is not None or flying:
        returns_s = flying[0][1] if flying else math.inf
        now_s = returns_s if coming is None else min(coming.arrival_s, returns_s)
        while coming is not None and coming.arrival_s == now_s:
            _submit(scheduler, coming)
            for observer in observers:
                observer.arrived(coming)
            coming = next(arrivals, None)
        while flying and flying[0][1] == now_s:
            batch, _ = flying.popleft()
            back = scheduler.complete(batch, now_s)
            for observer in observers:
                observer.completed(batch, now_s, back, scheduler.reserved, scheduler.used)
        while (batch := scheduler.next_batch(now_s)) is not None:
            batches, tokens, works = batches + 1, tokens + batch.tokens, works + len(batch.work)
            for observer in observers:
                observer.made(batch)
            times_s = stage_times(batch)
            free_s = free_s or [0.0] * len(times_s)
            if not times_s or len(times_s) != len(free_s) or min(times_s) < 0:
                raise ValueError(
                    f"stage_times={tuple(times_s)} must be as many as stages, {len(free_s)}, and not negative"
                )
            left_s = host_free_s = max(now_s, host_free_s) + host_s
            for stage, stage_s in enumerate(times_s):
                start_s = max(left_s, free_s[stage])
                left_s = free_s[stage] = start_s + stage_s
                for observer in observers:
                    observer.stage(batch, stage, start_s, left_s)
            flying.append((batch, left_s))
    assert scheduler.n_waiting == scheduler.n_rows == 0, "requests are left, and nothing runs"
    return Simulation(end_s=now_s, batches=batches, tokens=tokens, works=works)


def _submit(scheduler: Scheduler, request: Request) -> None:
    """Refusals are part of a run; any other error is not."""
    try:
        scheduler.submit(request)
    except ValueError:
        if request.state != "refused":
            raise
