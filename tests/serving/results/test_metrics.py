"""Metrics: each definition on a run small enough to compute by hand; distributions of many values."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.serving.results.distribution import EXACT, Distribution, Percentiles
from toruslab.serving.results.metrics import Limits, Metrics, Summary, goodput
from toruslab.serving.results.timeline import Timeline
from toruslab.serving.scheduling.batch import Batch, Work
from toruslab.serving.scheduling.policies import REQUEST_LEVEL
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler
from toruslab.serving.simulation.simulator import simulate

# Request-level, two requests of 4 and 2 prompt tokens, 1 and 3 output tokens; a batch takes its computed tokens in
# seconds. Both arrive while request 2 runs, so their batch is made when that of request 2 is done.
#
#   request 2 arrives, prompt of 2, 1 token: batch 0 from 0 to 2
#   request 0 arrives at 0.5, request 1 at 1.0: batch 1 (prompts padded to 4: 8 tokens) from 2 to 10
#   batch 2: request 1, and request 0 dead: 2 tokens from 10 to 12; batch 3 the same from 12 to 14


def run(**fields) -> tuple[Summary, Timeline]:
    requests = [
        Request(id=2, arrival_s=0.0, prompt=2, max_output=1, output=1),
        Request(id=0, arrival_s=0.5, prompt=4, max_output=5, output=1),
        Request(id=1, arrival_s=1.0, prompt=2, max_output=3, output=3),
        Request(id=3, arrival_s=1.0, prompt=90, max_output=20, output=3),
    ]
    metrics, timeline = Metrics(max_bs=2, **fields), Timeline()
    scheduler = Scheduler(max_bs=2, n_slots=100, policy=REQUEST_LEVEL)
    simulate(requests, scheduler, lambda batch: [float(batch.computed)], observers=(metrics, timeline))
    return metrics.summary(), timeline


def spread(values: list[float]) -> Percentiles:
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99)).tolist()
    return Percentiles(n=len(values), mean=sum(values) / len(values), median=p50, p90=p90, p99=p99, max=max(values))


def test_each_definition_by_hand():
    got, _ = run(limits=Limits(ttft_s=9.2, tpot_s=2.0))
    assert (got.arrived, got.refused, got.returned, got.window_s) == (4, 1, 3, (0.0, 14.0))
    assert got.queue_delay_s == spread([0.0, 1.5, 1.0])
    assert got.ttft_s == spread([2.0, 9.5, 9.0])
    assert got.tpot_s == spread([2.0]) and got.itl_s == spread([2.0, 2.0])
    assert got.e2e_s == spread([2.0, 13.5, 13.0])
    assert got.normalised_s == spread([2.0, 13.5, 13.0 / 3])
    assert got.throughput_per_s == 3 / 14 and got.tokens_per_s == 5 / 14 and got.offered_per_s == 4 / 14
    assert got.within_limits == 2 / 4, "request 0 waited 9.5 s for its token, request 3 was refused"
    assert got.batches == 4 and got.occupancy == (1 + 2 + 1 + 1) / 8
    assert got.padding_share == 2 / 14 and got.dead_share == 2 / 14
    assert got.slots_reserved == (3 * 2 + 14 * 12) / 14 and got.slots_reserved_peak == 14
    assert got.slots_used == (2 * 2 + 6 * 8 + 7 * 2 + 8 * 2) / 14 and got.slots_used_peak == 8
    assert got.stage_busy == (1.0,)


def test_a_steady_window():
    got, _ = run(window_s=(0.75, 11.0))
    assert got.e2e_s == spread([13.0]), "of the request that arrived inside, though it returned later"
    assert got.throughput_per_s == 1 / 10.25, "request 2 returned at 2, the others after 11"
    assert got.batches == 2 and got.occupancy == 3 / 4 and got.padding_share == 2 / 10
    assert got.stage_busy == (1.0,) and got.slots_reserved == pytest.approx((3 * 1.25 + 14 * 9) / 10.25)
    assert got.slots_used_peak == 7


def test_nothing_looks_like_nothing():
    got = Metrics(max_bs=1).summary()
    assert got.ttft_s is got.throughput_per_s is got.occupancy is got.within_limits is got.slots_used is None
    with pytest.raises(ValueError, match=r"window_s=\(2, 1\)"):
        Metrics(max_bs=1, window_s=(2, 1))


def test_goodput():
    assert goodput([(4.0, 0.89), (1.0, 1.0), (2.0, 0.9)]) == 2.0
    assert goodput([(1.0, 0.5)]) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 3.0))
def test_many_values_are_nearly_exact(seed: int, sigma: float):
    values = np.random.default_rng(seed).lognormal(0.0, sigma, EXACT + 5000)
    values[:100] = 0.0
    many = Distribution()
    for part in np.array_split(values, 50):
        many.add(part.tolist())
    got = many.percentiles()
    assert got is not None and got.n == values.size
    assert got.mean == pytest.approx(values.mean(), rel=1e-12) and got.max == values.max()
    for share, found in ((0.5, got.median), (0.9, got.p90), (0.99, got.p99)):
        assert found == pytest.approx(np.quantile(values, share), rel=0.004)
    assert many.quantile(0.001) == 0.0


def test_few_values_are_exact():
    few = Distribution()
    few.add([4.0, 1.0])
    few.add([2.0])
    assert few.percentiles() == spread([1.0, 2.0, 4.0])
    assert Distribution().percentiles() is None


def test_memory_of_a_distribution_is_bounded():
    many = Distribution()
    for _ in range(40):
        many.add(np.random.default_rng(0).exponential(1.0, 10_000).tolist())
    assert many.n == 400_000 and len(many._values) <= EXACT and len(many._buckets) < 4000


def test_timeline_is_what_perfetto_reads(tmp_path: Path):
    _, timeline = run()
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert all({"name", "ph", "pid", "tid"} <= set(event) for event in events)
    assert {event["ph"] for event in events} == {"X", "C", "M"}
    stages = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert [(e["name"], e["ts"], e["dur"]) for e in stages] == [
        ("batch 0", 0.0, 2e6),
        ("batch 1", 2e6, 8e6),
        ("batch 2", 10e6, 2e6),
        ("batch 3", 12e6, 2e6),
    ]
    assert stages[2]["args"] == {"requests": [0, 1], "tokens": 1, "padding": 0, "dead": 1}
    slots = [(e["ts"], sum(e["args"].values())) for e in events if e["ph"] == "C"]
    assert slots == [(0, 3), (2e6, 0), (2e6, 14), (10e6, 14), (10e6, 14), (12e6, 14), (12e6, 14), (14e6, 0)]
    spans = sorted((e["tid"], e["ts"], e["dur"], e["name"]) for e in events if e["ph"] == "X" and e["pid"] == 2)
    assert [(tid, name) for tid, *_, name in spans] == [
        (0, "2 prompt"),
        *((1, "0 waits"), (1, "0 prompt"), (1, "0 done, not returned")),
        *((2, "1 waits"), (2, "1 prompt"), (2, "1 decodes")),
    ]
    for tid in {tid for tid, *_ in spans}:
        ends = 0.0
        for _, start, length, _ in (span for span in spans if span[0] == tid):
            assert start >= ends, "two spans overlap on one track"
            ends = start + length


def test_spans_of_a_track_never_overlap_however_times_are_rounded(tmp_path: Path):
    timeline = Timeline()
    requests = [Request(id=i, arrival_s=i / 30, prompt=1 + i % 7, max_output=1 + i % 5) for i in range(200)]
    scheduler = Scheduler(max_bs=4, n_slots=200)
    simulate(requests, scheduler, lambda batch: [batch.computed * 0.0007], observers=(timeline,))
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ends: dict[tuple[int, int], int] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["ts"], e["dur"])):
        ts, dur, track = event["ts"], event["dur"], (event["pid"], event["tid"])
        assert isinstance(ts, int) and isinstance(dur, int) and ts >= ends.get(track, 0) and dur >= 0
        ends[track] = ts + dur


def test_shares_of_a_batch():
    batch = Batch(number=0, made_s=0.0, work=(Work(0, 0, 3, 5, True, False), Work(1, 7, 0, 1, False, True)))
    assert (batch.tokens, batch.computed, batch.padding, batch.dead) == (3, 6, 2, 1)
