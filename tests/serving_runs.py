"""Drives a scheduler through a random run, and checks every batch against an independent book."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler


@dataclass
class Book:
    """What the scheduler's state should be, computed from the batches that it made."""

    scheduler: Scheduler
    requests: dict[int, Request] = field(default_factory=dict)  # submitted and not refused
    rows: dict[int, int] = field(default_factory=dict)  # request -> slots that it reserves
    fed: dict[int, int] = field(default_factory=dict)  # tokens in its cache
    iterations: dict[int, int] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    flying: list[Batch] = field(default_factory=list)
    batches: int = 0

    def made(self, batch: Batch) -> None:
        """Checks a new batch against the book, and enters it."""
        scheduler = self.scheduler
        assert batch.number == self.batches
        self.batches += 1
        ids = [work.request for work in batch.work]
        busy = {work.request for flying in self.flying for work in flying.work}
        assert 0 < len(ids) == len(set(ids)) <= scheduler.max_bs and not busy & set(ids)
        for id in batch.released:
            assert self.requests[id].ended and id not in busy
            del self.rows[id]
        longest = max(work.length for work in batch.work)
        for work in batch.work:
            request = self.requests[work.request]
            if work.request not in self.rows:
                assert work.start == 0
                self.rows[work.request] = scheduler.reservation.slots(request, scheduler.model_max)
                self.fed[work.request] = 0
                self.started.append(work.request)
            assert work.start == self.fed[work.request]
            assert work.dead == request.ended == (work.length == 0)
            padded = longest if work.start == 0 and scheduler.policy.name.startswith("request-level") else work.length
            assert work.padded == (1 if work.dead else padded)
            self.fed[work.request] += work.length
            assert work.emits == (not work.dead and self.fed[work.request] >= request.prompt)
            assert work.length <= 1 or self.fed[work.request] <= request.prompt
            self.iterations[work.request] = self.iterations.get(work.request, 0) + (not work.dead)
        if scheduler.policy.token_budget:
            assert batch.computed <= scheduler.policy.token_budget
        self.flying.append(batch)
        assert len(self.flying) == scheduler.n_in_flight <= scheduler.n_workers
        assert len(self.rows) == scheduler.n_started <= scheduler.max_bs * scheduler.n_workers
        assert batch.reserved == scheduler.reserved == sum(self.rows.values()) <= scheduler.n_slots
        assert batch.used == scheduler.used == sum(self.fed[id] for id in self.rows) <= batch.reserved
        order = [self.requests[id].order for id in self.started]
        assert order == sorted(order), "a request has started before one that came earlier"
        if scheduler.policy.name == "orca":
            counts = [self.iterations[id] for id in self.started if not self.requests[id].ended]
            assert counts == sorted(counts, reverse=True), "an earlier request has run fewer iterations"


def run(
    scheduler: Scheduler,
    requests: Sequence[Request],
    seed: int,
    *,
    cancel: float = 0.0,
    stop: float = 0.0,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Book:
    """Runs all requests to their end. In each step of the clock some requests arrive, and some batches start and end.

    Args:
        scheduler: an empty one.
        requests: in order of arrival. Their arrival times are not used.
        seed: for the random order of events.
        cancel: share of the steps in which one of the requests is cancelled.
        stop: share of emitted tokens that are stop tokens.
        on_batch: called with every batch made.
    """
    chance = random.Random(seed)
    book = Book(scheduler)
    waiting, now_s = list(requests), 0.0
    returned: list[int] = []
    stopped: set[int] = set()
    most = 10 * (len(requests) + sum(request.prompt + request.target for request in requests))
    while waiting or scheduler.n_waiting or scheduler.n_started:
        now_s += 1.0
        for _ in range(min(len(waiting), chance.choice((0, 1, 1, 2, 5)))):
            request = waiting.pop(0)
            try:
                scheduler.submit(request)
                book.requests[request.id] = request
            except ValueError:
                assert request.state == "refused"
        if book.requests and chance.random() < cancel:
            id = chance.choice(list(book.requests))
            here = book.requests[id].state not in ("returned", "cancelled")
            assert (scheduler.cancel(id) is not None) == here
        while (batch := scheduler.next_batch(now_s)) is not None:
            book.made(batch)
            on_batch(batch)
        assert now_s < most, "requests are left, and none ends"
        for _ in range(min(len(book.flying), chance.randint(0 if waiting else 1, scheduler.n_workers))):
            batch = book.flying.pop(0)
            stops = {work.request for work in batch.work if work.emits and chance.random() < stop}
            before = {work.request: book.requests[work.request].n_tokens for work in batch.work}
            ended = {work.request for work in batch.work if book.requests[work.request].ended}
            back = scheduler.complete(batch, now_s, stops)
            for work in batch.work:
                emitted = book.requests[work.request].n_tokens - before[work.request]
                assert emitted == (work.emits and work.request not in ended)
            stopped |= stops
            returned += [request.id for request in back]
    assert not book.flying or all(work.dead for batch in book.flying for work in batch.work)
    assert scheduler.reserved == scheduler.used == scheduler.n_started == scheduler.n_in_flight == 0
    kept = [request for request in book.requests.values() if request.state != "cancelled"]
    assert sorted(returned) == sorted(request.id for request in kept), "a request was lost, or came back twice"
    for request in kept:
        assert request.state == "returned"
        assert request.n_tokens == request.target or request.id in stopped
        assert book.fed[request.id] == request.prompt + request.n_tokens - 1
        assert request.scheduled_s is not None and request.finished_s is not None and request.returned_s is not None
        times = [request.scheduled_s, *request.token_s, request.finished_s, request.returned_s]
        assert times == sorted(times) and request.finished_s == request.token_s[-1]
        assert scheduler.policy.early_return is False or request.returned_s == request.finished_s
    return book
