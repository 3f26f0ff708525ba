"""A calibrated machine: what is read off between samples, the chip file, and passes priced from it."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.battery import legal
from toruslab.benchmarks import bench as step_latency
from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.measure.contenders import analytic
from toruslab.benchmarks.runs.parser import InputError
from toruslab.models.programs.compiled import planned
from toruslab.partitioning.cost.estimate import estimate, estimate_many
from toruslab.partitioning.cost.measured import TERMS
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.calibrated import Machine, Sample, fit
from toruslab.partitioning.torus.chip import chip

FIXED = {2: 30e-6, 4: 70e-6, 8: 160e-6}
S_PER_MAC, S_PER_BYTE, S_PER_ELEMENT = 1e-9, 1e-10, 2e-9


def sample(what: str, taken: float, axes: str = "", at: str = "", **sizes: int) -> Sample:
    return Sample(
        what=what, dtype="f32", sizes=sizes, axes=axes, at=at, seconds=taken, low_s=taken, high_s=taken, repeats=1
    )


def machine() -> Machine:
    """8 fake devices on which everything has a known price."""
    samples = [sample("dispatch", 1e-4, arguments=12)]
    for rows, inner in itertools.product((1, 64), (64, 1024)):
        samples.append(sample("matmul", rows * inner * 512 * S_PER_MAC, rows=rows, inner=inner, outer=512))
    samples += [sample("copy", 1e6 * S_PER_BYTE, bytes=1_000_000, stack=n * 1_000_000) for n in (2, 50)]
    for what in ("norm", "activation", "rope"):
        samples += [sample(what, n * S_PER_ELEMENT, elements=n) for n in (1000, 100_000)]
    for rows, length in itertools.product((1, 8), (1, 16, 64)):
        sizes = {"cache": 2 * rows * 256 * 64, "scores": rows * length * 256, "macs": rows * length * 256 * 128}
        seconds = 1e-5 + sizes["cache"] * 1e-9 + sizes["scores"] * 3e-9
        samples.append(sample("attention", seconds, "", "", rows=rows, length=length, **sizes))
    groups = {"x": 2, "y": 2, "z": 2, "xy": 4, "yz": 4, "xz": 4, "xyz": 8}
    for kind in ("all-gather", "reduce-scatter", "all-to-all", "all-reduce"):
        for (axes, k), at in itertools.product(groups.items(), ("rows", "columns")):
            for n in (100, 10_000, 1_000_000):
                seconds = FIXED[k] + n * S_PER_BYTE
                samples.append(sample(kind, seconds, axes, at, group=k, bytes=n, columns=512))
    for axis, n in itertools.product("xyz", (100, 10_000, 1_000_000)):
        seconds = FIXED[2] + n * S_PER_BYTE
        samples.append(sample("collective-permute", seconds, axis, "rows", group=2, bytes=n, columns=512))
    return Machine(n_devices=8, shared=True, mesh=(2, 2, 2), samples=tuple(samples))


ENVIRONMENT = {"device_kind": "cpu", "cores": 2, "jax": "0", "date": "2026", "commit": None}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("chips") / "cpu-fake-8.toml"
    chip_file.write(found, "cpu-fake-8", machine(), 2**30, ENVIRONMENT)
    return found


def point(path=None, **more) -> Point:
    where = f"{path}:2x2x2" if path else "cpu:2x2x2"
    fields: dict[str, Any] = {
        "model": "toy",
        "slice": where,
        "phase": "decode",
        "batch": 8,
        "context": 256,
        "weights": "f32",
    }
    return Point.from_json(fields | {"layout": "ws2d", "attention": "batch"} | more)


@given(rows=st.integers(1, 64), inner=st.integers(64, 1024))
def test_matmuls_at_one_rate_are_priced_by_it(rows, inner):
    found = machine().matmul_s(rows, inner, 512, "f32")
    assert math.isclose(found, rows * inner * 512 * S_PER_MAC, rel_tol=1e-9)


def test_beyond_the_samples_the_rate_of_the_nearest_holds():
    rate = machine().matmul_s(64, 1024, 512, "f32") / (64 * 1024)
    assert math.isclose(machine().matmul_s(4096, 4096, 512, "f32"), rate * 4096 * 4096)
    assert math.isclose(machine().copy_s(5e6, 1e12, "f32"), 5e6 * S_PER_BYTE)


@pytest.mark.parametrize(("k", "fixed"), [*FIXED.items(), (3, 50e-6), (6, 115e-6), (16, 340e-6), (1, 30e-6)])
def test_collectives_between_and_beyond_groups(k, fixed):
    for kind, n in itertools.product(("all-gather", "all-to-all"), (100, 5000, 400_000, 3_000_000)):
        found = float(machine().collective_s(kind, k, "rows", n))
        assert math.isclose(found, fixed + n * S_PER_BYTE, rel_tol=1e-6)


def test_a_group_of_axes_of_its_own_comes_before_others_of_its_size():
    slow = [dataclasses.replace(s, seconds=1.0, low_s=1.0) if s.axes == "y" else s for s in machine().samples]
    other = dataclasses.replace(machine(), samples=tuple(slow))
    assert float(other.collective_s("all-gather", 2, "rows", 5000, axes="y")) == 1.0
    of_x = float(other.collective_s("all-gather", 2, "rows", 5000, axes="x"))
    assert math.isclose(of_x, FIXED[2] + 5000 * S_PER_BYTE, rel_tol=1e-9)


def test_wide_tensors_are_priced_between_the_widths():
    wide = [sample("all-gather", 1.0, "x", "columns", group=2, bytes=n, columns=4096) for n in (10_000, 1_000_000)]
    other = dataclasses.replace(machine(), samples=(*machine().samples, *wide))
    narrow, middle, most, small = (
        float(other.collective_s("all-gather", 2, "columns", n, columns))
        for n, columns in ((100_000, 512), (100_000, 1448), (100_000, 9999), (100, 9999))
    )
    assert narrow < 1e-3 < middle < most == 1.0
    assert small < 1e-3  # one row: there was no wide sample of it


def test_a_dtype_that_was_not_measured_is_refused(path):
    with pytest.raises(ValueError, match="no matmul in bf16; run toruslab calibrate --dtypes bf16"):
        analytic(point(weights="bf16"), chip(path))


def test_work_of_devices_that_share_cores_adds_up():
    assert machine().scale(64) == 8 and dataclasses.replace(machine(), shared=False).scale(64) == 1


def test_fits_are_exact_where_the_samples_are_and_not_bent_by_one_that_is_not():
    sizes = [{"bytes": n, "rows": r} for n, r in itertools.product((10, 1000, 100_000), (1, 8))]
    seconds = [3e-5 + 2e-9 * s["bytes"] + 1e-6 * s["rows"] for s in sizes]
    line = fit(sizes, seconds)
    assert np.allclose([line.fixed_s, line.s_per["bytes"], line.s_per["rows"]], [3e-5, 2e-9, 1e-6], rtol=1e-6)
    assert max(map(abs, line.residuals)) < 1e-6
    seconds[0] *= 20
    bent = fit(sizes, seconds)
    assert math.isclose(float(bent(bytes=100_000, rows=8)), float(line(bytes=100_000, rows=8)), rel_tol=0.05)


@given(st.lists(st.floats(1e-6, 1e-2), min_size=3, max_size=8))
def test_no_fit_has_a_negative_cost(seconds):
    line = fit([{"bytes": 10**i, "rows": i + 1} for i in range(len(seconds))], seconds)
    assert line.fixed_s >= 0 and min(line.s_per.values()) >= 0 and len(line.residuals) == len(seconds)


def test_a_disturbed_difference_costs_at_least_half_its_median():
    assert dataclasses.replace(sample("norm", 4.0), low_s=0.0).cost_s == 2.0
    assert dataclasses.replace(sample("norm", 4.0), low_s=3.0).cost_s == 3.0


def test_the_file_says_what_was_measured(path):
    found = chip(path)
    assert found.machine == machine() and found.name == "cpu-fake-8"
    assert math.isclose(found.peak("f32"), 2 / S_PER_MAC)
    assert "toruslab calibrate" in found.sources["hbm_bytes"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('what = "dispatch"', 'whatever = "dispatch"', "a sample has the unknown entry 'whatever'"),
        ("seconds = 0.0001", "seconds = -1.0", "dispatch: seconds=-1.0 must be a number of seconds"),
        ("n_devices = 8", "", "field 'n_devices' is missing"),
        ("repeats = 1\n", "", "a sample is not complete"),
        ('at = "rows"', 'at = "diagonal"', "at='diagonal' must be one of rows, columns"),
    ],
)
def test_bad_files_are_refused_by_name(path, tmp_path, old, new, sentence):
    text = path.read_text()
    assert old in text
    bad = tmp_path / "bad.toml"
    bad.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=r"bad\.toml: ") as error:
        chip(bad)
    assert sentence in str(error.value)


def test_a_chip_file_has_its_own_ending(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.toml"):
        chip_file.write(tmp_path / "chip.json", "chip", machine(), 1, ENVIRONMENT)


@pytest.mark.parametrize(("name", "attention"), [pair for pair in legal() if pair[0] != "auto"])
@pytest.mark.parametrize("sizes", [{}, {"phase": "prefill", "batch": 8, "length": 16, "context": 0}])
def test_a_pass_is_priced_term_by_term(path, name, attention, sizes):
    asked = point(layout=name, attention=attention, **sizes)
    row = analytic(asked, chip(path))
    assert set(row["terms"]) == set(TERMS)
    assert math.isclose(sum(row["terms"].values()), row["latency_s"])
    plan = planned(asked)
    assert [(c["scope"], c["bytes"]) for c in row["collectives"]] == [(p.scope, p.bytes) for p in plan]
    sizes_of = {"x": 2, "y": 2, "z": 2}
    expected = sum(p.count * (FIXED[math.prod(sizes_of[a] for a in p.axes)] + p.bytes * S_PER_BYTE) for p in plan)
    assert math.isclose(row["terms"]["collective_s"], expected, rel_tol=1e-3)
    by_estimate = estimate(point(path, layout=name, attention=attention, **sizes)).to_json()
    assert math.isclose(by_estimate["latency_s"], row["latency_s"]) and by_estimate["terms"] == row["terms"]
    found = sorted(c["seconds"] for c in row["collectives"])
    assert np.allclose(found, sorted(c["seconds"] for c in by_estimate["collectives"]))


def test_all_multiply_adds_of_a_pass_are_priced(path):
    """ws2d divides every matmul evenly: 8 devices at once take an eighth of the model's multiply-adds each."""
    row, config = analytic(point(), chip(path)), point().config
    layers = config.n_layers * config.d_model * (config.d_head * (2 * config.n_heads + 2) + 3 * config.d_ff)
    macs = 8 * (layers + config.d_model * config.vocab_rows)
    assert math.isclose(row["terms"]["matmul_s"], macs / 8 * S_PER_MAC, rel_tol=1e-6)
    attention = 8 * config.n_layers * config.n_heads * 256 * config.d_head * 2
    assert math.isclose(row["flops"], 2 * (macs + attention), rel_tol=1e-6)


@pytest.mark.parametrize(("name", "attention"), legal(["ws2d", "wgx", "wgxyz"]))
def test_a_training_step_is_priced_term_by_term(path, name, attention):
    """Twice a forward pass for gradients, and once more for layers that are run again; parts of a batch add up."""
    train = {"layout": name, "attention": attention, "phase": "train", "batch": 16, "length": 32, "context": 0}
    step = point(path, **train)
    found, kept, parts, bench = (
        estimate(step),
        estimate(dataclasses.replace(step, remat="none")),
        estimate(dataclasses.replace(step, accumulate=2)),
        analytic(dataclasses.replace(step, slice="cpu:2x2x2"), chip(path)),
    )
    assert tuple(found.terms) == TERMS and sum(found.terms.values()) == pytest.approx(found.latency_s)
    assert bench["latency_s"] == pytest.approx(found.latency_s) and bench["terms"] == pytest.approx(found.terms)
    config, tokens = step.config, step.tokens
    head = tokens * config.d_model * config.vocab_rows / 8 * S_PER_MAC  # every device takes an eighth
    layers = kept.terms["matmul_s"] - 3 * head
    assert found.terms["matmul_s"] == pytest.approx(4 / 3 * layers + 3 * head)
    width = config.n_heads * config.d_head
    least = config.d_model * (2 * width + 3 * config.d_ff) * config.n_layers * tokens
    assert layers > 3 * least / 8 * S_PER_MAC
    assert parts.terms["matmul_s"] == pytest.approx(found.terms["matmul_s"])
    moved = sum(c.seconds * c.count for c in found.collectives)
    assert found.terms["collective_s"] == pytest.approx(moved) and moved > sum(
        c.seconds * c.count for c in kept.collectives
    )
    assert bench["flops"] > 6 * (least + tokens * config.d_model * config.vocab_rows)


def test_points_of_several_dtypes_are_priced_together_as_alone(tmp_path):
    found = machine()
    slower = {"bf16": 2.0, "int8": 3.0}
    more = [
        dataclasses.replace(s, dtype=d, seconds=s.seconds * x, low_s=s.low_s * x)
        for s in found.samples
        for d, x in slower.items()
        if not s.axes and s.what != "dispatch"
    ]
    path = tmp_path / "all.toml"
    chip_file.write(path, "all", dataclasses.replace(found, samples=(*found.samples, *more)), 2**30, ENVIRONMENT)
    points = [point(path, weights=w) for w in ("f32", "bf16", "int8", "bf16")]
    together = estimate_many(points)
    assert [e.terms for e in together] == [estimate(p).terms for p in points]
    assert len({e.terms["matmul_s"] for e in together}) == 3


def test_estimates_from_a_chip_file_touch_no_device(path):
    code = "import sys; from toruslab.benchmarks.estimate import main; assert main(sys.argv[1:]) == 0; "
    code += "from jax._src import xla_bridge; assert not xla_bridge._backends"
    options = ["--slice", f"{path}:2x2x2", "--model", "toy", "--weights", "f32", "--batch", "8", "--json"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["terms"]) == set(TERMS)


@pytest.mark.slow
def test_a_bench_predicts_from_a_chip_file_and_profiles_some_steps(path, tmp_path, capsys):
    options = ["--phases", "decode", "--batches", "8", "--context", "16", "--attention", "batch", "--repeats", "2"]
    options += ["--layouts", "ws2d,auto", "--chip", str(path), "--out", str(tmp_path / "run"), "--json"]
    assert step_latency.main(options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by = {(r["point"]["layout"], r["source"]): r for r in rows}
    priced = [by["ws2d", "analytic"], by["auto", "compiled"]]
    assert all(math.isclose(sum(r["terms"].values()), r["latency_s"]) for r in priced)
    assert "terms" not in by["auto", "analytic"] and "terms" not in by["ws2d", "compiled"]
    assert priced[0]["terms"]["matmul_s"] == priced[1]["terms"]["matmul_s"]  # auto's weights lie where ws2d's do
    measured = [by["ws2d", "measured"], by["auto", "measured"]]
    bytes_per_s = priced[0]["memory_bytes"] / measured[0]["latency_s"]
    assert math.isclose(measured[0]["bandwidth_share"], bytes_per_s / priced[0]["roofline"]["bytes_per_s"])
    assert measured[0]["outliers"] == 0  # of two repetitions none can be
    profiles = [r["profile"] for r in measured if "profile" in r]
    assert profiles and all(p["by_kind"]["collective"]["device_s"] > 0 for p in profiles)
    assert (tmp_path / "run" / "chip.toml").read_text() == path.read_text()


def test_sends_have_samples_of_their_own_or_it_is_said_that_they_have_not(path, tmp_path):
    """In an older file a send is an all-to-all of two; a ring of four on a machine of twos sends as these do."""
    made = machine()
    more = [sample("collective-permute", n * 1e-6, "x", "rows", group=2, bytes=n, columns=512) for n in (10, 10_000)]
    others = tuple(s for s in made.samples if s.what != "collective-permute")
    found = {}
    for name, samples in (("newer", (*others, *more)), ("older", others)):
        chip_file.write(tmp_path / f"{name}.toml", name, dataclasses.replace(made, samples=samples), 2**30, ENVIRONMENT)
        asked = point(tmp_path / f"{name}.toml", layout="ws2d+ring", mesh="1x2x4")
        said = pytest.warns(UserWarning, match="no collective-permute: sends are priced as all-to-alls of two")
        with said if name == "older" else contextlib.nullcontext():
            found[name] = estimate(asked).collectives
    sends = [c for c in found["newer"] if c.kind == "collective-permute"]
    assert sends and all(c.seconds == pytest.approx(c.bytes * 1e-6) for c in sends)
    for new, old in zip(found["newer"], found["older"], strict=True):
        assert (new == old) == (new not in sends)
