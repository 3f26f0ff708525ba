"""The scheduler takes requests, makes batches, takes batches back and returns requests.

The engine and the simulator drive the same object. It keeps the queue and the slots, and lets batches return in the
order in which it made them. The policy decides which requests run together. The caller has the clock and the model.
The time to make a batch grows with the started requests (at most max_bs * n_workers), not with waiting or past ones.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.policies import ORCA, Policy
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.reservation import OWN, Reservation


class Scheduler:
    """Iteration-level scheduling [Orca, section 4.2], or a baseline's scheduling, as the policy says.

    Args:
        max_bs: most requests in one batch.
        n_slots: slots of the KV cache. A slot holds the K and V of one token.
        n_workers: most batches in flight: the number of pipeline stages.
        policy: decides which requests run together; see `serving.scheduling.policies`.
        reservation: decides how many slots a request reserves before its first iteration.
        model_max: most positions of a request; None: n_slots.

    Raises:
        ValueError: a size is below one.

    Example:
        >>> scheduler = Scheduler(max_bs=2, n_slots=20)
        >>> scheduler.submit(Request(id=7, arrival_s=0.0, prompt=3, max_output=2))
        >>> batch = scheduler.next_batch(0.0)
        >>> batch.work
        (Work(request=7, start=0, length=3, padded=3, emits=True, dead=False),)
        >>> scheduler.complete(batch, 1.0)
        []
        >>> [request.id for request in scheduler.complete(scheduler.next_batch(1.0), 2.0)], scheduler.reserved
        ([7], 0)
    """

    def __init__(
        self,
        *,
        max_bs: int,
        n_slots: int,
        n_workers: int = 1,
        policy: Policy = ORCA,
        reservation: Reservation = OWN,
        model_max: int | None = None,
    ):
        model_max = n_slots if model_max is None else model_max
        sizes = {"max_bs": max_bs, "n_slots": n_slots, "n_workers": n_workers, "model_max": model_max}
        for field, value in sizes.items():
            if value < 1:
                raise ValueError(f"{field}={value} must be at least 1")
        self.max_bs, self.n_slots, self.n_workers, self.model_max = max_bs, n_slots, n_workers, model_max
        self.policy, self.reservation = policy, reservation
        self._line_up = policy.line_up(max_bs, n_workers)
        self._queue: deque[Request] = deque()  # cancelled requests stay until they are first
        self._held: dict[int, Request] = {}  # waiting or started
        self._in_flight: deque[tuple[Batch, list[Request]]] = deque()
        self._released: list[int] = []
        self._n_submitted = self._n_batches = self._n_waiting = 0
        self._reserved = self._used = 0

    @property
    def reserved(self) -> int:
        """Slots that are reserved now."""
        return self._reserved

    @property
    def used(self) -> int:
        """Slots that hold a token now, including those that a batch in flight fills."""
        return self._used

    @property
    def n_waiting(self) -> int:
        """Requests that have never run."""
        return self._n_waiting

    @property
    def n_started(self) -> int:
        """Requests that hold a place: not yet ended, or still carried by their batch. At most max_bs * n_workers."""
        return len(self._held) - self._n_waiting

    @property
    def n_in_flight(self) -> int:
        """Batches that have not returned."""
        return len(self._in_flight)

    def arriving(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yields the requests of a run one by one, each checked before its time has come.

        Raises:
            ValueError: arrivals are not in order or not finite, or the reservation needs an output that is None.
        """
        before_s = 0.0
        for request in requests:
            if not before_s <= request.arrival_s < math.inf:
                raise ValueError(
                    f"request {request.id} arrives at {request.arrival_s} s, after {before_s} s; arrivals must be "
                    "finite, from 0 on, and in order"
                )
            self.reservation.slots(request, self.model_max)
            before_s = request.arrival_s
            yield request

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the queue.

        Raises:
            ValueError: the request can never run; its state is now `refused`. Or it was submitted before, or the
                reservation needs an output that is None; its state is unchanged.
        """
        if request.state != "initiation" or request.order >= 0 or request.id in self._held:
            raise ValueError(f"request {request.id} was submitted before; a new one needs an id of its own")
        slots = self.reservation.slots(request, self.model_max)
        if request.prompt + request.max_output > self.model_max:
            request.move("refused")
            raise ValueError(
                f"request {request.id}: prompt={request.prompt} + max_output={request.max_output} tokens exceed "
                f"model_max={self.model_max}"
            )
        if slots > self.n_slots:
            request.move("refused")
            raise ValueError(
                f"request {request.id}: prompt={request.prompt}, max_output={request.max_output} reserve {slots} "
                f"slots ({self.reservation.name}), more than n_slots={self.n_slots}"
            )
        request.slots, request.order = slots, self._n_submitted
        self._n_submitted += 1
        self._n_waiting += 1
        self._held[request.id] = request
        self._queue.append(request)

    def offer(self, request: Request) -> bool:
        """Submits a request of a run. Returns False if it was refused; raises any other error."""
        try:
            self.submit(request)
        except ValueError:
            if request.state != "refused":
                raise
            return False
        return True

    def next_batch(self, now_s: float) -> Batch | None:
        """Makes the batch of the next iteration. Its requests are running from now on.

        Returns:
            The batch. None if no request can run or n_workers batches are in flight.
        """
        if len(self._in_flight) >= self.n_workers:
            return None
        work = self._line_up.pick(self._admit)
        if not work:
            return None
        held = self._held
        members = [held[part.request] for part in work]
        for part, request in zip(work, members, strict=True):
            if not part.dead:
                request.run(now_s, part.length)
                self._used += part.length
        batch = Batch(
            number=self._n_batches,
            made_s=now_s,
            work=tuple(work),
            released=tuple(self._released),
            reserved=self._reserved,
            used=self._used,
        )
        self._n_batches += 1
        self._released.clear()
        self._in_flight.append((batch, members))
        return batch

    def complete(self, batch: Batch, now_s: float, stopped: Collection[int] = ()) -> list[Request]:
        """Takes back the oldest batch in flight.

        Args:
            batch: the oldest batch in flight.
            now_s: when its tokens came out.
            stopped: requests that got a stop token in this batch. The stop token counts as output.

        Returns:
            The requests that return to their clients now, in the order of the batch.

        Raises:
            ValueError: the batch is not the oldest in flight.
        """
        if not self._in_flight or self._in_flight[0][0] is not batch:
            oldest = self._in_flight[0][0].number if self._in_flight else "none"
            raise ValueError(f"batch {batch.number} cannot return: the oldest in flight is {oldest}")
        _, members = self._in_flight.popleft()
        early = self.policy.early_return
        back: list[Request] = []
        for part, request in zip(batch.work, members, strict=True):
            if request.state != "running":  # dead, or cancelled in flight
                continue
            if not part.emits:
                request.move("increment")
                continue
            request.emit(now_s)
            if len(request.token_s) < request.target and request.id not in stopped:
                request.move("increment")
                continue
            request.finish(now_s)
            if early:
                request.give_back(now_s)
                back.append(request)
        free = self._line_up.settle(members)
        if free:
            self._release(free)
        if not early:
            for request in free:
                if request.state == "finished":
                    request.give_back(now_s)
                    back.append(request)
        return back

    def cancel(self, id: int) -> Request | None:
        """Ends a request in any state. Other requests are unaffected.

        A request in flight gives up its place when its batch returns. A request-level batch keeps it until all of the
        batch have ended.

        Returns:
            The request. None if it is unknown, or was returned or cancelled before.
        """
        request = self._held.get(id)
        if request is None or request.state in ("returned", "cancelled"):
            return None
        before = request.state
        request.move("cancelled")
        if before == "initiation":
            self._n_waiting -= 1
            del self._held[id]
        elif before == "increment":
            self._release(self._line_up.drop(request))
        return request

    def _admit(self) -> Request | None:
        queue = self._queue
        while queue and queue[0].state == "cancelled":
            queue.popleft()
        if not queue or self._reserved + queue[0].slots > self.n_slots:
            return None
        request = queue.popleft()
        self._n_waiting -= 1
        self._reserved += request.slots
        self._used += request.cached
        return request

    def _release(self, requests: list[Request]) -> None:
        for request in requests:
            self._reserved -= request.slots
            self._used -= request.cached
            del self._held[request.id]
            self._released.append(request.id)
