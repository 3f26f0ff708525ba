"""A scenario: one server, or a prefill and a decode server, and what a workload shows of it.

Computes the metrics of a run at a rate, the throughput when requests never run out, and the highest rate that keeps a
promise. Nothing here prints, and no JAX backend is initialised.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from toruslab.serving.results.metrics import Limits, Metrics, Summary
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.policies import ORCA
from toruslab.serving.scheduling.request import Request
from toruslab.serving.simulation.disaggregated import simulate_disaggregated
from toruslab.serving.simulation.simulator import Server, Simulation, simulate
from toruslab.serving.traffic.arrivals import GivenTimes
from toruslab.serving.traffic.workload import Workload

SHARE = 0.9
"""Share of the requests that must meet the limits."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One server for everything, or a prefill server and a decode server.

    Args:
        server: the server, or the decode server if there is a prefill server.
        prefill: the prefill server; None: `server` runs the prompts too.
        kv_bytes: bytes of one token's K and V in all layers.
        kv_bytes_per_s: bandwidth between the two servers.
        kv_start_s: latency of a transfer, seconds.

    Raises:
        ValueError: a policy that cannot continue prompts of another server.
    """

    server: Server
    prefill: Server | None = None
    kv_bytes: float = 0.0
    kv_bytes_per_s: float = math.inf
    kv_start_s: float = 0.0

    def __post_init__(self):
        for server in (self.server, self.prefill):
            if self.prefill and server and not (server.policy is ORCA or server.policy.token_budget):
                raise ValueError(
                    f"policy={server.policy.name!r} cannot go on from prompts run elsewhere: orca and chunked-N can"
                )

    @property
    def n_chips(self) -> int:
        return self.server.n_chips + (self.prefill.n_chips if self.prefill else 0)

    def transfer_s(self, tokens: int) -> float:
        """Seconds to send the K and V of a prompt of so many tokens to the decode server."""
        return self.kv_start_s + tokens * self.kv_bytes / self.kv_bytes_per_s

    def simulate(self, workload: Workload, observers: Sequence[Observer] = ()) -> tuple[Simulation, ...]:
        """Runs a workload. Returns the totals of each server, the prefill server first."""
        if self.prefill is None:
            server = self.server
            requests, scheduler = workload.requests(), server.scheduler()
            return (simulate(requests, scheduler, server.times, host_s=server.host_s, observers=observers),)
        return simulate_disaggregated(workload.requests(), self.prefill, self.server, self.transfer_s, observers)

    def run(
        self,
        workload: Workload,
        *,
        warm_up: float = 0.2,
        limits: Limits | None = None,
        observers: Sequence[Observer] = (),
    ) -> tuple[Summary, tuple[Simulation, ...]]:
        """Runs a workload. Returns the metrics of its steady window and the totals of each server."""
        metrics = Metrics(max_bs=self.server.max_bs, window_s=workload.window_s(warm_up), limits=limits)
        runs = self.simulate(workload, [metrics, *observers])
        return metrics.summary(), runs

    def peak_per_s(self, workload: Workload, observers: Sequence[Observer] = ()) -> float:
        """Throughput when all requests are there from the start: requests per second.

        The first and the last fifth of the returned requests are left out.

        Raises:
            ValueError: the slots are too few for any request.
        """
        returns = _Returns()
        at_once = replace(workload, arrivals=GivenTimes(times_s=(0.0,) * workload.n))
        self.simulate(at_once, [returns, *observers])
        times_s = returns.times_s
        if not times_s:
            raise ValueError(f"slots={self.server.slots} are too few: every request was refused")
        first, last = len(times_s) // 5, len(times_s) - 1 - len(times_s) // 5
        if times_s[last] <= times_s[first]:
            first, last = 0, len(times_s) - 1
        taken_s = times_s[last] - times_s[first]
        return (last - first) / taken_s if taken_s > 0 else len(times_s) / times_s[-1]


class _Returns(Observer):
    """Keeps the times at which requests return."""

    def __init__(self):
        self.times_s: list[float] = []

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self.times_s += [now_s] * len(back)


def highest_rate(good: Callable[[float], bool], top: float, *, precision: float = 0.01) -> float | None:
    """The highest good rate, by bisection between `top / 100` and `top`.

    Args:
        good: says whether a rate is good. Rates above a bad rate are taken to be bad.
        top: the highest rate to try.
        precision: relative precision of the answer.

    Returns:
        A good rate. None if `top / 100` is not good.

    Example:
        >>> round(highest_rate(lambda rate: rate < 3.0, 10.0), 1), highest_rate(lambda rate: False, 10.0)
        (3.0, None)
    """
    low, high = top / 100, top
    if good(high):
        return high
    if not good(low):
        return None
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
