"""Stage times fitted to batches: exact if the batches follow the fit's assumptions."""

import random

import pytest

from tests.serving.engine import test_engine
from toruslab.benchmarks.studies.engine_times import EngineTimes, Padding, reads
from toruslab.serving.engine.engine import Engine
from toruslab.serving.scheduling.batch import Batch, Work

PADDING = Padding(singles=(2, 4), pieces=(0, 2, 4), length=8)


def batch(*work):
    return Batch(number=0, made_s=0.0, work=tuple(Work(i, s, n, n, True, False) for i, (s, n) in enumerate(work)))


def taken_s(of):
    singles, pieces = reads(of)
    return sum(0.01 + 0.002 * s + 0.003 * p for s, p in PADDING.passes(of)) + 0.05 * singles + 0.02 * pieces


def test_exact_on_its_own_terms():
    random.seed(0)
    samples = [
        batch(*((random.randrange(50), random.choice((1, 1, 1, 12, 20))) for _ in range(random.randrange(1, 7))))
        for _ in range(200)
    ]
    times = EngineTimes(PADDING, [(of, taken_s(of)) for of in samples])
    assert times.explained == pytest.approx(1)
    for of in samples[:20]:
        assert times(of) == pytest.approx((taken_s(of),))


def test_a_form_that_was_never_met():
    samples = [(batch((0, 1)), 0.1), (batch((9, 1)), 0.1), (batch((0, 30)), 0.4), (batch((9, 30)), 0.4)]
    times = EngineTimes(PADDING, samples)
    assert times(batch((0, 9)))[0] == pytest.approx(0.4)  # as the next larger
    assert times(batch(*[(0, 1)] * 4))[0] == pytest.approx(0.1)  # not less than a smaller one
    assert times(batch(*[(0, 1)] * 4, (0, 30)))[0] > 0.4


def test_no_samples():
    with pytest.raises(ValueError, match="samples must be at least one batch"):
        EngineTimes(PADDING, [])


def test_forms_are_the_engines():
    """The padding is that of `Engine.passes`, which needs no device for it."""
    random.seed(1)
    engine = object.__new__(Engine)
    engine.sizes = test_engine.Sizes(rows=40, n_slots=4000, longest=100, singles=(2, 4), pieces=(0, 2, 4), length=8)
    engine.parts, engine.stages = 1, ()
    engine._closed, engine._senders, engine._watchers, engine._lost = False, [], [], set()
    for _ in range(50):
        of = batch(*((random.randrange(20), random.choice((1, 1, 12, 40))) for _ in range(random.randrange(1, 9))))
        passes = test_engine.told(engine, of.work)
        assert PADDING.passes(of) == [(form.singles, form.pieces) for form, _, _ in passes]
