"""The scheduler: the paper's examples, and properties of every run under any traffic."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving_runs import run
from toruslab.serving.scheduling.batch import Batch, Work
from toruslab.serving.scheduling.policies import (
    ORCA,
    POLICIES,
    REQUEST_LEVEL,
    REQUEST_LEVEL_EARLY,
    SHORTEST_PROMPT,
    Policy,
    Together,
    WholePrompts,
    chunked,
    policy,
)
from toruslab.serving.scheduling.request import NEXT, Request
from toruslab.serving.scheduling.reservation import OWN, RESERVATIONS, reservation
from toruslab.serving.scheduling.scheduler import Scheduler

ALL = [*POLICIES.values(), chunked(1), chunked(7)]


def request(id: int, prompt: int, output: int, max_output: int | None = None) -> Request:
    return Request(id=id, arrival_s=0.0, prompt=prompt, max_output=max_output or output, output=output)


def submit(scheduler: Scheduler, *requests: Request) -> None:
    for one in requests:
        scheduler.submit(one)


def made(scheduler: Scheduler, now_s: float) -> Batch:
    batch = scheduler.next_batch(now_s)
    assert batch is not None
    return batch


def step(scheduler: Scheduler, now_s: float) -> tuple[dict[int, int], list[int]]:
    """Runs one iteration. Returns the computed tokens of each request, and the requests that returned."""
    batch = made(scheduler, now_s)
    return {work.request: work.padded for work in batch.work}, [r.id for r in scheduler.complete(batch, now_s + 1)]


# The paper's Figure 3 (early-finished and late-joining requests); the lengths are ours.


def early_and_late(policy: Policy) -> tuple[list[dict[int, int]], list[list[int]]]:
    scheduler = Scheduler(max_bs=2, n_slots=100, policy=policy)
    submit(scheduler, request(1, 2, 4), request(2, 2, 2))
    rows, backs = [], []
    for now in range(6):
        ran, back = step(scheduler, now)
        rows.append(ran)
        backs.append(back)
        if now == 0:
            submit(scheduler, request(3, 3, 2))
    assert scheduler.n_waiting == scheduler.n_started == 0
    return rows, backs


def test_request_level_early_finished_waits_and_late_joining_waits():
    rows, backs = early_and_late(REQUEST_LEVEL)
    assert rows == [{1: 2, 2: 2}, {1: 1, 2: 1}, {1: 1, 2: 1}, {1: 1, 2: 1}, {3: 3}, {3: 1}]
    assert backs == [[], [], [], [1, 2], [], [3]]


def test_early_return_changes_when_requests_return_and_nothing_else():
    rows, backs = early_and_late(REQUEST_LEVEL_EARLY)
    assert rows == early_and_late(REQUEST_LEVEL)[0]
    assert backs == [[], [2], [], [1], [], [3]]


def test_iteration_level_leaves_and_joins_at_once():
    scheduler = Scheduler(max_bs=2, n_slots=100)
    submit(scheduler, request(1, 2, 4), request(2, 2, 2))
    assert step(scheduler, 0) == ({1: 2, 2: 2}, [])
    submit(scheduler, request(3, 3, 2))
    assert step(scheduler, 1) == ({1: 1, 2: 1}, [2])
    assert step(scheduler, 2) == ({1: 1, 3: 3}, [])
    assert step(scheduler, 3) == ({1: 1, 3: 1}, [1, 3])
    assert scheduler.next_batch(4) is None


def test_a_batch_of_seven_tokens_mixes_phases():
    """The paper's Figure 5: two requests in increment, prompts of two and of three tokens beside them."""
    scheduler = Scheduler(max_bs=4, n_slots=100)
    submit(scheduler, request(1, 5, 9), request(2, 6, 9))
    step(scheduler, 0)
    submit(scheduler, request(3, 2, 9), request(4, 3, 9))
    batch = made(scheduler, 1)
    assert batch.work == (
        Work(1, 5, 1, 1, True, False),
        Work(2, 6, 1, 1, True, False),
        Work(3, 0, 2, 2, True, False),
        Work(4, 0, 3, 3, True, False),
    )
    assert batch.tokens == batch.computed == 7 and batch.padding == batch.dead == 0


def test_three_batches_in_flight_before_the_first_returns():
    """The paper's Figure 8: max_bs 2, n_workers 3, requests A to F. Its times are in test_simulator."""
    scheduler = Scheduler(max_bs=2, n_slots=100, n_workers=3)
    submit(scheduler, *[request(id, 2, 3) for id in range(7)])
    batches = [made(scheduler, 0.0) for _ in range(3)]
    assert [[work.request for work in batch.work] for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert scheduler.next_batch(0.0) is None and scheduler.n_in_flight == 3
    with pytest.raises(ValueError, match="batch 1 cannot return: the oldest in flight is 0"):
        scheduler.complete(batches[1], 1.0)
    assert scheduler.complete(batches[0], 1.0) == []
    assert [work.request for work in made(scheduler, 1.0).work] == [0, 1], "the earliest go on, 6 waits"
    assert scheduler.next_batch(1.0) is None
    with pytest.raises(ValueError, match="batch 0 cannot return"):
        scheduler.complete(batches[0], 2.0)


def test_first_that_does_not_fit_ends_the_selection():
    scheduler = Scheduler(max_bs=4, n_slots=20)
    submit(scheduler, request(0, 8, 2), request(1, 9, 2), request(2, 1, 1))
    batch = made(scheduler, 0)
    assert [work.request for work in batch.work] == [0], "1 needs 11 of 10 slots; 2 would fit and must not overtake"
    assert (batch.reserved, batch.used, scheduler.reserved) == (10, 8, 10)
    scheduler.complete(batch, 1)
    batch = made(scheduler, 1)
    assert [r.id for r in scheduler.complete(batch, 2)] == [0] and scheduler.reserved == scheduler.used == 0
    batch = made(scheduler, 2)
    assert [work.request for work in batch.work] == [1, 2] and batch.released == (0,)


def test_shortest_prompt_feeds_the_rest_one_token_an_iteration():
    scheduler = Scheduler(max_bs=2, n_slots=100, policy=SHORTEST_PROMPT)
    submit(scheduler, request(0, 2, 1), request(1, 4, 2))
    seen, back = [], []
    for now in range(4):
        batch = made(scheduler, now)
        seen.append(batch.work)
        back = scheduler.complete(batch, now + 1)
    assert seen == [
        (Work(0, 0, 2, 2, True, False), Work(1, 0, 2, 2, False, False)),
        (Work(0, 2, 0, 1, False, True), Work(1, 2, 1, 1, False, False)),
        (Work(0, 2, 0, 1, False, True), Work(1, 3, 1, 1, True, False)),
        (Work(0, 2, 0, 1, False, True), Work(1, 4, 1, 1, True, False)),
    ]
    assert [(r.id, r.token_s, r.returned_s) for r in back] == [(0, [1], 4), (1, [3, 4], 4)]


def test_padded_prompts():
    scheduler = Scheduler(max_bs=3, n_slots=100, policy=REQUEST_LEVEL)
    submit(scheduler, request(0, 2, 1), request(1, 5, 1), request(2, 4, 1))
    batch = made(scheduler, 0)
    assert [(work.length, work.padded) for work in batch.work] == [(2, 5), (5, 5), (4, 5)]
    assert (batch.tokens, batch.computed, batch.padding, batch.dead) == (11, 15, 4, 0)


def test_request_level_batches_in_flight_form_when_a_place_is_free():
    scheduler = Scheduler(max_bs=2, n_slots=100, n_workers=2, policy=REQUEST_LEVEL)
    submit(scheduler, *[request(id, 2, 2 + 3 * (id == 2)) for id in range(6)])
    first, second = made(scheduler, 0), made(scheduler, 0)
    assert [[work.request for work in batch.work] for batch in (first, second)] == [[0, 1], [2, 3]]
    scheduler.complete(first, 1)
    again = made(scheduler, 1)
    assert [work.request for work in again.work] == [0, 1], "no third batch while two are alive"
    scheduler.complete(second, 2)
    made(scheduler, 2)
    assert [r.id for r in scheduler.complete(again, 3)] == [0, 1]
    assert [work.request for work in made(scheduler, 3).work] == [4, 5]


def test_chunked_takes_decodes_first_then_prompts_within_the_budget():
    scheduler = Scheduler(max_bs=4, n_slots=100, policy=chunked(4))
    submit(scheduler, request(0, 3, 5), request(1, 7, 2), request(2, 1, 1))
    seen = []
    for now in range(4):
        batch = made(scheduler, now)
        seen.append([(work.request, work.start, work.length, work.emits) for work in batch.work])
        scheduler.complete(batch, now + 1)
    assert seen == [
        [(0, 0, 3, True), (1, 0, 1, False)],
        [(0, 3, 1, True), (1, 1, 3, False)],
        [(0, 4, 1, True), (1, 4, 3, True)],
        [(0, 5, 1, True), (1, 7, 1, True), (2, 0, 1, True)],
    ]


def test_reservations():
    one = request(0, 100, 33, max_output=128)
    assert {name: rule.slots(one, 640) for name, rule in RESERVATIONS.items()} == {
        "own": 228,
        "oracle": 133,
        "pow2": 164,
        "model-max": 640,
    }
    assert reservation("pow2").slots(request(0, 100, 32), 640) == 132, "a power of two stays"
    assert reservation("pow2").slots(request(0, 100, 33), 160) == 160, "never above the model's maximum"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": 0, "max_output": 1}, "prompt=0 must be at least 1"),
        ({"prompt": 1, "max_output": 0}, "max_output=0 must be at least 1"),
        ({"prompt": 1, "max_output": 4, "output": 5}, "output=5 must be 1 to max_output=4"),
    ],
)
def test_malformed_requests(fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Request(id=0, arrival_s=0.0, **fields)


def test_oversized_is_refused_on_arrival_and_the_next_one_runs():
    scheduler = Scheduler(max_bs=2, n_slots=20, model_max=16)
    large = request(0, 14, 3)
    with pytest.raises(ValueError, match=r"request 0: prompt=14 \+ max_output=3 tokens exceed model_max=16"):
        scheduler.submit(large)
    assert large.state == "refused" and scheduler.n_waiting == 0
    scheduler.submit(request(0, 4, 1))
    assert step(scheduler, 0) == ({0: 4}, [0])
    small = Scheduler(max_bs=2, n_slots=10, model_max=16)
    with pytest.raises(
        ValueError, match=r"request 0: prompt=8, max_output=3 reserve 11 slots \(own\), more than n_slots=10"
    ):
        small.submit(request(0, 8, 3))
    with pytest.raises(ValueError, match="request 0 was submitted before"):
        small.submit(large)
    unknown = Request(id=5, arrival_s=0.0, prompt=2, max_output=3)
    oracle = Scheduler(max_bs=1, n_slots=10, reservation=reservation("oracle"))
    with pytest.raises(ValueError, match="output=None; oracle and pow2 must know"):
        oracle.submit(unknown)
    assert unknown.state == "initiation", "the mistake is not the request's"
    with pytest.raises(ValueError, match="output=None; oracle and pow2 must know"):
        next(oracle.arriving([unknown]))


@pytest.mark.parametrize(
    "times_s", [(1.0, 0.5), (-1.0,), (math.nan,), (0.0, math.inf)], ids=["fall", "negative", "nan", "infinite"]
)
def test_arrivals_are_in_order_and_finite(times_s):
    requests = [Request(id=i, arrival_s=s, prompt=1, max_output=1) for i, s in enumerate(times_s)]
    with pytest.raises(ValueError, match=f"request {len(times_s) - 1} arrives at .* must be finite, from 0 on, and in"):
        list(Scheduler(max_bs=1, n_slots=9).arriving(requests))


def test_sizes_and_names_are_checked():
    with pytest.raises(ValueError, match="n_workers=0 must be at least 1"):
        Scheduler(max_bs=1, n_slots=1, n_workers=0)
    with pytest.raises(ValueError, match="policy='fifo' must be one of"):
        policy("fifo")
    with pytest.raises(ValueError, match="must have a budget of at least 1 token"):
        policy("chunked-0")
    with pytest.raises(ValueError, match="reservation='none' must be one of own, oracle"):
        reservation("none")


def test_illegal_transitions_raise():
    states = set(NEXT)
    for state, legal in NEXT.items():
        for to in states - set(legal):
            one = request(0, 1, 1)
            one.state = state
            with pytest.raises(ValueError, match=f"request 0 is {state}: {to} may not follow"):
                one.move(to)
    one = request(0, 1, 1)
    with pytest.raises(ValueError, match="only one that is running emits"):
        one.emit(0.0)
    one.run(0.0, 1)
    one.emit(1.0)
    with pytest.raises(ValueError, match="has emitted all of its 1 tokens"):
        one.emit(2.0)


def test_stop_token_ends_a_request():
    scheduler = Scheduler(max_bs=2, n_slots=100)
    one = Request(id=3, arrival_s=0.0, prompt=2, max_output=9)
    submit(scheduler, one, request(4, 2, 9))
    scheduler.complete(made(scheduler, 0), 1)
    assert scheduler.complete(made(scheduler, 1), 2, stopped={3}) == [one]
    assert one.token_s == [1, 2] and scheduler.reserved == 11


def test_cancel_in_each_state():
    scheduler = Scheduler(max_bs=2, n_slots=12, n_workers=2)
    requests = [request(id, 2, 4) for id in range(4)]
    submit(scheduler, *requests)
    first = made(scheduler, 0)
    assert scheduler.cancel(0) and scheduler.reserved == 12, "in flight: its row is kept until the batch returns"
    assert scheduler.cancel(2) and scheduler.n_waiting == 1
    assert scheduler.complete(first, 1) == [] and scheduler.reserved == 6 and requests[0].n_tokens == 0
    assert scheduler.cancel(1) and scheduler.reserved == 0, "between two iterations: at once"
    batch = made(scheduler, 1)
    assert [work.request for work in batch.work] == [3] and sorted(batch.released) == [0, 1]
    assert not scheduler.cancel(1) and not scheduler.cancel(99)


def test_cancel_in_a_request_level_batch():
    scheduler = Scheduler(max_bs=2, n_slots=100, policy=REQUEST_LEVEL)
    submit(scheduler, request(0, 2, 1), request(1, 2, 9))
    scheduler.complete(made(scheduler, 0), 1)
    assert scheduler.cancel(1) and scheduler.reserved == 14
    batch = made(scheduler, 1)
    assert batch.dead == 2
    assert [r.id for r in scheduler.complete(batch, 2)] == [0], "the batch notices when it returns that nobody is left"
    assert scheduler.reserved == scheduler.n_started == 0


# Random runs: every batch is checked against an independent book (tests/serving_runs.py).

TRACE = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(0, 4)), min_size=1, max_size=25
)  # prompt, output, by how much the declared maximum is above the output


def requests_of(trace: list[tuple[int, int, int]]) -> list[Request]:
    return [request(id, prompt, output, output + more) for id, (prompt, output, more) in enumerate(trace)]


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
@settings(max_examples=40, deadline=None)
@given(
    trace=TRACE,
    max_bs=st.integers(1, 5),
    n_workers=st.integers(1, 3),
    n_slots=st.integers(12, 80),
    rule=st.sampled_from(list(RESERVATIONS)),
    seed=st.integers(0, 2**32),
)
def test_every_admissible_request_finishes(
    policy: Policy, trace: list[tuple[int, int, int]], max_bs: int, n_workers: int, n_slots: int, rule: str, seed: int
):
    scheduler = Scheduler(
        max_bs=max_bs,
        n_slots=n_slots,
        n_workers=n_workers,
        policy=policy,
        reservation=reservation(rule),
        model_max=min(n_slots, 24),
    )
    requests = requests_of(trace)
    book = run(scheduler, requests, seed)
    for one in requests:
        fits = one.prompt + one.max_output <= scheduler.model_max
        assert (one.id in book.requests) == fits and one.state == ("returned" if fits else "refused")


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
@settings(max_examples=40, deadline=None)
@given(
    trace=TRACE,
    max_bs=st.integers(1, 5),
    n_workers=st.integers(1, 3),
    n_slots=st.integers(26, 80),
    seed=st.integers(0, 2**32),
)
def test_cancelled_and_stopped_requests_touch_no_other(
    policy: Policy, trace: list[tuple[int, int, int]], max_bs: int, n_workers: int, n_slots: int, seed: int
):
    scheduler = Scheduler(max_bs=max_bs, n_slots=n_slots, n_workers=n_workers, policy=policy)
    run(scheduler, requests_of(trace), seed, cancel=0.3, stop=0.1)


def test_the_same_run_twice():
    def batches() -> list[Batch]:
        seen: list[Batch] = []
        chance = random.Random(1)
        trace = [(chance.randint(1, 12), chance.randint(1, 10), 0) for _ in range(50)]
        scheduler = Scheduler(max_bs=4, n_slots=60, n_workers=2)
        run(scheduler, requests_of(trace), 5, cancel=0.1, on_batch=seen.append)
        return seen

    assert batches() == batches()


# The checks must fail on schedulers with one fault.


class KeepsReservation(Scheduler):
    def _release(self, requests: list[Request]) -> None:
        before = self._reserved
        super()._release(requests)
        self._reserved = before


class IgnoresSlots(Scheduler):
    def _admit(self) -> Request | None:
        n_slots, self.n_slots = self.n_slots, 10**9
        new = super()._admit()
        self.n_slots = n_slots
        return new


class LastComesFirst(Scheduler):
    def _admit(self) -> Request | None:
        self._queue.rotate(1)
        new = super()._admit()
        if new is None:
            self._queue.rotate(-1)
        return new


class OneTooMany(Scheduler):
    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self._line_up = self.policy.line_up(self.max_bs + 1, self.n_workers)


class LosesCancelled(Scheduler):
    def _release(self, requests: list[Request]) -> None:
        super()._release([one for one in requests if one.state != "cancelled"])


class LatestFirst(WholePrompts):
    def pick(self, admit: Any) -> list[Work]:
        ready = sorted(self._ready, key=lambda one: -one.order)
        self._ready, left = ready[: self._max_bs], ready[self._max_bs :]
        work = super().pick(admit)
        self._ready += left
        return work


class FreesRowsEarly(Together):
    def settle(self, members: list[Request]) -> list[Request]:
        free = super().settle(members)
        return free or [one for one in members if one.ended]


@pytest.mark.parametrize(
    ("wrong", "policy"),
    [
        (KeepsReservation, ORCA),
        (IgnoresSlots, ORCA),
        (LastComesFirst, ORCA),
        (OneTooMany, ORCA),
        (LosesCancelled, ORCA),
        (Scheduler, Policy(name="orca", line_up=LatestFirst)),
        (
            Scheduler,
            Policy(name="request-level", line_up=lambda a, b: FreesRowsEarly(a, b, prompts="padded")),
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else getattr(value.line_up, "__name__", value.name),
)
def test_a_wrong_scheduler_is_caught(wrong: type[Scheduler], policy: Policy):
    def runs():
        for seed in range(20):
            chance = random.Random(seed)
            trace = [(chance.randint(1, 12), chance.randint(1, 10), chance.randint(0, 4)) for _ in range(25)]
            scheduler = wrong(max_bs=2, n_slots=60, n_workers=2, policy=policy, reservation=OWN)
            run(scheduler, requests_of(trace), seed, cancel=0.1)

    with pytest.raises((AssertionError, KeyError)):
        runs()
