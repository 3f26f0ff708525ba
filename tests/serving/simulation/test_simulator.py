"""The simulator: schedules computed by hand, and times that add up."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.serving.results.metrics import Metrics
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.policies import POLICIES, Policy, chunked
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler
from toruslab.serving.simulation.simulator import simulate
from toruslab.serving.traffic.arrivals import Poisson
from toruslab.serving.traffic.lengths import Uniform
from toruslab.serving.traffic.workload import Workload


@dataclass
class Recording(Observer):
    """Keeps all events."""

    stages: list[tuple[int, int, float, float]] = field(default_factory=list)  # batch, stage, start, end
    batches: list[Batch] = field(default_factory=list)
    returned: list[Request] = field(default_factory=list)

    def made(self, batch: Batch) -> None:
        self.batches.append(batch)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        self.stages.append((batch.number, stage, start_s, end_s))

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self.returned += back


def request(id: int, prompt: int, output: int, arrival_s: float = 0.0) -> Request:
    return Request(id=id, arrival_s=arrival_s, prompt=prompt, max_output=output, output=output)


def ids(batches: Sequence[Batch]) -> list[list[int]]:
    return [[work.request for work in batch.work] for batch in batches]


def test_two_stages_five_requests_by_hand():
    """Stages of 1 s and 2 s, max_bs 2, two batches in flight, no host time. Stage 1 is the slower one: from its first
    batch on it never waits, and a batch returns every 2 s.

        made   batch     stage 0   stage 1
        0      0: A B     0-1       1-3     B has its only token at 3
        0      1: C D     1-2       3-5
        3      2: A E     3-4       5-7     A has its second and last token at 7; E arrived at 1.5 and comes in for B
        5      3: C D     5-6       7-9     both end
        7      4: E       7-8       9-11    E ends
    """
    requests = [request(0, 3, 2), request(1, 3, 1), request(2, 3, 2), request(3, 3, 2), request(4, 3, 2, 1.5)]
    record = Recording()
    run = simulate(requests, Scheduler(max_bs=2, n_slots=99, n_workers=2), lambda batch: (1.0, 2.0), observers=[record])
    assert ids(record.batches) == [[0, 1], [2, 3], [0, 4], [2, 3], [4]]
    assert [batch.made_s for batch in record.batches] == [0.0, 0.0, 3.0, 5.0, 7.0]
    assert record.stages == [
        *((0, 0, 0.0, 1.0), (0, 1, 1.0, 3.0)),
        *((1, 0, 1.0, 2.0), (1, 1, 3.0, 5.0)),
        *((2, 0, 3.0, 4.0), (2, 1, 5.0, 7.0)),
        *((3, 0, 5.0, 6.0), (3, 1, 7.0, 9.0)),
        *((4, 0, 7.0, 8.0), (4, 1, 9.0, 11.0)),
    ]
    assert {r.id: (r.scheduled_s, r.token_s, r.returned_s) for r in requests} == {
        0: (0.0, [3.0, 7.0], 7.0),
        1: (0.0, [3.0], 3.0),
        2: (0.0, [5.0, 9.0], 9.0),
        3: (0.0, [5.0, 9.0], 9.0),
        4: (3.0, [7.0, 11.0], 11.0),
    }
    assert (run.end_s, run.batches, run.works, run.tokens) == (11.0, 5, 9, 5 * 3 + 4)


def test_three_stages_without_a_bubble():
    """The paper's Figure 8: max_bs 2, n_workers 3, requests A to F, stages equally long. AB, CD, EF follow each other,
    and AB's next iteration enters stage 0 the moment it returns, which is when EF leaves that stage."""
    record = Recording()
    scheduler = Scheduler(max_bs=2, n_slots=99, n_workers=3)
    simulate([request(id, 4, 3) for id in range(6)], scheduler, lambda batch: (1.0, 1.0, 1.0), observers=[record])
    assert ids(record.batches) == [[0, 1], [2, 3], [4, 5]] * 3
    for number, stage, start_s, end_s in record.stages:
        assert (start_s, end_s) == (number + stage, number + stage + 1), "no stage waits between two batches"


def test_host_work_delays_every_batch_and_is_done_for_one_at_a_time():
    record = Recording()
    scheduler = Scheduler(max_bs=1, n_slots=99, n_workers=2)
    simulate([request(0, 1, 2), request(1, 1, 1)], scheduler, lambda batch: (1.0, 1.0), host_s=0.25, observers=[record])
    assert [(n, start) for n, stage, start, _ in record.stages if stage == 0] == [(0, 0.25), (1, 1.25), (2, 2.5)]


@pytest.mark.parametrize("policy", [*POLICIES.values(), chunked(16)], ids=lambda policy: policy.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.05, 5.0), n_workers=st.integers(1, 3))
def test_time_and_tokens_add_up(policy: Policy, seed: int, rate: float, n_workers: int):
    trace = Workload(
        n=30, arrivals=Poisson(rate=rate), prompt=Uniform(low=1, high=20), output=Uniform(low=1, high=9), seed=seed
    )

    def times(batch: Batch) -> list[float]:
        return [0.1 + 0.01 * batch.computed, 0.3]

    def once():
        record, metrics = Recording(), Metrics(max_bs=4)
        scheduler = Scheduler(max_bs=4, n_slots=100, n_workers=n_workers, policy=policy)
        return record, metrics, simulate(trace.requests(), scheduler, times, observers=(record, metrics))

    record, metrics, run = once()
    summary = metrics.summary()
    for stage in (0, 1):
        busy = [(start, end) for _, at, start, end in record.stages if at == stage]
        assert all(a[1] <= b[0] for a, b in pairwise(busy)), "a stage computes one batch at a time"
        assert summary.stage_busy[stage] * run.end_s == pytest.approx(sum(times(b)[stage] for b in record.batches))
    for number in range(run.batches):
        (_, _, start, left), (_, _, entered, _) = record.stages[2 * number : 2 * number + 2]
        assert record.batches[number].made_s <= start < left <= entered, "a batch goes through the stages in order"
    requests = list(trace.requests())
    assert sorted(r.id for r in record.returned) == list(range(30)) and summary.returned == 30
    assert run.tokens == sum(r.prompt + r.target - 1 for r in requests), "each token but the last goes in once"
    assert run.works == sum(len(batch.work) for batch in record.batches)
    ends = {number: end for number, stage, _, end in record.stages if stage == 1}
    assert {s for r in record.returned for s in r.token_s} <= set(ends.values()), "tokens come out where stage 1 ends"
    again, metrics, _ = once()
    assert (again.stages, again.batches, metrics.summary()) == (record.stages, record.batches, summary)


def test_what_makes_no_sense_is_refused():
    scheduler = Scheduler(max_bs=1, n_slots=99)
    with pytest.raises(ValueError, match=r"request 1 arrives at 1.0 s, after 2.0 s; arrivals must be finite"):
        simulate([request(0, 1, 1, 2.0), request(1, 1, 1, 1.0)], scheduler, lambda batch: (9.0,))
    for wrong in ((), (-1.0,)):
        with pytest.raises(ValueError, match="must be as many as stages"):
            simulate([request(0, 1, 1)], Scheduler(max_bs=1, n_slots=99), lambda batch, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="request 0 was submitted before"):
        simulate([request(0, 1, 5), request(0, 1, 5)], Scheduler(max_bs=1, n_slots=99), lambda batch: (1.0,))


def test_scheduler_and_simulator_need_no_jax():
    rooms = ("simulation.simulator", "results.metrics", "results.timeline", "traffic.workload")
    modules = ", ".join(f"toruslab.serving.{room}" for room in rooms)
    code = f"import sys, {modules}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
