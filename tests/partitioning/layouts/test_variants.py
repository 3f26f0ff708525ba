"""Variants of layouts, and attention split over a part of the axes: the battery, the plan, and their purpose."""

import pytest

from tests.battery import CHECKS, SHORT_CHECKS, Bench, model
from toruslab.models.config import ModelConfig
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.layouts.layout import NoAxisLeft
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import Shape

LEAN = [
    ("ws1d+lean", "heads"),
    ("ws1d+lean", "batch"),
    ("ws1d+lean", "batch-xy"),
    ("ws2d+lean", "heads"),
    ("ws2d+lean", "batch"),
    ("ws2d+lean", "batch-y"),
]
PARTIAL = [("ws1d", "batch-x"), ("ws2d", "batch-x"), ("ws2d", "batch-xy"), ("wgx", "batch-y")]
POINT = {"model": "palm-540b-h64", "slice": "v4:4x4x4", "phase": "decode", "batch": 64, "context": 2048}


def per_layer(name: str, attention: str, block: str = "parallel", kv: int = 1, shape: Shape = (2, 2, 2)) -> int:
    config = model(block, kv)
    found = plan(layout(name, attention, shape, kv), config, Pass(batch=8, length=1, capacity=4), shape)
    return sum(p.count for p in found if "/" in p.scope and not p.fused) // config.n_layers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), LEAN + PARTIAL)
@pytest.mark.parametrize(("block", "kv"), [("parallel", 1), ("serial", 16)])
def test_battery(name, attention, block, kv):
    bench = Bench(model(block, kv), name, attention, (2, 2, 2))
    for check in CHECKS:
        check(bench)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kv", "name", "attention"),
    [
        ((1, 2, 4), 1, *pair)
        for pair in LEAN + PARTIAL
        if pair not in (("ws1d", "batch-x"), ("ws2d", "batch-x"))  # no axis there
    ]
    + [((4, 2, 1), 4, *pair) for pair in LEAN + PARTIAL],
)
def test_other_meshes(shape, kv, name, attention):
    bench = Bench(model("parallel", kv), name, attention, shape)
    for check in SHORT_CHECKS:
        check(bench)


def test_the_fewest_collectives_of_a_layer():
    """One sum in 1D, two in 2D, two more if attention is split over the batch; serial layers have twice the sums."""
    assert [per_layer(name, "heads") for name in ("ws1d+lean", "ws2d+lean")] == [1, 2]
    assert [per_layer(name, "batch") for name in ("ws1d+lean", "ws2d+lean")] == [3, 4]
    assert [per_layer(name, "heads", "serial", 16) for name in ("ws1d+lean", "ws2d+lean")] == [2, 4]
    assert [per_layer(name, "heads") for name in ("ws1d", "ws2d")] == [2, 6]
    assert [per_layer(name, "batch") for name in ("ws1d", "ws2d")] == [4, 8]
    assert per_layer("ws2d+lean", "heads", shape=(8, 1, 1)) == per_layer("ws2d+lean", "heads", shape=(1, 2, 4)) == 1


@pytest.mark.slow
def test_few_heads_are_partly_replicated():
    """Four heads on eight chips are split over z and y; chips along x have the same heads."""
    config = ModelConfig(
        name="few", n_layers=2, d_model=40, d_ff=96, n_heads=4, d_head=6, n_kv_heads=1, vocab=91, block="parallel"
    )
    with pytest.raises(ValueError, match="n_heads=4 is not divisible"):
        Bench(config, "ws2d", "heads", (2, 2, 2)).program(1, True)
    for check in CHECKS:
        check(Bench(config, "ws2d+lean", "heads", (2, 2, 2)))


def test_small_batches_are_split_over_some_of_the_axes():
    small = POINT | {"batch": 16, "layout": "ws2d"}
    with pytest.raises(ValueError, match="batch=16 is not divisible"):
        Point.from_json(small | {"attention": "batch"})
    held = {a: estimate(Point.from_json(small | {"attention": a})).memory_s for a in ("heads", "batch-x", "batch-xy")}
    assert held["heads"] > held["batch-x"] > held["batch-xy"]  # less of the cache is read on each chip


@pytest.mark.parametrize("attention", ["heads", "batch"])
def test_lean_costs_no_bytes_and_fewer_starts(attention):
    few, many = (
        estimate(Point.from_json(POINT | {"layout": name, "attention": attention})) for name in ("ws1d+lean", "ws1d")
    )
    assert sum(c.bytes * c.count for c in few.collectives) == sum(c.bytes * c.count for c in many.collectives)
    assert few.collective_s < many.collective_s


@pytest.mark.parametrize(
    ("name", "attention", "why"),
    [
        ("ws2d+leen", "heads", "'leen' is no variant (did you mean 'lean'?); known: lean, ring, biring, prefetch"),
        ("ws2d+rings", "heads", "'rings' is no variant (did you mean 'ring'?); known: lean, ring, biring, prefetch"),
        ("ws2d+ring+biring", "heads", "rings send one way (ring) or both (biring)"),
        ("wgx+prefetch+ring", "heads", "prefetch comes last"),
        ("ws2d+lean+ring", "heads", "'ring' changes nothing in it"),
        ("ws2d+", "heads", "'' is no variant"),
        ("+lean", "heads", "layout='+lean' is unknown"),
        ("wgx+lean", "heads", "lean is for ws1d and ws2d"),
        ("auto+lean", "batch", "lean is for ws1d and ws2d"),
        ("ws2d+lean+lean", "heads", "names a variant twice"),
        ("ws2d", "batch-z", "known: heads, batch-x, batch-xy, batch"),
        ("ws2d+lean", "batch-x", "known: heads, batch-y, batch"),
        ("wgxyz", "batch-x", "attention='batch-x'"),
        ("replicated", "batch-x", "heads and batch only"),
        ("ws2d", "batch-", "attention='batch-' must be one of heads, batch-x, batch-y, batch-z, batch-xy, "),
        ("ws2d", "batch-yx", "batch-xy, batch-xz, batch-yz, batch"),
    ],
)
def test_bad_names_are_one_sentence(name, attention, why):
    with pytest.raises(ValueError, match=r"attention|layout") as found:
        layout(name, attention, (2, 2, 2), 1)
    assert why in str(found.value) and "\n" not in str(found.value)


def test_an_axis_that_is_not_there_splits_no_batch():
    with pytest.raises(NoAxisLeft, match="no axis of the mesh 1x2x4 is left"):
        layout("ws2d", "batch-x", (1, 2, 4), 1)
    assert not layout("wgx+prefetch", "batch", (1, 2, 4), 1).prefetch


def test_a_serial_model_with_looped_weights_has_a_price():
    point = Point.from_json(
        POINT | {"model": "toy-serial", "slice": "v4:2x2x2", "layout": "wgx+ring", "attention": "batch"}
    )
    assert estimate(point).latency_s > 0
