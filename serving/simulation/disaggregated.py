"""Disaggregated serving: one server runs the prompts, another decodes.

1. The prefill server runs each prompt and emits the first token.
2. The prompt's K and V are sent to the decode server, one request after another.
3. The decode server emits the other tokens.

Nothing flows back, so that the whole prefill server is simulated before the decode server. A full decode server never
holds up the prefill server. The simulation keeps all requests in memory.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler
from toruslab.serving.simulation.simulator import Server, Simulation, simulate


def simulate_disaggregated(
    requests: Iterable[Request],
    prefill: Server,
    decode: Server,
    transfer_s: Callable[[int], float],
    observers: Sequence[Observer] = (),
) -> tuple[Simulation, Simulation]:
    """Simulates all requests on both servers, and writes the times of their events into them.

    Args:
        requests: in order of arrival. None of them has run.
        prefill, decode: the servers. Their policies must be Orca's or chunked.
        transfer_s: called with a prompt's tokens; returns the seconds to send its K and V.
        observers: get the arrivals and returns of requests, the batches and slots of the decode server, and the stages
            of both servers, numbered from the first stage of the prefill server. A request that ends with its first
            token is reported with the decode server's next batch that returns.

    Returns:
        The totals of the prefill and of the decode server.
    """
    here: dict[int, Request] = {}
    decode_scheduler = decode.scheduler()
    prefilled = _Prefill(observers, here)
    before = simulate(
        _prompts(requests, decode_scheduler, observers, here),
        prefill.scheduler(),
        prefill.times,
        host_s=prefill.host_s,
        observers=[prefilled],
    )
    decoded = _Decode(observers, here, prefilled.n_stages, prefilled.ended)
    continued = _continued(prefilled.ready, here, transfer_s)
    after = simulate(continued, decode_scheduler, decode.times, host_s=decode.host_s, observers=[decoded])
    decoded.flush(max(before.end_s, after.end_s))
    return before, after


def _prompts(
    requests: Iterable[Request], decode: Scheduler, observers: Sequence[Observer], here: dict[int, Request]
) -> Iterator[Request]:
    """Yields each request as the prefill server sees it: with one output token."""
    for request in requests:
        fits = request.prompt + request.max_output <= decode.model_max
        if not fits or decode.reservation.slots(request, decode.model_max) > decode.n_slots:
            request.move("refused")
            for observer in observers:
                observer.arrived(request)
            continue
        here[request.id] = request
        yield Request(id=request.id, arrival_s=request.arrival_s, prompt=request.prompt, max_output=1, output=1)


def _continued(
    ready: Iterable[Request], here: dict[int, Request], transfer_s: Callable[[int], float]
) -> Iterator[Request]:
    """Yields each request as the decode server sees it, in the order in which K and V arrive."""
    free_s = 0.0
    for done in ready:
        request = here[done.id]
        assert done.returned_s is not None
        free_s = max(free_s, done.returned_s) + transfer_s(request.prompt)
        left = Request(
            id=request.id,
            arrival_s=free_s,
            prompt=request.prompt + 1,
            max_output=request.max_output - 1,
            output=None if request.output is None else request.output - 1,
        )
        left.cached = request.prompt
        yield left


class _Prefill(Observer):
    """Listens to the prefill server."""

    def __init__(self, observers: Sequence[Observer], here: dict[int, Request]):
        self._observers, self._here, self.n_stages = observers, here, 0
        self.ready: list[Request] = []
        self.ended: deque[Request] = deque()

    def arrived(self, request: Request) -> None:
        original = self._here[request.id]
        if request.state == "refused":
            original.move("refused")
        for observer in self._observers:
            observer.arrived(original)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        self.n_stages = max(self.n_stages, stage + 1)
        for observer in self._observers:
            observer.stage(batch, stage, start_s, end_s)

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        for done in back:
            original = self._here[done.id]
            original.scheduled_s = done.scheduled_s
            original.token_s.append(now_s)
            if original.target == 1:
                _return(original, now_s)
                self.ended.append(original)
            else:
                self.ready.append(done)


@dataclass
class _Decode(Observer):
    """Listens to the decode server."""

    observers: Sequence[Observer]
    here: dict[int, Request]
    n_before: int
    ended: deque[Request] = field(default_factory=deque)
    last: Batch | None = None

    def made(self, batch: Batch) -> None:
        for observer in self.observers:
            observer.made(batch)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        for observer in self.observers:
            observer.stage(batch, self.n_before + stage, start_s, end_s)

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self.last = batch
        originals = self._before(now_s)
        for left in back:
            original = self.here[left.id]
            original.token_s += left.token_s
            _return(original, now_s)
            originals.append(original)
        for observer in self.observers:
            observer.completed(batch, now_s, originals, reserved, used)

    def flush(self, now_s: float) -> None:
        """Reports the requests that ended with their first token after the decode server's last batch."""
        batch = self.last or Batch(number=0, made_s=now_s, work=())
        if originals := self._before(now_s):
            for observer in self.observers:
                observer.completed(batch, now_s, originals, 0, 0)

    def _before(self, now_s: float) -> list[Request]:
        found = []
        while self.ended and (self.ended[0].returned_s or 0.0) <= now_s:
            found.append(self.ended.popleft())
        return found


def _return(request: Request, now_s: float) -> None:
    for state in ("running", "finished", "returned"):
        request.move(state)
    request.finished_s = request.returned_s = now_s
