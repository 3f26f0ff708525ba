"""The micro-benchmarks: every block runs the operation that it is priced as. Data sheets and tables."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from toruslab.benchmarks.measure import chip_file
from toruslab.benchmarks.measure.building_blocks import blocks
from toruslab.benchmarks.measure.looped import Block, Timed, dispatch, measure
from toruslab.benchmarks.reports import calibration_tables
from toruslab.partitioning.torus.calibrated import Machine, Sample
from toruslab.partitioning.torus.chip import chip
from toruslab.partitioning.torus.mesh import attach


@pytest.fixture(scope="module")
def mesh():
    return attach((2, 2, 2), chip="cpu")


def test_every_block_is_there(mesh):
    found = list(blocks(mesh, ["f32"], "cpu"))
    samples = [b.sample for b in found]
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
    others = {"matmul", "copy", "attention", "norm", "activation", "rope"}
    assert {s.what for s in samples} == {*others, "collective-permute", *kinds}
    assert {s.axes: s.sizes["group"] for s in samples if s.what == "collective-permute"} == {"x": 2, "y": 2, "z": 2}
    for kind in kinds:
        groups = {s.axes: s.sizes["group"] for s in samples if s.what == kind}
        assert groups == {"x": 2, "y": 2, "z": 2, "xy": 4, "xz": 4, "yz": 4, "xyz": 8}
    keys = [(s.what, s.axes, s.at, tuple(s.sizes.items())) for s in samples]
    assert len(set(keys)) == len(keys)
    assert len(list(blocks(mesh, ["f32"], "cpu", quick=True))) < len(found) / 2


@pytest.mark.parametrize(("dtypes", "expected"), [(["f32"], {"f32"}), (["bf16", "int8"], {"bf16", "int8", "f32"})])
def test_dtypes(mesh, dtypes, expected):
    assert {b.sample.dtype for b in blocks(mesh, dtypes, "cpu")} == expected


def test_one_device_has_no_collectives():
    found = list(blocks(attach((1, 1, 1), chip="cpu"), ["bf16"], "gpu"))
    assert found and not any(b.sample.axes for b in found)
    assert max(b.sample.sizes.get("rows", 0) * b.sample.sizes.get("inner", 0) for b in found) >= 2**20


def test_blocks_hold_the_collective_that_they_are_named_after(mesh):
    """Kind and bytes, read back from the block's program."""
    from toruslab.partitioning.hlo.collectives import read

    small = [b for b in blocks(mesh, ["f32"], "cpu") if b.sample.axes and b.sample.sizes["bytes"] < 10**5]
    picked = {(b.sample.what, b.sample.axes, b.sample.at): b for b in small}
    for what, axes, at in (
        ("all-gather", "x", "columns"),
        ("all-gather", "xyz", "rows"),
        ("reduce-scatter", "yz", "columns"),
        ("all-to-all", "xy", "rows"),
        ("all-reduce", "xz", "rows"),
        ("collective-permute", "y", "rows"),
    ):
        block = picked[what, axes, at]
        (found,) = read(Timed(block, mesh).run.as_text() or "", {"x": 2, "y": 2, "z": 2}, unknown_trips=1)
        assert (found.kind, "".join(found.axes)) == (what, axes)
        assert found.bytes == block.sample.sizes["bytes"]


@pytest.mark.slow
def test_every_small_block_runs(mesh):
    small = [b for b in blocks(mesh, ["f32"], "cpu", quick=True) if b.sample.sizes.get("bytes", 0) < 10**6]
    small = [b for b in small if b.sample.sizes.get("macs", 0) < 10**7 and b.sample.sizes.get("inner", 0) < 512]
    told = []
    found = measure(small, mesh, repeats=2, each=told.append)
    assert len(found) == len(small) and len(told) == 3 * len(small)
    assert all(s.repeats == 2 and s.high_s >= 0 for s in found)


def test_what_is_taken_off_is_the_same_block_without_it(mesh):
    """Quartile by quartile, with invented times."""
    empty = Block(
        sample=Sample(what="norm", dtype="f32", sizes={"elements": 1}, seconds=0.0, low_s=0.0, high_s=0.0, repeats=0),
        turn=lambda x, i: x * 1.5,
        carry=[jax.ShapeDtypeStruct((4,), jnp.float32)],
    )
    one, other = Timed(empty, mesh), Timed(empty, mesh)
    one.times_s, other.times_s = [1.0, 5.0, 3.0, 2.0, 4.0], [0.5, 2.5, 1.5, 1.0, 8.0]
    found = one.sample(other)
    assert (found.low_s, found.seconds, found.high_s, found.repeats) == (1.0, 1.5, 1.5, 5)
    assert other.sample(one).low_s == 0.0  # never below nothing


def test_the_collective_and_the_work_between_stay_in_the_loop(mesh):
    """XLA could hoist whatever does not depend on the previous turn."""
    block = next(b for b in blocks(mesh, ["f32"], "cpu") if b.sample.what == "all-reduce")
    text = Timed(block, mesh).run.as_text() or ""
    body = next(part for part in text.split("\n\n") if "all-reduce" in part and "ENTRY" not in part)
    assert "dot(" in body or "fusion(" in body  # the work between is in the loop as well


def test_dispatch_is_measured(mesh):
    found = dispatch(mesh, 1)
    assert found.what == "dispatch" and found.seconds > 0 and found.sizes["arguments"] > 6


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v4", "v4"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", None),
    ],
)
def test_devices_have_data_sheets(kind, name):
    found = chip_file.data_sheet(kind)
    assert (found and found.name) == name


def test_one_chip_is_held_against_its_data_sheet():
    """There is no GPU here: an invented machine reaches half of every rate."""
    sheet, shape = chip("h200"), {"inner": 4096, "outer": 16384}
    times = {
        4096: 2 * 4096 * 4096 * 16384 / (sheet.peak("bf16") / 2),
        1: 2 * 4096 * 16384 / (sheet.hbm_bytes_per_s / 2),
    }
    samples = [
        Sample(what="matmul", dtype="bf16", sizes={"rows": n} | shape, seconds=t, low_s=t, high_s=t, repeats=1)
        for n, t in times.items()
    ]
    copy = Sample(
        what="copy", dtype="bf16", sizes={"bytes": 1, "stack": 2}, seconds=1.0, low_s=1.0, high_s=1.0, repeats=1
    )
    machine = Machine(n_devices=1, shared=False, mesh=(1, 1, 1), samples=(*samples, copy))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(calibration_tables.against(machine, chip_file.memory_rate(machine)[0], sheet))
    assert console.export_text().count("50%") == 2
