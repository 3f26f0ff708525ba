"""The planner against a brute-force loop over `cost.estimate`, its Pareto front, its books, its limits, the command."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.benchmarks import cli, plan
from toruslab.partitioning.cost import planner
from toruslab.partitioning.cost.cache_move import cache_move_s, same_weights
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.limits import largest_batch, longest_context
from toruslab.partitioning.cost.planner import GOALS, Goal, pareto, search
from toruslab.partitioning.cost.space import PLANNED, Job, Space, placements, read_slices
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import chip
from toruslab.partitioning.torus.mesh import Slice

MODEL = "palm-8b-4l"
SMALL = Space(model=MODEL, slices=("v4:2x2x1", "v5e:2x4"), batches=(1, 3, 8, 64), weights=("bf16", "int8"))
DECODE = Job(phase="decode", prompt=1023)
REQUEST = Job(prompt=256, output=32)


def brute(space: Space, job: Job, phase: str):
    """Every point of one phase that can be made and fits, with its estimate, one at a time."""
    for text in space.slices:
        for turned, mesh in placements(Slice.parse(text)):
            for name, attention, weights, batch in itertools.product(
                space.layouts, space.attentions, space.weights, space.batches
            ):
                fields: dict[str, Any] = {
                    "slice": str(turned),
                    "mesh": "x".join(map(str, mesh)),
                    "layout": name,
                    "weights": weights,
                }
                try:
                    point = Point(
                        model=space.model,
                        phase=phase,
                        batch=batch,
                        attention=attention,
                        **job.sizes(phase),
                        **fields,
                    )
                except ValueError:
                    continue
                found = estimate(point)
                if found.fits:
                    yield (str(turned), mesh, weights, batch), point, found


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("goal", GOALS)
def test_choice_is_that_of_brute_force(phase, goal):
    job = Job(phase=phase, prompt=512)
    found = search(SMALL, job)
    every = [(p, e) for _, p, e in brute(SMALL, job, phase)]
    assert len(found) == len(every) == found.n_considered
    limit = float(np.median([e.latency_s for _, e in every]))
    within = [(p, e) for p, e in every if e.latency_s <= limit]
    best = found.order(goal, found.allowed(limit))[0]
    latency, cost = found.columns["latency_s"][best], found.columns["cost_chip_s_per_token"][best]
    costs = [p.n_chips * e.latency_s / p.batch / job.tokens for p, e in within]
    if goal == "latency":
        assert latency == pytest.approx(min(e.latency_s for _, e in within), rel=1e-12)
    elif goal == "cost":
        assert cost == pytest.approx(min(costs), rel=1e-12)
    else:
        most = max(p.batch for p, _ in within)
        assert found.columns["batch"][best] == most
        assert cost == pytest.approx(min(c for c, (p, _) in zip(costs, within, strict=True) if p.batch == most))
    (point,) = found.points(best).values()
    checked = estimate(point)
    assert latency == pytest.approx(checked.latency_s, rel=1e-12)
    assert found.columns["hbm_bytes_per_chip"][best] == checked.hbm_bytes_per_chip


def test_a_request_joins_the_phases_as_brute_force_does():
    space = Space(model=MODEL, slices=("v4:2x2x1",), batches=(4, 8), weights=("int8",))
    found = search(space, REQUEST)
    groups: dict = {}
    for phase in REQUEST.phases:
        for key, point, cost in brute(space, REQUEST, phase):
            groups.setdefault(key, {}).setdefault(phase, []).append((point, cost))
    best = math.inf
    for (slice_, mesh, _, batch), phases in groups.items():
        for (p, first), (d, step) in itertools.product(phases["prefill"], phases["decode"]):
            if not same_weights(p.layout_value, d.layout_value):
                continue
            c = planner.constants_of(chip("v4"))
            moved = cache_move_s(
                p.layout_value,
                d.layout_value,
                Slice.parse(slice_),
                mesh,
                p.config,
                batch=batch,
                filled=REQUEST.prompt,
                weight=1,
                constants=c,
            )
            best = min(best, float(first.latency_s + moved + REQUEST.output * step.latency_s))
    i = found.order("latency")[0]
    assert found.columns["latency_s"][i] == pytest.approx(best, rel=1e-12)
    column = {k: v[i] for k, v in found.columns.items()}
    assert column["latency_s"] == pytest.approx(column["prefill_s"] + column["handoff_s"] + 32 * column["step_s"])
    assert column["cost_chip_s_per_token"] == pytest.approx(4 * column["latency_s"] / column["batch"] / 32)
    points = found.points(i)
    assert points["decode"].context == 256 + 16
    assert points["prefill"].length == 256


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=40))
@settings(deadline=None)
def test_front_is_what_no_point_dominates(points):
    latency, cost = np.array(points, float).T
    dominated = [
        any(a <= x and b <= y and (a < x or b < y) for a, b in zip(latency, cost, strict=True))
        for x, y in zip(latency, cost, strict=True)
    ]
    assert pareto(latency, cost).tolist() == [not d for d in dominated]


@pytest.mark.parametrize("job", [DECODE, REQUEST, Job(phase="prefill", prompt=100_000)])
def test_rejected_and_considered_are_all(job):
    space = Space(
        model="llama-2-13b",
        slices=("v4:2x2x4", "v5e:4x4x4", "v4:3x1x1", "h100:8"),
        batches=(1, 6, 64, 100_000),
    )
    found = search(space, job)
    assert found.n_considered + sum(r.count for r in found.rejected) == found.n_points
    meshes = sum(len(placements(Slice.parse(s))) for s in space.slices)
    assert found.n_points == meshes * 6 * 2 * 2 * 4 * len(job.phases)
    reasons = {r.reason: r for r in found.rejected}
    assert {"the slice is impossible", "does not fit", "batch does not divide", "no axis is left for heads"} <= {
        *reasons
    }
    assert all(r.why and r.example and r.count > 0 for r in found.rejected)
    assert "GiB" in reasons["does not fit"].why


def test_sizes_that_do_not_divide_are_named_by_field_and_rule():
    found = search(Space(model="palm-540b", slices=("v4:4x4x4",), batches=(64,)), DECODE)
    (heads,) = (r for r in found.rejected if r.reason == "n_heads does not divide")
    assert "n_heads=48 is not divisible by" in heads.why
    with pytest.raises(ValueError, match="n_heads=48"):
        Point(model="palm-540b", phase="decode", batch=64, context=9, **heads.example)


@pytest.mark.parametrize("slice_", ["v4:4x4x4", "v5e:2x4", "v4:1x2x4", "h100:8"])
def test_placements_cover_the_slice_once(slice_):
    found = placements(Slice.parse(slice_))
    assert len(set(found)) == len(found)
    assert all(math.prod(mesh) == turned.n_chips == Slice.parse(slice_).n_chips for turned, mesh in found)
    assert all(sorted(turned.dims) == sorted(Slice.parse(slice_).dims) for turned, _ in found)


def test_weights_rest_in_the_same_places_for_all_but_ws1d_and_replicated():
    def at(name):
        return planner.layout(name, "batch", (2, 2, 2), 1)

    shared = [n for n in PLANNED if same_weights(at(n), at("ws2d"))]
    assert shared == ["ws2d", "wgx", "wgxy", "wgxyz"]


def best(phase: str, batch: int, size: int, goal: Goal = "latency", **changed) -> Point:
    space = Space(**{"model": "palm-540b-h64", "slices": ("v4:4x4x4",), "batches": (batch,), **changed})
    found = search(space, Job(phase=phase, prompt=size))
    return found.points(found.order(goal)[0])[phase]


def test_known_answers_for_540b_on_64_chips():
    decode = best("decode", 512, 2047)
    assert (decode.layout, decode.attention) == ("ws2d", "batch")
    found = search(Space(model="palm-540b-h64", slices=("v4:4x4x4",), batches=(512,)), Job(phase="decode", prompt=2047))
    fastest: dict[str, float] = {}
    for structure, latency in zip(found.columns["decode"], found.columns["latency_s"], strict=True):
        label = found.structures[structure].label
        fastest[label] = min(fastest.get(label, math.inf), latency)
    assert fastest["ws2d/batch"] < fastest["ws1d/batch"] / 1.1
    assert best("prefill", 512, 2048, weights=("bf16",)).layout.startswith("wg")  # a million tokens
    assert best("prefill", 1, 2048).layout.startswith("ws")
    assert best("decode", 128, 32768, weights=("int8",)).attention == "batch"


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize(
    ("phase", "length", "context"), [("decode", 1, 2048), ("prefill", 512, 0), ("prefill", 64, 999)]
)
def test_limits_of_memory_are_where_the_estimate_says(phase, length, context, weights):
    fields = {
        "model": "palm-62b",
        "slice": "v4:2x2x4",
        "phase": phase,
        "length": length,
        "layout": "ws2d",
        "attention": "batch",
        "weights": weights,
    }
    batch = largest_batch(Point(**fields, batch=16, context=context))
    assert batch is not None and batch % 16 == 0
    assert estimate(Point(**fields, batch=batch, context=context)).fits
    assert not estimate(Point(**fields, batch=batch + 16, context=context)).fits
    longest = longest_context(Point(**fields, batch=16, context=context))
    assert longest is not None
    assert estimate(Point(**fields, batch=16, context=longest)).fits
    assert not estimate(Point(**fields, batch=16, context=longest + 1)).fits


def test_the_largest_batch_of_a_training_step():
    """In whole parts; there is no context to be longest."""
    point = Point(
        model="palm-8b",
        slice="v4:2x2x2",
        phase="train",
        batch=32,
        length=2048,
        layout="wgxy",
        attention="batch",
        accumulate=2,
    )
    batch = largest_batch(point)
    assert batch is not None and batch % 16 == 0
    assert estimate(dataclasses.replace(point, batch=batch)).fits
    assert not estimate(dataclasses.replace(point, batch=batch + 16)).fits
    assert longest_context(point) is None


def test_limits_of_memory_where_nothing_fits():
    point = Point(
        model="palm-540b-h64", slice="v4:1x1x1", phase="decode", batch=1, context=1, layout="ws2d", attention="heads"
    )
    assert largest_batch(point) is None
    assert longest_context(point) is None


def test_a_chip_means_its_legal_slices():
    found = read_slices("v4,v5e:4x8", 16)
    assert "v4:2x2x4" in found and "v4:1x1x8" not in found and found[-1] == "v5e:4x8"
    for text in found:
        chip(Slice.parse(text).chip).check_slice(Slice.parse(text).dims)


def test_every_layout_with_a_plan_is_searched():
    assert {*PLANNED} == {*LAYOUTS} - {"auto"}


COMMAND = ["--model", MODEL, "--slices", "v4:2x2x1", "--batches", "1,8,64", "--prompt", "128", "--output", "8"]


def test_command_prints_one_json_object_a_line(capsys, tmp_path):
    assert cli.guarded(plan.main, [*COMMAND, "--json", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ranked = [x for x in lines if x["kind"] == "ranking"]
    assert [x["chosen"] for x in ranked] == [True] + [False] * (len(ranked) - 1)
    assert sorted(x["cost_chip_s_per_token"] for x in ranked) == [x["cost_chip_s_per_token"] for x in ranked]
    assert {p.to_json()["phase"] for p in map(Point.from_json, ranked[0]["points"].values())} == {"prefill", "decode"}
    front = [x for x in lines if x["kind"] == "front"]
    assert [x["latency_s"] for x in front] == sorted(x["latency_s"] for x in front)
    assert all(a["cost_chip_s_per_token"] > b["cost_chip_s_per_token"] for a, b in itertools.pairwise(front))
    (summary,) = (x for x in lines if x["kind"] == "summary")
    rejected = sum(x["count"] for x in lines if x["kind"] == "rejected")
    assert summary["n_considered"] + rejected == summary["n_points"]
    assert {path.name for path in tmp_path.iterdir()} == {"plan.jsonl", "plan.svg", "plan.png"}


def test_command_prints_tables(capsys):
    assert cli.guarded(plan.main, [*COMMAND, "--phase", "decode", "--goal", "batch", "--max-latency", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "Pareto front" in out and "Refused" in out and "considered" in out


def test_command_fails_where_nothing_is_left(capsys):
    assert cli.guarded(plan.main, [*COMMAND, "--max-latency", "1e-9"]) == 1
    assert "the fastest takes" in capsys.readouterr().err
    tiny = ["--model", "palm-540b-h64", "--slices", "v4:1x1x1", "--batches", "1", "--json"]
    assert cli.guarded(plan.main, tiny) == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--slices", "v5e:4x4x4"], "slice='v5e:4x4x4': slice 4x4x4 has 3 axes longer than 1, but v5e is a torus of 2"),
        (["--slices", "v4:4by4"], "must be CHIP:DIMS"),
        (["--slices", "v44"], "chip='v44' is not known: did you mean 'v4'?"),
        (["--slices", "cpu:8"], "chip='cpu' is an attached platform"),
        (["--slices", ","], "slices is empty"),
        (["--max-chips", "0", "--slices", "v4"], "max_chips=0 must be at least 1"),
        (["--model", "palm-541b"], "palm-540b"),
        (["--phase", "training"], "phase='training' must be one of"),
        (["--goal", "speed"], "goal='speed' must be one of latency, cost, batch"),
        (["--prompt", "0"], "prompt=0 must be an integer of at least 1"),
        (["--output", "-1"], "output=-1 must be an integer of at least 1"),
        (["--context", "5"], "context=5 is for phase='decode'"),
        (["--phase", "decode", "--context", "0"], "context=0 must be at least 1"),
        (["--max-latency", "-1"], "max_latency=-1.0 must be a positive number"),
        (["--max-latency", "nan"], "max_latency=nan must be a positive number"),
        (["--phase", "prefill", "--max-step", "1"], "max_step bounds decode steps"),
        (["--batches", "0,1"], "batch=0 must be an integer of at least 1"),
        (["--batches", "many"], "batches='many' must be integers"),
        (["--batches", "8..1"], "batches='8..1' must be a range"),
        (["--weights", "fp4"], "weights='fp4' must be of f32, bf16, int8"),
        (["--layouts", "auto"], "it has no plan"),
        (["--layouts", "ws3d"], "layouts='ws3d' must be of"),
        (["--attention", "tails"], "attentions='tails' must be of heads, batch-x, batch-y, batch-z, batch-xy, "),
        (["--attention", "batch-yx"], "attentions='batch-yx' must be of heads, batch-x, "),
        (["--top", "0"], "top=0 must be at least 1"),
        (["--out", __file__], "is a file, not a folder"),
    ],
)
def test_command_refuses_in_one_sentence(capsys, argv, sentence):
    assert cli.guarded(plan.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err


def test_no_backend_is_initialised():
    program = (
        "from benchmarks import plan\n"
        f"assert plan.main({[*COMMAND, '--json']!r}) == 0\n"
        "from jax._src import xla_bridge\n"
        "assert len(xla_bridge._backends) == 0\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
