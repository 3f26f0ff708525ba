"""Several decode steps in one call give the tokens of single steps, for every sampler, stop and number of calls."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import battery
from tests.benchmarks.commands.test_commands import SMALL, refused
from tests.models.programs.test_generate import generator, parameters, prompts
from tests.points import POINT
from toruslab.benchmarks import bench as step_latency
from toruslab.benchmarks import estimate as command
from toruslab.benchmarks.reports.cells import title
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.programs.compiled import evidence
from toruslab.models.programs.generate import Generator
from toruslab.models.programs.program import Program
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.limits import longest_context
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.text import HloError
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import AXES

SAMPLERS = [Sampler(temperature=1.0, seed=3), Sampler(temperature=1.3, top_k=9, top_p=0.8, seed=2)]
DECODE = {
    "model": "palm-540b-h64",
    "slice": "v4:4x4x4",
    "phase": "decode",
    "layout": "ws2d",
    "attention": "batch",
    "batch": 512,
}


@pytest.fixture(scope="module")
def bench():
    return battery.Bench(battery.model("parallel", 1), "ws2d", "batch", (2, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"), [*battery.legal(), ("ws1d+lean", "batch"), ("ws2d+lean", "heads"), ("wgx+ring", "batch")]
)
def test_every_layout_picks_the_same(name, attention):
    battery.check_several_steps(battery.Bench(battery.model("parallel", 1), name, attention, (2, 2, 2)))


@pytest.mark.parametrize("sampler", [pytest.param(SAMPLERS[0], marks=pytest.mark.slow), SAMPLERS[1]])
@pytest.mark.parametrize(("name", "attention"), [("ws2d", "batch"), ("wgx", "heads"), ("replicated", "batch")])
def test_seeded_samplers_draw_the_same(name, attention, sampler):
    """Request and position decide the draw, not the call."""
    own = battery.Bench(battery.model("serial", 16), name, attention, (2, 2, 2))
    single, _ = own.decode([1] * 4, sampler=sampler)
    several, _ = own.decode([4], sampler=sampler)
    np.testing.assert_array_equal(several, single)
    assert len(np.unique(single)) > 4


def test_calls_of_any_length_say_the_same(bench):
    expected, _ = bench.decode([1] * 6)
    for calls in ([2, 4], [4, 1, 1], [6]):
        np.testing.assert_array_equal(bench.decode(calls)[0], expected)


def test_a_row_that_stops_in_the_middle_of_a_call_gets_nothing_else(bench):
    expected, _ = bench.decode([1] * 6)
    for stop in {int(expected[0, 0]), int(expected[1, 3])}:
        np.testing.assert_array_equal(bench.decode([4, 2], stop)[0], battery.stopped(expected, stop))


def test_the_loop_ends_when_all_rows_have_stopped(bench):
    """No step runs after the stop: its positions in the cache are not written."""
    ends = bench.steps(5, stop=7).executable
    tokens = [np.full((8, 1), 7, np.int32), np.ones(8, np.int32), np.ones(8, np.int32)]
    on = [battery.everywhere(bench.mesh, a) for a in (*tokens, np.arange(8, dtype=np.int32))]
    with jax.set_mesh(bench.mesh):
        out, cache = ends(bench.params, battery.Tokens(*on[:3]), bench.cache(), on[3])
    np.testing.assert_array_equal(np.asarray(out), np.full((8, 5), 7))
    assert not np.asarray(cache.k).any()


def test_a_program_that_may_stop_early_is_counted_as_if_it_did_not(bench):
    """The text has no trip count. Without one given, the reader refuses to count."""
    text, sizes = bench.steps(4, stop=7).text, dict(zip(AXES, (2, 2, 2), strict=True))
    fixed = read(bench.steps(4).text, sizes)
    told = read(text, sizes, unknown_trips=4)
    assert sum(c.trips for c in told) == sum(c.trips for c in fixed)
    with pytest.raises(HloError, match="trip count"):
        read(text, sizes)


@pytest.mark.parametrize("steps_per_call", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_generation_says_the_same(steps_per_call):
    """Eight tokens take the prefill and seven steps, which 3 does not divide."""
    config = battery.model("parallel", 1)
    single = generator(config, "ws2d/heads", "ws2d/batch", capacity=17)
    params = parameters(config, single)
    several = dataclasses.replace(single, steps_per_call=steps_per_call)
    expected, calls = single(params, prompts(config), 8), []
    found = several(params, prompts(config), 8, each=lambda ids: calls.append(ids.shape[1]))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert calls == {3: [1, 3, 3, 1], 50: [1, 7]}[steps_per_call]
    stop = int(expected[1][3])
    for a, b in zip(several(params, prompts(config), 8, stop=stop), expected, strict=True):
        np.testing.assert_array_equal(a, b[: list(b).index(stop)] if stop in b else b)


def test_generation_stops_early():
    config = battery.model("parallel", 1)
    made = generator(config, "ws2d/heads", "ws2d/batch", capacity=17, steps_per_call=7)
    params = parameters(config, made)
    row = next(n for n, ids in enumerate(made(params, prompts(config), 8)) if ids[1] != ids[0])
    one = [prompts(config)[row]] * 8
    stop, calls = int(made(params, one, 8)[0][1]), []
    found = made(params, one, 8, stop=stop, each=calls.append)
    assert [len(c[0]) for c in calls] == [1, 7]
    assert (calls[1] == stop).all()
    assert [len(ids) for ids in found] == [1] * 8


def test_the_last_step_must_fit_the_cache():
    assert Point.from_json(POINT | {"steps_per_call": 5}).capacity == 20
    with pytest.raises(ValueError, match="steps=12 do not fit a cache of capacity=11"):
        Pass(batch=8, length=1, capacity=11, steps=12)
    with pytest.raises(ValueError, match="steps=2 must be 1 unless"):
        Pass(batch=8, length=2, capacity=11, steps=2)
    with pytest.raises(ValueError, match="steps=0 must be a positive integer"):
        Pass(batch=8, length=1, capacity=11, steps=0)
    config = battery.model("parallel", 1)
    made = generator(config, "ws2d/heads", "ws2d/heads", steps_per_call=4)
    params = parameters(config, made)
    with pytest.raises(ValueError, match="longer than the cache of 15"):
        made(params, [np.zeros(9, int)] * 8, 8)
    with pytest.raises(ValueError, match="steps_per_call=0 must be at least 1"):
        generator(config, "ws2d/heads", "ws2d/heads", steps_per_call=0)


def test_a_stop_id_is_for_several_steps(bench):
    with pytest.raises(ValueError, match="stop=3 is for several steps"):
        Program(
            config=bench.config,
            layout=bench.layout,
            mesh=bench.mesh,
            pass_=Pass(batch=8, length=1, capacity=11),
            stop=3,
        )


def test_points_say_it_where_it_is_not_one():
    assert "steps_per_call" not in Point.from_json(POINT).to_json()
    several = Point.from_json(POINT | {"steps_per_call": 4})
    assert Point.from_json(json.dumps(several.to_json())) == several
    assert "4 steps a call" in title(several.to_json())
    assert title(several.to_json()) != title(Point.from_json(POINT).to_json())
    for value, rule in ((0, "must be an integer of at least 1"), (True, "must be an integer"), ("4", "must be")):
        with pytest.raises(ValueError, match=f"steps_per_call={value!r} {rule}"):
            Point.from_json(POINT | {"steps_per_call": value})
    with pytest.raises(ValueError, match="steps_per_call=2 must be 1 in prefill"):
        Point.from_json(POINT | {"phase": "prefill", "steps_per_call": 2})


def test_an_estimate_is_of_one_step_at_the_mean_context():
    """N steps of growing context, priced one by one, cost N times the figure."""
    point = Point.from_json(DECODE | {"context": 2048, "steps_per_call": 9})
    each = [estimate(Point.from_json(DECODE | {"context": 2048 + i})).latency_s for i in range(9)]
    found = estimate(point)
    assert 9 * found.latency_s == pytest.approx(sum(each), rel=1e-9)
    assert found.hbm_bytes_per_chip == estimate(Point.from_json(DECODE | {"context": 2056})).hbm_bytes_per_chip
    single = estimate(Point.from_json(DECODE | {"context": 2048}))
    assert [c.count for c in found.collectives] == [c.count for c in single.collectives]
    longest, shorter = (longest_context(p) for p in (dataclasses.replace(point, steps_per_call=1), point))
    assert longest and shorter and longest - 8 == shorter


def test_compiled_evidence_is_of_one_step():
    point = Point.from_json(POINT | {"steps_per_call": 3})
    one, several = evidence(dataclasses.replace(point, steps_per_call=1)), evidence(point)
    assert several.unexplained == 0 and {m.verdict for m in several.collectives} == {"as planned"}
    assert [(m.scope, m.bytes, m.count) for m in several.collectives] == [
        (m.scope, m.bytes, m.count) for m in one.collectives
    ]
    assert several.cache_copies == one.cache_copies == 0


def test_the_bench_measures_steps(capsys, tmp_path):
    argv = [*SMALL, "--layouts", "ws2d", "--steps-per-call", "4", "--json", "--out", str(tmp_path)]
    assert step_latency.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    analytic, compiled, measured = rows
    assert {r["point"]["steps_per_call"] for r in rows} == {4}
    assert analytic["n_collectives"] == compiled["n_collectives"]
    assert analytic["collective_bytes"] == compiled["collective_bytes"]
    assert measured["latency_s"] > 0


def test_bad_options_are_refused(capsys, tmp_path):
    for value in ("0", "-3"):
        assert f"steps_per_call={value} must be" in refused(capsys, step_latency.main, "--steps-per-call", value)
        assert f"steps_per_call={value} must be" in refused(capsys, command.main, "--steps-per-call", value)
    assert "must be 1 in prefill" in refused(
        capsys, command.main, "--phase", "prefill", "--length", "8", "--steps-per-call", "2"
    )


def test_generators_are_made_for_a_layout_pair():
    """Each program of several steps is made once."""
    config = battery.model("parallel", 1)
    made: Generator = generator(config, "ws2d/heads", "ws2d/batch", steps_per_call=3)
    assert made.decoding(3, None) is made.decoding(3, None)
    assert made.decoding(1, 5) is made.decoding(1, None)
    assert made.decode == layout("ws2d", "batch", (2, 2, 2), 1)


@pytest.mark.slow
def test_a_tpu_program_of_several_steps_copies_nothing():
    """The loop copies neither cache nor weights, and needs no more memory than one step, except for the ids."""
    pytest.importorskip("libtpu", reason="needs libtpu, the extra `tpu`")
    fields = {"model": "palm-540b-h64-8l", "batch": 64, "context": 2048, "weights": "int8", "steps_per_call": 4}
    point = Point.from_json(DECODE | fields)
    one, several = evidence(dataclasses.replace(point, context=2051, steps_per_call=1)), evidence(point)
    assert several.unexplained == 0 and several.cache_copies == 0 and several.weight_copies == 0
    assert one.peak_bytes_per_chip and several.peak_bytes_per_chip
    assert abs(several.peak_bytes_per_chip - one.peak_bytes_per_chip) < 2**20
    assert several.compute_s == pytest.approx(one.compute_s, rel=0.02)
    assert several.stack_compute_s == pytest.approx(one.stack_compute_s, rel=0.02)
