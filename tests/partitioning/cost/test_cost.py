"""The analytic cost: what must hold for any point, the plan's own bytes, known answers, and the command."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.benchmarks.commands.test_commands import refused
from toruslab.benchmarks import cli
from toruslab.benchmarks import estimate as command
from toruslab.partitioning.cost.estimate import estimate, estimate_many
from toruslab.partitioning.cost.forward import constants_of
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import chip

MODELS = ("palm-8b", "palm-62b", "palm-540b-h64", "llama-3-70b", "gpt3-175b-h128", "llama-2-7b")
SLICES = ("v4:4x4x4", "v4:2x2x2", "v4:2x4x2", "v5e:4x4", "v5p:4x4x8", "v6e:8x2", "h100:8")


@st.composite
def points(draw) -> Point:
    """Legal points, of any layout that has a plan."""
    phase = draw(st.sampled_from(["prefill", "decode"]))
    fields = {
        "model": draw(st.sampled_from(MODELS)),
        "slice": draw(st.sampled_from(SLICES)),
        "phase": phase,
        "batch": draw(st.sampled_from([1, 8, 16, 64, 128, 512])),
        "length": draw(st.integers(1, 4096)) if phase == "prefill" else 1,
        "context": draw(st.integers(1, 8192)) if phase == "decode" else draw(st.sampled_from([0, 1024])),
        "layout": draw(st.sampled_from([name for name in LAYOUTS if name != "auto"])),
        "attention": draw(st.sampled_from(["heads", "batch"])),
        "weights": draw(st.sampled_from(["bf16", "int8", "f32"])),
    }
    try:
        return Point(**fields)
    except ValueError:
        assume(False)
        raise


@given(points(), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_more_of_anything_never_takes_less(point, times):
    bigger = [dataclasses.replace(point, batch=point.batch * times)]
    if point.phase == "decode":
        bigger.append(dataclasses.replace(point, context=point.context * times))
    else:
        bigger.append(dataclasses.replace(point, length=point.length * times))
    first, *others = estimate_many([point, *bigger])
    for other in others:
        for field in ("latency_s", "stack_latency_s", "compute_s", "memory_s", "collective_s", "hbm_bytes_per_chip"):
            assert getattr(other, field) >= getattr(first, field) * (1 - 1e-12)


@given(points())
@settings(deadline=None, max_examples=60)
def test_better_chips_never_hurt(point):
    c = constants_of(chip(point.chip))
    before = estimate(point, c).latency_s
    for name in c:
        better = c | {name: c[name] * (0.5 if name.endswith("_s") else 1.5)}
        assert estimate(point, better).latency_s <= before * (1 + 1e-12)


@given(points())
@settings(deadline=None, max_examples=60)
def test_the_bytes_are_the_plans(point):
    """Every collective of the estimate is the one that the bench checks against the compiled program."""
    planned = plan(point.layout_value, point.config, point.pass_, point.mesh_shape)
    priced = estimate(point).collectives
    assert [(c.scope, c.kind, c.axes, c.bytes, c.count) for c in priced] == [
        (p.scope, p.kind, p.axes, p.bytes, p.count) for p in planned
    ]


@given(points())
@settings(deadline=None, max_examples=60)
def test_a_slice_holds_at_least_the_model(point):
    held = estimate(point).hbm_bytes_per_chip * point.n_chips
    config = point.config
    least = config.n_params * (1 if point.weights == "int8" else 2 if point.weights == "bf16" else 4)
    assert held >= least * 0.999


@given(points())
@settings(deadline=None, max_examples=30)
def test_many_at_once_equal_one_by_one(point):
    others = [dataclasses.replace(point, batch=point.batch * n) for n in (1, 2, 3)]
    assert estimate_many(others) == [estimate(p) for p in others]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "auto"])
def test_one_chip_has_no_collectives(layout):
    p = Point(model="palm-8b", slice="v4:1x1x1", phase="decode", batch=4, context=64, layout=layout, attention="batch")
    found = estimate(p)
    assert found.collectives == () and found.collective_s == 0


@pytest.mark.parametrize(("layout", "attention"), [("ws1d", "batch"), ("ws1d", "heads"), ("replicated", "batch")])
def test_permuting_axes_changes_nothing_where_all_are_alike(layout, attention):
    common = {"model": "palm-62b-h128", "phase": "prefill", "batch": 128, "length": 128, "attention": attention}
    found = [
        estimate(Point(slice=f"v4:{dims}", layout=layout, **common)).latency_s for dims in ("4x4x8", "4x8x4", "8x4x4")
    ]
    assert max(found) == pytest.approx(min(found), rel=1e-12)


def test_permuting_equal_axes_changes_nothing():
    """y and z are used as one group everywhere but in wgxy: swapping their extents costs the same."""
    common = {"model": "palm-62b-h128", "phase": "decode", "batch": 128, "context": 128}
    for layout in ("ws2d", "wgx", "wgxyz"):
        found = [
            estimate(Point(slice=f"v4:{dims}", layout=layout, attention="batch", **common)).latency_s
            for dims in ("4x4x8", "4x8x4")
        ]
        assert max(found) == pytest.approx(min(found), rel=1e-12)


def test_memory_of_540b_int8():
    """The TPU compiler found 8.53 GiB at the peak for this point, of which 8.3 were weights."""
    p = Point(
        model="palm-540b-h64",
        slice="v4:4x4x4",
        phase="decode",
        batch=64,
        context=2048,
        layout="ws2d",
        attention="batch",
        weights="int8",
    )
    found = estimate(p)
    assert found.hbm_bytes_per_chip / 2**30 == pytest.approx(8.53, rel=0.03)
    assert found.fits
    assert not estimate(dataclasses.replace(p, weights="f32")).fits


def test_where_there_is_no_data_sheet():
    p = Point(model="toy", slice="cpu:2x2x2", phase="decode", batch=8, context=8, layout="ws2d", attention="batch")
    with pytest.raises(ValueError, match="calibrate"):
        estimate(p)
    with pytest.raises(ValueError, match="has no plan"):
        estimate(dataclasses.replace(p, slice="v4:2x2x2", layout="auto"))


GOOD = Point(
    model="palm-62b", slice="v4:2x4x2", phase="decode", batch=32, context=2048, layout="ws2d", attention="batch"
).to_json()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"slice": "v5e:4x4x4"}, "v5e"),
        ({"mesh": "3x4x2"}, "mesh='3x4x2' has 24 places"),
        ({"batch": -1}, "batch=-1 must be"),
        ({"batch": 10**30}, "must be an integer"),
        ({"batch": 7}, "batch=7 is not divisible by"),
        ({"slcie": "v4:2x2x2"}, "unknown field 'slcie'; did you mean 'slice'?"),
        ({"slice": "cpu:2x4x2"}, "calibrate"),
        ({"layout": "auto"}, "has no plan"),
    ],
)
def test_bad_points_get_one_sentence(capsys, change, sentence):
    assert cli.guarded(command.main, [json.dumps(GOOD | change)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_good_lines_are_answered_whatever_the_others(capsys, tmp_path):
    path = tmp_path / "points.jsonl"
    lines = [json.dumps(GOOD), "{oops", json.dumps(GOOD | {"batch": 64}), "", json.dumps(GOOD | {"phase": "sleep"})]
    path.write_text("\n".join(lines) + "\n")
    assert command.main(["--points", str(path), "--json"]) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["point"]["batch"] for r in rows] == [32, 64]
    assert "line 2: not JSON" in err and "line 5: phase='sleep'" in err
    fields = {"latency_s", "stack_latency_s", "compute_s", "memory_s", "collective_s", "bound", "mfu"}
    assert fields | {"hbm_bytes_per_chip", "fits", "collectives", "point", "source"} == set(rows[0])
    assert all(math.isfinite(r["latency_s"]) for r in rows)


def test_lines_that_are_no_text_are_refused_alone(capsys, tmp_path):
    off_torus = GOOD | {"slice": "v4:4x4x12", "mesh": "3x8x8", "batch": 192, "layout": "replicated"}
    path = tmp_path / "points.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps(GOOD).encode()
        + b"\r\n\xff\xfe\n"
        + b"[" * 100_000
        + b"\n"
        + json.dumps(off_torus).encode()
    )
    assert command.main(["--points", str(path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "line 2: not UTF-8" in err and "line 3: not JSON" in err and "line 4: mesh 3x8x8 cannot be laid" in err


@pytest.mark.parametrize("wrong", [-1, 0, "a", math.inf])
def test_a_chips_fitted_constants_are_checked(wrong):
    v4 = chip("v4")
    with pytest.raises(ValueError, match=r"fitted\.hbm_efficiency"):
        dataclasses.replace(v4, fitted={**v4.fitted, "hbm_efficiency": wrong})
    with pytest.raises(ValueError, match="fitted must hold all"):
        dataclasses.replace(v4, fitted={"hop_s": 1e-6})


def test_estimate_touches_no_device():
    program = (
        "import sys; from benchmarks import estimate; code = estimate.main([]);"
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


LOOPED = {"slice": "v4:4x4x4", "model": "palm-540b-h64", "phase": "prefill", "batch": 64, "attention": "batch"}


@pytest.mark.parametrize("name", ["ws2d", "wgx", "wgxyz"])
@pytest.mark.parametrize("variant", ["ring", "biring"])
def test_a_looped_collective_is_hidden_as_far_as_its_matmul_goes(name, variant):
    """What a looped layout takes beyond its matmuls and plain collectives is less than its sends take."""
    for length in (1, 16, 512):
        plain, looped = [
            estimate(Point(**LOOPED, length=length, layout=layout), overlap=False)
            for layout in (name, f"{name}+{variant}")
        ]
        sent = [c for c in looped.collectives if c.kind == "collective-permute"]
        whole = [c for c in plain.collectives if c not in looped.collectives]
        assert sum(c.bytes for c in sent) == pytest.approx(sum(c.bytes for c in whole), rel=1e-6)
        kept = math.fsum(c.seconds * c.count for c in looped.collectives if c not in sent)
        left = looped.latency_s - kept - (plain.latency_s - plain.collective_s)
        assert 0 < left < math.fsum(c.seconds * c.count for c in sent)


def test_rings_are_priced_as_they_run_whatever_the_authors_did():
    point = Point(**LOOPED, length=512, layout="wgxyz+ring")
    assert estimate(point) == estimate(point, overlap=False)
    assert estimate(point).hbm_bytes_per_chip < estimate(dataclasses.replace(point, layout="wgxyz")).hbm_bytes_per_chip


def test_exposed_is_refused_where_a_layout_says_itself_what_hides(capsys, tmp_path):
    for layout in ("ws2d+ring", "wgxyz+biring", "wgx+prefetch"):
        point = json.dumps(LOOPED | {"length": 512, "layout": layout})
        assert f"exposed is for plain layouts: layout='{layout}'" in refused(capsys, command.main, point, "--exposed")
    path = tmp_path / "points.jsonl"
    path.write_text(json.dumps(LOOPED | {"length": 512, "layout": "wgxyz"}) + "\n" + point + "\n")
    assert command.main(["--points", str(path), "--exposed", "--json"]) == 1
    out, err = capsys.readouterr()
    (exposed,) = map(json.loads, out.splitlines())
    plain = Point(**LOOPED, length=512, layout="wgxyz")
    assert exposed["latency_s"] == estimate(plain, overlap=False).latency_s != estimate(plain).latency_s
    assert "line 2: exposed is for plain layouts" in err
