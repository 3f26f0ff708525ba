"""The paper's closed forms give the paper's own figures, tables and crossovers."""

import doctest
import itertools
import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.partitioning.published import paper_formulas as formulas
from toruslab.partitioning.published import closed_forms as paper

PUBLISHED = resources.files("toruslab.partitioning.published").joinpath("data")
POWERS = st.integers(0, 9).map(lambda k: 2**k)


def published(name: str):
    return json.loads(PUBLISHED.joinpath(name).read_text(encoding="utf-8"))


def test_doctests():
    assert doctest.testmod(paper).failed == 0
    assert doctest.testmod(formulas).failed == 0


def test_figure_3_is_reproduced():
    data = published("fig3.json")
    rows = np.array(data["rows"], dtype=float)
    for column, layout in enumerate(data["columns"][1:], start=1):
        gigabytes = 2 * paper.layout_volume(layout, rows[:, 0], 16384.0, 65536.0, (4, 4, 4)) / 1e9
        np.testing.assert_allclose(np.broadcast_to(gigabytes, rows[:, 0].shape), rows[:, column], rtol=1e-3)


@pytest.mark.parametrize("row", published("table1.json")["rows"], ids=lambda row: f"{row['attention']}-{row['batch']}")
def test_table_1_is_reproduced(row):
    table = published("table1.json")
    kv_bytes = paper.kv_bytes_per_token(table["n_layers"], row["n_kv_heads"], row["d_head"])
    context = paper.longest_context(32 * 2**30, row["n_kv_shards"], row["batch"], kv_bytes, table["kv_fraction"])
    assert context == pytest.approx(row["context"], rel=0.015)


def test_layouts_cross_where_the_paper_says():
    E, F = 16384, 65536
    assert paper.ws2d_to_wg_tokens(E, F, 4, 16, 4) == 16_384
    assert paper.wg_to_wg_tokens(E, F, 64, 4, 16) == 65_536
    assert paper.wg_to_wg_tokens(E, F, 64, 16, 64) == 786_432


@pytest.mark.parametrize("layouts", list(itertools.pairwise(("ws2d", "wgx", "wgxy", "wgxyz"))), ids="-".join)
def test_crossovers_are_where_the_volumes_meet(layouts):
    E, F, mesh = 4096.0, 32768.0, (2, 4, 8)
    N = {"wgx": 2, "wgxy": 8, "wgxyz": 64}
    if layouts[0] == "ws2d":
        tokens = paper.ws2d_to_wg_tokens(E, F, 2, 32, N[layouts[1]])
    else:
        tokens = paper.wg_to_wg_tokens(E, F, 64, N[layouts[0]], N[layouts[1]])
    at = [paper.layout_volume(layout, tokens, E, F, mesh) for layout in layouts]
    assert at[0] == pytest.approx(at[1])
    after = [paper.layout_volume(layout, 1.01 * tokens, E, F, mesh) for layout in layouts]
    assert after[0] > after[1]


def test_a_layout_that_saves_nothing_never_wins():
    assert paper.ws2d_to_wg_tokens(4096, 16384, 4, 16, 1) == np.inf


@given(B=POWERS, n=st.integers(1, 4096), E=st.integers(128, 2**15), ratio=st.floats(1, 8))
def test_best_X_by_brute_force(B, n, E, ratio):
    F = E * ratio
    best = formulas.ws2d_best_volume(B, 1, E, F, n)
    X = formulas.ws2d_best_X(n, E, F)
    assert paper.ws2d_volume(B, 1, E, F, X, n / X) == pytest.approx(best)
    tried = np.geomspace(1e-2, 1e5, 2001)
    volumes = paper.ws2d_volume(B, 1, E, F, tried, n / tried)
    assert np.min(volumes) >= best * (1 - 1e-9)
    assert np.min(volumes) == pytest.approx(best, rel=1e-3)


@given(n=st.integers(1, 4096), tokens=st.integers(1, 2**20), F=st.integers(512, 2**17))
def test_best_N_by_brute_force(n, tokens, F):
    E = F / 4
    best = formulas.wg_best_volume(1, tokens, E, F, n)
    tried = np.geomspace(1e-3, 1e6, 4001)
    volumes = 2 * E * F * tried / n + 2 * tokens * E / tried
    assert np.min(volumes) >= best * (1 - 1e-9)
    assert np.min(volumes) == pytest.approx(best, rel=1e-3)
    N = formulas.wg_best_N(1, tokens, F, n)
    if n > N:
        assert paper.wg_volume(1, tokens, E, F, n, N) == pytest.approx(best)


@given(n=st.integers(1, 4096), E=st.integers(128, 2**15), ratio=st.sampled_from((1, 2, 3, 4, 8)))
def test_2d_beats_1d_as_derived(n, E, ratio):
    F = E * ratio
    if n == 4 * ratio:  # equal, up to rounding
        return
    moves_less = formulas.ws2d_best_volume(1, 1, E, F, n) < paper.ws1d_volume(1, 1, E)
    assert moves_less == formulas.ws2d_beats_ws1d(n, E, F)
    if ratio == 4:
        assert moves_less == formulas.ws2d_beats_ws1d_as_printed(n, E, F)


def test_the_printed_condition_is_wrong_away_from_4():
    assert formulas.ws2d_beats_ws1d(40, 1, 8) and not formulas.ws2d_beats_ws1d_as_printed(40, 1, 8)


def test_collectives_and_laws():
    assert formulas.all_reduce_s(1e9, 4, 270e9) == 2 * formulas.reduce_scatter_s(1e9, 4, 270e9)
    assert formulas.seconds(135e9, 270e9) == 1.0
    assert paper.forward_flops(540e9, 2) == 4 * 540e9
    assert paper.wg_volume(1, 1, 2, 8, 4, 2) == 16 + 2


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout='ws3d' has no closed form"):
        paper.layout_volume("ws3d", 1, 1, 1, (1, 1, 1))
