"""The plan: refusals in the caller's words, and what must hold for any layout."""

import pytest

from tests import battery
from toruslab.models.presets import model
from toruslab.partitioning.layouts.catalogue import LAYOUTS, kv_axes
from toruslab.partitioning.layouts.rings import looped_steps
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import check, plan
from toruslab.partitioning.plan.tensors import forward_tensors
from toruslab.partitioning.torus.mesh import Slice, mesh_shape


@pytest.mark.parametrize(("name", "attention"), battery.legal())
@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_one_chip_has_no_collectives(name, attention, block):
    made = layout(name, attention, (1, 1, 1), 4)
    assert plan(made, battery.model(block, 4), Pass(batch=3, length=5, capacity=7), (1, 1, 1)) == []


@pytest.mark.parametrize(
    ("name", "attention", "mesh", "preset", "batch", "message"),
    [
        ("ws2d", "heads", (4, 4, 4), "palm-540b", 64, r"n_heads=48 .* X\*Y\*Z=64.*; pad with n_heads=64"),
        ("ws2d", "batch", (4, 4, 4), "palm-540b-h64", 8, r"batch=8 is not divisible by X\*Y\*Z=64"),
        ("wgxy", "heads", (4, 4, 4), "palm-540b-h64", 8, r"batch=8 is not divisible by X\*Y=16"),
        ("wgxyz", "batch", (4, 4, 4), "palm-540b-h64", 1, r"batch=1 is not divisible by X\*Y\*Z=64"),
        ("ws2d", "heads", (1, 3, 1), "palm-62b", 8, r"n_heads=32 is not divisible by Y=3.*h33"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(name, attention, mesh, preset, batch, message):
    with pytest.raises(ValueError, match=message):
        check(layout(name, attention, mesh, 1), model(preset), Pass(batch=batch, length=1, capacity=16), mesh)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"layout='ws3d' is unknown \(did you mean 'ws2d'\?\)"):
        layout("ws3d", "heads", (2, 2, 2), 1)
    with pytest.raises(ValueError, match="attention='head' must be one of heads, batch-x"):
        layout("ws2d", "head", (2, 2, 2), 1)
    with pytest.raises(ValueError, match="no axis is left to split heads over"):
        layout("wgxyz", "heads", (2, 2, 2), 1)


def test_variants_are_named_after_a_plus():
    made = layout("ws2d+biring", "batch", (2, 2, 2), 1)
    assert (made.name, made.rings) == ("ws2d+biring", 2)
    for name in ("replicated", "auto"):
        with pytest.raises(ValueError, match=rf"layout='{name}\+ring': 'ring' changes nothing in it"):
            layout(f"{name}+ring", "batch", (2, 2, 2), 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ws1d", {"out": "out"}),
        ("ws2d", {"h": "h", "out": "g"}),
        ("wgx", {"h": "w_in", "kv": "w_kv", "out": "w_out"}),
        ("wgxyz", {"h": "w_in", "kv": "w_kv", "out": "w_out"}),
    ],
)
def test_what_is_looped_with_which_matmul(name, expected):
    found = looped_steps(layout(f"{name}+ring", "batch", (2, 2, 2), 1))
    assert {target: loop.name for target, loop in found.items()} == expected
    assert not looped_steps(layout(name, "batch", (2, 2, 2), 1))


def test_loops_move_the_same_bytes():
    """The bytes are equal, in more pieces, each along one axis."""
    for name in [n for n in battery.RINGS if "prefetch" not in n]:
        whole, pieces = [
            plan(layout(n, "batch", (4, 2, 2), 1), model("palm-8b"), Pass(batch=16, length=3, capacity=4), (4, 2, 2))
            for n in (name.partition("+")[0], name)
        ]
        assert len(pieces) > len(whole)
        for scope in {p.scope for p in pieces if p.kind == "collective-permute"}:
            sent = [sum(p.bytes for p in found if p.scope == scope) for found in (whole, pieces)]
            assert sent[0] == sent[1]
        assert all(len(p.axes) == 1 for p in pieces if p.kind == "collective-permute")


def test_prefetching_gathers_the_first_layer_once_more():
    config, pass_ = model("palm-8b"), Pass(batch=16, length=3, capacity=4)
    plain, ahead = [plan(layout(n, "batch", (4, 2, 2), 1), config, pass_, (4, 2, 2)) for n in ("wgx", "wgx+prefetch")]
    first = [p for p in ahead if p not in plain]
    assert [(p.scope, p.count) for p in first] == [("layer/w_in", 1), ("layer/w_kv", 1), ("layer/w_out", 1)]
    assert len(ahead) == len(plain) + 3
    for name in ("ws2d+prefetch", "wgx+ring+prefetch", "wgx+prefetch+ring"):
        with pytest.raises(ValueError, match=r"changes nothing|prefetch comes last"):
            layout(name, "batch", (2, 2, 2), 1)


def test_weights_rest_in_the_same_places():
    """Prefill and decode in different layouts use the same arrays; only 1D splits them differently."""
    for kv in (1, 4, 16):
        rests = {}
        for name, attention in battery.legal([n for n in LAYOUTS if n not in ("ws1d", "replicated")]):
            made = layout(name, attention, (2, 2, 2), kv)
            rests[name, attention] = (made.table, made.w_in[0], made.w_kv[0], made.w_out[0])
        assert len(set(rests.values())) == 1


def test_ladders_meet():
    """The residual stream ends a layer in the spec in which it began, and tensors that are joined are split alike."""
    for name, attention in battery.legal():
        made = layout(name, attention, (2, 2, 2), 4)
        if made.explicit:
            assert made.embed[-1] == made.x[0] == made.out[-1] == made.rows[0]
            assert made.h[-1] == made.g[0]
            assert made.q[0] == made.o[-1]
            assert made.q[-1] == made.o[0]
            assert made.x[-1] == made.x_kv[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4", "must be CHIP:DIMS"),
        ("v4:4x4x4x4", "must be CHIP:DIMS"),
        ("v4:0x4", "at least 1"),
        ("v4:-1", "must be CHIP:DIMS"),
    ],
)
def test_slices_that_make_no_sense(text, message):
    with pytest.raises(ValueError, match=message):
        Slice.parse(text)


def test_a_mesh_covers_its_slice():
    with pytest.raises(ValueError, match="mesh='2x2x4' has 16 places, slice=cpu:2x2x2 has 8 chips"):
        mesh_shape(Slice.parse("cpu:2x2x2"), "2x2x4")
    with pytest.raises(ValueError, match="must be one to three positive extents"):
        mesh_shape(Slice.parse("cpu:2x2x2"), "2xtwo")


@pytest.mark.parametrize(("n", "expected"), [(1, ()), (2, ("z",)), (4, ("z", "y")), (6, ("z",)), (8, ("z", "y", "x"))])
def test_kv_heads_are_split_as_far_as_they_divide(n, expected):
    assert kv_axes((2, 2, 2), n) == expected


def test_stages_name_every_ladder_once():
    made = layout("ws2d", "batch", (2, 2, 2), 1)
    scopes = [s.scope for s in forward_tensors(made, "serial", 3, True)]
    assert scopes.count("attention/h") == scopes.count("mlp/h") == 1
