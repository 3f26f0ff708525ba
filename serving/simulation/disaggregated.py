"""Prompts on one slice, tokens on another: two pipelines, and K and V sent between them.

The first slice runs each prompt and gives the first token; K and V of the prompt then go over the links, one request
after another; the second slice goes on from there. Nothing comes back, so that the first runs to its end before the
second begins; it is never held up by a second one that is full. Needs memory for every request.
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
    """Runs all requests through both slices; their times end up in the requests themselves.

    Args:
        requests: in order of arrival, none of which has run.
        prefill, decode: the slices; policies that take whole prompts or pieces of them.
        transfer_s: from tokens of a prompt, the seconds in which its K and V are sent.
        observers: are told of the second slice's batches and slots, of the stages of both, the first slice's first, and
            of requests from their arrival at the first to their return; one that ends with its first token is told of
            with the next batch that returns from the second.

    Returns:
        The runs of the first and of the second slice.
    """
    here: dict[int, Request] = {}
    decode_scheduler = decode.scheduler()
    first = _First(observers, here)
    before = simulate(
        _prompts(requests, decode_scheduler, observers, here),
        prefill.scheduler(),
        prefill.times,
        host_s=prefill.host_s,
        observers=[first],
    )
    second = _Second(observers, here, first.n_stages, first.ended)
    clones = _clones(first.ready, here, transfer_s)
    after = simulate(clones, decode_scheduler, decode.times, host_s=decode.host_s, observers=[second])
    second.flush(max(before.end_s, after.end_s))
    return before, after


def _prompts(
    requests: Iterable[Request], decode: Scheduler, observers: Sequence[Observer], here: dict[int, Request]
) -> Iterator[Request]:
    """Of each request what the first slice does: its prompt, and one token."""
    for request in requests:
        fits = request.prompt + request.max_output <= decode.model_max
        if not fits or decode.reservation.slots(request, decode.model_max) > decode.n_slots:
            request.move("refused")
            for observer in observers:
                observer.arrived(request)
            continue
        here[request.id] = request
        yield Request(id=request.id, arrival_s=request.arrival_s, prompt=request.prompt, max_output=1, output=1)


def _clones(
    ready: Iterable[Request], here: dict[int, Request], transfer_s: Callable[[int], float]
) -> Iterator[Request]:
    """Of each request what is left for the second slice, in the order in which K and V arrive there."""
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


class _First(Observer):
    """Listens to the first slice."""

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
class _Second(Observer):
    """Listens to the second slice."""

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
        """Tells of those that ended with their first token after the last batch of the second slice."""
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
