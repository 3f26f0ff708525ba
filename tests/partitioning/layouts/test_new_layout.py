"""Adding a layout is one function: it inherits the battery, the plan and the check with no other line changed."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P

from tests import battery
from toruslab.partitioning.layouts.catalogue import LAYOUTS, around_attention, ws2d
from toruslab.partitioning.layouts.layout import Attention, Axes, Layout
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import plan


def wgz(attention: Attention, kv: Axes) -> Layout:
    """Weights gathered over z only, batch over z; 2D weight-stationary over x and y."""
    del kv  # K and V stay whole
    yzx = ("z", "y", "x")
    return dataclasses.replace(
        ws2d(attention, ()),
        name="wgz",
        table=P(("y", "z"), "x"),
        w_in=(P("x", ("y", "z")), P("x", "y")),
        w_kv=(P("x", None),),
        w_out=(P(("y", "z"), "x"), P("y", "x")),
        embed=(P(None, "x", unreduced=frozenset("yz")), P("z", "x", unreduced=frozenset("y")), P("z", ("x", "y"))),
        x=(P("z", ("x", "y")), P("z", "x")),
        h=(P("z", "y", unreduced=frozenset("x")), P("z", ("y", "x"))),
        g=(P("z", ("y", "x")), P("z", "y")),
        out=(P("z", "x", unreduced=frozenset("y")), P("z", ("x", "y"))),
        rows=(P("z", ("x", "y")), P("z", "x"), P(None, "x")),
        logits=(P(None, ("y", "z"), unreduced=frozenset("x")), P(None, ("y", "z", "x"))),
        **around_attention(attention, batch=("z",), heads=yzx[1:], partial=("x",), w_kv=(), kv=(), e=("x",)),
    )


@pytest.mark.slow
def test_a_new_layout_inherits_everything(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "wgz", wgz)
    assert ("wgz", "heads") in battery.legal()
    assert ("wgz", "batch") in battery.legal()
    for shape in ((2, 2, 2), (1, 2, 4), (8, 1, 1)):
        for block, kv in (("parallel", 1), ("serial", 16)):
            for attention in ("heads", "batch"):
                bench = battery.Bench(battery.model(block, kv), "wgz", attention, shape)
                for check in battery.CHECKS if shape == (2, 2, 2) else battery.SHORT_CHECKS:
                    check(bench)


def test_its_plan_gathers_over_z_only(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "wgz", wgz)
    made = layout("wgz", "heads", (2, 2, 2), 1)
    found = plan(made, battery.model("parallel", 1), Pass(batch=8, length=1, capacity=4), (2, 2, 2))
    assert {p.axes for p in found if p.scope == "layer/w_in"} == {("z",)}
