"""Metrics of a run: latencies, throughput, waste and memory. This file defines each of these words.

Queue delay   first scheduled - arrival
TTFT          first token - arrival
TPOT          (last - first token) / (n - 1), for requests of n >= 2 tokens
ITL           every gap between two tokens of a request, pooled over all requests
E2E           returned - arrival
normalised    E2E / output tokens (Orca states its median, vLLM its mean)

All metrics are of a steady window of time, without warm-up and drain:

- latencies: of requests that arrived in the window, whenever they returned;
- throughput: of requests that returned in the window;
- waste and occupancy: of batches that were made in the window;
- slots and stages: over the time in the window.

The memory needed does not grow with the run.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from toruslab.serving.results.distribution import Distribution, Percentiles
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request

LATENCIES = ("queue_delay_s", "ttft_s", "tpot_s", "itl_s", "e2e_s", "normalised_s")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The TTFT and TPOT that a client accepts, in seconds. A request of one token has no TPOT."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The metrics of a run. None: there was nothing to measure.

    Attributes:
        window_s: start and end of the window.
        arrived, refused, cancelled, returned: requests of the whole run.
        offered_per_s: requests that arrived in the window (including refused ones) per second.
        throughput_per_s: requests that returned in the window per second.
        tokens_per_s: output tokens of these requests per second of the window.
        queue_delay_s ... normalised_s: see the module.
        within_limits: share of the window's requests that met the limits. Refused requests missed them, cancelled ones
            do not count.
        batches: made in the window.
        occupancy: requests of a batch that have not ended over max_bs, mean over batches.
        padding_share: share of padding in all computed tokens.
        dead_share: share of dead places in all computed tokens.
        slots_reserved, slots_used: mean over time.
        slots_reserved_peak, slots_used_peak: maximum over time.
        stage_busy: for each stage, the share of the time in which it computed.
    """

    window_s: tuple[float, float]
    arrived: int
    refused: int
    cancelled: int
    returned: int
    offered_per_s: float | None
    throughput_per_s: float | None
    tokens_per_s: float | None
    queue_delay_s: Percentiles | None
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    normalised_s: Percentiles | None
    within_limits: float | None
    batches: int
    occupancy: float | None
    padding_share: float | None
    dead_share: float | None
    slots_reserved: float | None
    slots_used: float | None
    slots_reserved_peak: int
    slots_used_peak: int
    stage_busy: tuple[float, ...]


class Metrics(Observer):
    """An observer that computes the metrics of a run.

    Args:
        max_bs: of the scheduler, for the occupancy.
        window_s: start and end of the steady window, both included, seconds. Default: the whole run.
        limits: for `within_limits`.

    Raises:
        ValueError: the window ends before it begins.
    """

    def __init__(self, *, max_bs: int, window_s: tuple[float, float] = (0.0, math.inf), limits: Limits | None = None):
        if not window_s[0] <= window_s[1]:
            raise ValueError(f"window_s={window_s} must not end before it begins")
        self._max_bs, self._window_s, self._limits = max_bs, window_s, limits
        self._end_s = 0.0
        self._arrived = self._refused = self._cancelled = self._returned = 0
        self._arrived_inside = self._refused_inside = self._returned_inside = self._tokens_inside = 0
        self._judged = self._met = 0
        self._latencies = {name: Distribution() for name in LATENCIES}
        self._batches = self._rows = self._computed = self._padding = self._dead = 0
        self._reserved, self._used = _Level(window_s), _Level(window_s)
        self._busy_s: list[float] = []

    def arrived(self, request: Request) -> None:
        refused = request.state == "refused"
        self._see(request.arrival_s)
        self._arrived += 1
        self._refused += refused
        if self._inside(request.arrival_s):
            self._arrived_inside += 1
            self._refused_inside += refused

    def cancelled(self, request: Request, now_s: float) -> None:
        self._see(now_s)
        self._cancelled += 1

    def made(self, batch: Batch) -> None:
        self._see(batch.made_s)
        self._slots(batch.made_s, batch.reserved, batch.used)
        if self._inside(batch.made_s):
            dead, computed = batch.dead, batch.computed
            self._batches += 1
            self._rows += len(batch.work) - dead
            self._computed += computed
            self._padding += computed - dead - batch.tokens
            self._dead += dead

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        self._see(end_s)
        while len(self._busy_s) <= stage:
            self._busy_s.append(0.0)
        self._busy_s[stage] += _overlap(self._window_s, start_s, end_s)

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self._see(now_s)
        self._slots(now_s, reserved, used)
        for request in back:
            self._returned += 1
            if self._inside(now_s):
                self._returned_inside += 1
                self._tokens_inside += request.n_tokens
            if self._inside(request.arrival_s):
                self._judge(request)

    def summary(self) -> Summary:
        """The metrics so far."""
        start_s, end_s = self._window_s[0], min(self._window_s[1], self._end_s)
        length_s = end_s - start_s
        judged = self._judged + self._refused_inside
        return Summary(
            window_s=(start_s, end_s),
            arrived=self._arrived,
            refused=self._refused,
            cancelled=self._cancelled,
            returned=self._returned,
            offered_per_s=_ratio(self._arrived_inside, length_s),
            throughput_per_s=_ratio(self._returned_inside, length_s),
            tokens_per_s=_ratio(self._tokens_inside, length_s),
            **{name: distribution.percentiles() for name, distribution in self._latencies.items()},
            within_limits=_ratio(self._met, judged) if self._limits else None,
            batches=self._batches,
            occupancy=_ratio(self._rows, self._batches * self._max_bs),
            padding_share=_ratio(self._padding, self._computed),
            dead_share=_ratio(self._dead, self._computed),
            slots_reserved=_ratio(self._reserved.total(end_s), length_s),
            slots_used=_ratio(self._used.total(end_s), length_s),
            slots_reserved_peak=self._reserved.peak,
            slots_used_peak=self._used.peak,
            stage_busy=tuple(busy_s / length_s for busy_s in self._busy_s) if length_s > 0 else (),
        )

    def _judge(self, request: Request) -> None:
        assert request.scheduled_s is not None and request.returned_s is not None
        token_s, arrival_s, n = request.token_s, request.arrival_s, request.n_tokens
        ttft_s = token_s[0] - arrival_s
        tpot_s = (token_s[-1] - token_s[0]) / (n - 1) if n > 1 else None
        e2e_s = request.returned_s - arrival_s
        self._latencies["queue_delay_s"].add((request.scheduled_s - arrival_s,))
        self._latencies["ttft_s"].add((ttft_s,))
        if tpot_s is not None:
            self._latencies["tpot_s"].add((tpot_s,))
            self._latencies["itl_s"].add([after - before for before, after in pairwise(token_s)])
        self._latencies["e2e_s"].add((e2e_s,))
        self._latencies["normalised_s"].add((e2e_s / n,))
        self._judged += 1
        if self._limits:
            self._met += ttft_s <= self._limits.ttft_s and (tpot_s is None or tpot_s <= self._limits.tpot_s)

    def _inside(self, now_s: float) -> bool:
        return self._window_s[0] <= now_s <= self._window_s[1]

    def _see(self, now_s: float) -> None:
        self._end_s = max(self._end_s, now_s)

    def _slots(self, now_s: float, reserved: int, used: int) -> None:
        self._reserved.set(now_s, reserved)
        self._used.set(now_s, used)


def goodput(runs: Iterable[tuple[float, float]], share: float = 0.9) -> float | None:
    """The highest offered rate at which a share of the requests met their limits.

    Args:
        runs: (rate, within_limits) of each run.
        share: of the requests that must meet the limits.

    Returns:
        One of the rates, not interpolated. None if no rate was low enough.

    Example:
        >>> goodput([(1.0, 1.0), (2.0, 0.93), (4.0, 0.4)])
        2.0
    """
    return max((rate for rate, met in runs if met >= share), default=None)


class _Level:
    """A number that changes in steps: its integral over the window, and its peak inside the window."""

    def __init__(self, window_s: tuple[float, float]):
        self._window_s, self._since_s, self._value, self._total, self.peak = window_s, 0.0, 0, 0.0, 0

    def set(self, now_s: float, value: int) -> None:
        inside_s = _overlap(self._window_s, self._since_s, now_s)
        if inside_s > 0:
            self._total += self._value * inside_s
            self.peak = max(self.peak, self._value)
        self._since_s, self._value = now_s, value

    def total(self, end_s: float) -> float:
        return self._total + self._value * _overlap(self._window_s, self._since_s, end_s)


def _overlap(window_s: tuple[float, float], start_s: float, end_s: float) -> float:
    return max(0.0, min(window_s[1], end_s) - max(window_s[0], start_s))


def _ratio(value: float, of: float) -> float | None:
    return value / of if of > 0 else None
