"""The engine when something fails: stages that raise, interrupts, closing, and runs with wrong arguments."""

import gc
import math
import threading

import numpy as np
import pytest

from tests.serving.engine.test_engine import LONGEST, MAX_BS, N_SLOTS, check_alone, engine, run, stages, trace
from tests.serving.engine.virtual_clock import Virtual
from toruslab.serving.engine.play import serve
from toruslab.serving.results.metrics import Metrics
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.reservation import ORACLE
from toruslab.serving.scheduling.scheduler import Scheduler

OF = trace(1)


@pytest.fixture
def three():
    """Three stages of one device each, three batches in flight."""
    with engine(stages("ws1d", "heads", (1, 1, 1), 3), workers=3, singles=(4,)) as made:
        yield made


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("send", "watch"))]


@pytest.mark.parametrize("loses", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_a_stage_that_raises_ends_the_run_and_not_the_engine(three, monkeypatch, stage, loses):
    """Even if the program had taken the donated cache, which is lost."""
    calls = iter(range(1000))

    def fails(program):
        def run_program(*arguments):
            if next(calls) != 4:
                return program(*arguments)
            if loses:
                program(*arguments)
            raise RuntimeError("a chip is gone")

        return run_program

    with monkeypatch.context() as patch:
        for form, programs in three._programs.items():
            wrapped = [fails(program) if i == stage else program for i, program in enumerate(programs)]
            patch.setitem(three._programs, form, wrapped)
        with pytest.raises(RuntimeError, match="a chip is gone"):
            run(three, OF, workers=3)
    found, served = run(three, OF, workers=3)
    assert len(found) == len(OF) and served.compilations == 0
    check_alone(found, OF)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no such text")])
def test_an_interrupted_run_leaves_nothing_behind(three, error):
    """The interrupt comes while batches are in flight. The next run has the same ids."""

    class Interrupts(Virtual):
        def wait(self, until_s, flight):
            if self.now_s() > 4:
                raise error
            return super().wait(until_s, flight)

    with pytest.raises(error if isinstance(error, type) else ValueError):
        run(three, OF, workers=3, clock=Interrupts())
    of = trace(2)
    check_alone(run(three, of, workers=3)[0], of)


def test_closed_it_has_no_threads():
    before = set(threads())  # an engine of an earlier test may end only now
    with engine(stages("ws1d", "heads", (1, 2, 1)), singles=(4,)) as made:
        run(made, OF)
        started = set(threads()) - before
        assert len(started) == 2
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)
    made.close()
    with pytest.raises(RuntimeError, match="the engine is closed; make another one"):
        run(made, OF)


def test_dropped_it_has_no_threads():
    before = set(threads())  # an engine of an earlier test may end only now
    made = engine(stages("ws1d", "heads", (1, 2, 1)), singles=(4,))
    run(made, OF)
    started = set(threads()) - before
    assert len(started) == 2
    del made
    gc.collect()
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)


def test_closed_with_batches_in_flight(three):
    """Nothing waits for ever: passes that were not dispatched are cancelled, and raise."""
    scheduler = Scheduler(max_bs=MAX_BS, n_slots=N_SLOTS, n_workers=3)
    for i, (_, prompt, n_new) in enumerate(OF):
        scheduler.submit(Request(id=i, arrival_s=0.0, prompt=len(prompt), max_output=n_new))
        three.admit(i, prompt, n_new)
    flights = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        flights.append(three.start(batch))
    three.close()
    assert len(flights) > 1 and all(flight.ready for flight in flights)


def test_a_prompt_of_another_length(three):
    one = Request(id=0, arrival_s=0.0, prompt=5, max_output=3)
    scheduler = Scheduler(max_bs=2, n_slots=N_SLOTS, model_max=LONGEST)
    with pytest.raises(ValueError, match="request 0: prompt=5 tokens, but 4 ids came"):
        serve([one], scheduler, three, lambda request: np.zeros(4, np.int32), clock=Virtual())
    with pytest.raises(ValueError, match="the scheduler holds 1 requests of another run; it must hold none"):
        serve([], scheduler, three, lambda request: np.zeros(4, np.int32), clock=Virtual())


def test_batches_end_while_requests_keep_coming(three):
    """The first request fills the cache; others come twice as often as a batch takes."""
    prompt = np.arange(5, dtype=np.int32)
    requests = [Request(id=i, arrival_s=0.5 * i, prompt=5, max_output=2) for i in range(20)]
    scheduler = Scheduler(max_bs=2, n_slots=7, n_workers=3)
    returned = {}
    serve(
        requests,
        scheduler,
        three,
        lambda request: prompt,
        clock=Virtual(),
        returned=lambda request, ids: returned.__setitem__(request.id, request.returned_s),
    )
    assert returned == {i: 2.0 * (i + 1) for i in range(20)}


def test_cancelled_when_asked_for_and_not_when_a_batch_has_ended(three):
    """A request that is cancelled while it runs gets no token. Cancelling an unknown id, or twice, does nothing."""
    of = [(0.0, np.arange(5, dtype=np.int32), 1)] * 3
    metrics, leaving = Metrics(max_bs=MAX_BS), [(0.5, 1), (0.5, 1), (0.5, 7), (1.5, 0), (99.0, 2)]
    found, served = run(three, of, workers=3, cancelled=leaving, observers=[metrics])
    assert sorted(found) == [0, 2] and served.end_s == 1.0
    said = metrics.summary()
    assert (said.arrived, said.cancelled, said.returned) == (3, 1, 2)


@pytest.mark.parametrize("times_s", [(1.0, 0.5), (math.nan,), (0.0, math.inf)], ids=["fall", "nan", "infinite"])
def test_arrivals_that_fall_or_never_come(three, times_s):
    """Both raise: the run neither ends silently nor hangs."""
    of = [(at, np.arange(5, dtype=np.int32), 2) for at in times_s]
    with pytest.raises(ValueError, match="arrivals must be finite, from 0 on, and in order"):
        run(three, of, workers=3)


def test_a_reservation_that_cannot_know_is_refused_once_before_anything_runs(three):
    one = Request(id=0, arrival_s=9.0, prompt=5, max_output=3)
    scheduler, clock = Scheduler(max_bs=2, n_slots=N_SLOTS, model_max=LONGEST, reservation=ORACLE), Virtual()
    with pytest.raises(ValueError, match="request 0 has output=None; oracle and pow2 must know what it will produce"):
        serve([one], scheduler, three, lambda request: np.zeros(5, np.int32), clock=clock)
    assert one.state == "initiation" and clock.now_s() == 0.0
