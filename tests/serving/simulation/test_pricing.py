"""Prices of mixed batches: equal requests cost the same as in `estimate`; stages, padding and memory."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.limits import largest_batch
from toruslab.serving.scheduling.batch import Batch, Work
from toruslab.serving.simulation.measured_times import StageTable
from toruslab.serving.simulation.pricing import Pipeline, Pricing

WHERE: dict[str, Any] = {
    "a100": {"model": "orca-175b", "slice": "a100-40:8"},
    "v5e": {"model": "llama-3-70b", "slice": "v5e:8x8", "weights": "int8"},
    "v4": {"model": "palm-540b-h64", "slice": "v4:4x4x4", "cache": "int8"},
}
LAYOUTS = ("ws1d", "ws1d+lean", "ws2d", "ws2d+lean", "wgx", "wgxy", "wgxyz", "ws2d+ring", "wgx+prefetch")


def batch(*work: Work) -> Batch:
    return Batch(number=0, made_s=0.0, work=work)


def singles(n: int, start: int) -> list[Work]:
    return [Work(i, start, 1, 1, True, False) for i in range(n)]


def prompts(n: int, length: int, start: int = 0, first: int = 0) -> list[Work]:
    return [Work(first + i, start, length, length, True, False) for i in range(n)]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("layout", "attention"), list(itertools.product(LAYOUTS, ("heads", "batch"))))
def test_equal_requests_cost_what_estimate_says(where: str, layout: str, attention: str):
    if (layout, attention) == ("wgxyz", "heads"):
        pytest.skip("no axis is left to split heads over")
    pipeline = Pipeline(**WHERE[where], layout=layout, attention=attention)
    pricing, decode = Pricing(pipeline), pipeline.decode(128, 1000)
    assert sum(pricing(batch(*singles(decode.batch, 999)))) == pytest.approx(estimate(decode).latency_s, rel=1e-12)
    prefill = dataclasses.replace(decode, phase="prefill", length=64, context=50)
    found = pricing(batch(*prompts(decode.batch, 64, 50)))
    assert sum(found) == pytest.approx(estimate(prefill).latency_s, rel=1e-12)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages_share_the_layers_and_one_sends_to_the_next(stages: int):
    pipeline = Pipeline(model="orca-175b", slice="a100-40:8", stages=stages, layout="ws1d", attention="heads")
    work = batch(*singles(31, 300), *prompts(2, 200, first=31))
    found, apart = Pricing(pipeline)(work), Pricing(pipeline, send=False)(work)
    assert len(found) == stages
    whole = Pricing(dataclasses.replace(pipeline, stages=1))(work)
    assert sum(apart) == pytest.approx(sum(whole), rel=1e-12)
    sent_s = 431 * 12288 * 2 / 8 / 25e9 + 1e-6
    assert sum(found) - sum(apart) == pytest.approx((stages - 1) * sent_s)
    assert Pricing(pipeline, slowdown=2.0)(work) == pytest.approx([2 * s for s in found])


@settings(max_examples=30, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 2000), min_size=1, max_size=40),
    lengths=st.lists(st.integers(2, 400), max_size=4),
)
def test_more_work_never_costs_less(contexts: list[int], lengths: list[int]):
    pricing = PRICED
    work = [Work(i, start, 1, 1, True, False) for i, start in enumerate(contexts)]
    work += [Work(100 + i, 0, length, length, True, False) for i, length in enumerate(lengths)]
    (seconds,) = pricing(batch(*work))
    for more in (
        [*work, Work(99, 0, 1, 1, True, False)],
        [work[0]._replace(start=work[0].start + 500), *work[1:]],
        [*work, Work(99, 0, 50, 50, True, False)],
    ):
        assert pricing(batch(*more))[0] >= seconds
    assert pricing(batch(*reversed(work)))[0] == pytest.approx(seconds, rel=1e-12)


PRICED = Pricing(Pipeline(model="orca-101b", slice="a100-40:8", layout="ws1d", attention="heads"))


def test_rows_of_the_dead_and_padding_cost_what_they_compute():
    dead = batch(*singles(3, 100), Work(3, 100, 0, 1, False, True))
    assert PRICED(dead) == PRICED(batch(*singles(4, 100)))
    padded = batch(Work(0, 0, 30, 64, True, False), Work(1, 0, 64, 64, True, False))
    assert PRICED(padded) == PRICED(batch(*prompts(2, 64)))


def test_slots_are_what_fits_beside_the_weights():
    pipeline = Pipeline(model="llama-3-70b", slice="v5e:4x4", layout="ws1d", attention="heads", weights="int8")
    slots = pipeline.slots(64, 64)
    point = pipeline.decode(64, 2048)
    most = largest_batch(point)
    assert most
    assert slots == pytest.approx(most * 2048, rel=0.05), "as many as `largest_batch` finds for one context"
    two = dataclasses.replace(pipeline, stages=2)
    assert two.slots(64, 64) > 2 * slots, "half of the layers leave more than twice the room for half the cache"
    assert pipeline.kv_bytes == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": 5}, "stages=5 must divide the 96 layers"),
        ({"layout": "auto"}, "auto"),
        ({"slice": "cpu:2x2x2"}, "attached platform"),
        ({"slice": "a100-40:16"}, "16"),
        ({"attention": "tails"}, "attention='tails'"),
        ({"model": "gpt4"}, "gpt4"),
    ],
)
def test_pipelines_that_make_no_sense_are_refused(change: dict, sentence: str):
    fields: dict[str, Any] = {"model": "orca-175b", "slice": "a100-40:8", "layout": "ws1d", "attention": "heads"}
    with pytest.raises(ValueError, match=sentence):
        Pipeline(**fields | change)


def test_weights_that_do_not_fit_are_refused():
    pipeline = Pipeline(model="orca-175b", slice="a100-40:8", layout="ws1d", attention="heads")
    with pytest.raises(ValueError, match=r"take 4\d\.\d GB a chip, which has 40\.0"):
        pipeline.slots(64, 64)


def test_a_table_of_measured_times():
    rows = [
        {"stage": s, "tokens": t, "context": c, "seconds": (s + 1) * (1e-3 * t + 1e-6 * c)}
        for s in (0, 1)
        for t in (4, 16)
        for c in (100, 900)
    ]
    table = StageTable(rows)
    work = batch(*singles(4, 49), *prompts(1, 6, first=4))  # 10 tokens, context 4 x 50 + 6
    assert table(work) == pytest.approx([1e-2 + 206e-6, 2e-2 + 412e-6])
    assert table(batch(*singles(2, 49)))[0] == pytest.approx(4e-3 + 100e-6), "fewer take as long as the fewest"
    assert table(batch(*singles(20, 49)))[0] == pytest.approx(2e-2 + 1e-3), "more go on"
    for wrong, sentence in (
        ([{"stage": 1, "tokens": 1, "context": 1, "seconds": 1.0}], "without a gap"),
        ([{"stage": 0, "tokens": 0, "context": 1, "seconds": 1.0}], "tokens=0"),
        ([{"stage": 0}], "must be an object with"),
        ([], "without a gap"),
    ):
        with pytest.raises(ValueError, match=sentence):
            StageTable(wrong)
