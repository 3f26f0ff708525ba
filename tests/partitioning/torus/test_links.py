"""The interconnect gives the scaling book's worked answers, and obeys what any interconnect obeys."""

import dataclasses
import doctest
import itertools
import json
import math
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.partitioning.published.paper_formulas import all_gather_s
from tests.partitioning.torus import all_axes_at_once
from tests.partitioning.torus.all_axes_at_once import seconds, usable_links
from toruslab.models.presets import model
from toruslab.partitioning.published import closed_forms
from toruslab.partitioning.torus import links
from toruslab.partitioning.torus.chip import chip
from toruslab.partitioning.torus.links import CollectiveKind, Segment, permute_rate, rate, segments

BOOK = json.loads(resources.files("toruslab.partitioning.published").joinpath("data", "scaling_book.json").read_text())
KINDS: tuple[CollectiveKind, ...] = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DIMS = st.tuples(*[st.sampled_from((1, 2, 3, 4, 8))] * 3)
AXES = st.sampled_from([c for r in (1, 2, 3) for c in itertools.combinations("xyz", r)])
V4, V5E, H100 = chip("v4"), chip("v5e"), chip("h100")


def test_doctests():
    assert doctest.testmod(links).failed == 0
    assert doctest.testmod(all_axes_at_once).failed == 0


@pytest.mark.parametrize("answer", BOOK["collectives"], ids=lambda answer: answer["what"])
def test_worked_answers_of_the_scaling_book(answer):
    mesh, axes, kind = answer["mesh"], answer["axes"], answer["kind"]
    K = math.prod(mesh["xyz".index(axis)] for axis in axes)
    received = answer["array_bytes"] * (2 if kind == "all-reduce" else 1)
    received *= 1 if answer["counts_own_shard"] else (K - 1) / K
    sheet = chip(answer["chip"])
    as_asked = all(ring.closed for ring in segments(axes, mesh, sheet)) == answer["wrapped"]
    if not as_asked:  # "if the axis were a ring": the book's first answer, before it recalls that v5e has none here
        sheet = dataclasses.replace(sheet, torus_axes=3, n_links=6, wrap="cubes_of_4")
        mesh = (*mesh, 4)
    assert seconds(kind, received, axes, mesh, sheet, hop_s=0) == pytest.approx(answer["seconds"], rel=0.02)


def test_small_transfers_are_bound_by_hops():
    """Two hops on a closed axis of 4, three on an open one; the book takes a microsecond each."""
    assert seconds("all-gather", 192, "x", (4, 4, 4), V4) == pytest.approx(2e-6, rel=0.02)
    assert seconds("all-gather", 192, "y", (8, 4), V5E) == pytest.approx(3e-6, rel=0.02)


def test_llama_2_13b_steps_of_the_scaling_book():
    table = BOOK["llama_2_13b_step"]
    llama = model("llama-2-13b")
    per_token = closed_forms.kv_bytes_per_token(llama.n_layers, llama.n_kv_heads, llama.d_head)
    read = 2 * llama.n_params + np.array(table["batch"]) * per_token * table["context"]
    step_s = read / (table["n_chips"] * chip(table["chip"]).hbm_bytes_per_s)
    np.testing.assert_allclose(step_s, table["seconds"], rtol=0.02)


def test_llama_3_70b_steps_of_the_scaling_book():
    """The book rounds 17.3 ms to 17; int8 weights and cache."""
    table = BOOK["llama_3_70b_step"]
    llama = model("llama-3-70b")
    per_token = closed_forms.kv_bytes_per_token(llama.n_layers, llama.n_kv_heads, llama.d_head, 1)
    read = llama.n_params + table["batch"] * per_token * table["context"]
    step_s = read / (np.array(table["n_chips"]) * chip(table["chip"]).hbm_bytes_per_s)
    np.testing.assert_allclose(step_s, table["seconds"], rtol=0.02)


def test_flat_is_the_papers_formula():
    for axes, K in (("x", 4), ("yz", 16), ("xyz", 64)):
        received = 1e9 * (K - 1) / K
        flat = seconds("all-gather", received, axes, (4, 4, 4), V4, convention="flat")
        assert flat == pytest.approx(all_gather_s(1e9, K, 270e9))
    assert seconds("all-gather", 1e9, "xyz", (4, 4, 4), V4, hop_s=0) == pytest.approx(1e9 / 270e9)


def test_all_to_all_is_a_quarter_of_an_all_gather_on_a_closed_ring():
    """With a chip's own shard counted, as the book does: 16 chips that hold D each."""
    D, K = 1e9, 16
    gather_s = seconds("all-gather", K * D, "x", (16, 16), V5E, hop_s=0)
    assert seconds("all-to-all", D * (K - 1) / K, "x", (16, 16), V5E, hop_s=0) == pytest.approx(gather_s / 4)


def test_all_to_all_over_a_cube_is_bound_by_its_middle():
    """32 chips send half of D each across 16 wrapped columns, two links each way: D / (2 links)."""
    D = 1e9
    assert seconds("all-to-all", D * 63 / 64, "xyz", (4, 4, 4), V4, hop_s=0) == pytest.approx(D / (2 * 45e9))


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("n_chips", [2, 3, 4, 8])
def test_a_line_takes_twice_as_long_as_a_ring(kind, n_chips):
    ring, line = (usable_links(kind, (Segment(n_chips=n_chips, closed=c),)) for c in (True, False))
    assert ring == pytest.approx(2 * line)


def test_an_axis_of_two_has_one_cable():
    assert segments("x", (2, 2, 2), V4) == (Segment(n_chips=2, closed=False),)
    assert seconds("all-gather", 45e9, "x", (2, 2, 2), V4, hop_s=0) == pytest.approx(1.0)


def test_permute_uses_one_link_one_way():
    assert seconds("collective-permute", 45e9, "x", (4, 4, 4), V4, hop_s=0.5) == pytest.approx(1.5)
    assert seconds("collective-permute", 45e9, "x", (2, 4, 1), V4, hop_s=0.5) == pytest.approx(1.5)
    assert seconds("collective-permute", 45e9, "y", (2, 4, 1), V4, hop_s=0.5) == pytest.approx(2.5)


def test_a_mesh_over_another_slice():
    """z takes 8 neighbours of a row of 16, y the other factor of 2 and 4 rows, x the other 4."""

    def over(axes):
        return segments(axes, (4, 8, 8), V5E, slice_dims=(16, 16))

    assert over("z") == (Segment(n_chips=8, closed=False),)
    assert over("y") == (Segment(n_chips=4, closed=False), Segment(n_chips=2, stride=8, closed=True))
    assert over("x") == (Segment(n_chips=4, stride=4, closed=True),)
    whole = (Segment(n_chips=16, closed=True), Segment(n_chips=16, closed=True))
    assert over("xyz") == whole == segments("xy", (16, 16), V5E)
    assert segments("xz", (2, 2, 2), V5E, slice_dims=(1, 8)) == (
        Segment(n_chips=2, closed=False, n_sharing=2),
        Segment(n_chips=2, stride=4, closed=False, n_sharing=2),
    )


def test_a_slow_long_axis_is_not_hidden_by_a_fast_short_one():
    """Eight chips four links apart must still carry their own seven shards over a quarter of a link."""
    group = (Segment(n_chips=2, closed=True), Segment(n_chips=8, stride=4, closed=False))
    assert usable_links("all-gather", group) == pytest.approx(0.25 * 15 / 7)


def test_switch_uses_all_links_for_every_kind():
    for kind in KINDS:
        assert seconds(kind, 450e9, "x", (8,), H100, hop_s=0) == pytest.approx(1.0)


@given(dims=DIMS, axes=AXES, kind=st.sampled_from(KINDS), received=st.floats(0, 1e12), factor=st.floats(1, 100))
def test_more_bandwidth_never_hurts(dims, axes, kind, received, factor):
    faster = dataclasses.replace(V4, link_bytes_per_s=V4.link_bytes_per_s * factor)
    assert seconds(kind, received, axes, dims, faster) <= seconds(kind, received, axes, dims, V4)


@given(dims=DIMS, axes=AXES, kind=st.sampled_from(KINDS), order=st.permutations(range(3)))
def test_permuting_axes_changes_nothing(dims, axes, kind, order):
    turned = tuple(dims[i] for i in order)
    turned_axes = tuple("xyz"[order.index("xyz".index(axis))] for axis in axes)
    before, after = seconds(kind, 1e9, axes, dims, V4), seconds(kind, 1e9, turned_axes, turned, V4)
    assert after == pytest.approx(before)
    assert seconds(kind, 1e9, axes[::-1], dims, V4) == before


@given(dims=DIMS, axes=AXES, kind=st.sampled_from(KINDS))
def test_a_group_of_one_costs_nothing(dims, axes, kind):
    alone = tuple(1 if name in axes else size for name, size in zip("xyz", dims, strict=True))
    assert seconds(kind, 1e9, axes, alone, V4, fixed_s=1.0) == 0


@given(dims=DIMS, axes=AXES, kind=st.sampled_from(KINDS[:3]))
def test_no_group_receives_faster_than_its_links(dims, axes, kind):
    """At least a chip's own links' worth of time, and never more than one link's."""
    assume(math.prod(dims["xyz".index(axis)] for axis in axes) > 1)
    group = segments(axes, dims, V4)
    link_s = 1e9 / V4.link_bytes_per_s
    took_s = seconds(kind, 1e9, axes, dims, V4, hop_s=0)
    assert link_s / sum(ring.n_links for ring in group) == pytest.approx(took_s)  # whole axes: the book's sum
    assert took_s <= link_s * (1 + 1e-9)


@given(kind=st.sampled_from(KINDS), axes=AXES)
def test_arrays_give_what_numbers_give(kind, axes):
    sizes = np.array([0.0, 1e3, 1e9])
    together = seconds(kind, sizes, axes, (4, 4, 8), V4, fixed_s=5e-6)
    assert isinstance(together, np.ndarray)
    np.testing.assert_allclose(together, [seconds(kind, b, axes, (4, 4, 8), V4, fixed_s=5e-6) for b in sizes])
    assert together[0] >= 5e-6


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"kind": "gather"}, "kind='gather' must be one of"),
        ({"convention": "best"}, "convention='best' must be one of"),
        ({"axes": "w"}, "'w' is not an axis of the mesh, which has x, y, z"),
        ({"axes": "xx"}, "names an axis twice"),
        ({"bytes_received": -1}, "must not be negative"),
        ({"mesh": (0, 4, 4)}, "one to three positive sizes"),
        ({"chip": V5E}, "slice 4x4x4 has more axes longer than 1 than the chip's torus, which has 2"),
        ({"slice_dims": (4, 4, 8)}, "64 chips are not 128"),
        ({"mesh": (4, 6, 4), "slice_dims": (4, 4, 6)}, "cannot be laid over slice 4x4x6"),
        ({"chip": H100}, "larger than the 8 that one switch of h100 joins"),
    ],
)
def test_bad_questions_are_refused(change, rule):
    question: dict[str, Any] = {
        "kind": "all-gather",
        "bytes_received": 1.0,
        "axes": "xyz",
        "mesh": (4, 4, 4),
        "chip": V4,
    } | change
    with pytest.raises(ValueError, match=rule):
        seconds(**question)


def test_a_rate_refuses_a_group_larger_than_a_switch_joins():
    with pytest.raises(ValueError, match="larger than the 8 that one switch of h100 joins"):
        rate("all-gather", ("x",), (16,), H100)


def test_a_switch_has_no_rings():
    with pytest.raises(ValueError, match="hangs on a switch"):
        segments("x", (8,), H100)


def test_planning_needs_no_jax():
    """In a fresh interpreter: this one has JAX loaded by the other tests."""
    modules = (
        "sys, toruslab.models.presets, toruslab.partitioning.published.closed_forms, toruslab.partitioning.torus.links"
    )
    code = f"import {modules}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_step_of_a_ring():
    """One link one way, two on a closed ring both ways; a line's way back is long, a switch has all links."""
    v4 = chip("v4")
    link = v4.link_bytes_per_s
    assert permute_rate("x", (4, 4, 4), v4) == (1 / link, 1)
    assert permute_rate("x", (4, 4, 4), v4, ways=2) == (0.5 / link, 0.5)
    assert permute_rate("z", (2, 2, 3), v4, ways=2) == (1 / link, 2)
    assert permute_rate("x", (2, 2, 2), v4, ways=2) == (1 / link, 1)
    h100 = chip("h100")
    assert permute_rate("x", (8, 1, 1), h100, ways=2) == (1 / (h100.n_links * h100.link_bytes_per_s), 1)
