"""The simulator: a run of the real scheduler on a virtual clock, over a pipeline whose stages only take time.

It computes when batches are made and return. The caller provides the seconds that each stage takes for a batch. The
same input gives the same run to the last bit.
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
"""Returns the seconds that each stage takes for a batch, in the order of the pipeline."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A simulated server: a pipeline of one or more slices, and its scheduler's settings.

    Args:
        times: see `StageTimes`.
        n_stages: pipeline stages.
        n_chips: chips of all stages.
        max_bs, slots, policy, reservation: see `serving.scheduling.scheduler.Scheduler`.
        in_flight: most batches in flight; None: one for each stage.
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
        """A new, empty scheduler with these settings.

        Raises:
            ValueError: a size is below one.
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
    """The totals of a run.

    Args:
        end_s: when the last batch returned, seconds.
        batches: iterations.
        tokens: scheduled tokens of prompts and outputs.
        works: scheduled `Work` entries: one for each request and iteration, dead places included.
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
    """Simulates all requests to their end.

    The host prepares one batch at a time, in `host_s` seconds. A batch enters a stage when it has left the previous one
    and the stage is free. At equal times, requests arrive and batches return before the next batch is made.

    Args:
        requests: in order of arrival. A request without an `output` runs to its maximum.
        scheduler: holds no requests.
        stage_times: see `StageTimes`.
        host_s: seconds of host work for each batch.
        observers: get all events.

    Raises:
        ValueError: `Scheduler.arriving` refuses a request, or stage times are negative, missing, or not one for each
            stage.
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
            scheduler.offer(coming)
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
    assert scheduler.n_waiting == scheduler.n_started == 0, "requests are left, and nothing runs"
    return Simulation(end_s=now_s, batches=batches, tokens=tokens, works=works)
