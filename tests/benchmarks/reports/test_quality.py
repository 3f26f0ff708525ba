"""How good a prediction is: ranks, regret, errors and targets of rows, and whether two runs agree."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.points import POINT
from toruslab.benchmarks.reports.cells import groups
from toruslab.benchmarks.reports.quality import agree, crossover_sentences, crossovers, quality, ranks, regret, spearman

LAYOUTS = ("ws1d", "ws2d", "wgx", "wgxy", "wgxyz", "replicated")
times = st.floats(1e-6, 1e3)
cells = st.lists(times, min_size=2, max_size=len(LAYOUTS))


def rows(measured, predicted, **changes):
    """Rows of one cell; a time that is None is left out."""
    found = []
    for name, m, p in zip(LAYOUTS, measured, predicted, strict=False):
        point = POINT | {"layout": name} | changes
        found.append({"point": point, "source": "analytic"} | ({} if p is None else {"latency_s": p}))
        if m is not None:
            found.append({"point": point, "source": "measured", "latency_s": m})
    return found


def only(found):
    (lines,) = groups(found).values()
    return lines


@given(cells)
def test_a_perfect_prediction(measured):
    found = quality(rows(measured, measured))
    assert found.median_error == found.p90_error == found.worst_error == 0
    assert found.mean_regret == found.worst_regret == 0
    assert found.spearman == (None if len(set(measured)) == 1 else pytest.approx(1))
    assert found.n_points == found.n_measured == len(measured)
    assert all(t.met in (True, None) for t in found.targets)


@given(cells, st.data(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_ranks_and_regret_do_not_change_with_the_scale(measured, data, scale):
    predicted = data.draw(st.lists(times, min_size=len(measured), max_size=len(measured)))
    one, other = quality(rows(measured, predicted)), quality(rows(measured, [p * scale for p in predicted]))
    assert one.worst_regret == other.worst_regret
    assert one.spearman == pytest.approx(other.spearman) if one.spearman is not None else other.spearman is None
    both = quality(rows([m * scale for m in measured], [p * scale for p in predicted]))
    assert both.median_error == pytest.approx(one.median_error)
    assert both.worst_regret == pytest.approx(one.worst_regret)


@given(cells, st.data())
def test_regret_is_what_another_choice_would_save(measured, data):
    predicted = data.draw(st.lists(times, min_size=len(measured), max_size=len(measured)))
    found = regret(only(rows(measured, predicted)))
    assert found is not None and 0 <= found.value <= max(measured) / min(measured) - 1
    worst = max(range(len(measured)), key=lambda i: measured[i])
    lies = [p + 2000 for p in predicted]
    lies[worst] = 1.0
    lied = regret(only(rows(measured, lies)))
    assert lied is not None and lied.value == pytest.approx(max(measured) / min(measured) - 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_ranks_share_their_average(values):
    by_hand = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert ranks(values).tolist() == by_hand


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=12))
def test_spearman_is_symmetric_bounded_and_turns_with_the_order(pairs):
    x, y = zip(*pairs, strict=True)
    found = spearman(x, y)
    if found is None:
        assert len(set(x)) == 1 or len(set(y)) == 1
        return
    assert -1 <= found <= 1
    assert spearman(y, x) == pytest.approx(found)
    assert spearman(x, [-v for v in y]) == pytest.approx(-found)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1], [1]) is None


def test_of_equal_predictions_the_slowest_counts():
    found = regret(only(rows([1.0, 3.0, 2.0], [5.0, 5.0, 6.0])))
    assert found is not None
    assert (found.picked, found.best, found.value) == ("ws2d/batch", "ws1d/batch", 2.0)


def test_the_best_may_have_no_prediction_but_the_pick_must_be_measured():
    found = regret(only(rows([1.0, 2.0, 3.0, None], [None, 5.0, 6.0, 1.0])))
    assert found is not None and (found.picked, found.best, found.value) == ("ws2d/batch", "ws1d/batch", 1.0)
    assert regret(only(rows([1.0, 2.0], [1.0, None]))) is None


def test_numbers_over_the_grid():
    grid = rows([1.0, 2.0], [1.1, 1.8]) + rows([10.0, 20.0], [30.0, 20.0], batch=64)
    found = quality(grid)
    assert found.n_points == 4 and len(found.cells) == 2
    assert found.median_error == pytest.approx(0.1)
    assert found.p90_error == pytest.approx(0.1 + 0.7 * 1.9)  # between the third and the fourth of four
    assert found.worst_error == pytest.approx(2) and str(found.worst_point).startswith("ws1d/batch, decode, batch 64")
    assert (found.mean_regret, found.worst_regret) == (0.5, 1.0)
    assert {t.name: t.met for t in found.targets} == {
        "median_error": True,
        "spearman": False,
        "mean_regret": False,
        "worst_regret": False,
    }
    assert found.to_json()["targets_met"]["median_error"] is True


def test_nothing_is_made_up_where_nothing_is_known():
    found = quality([])
    assert found.n_points == 0 and all(t.met is None for t in found.targets)
    odd = [None, "fast", math.nan, math.inf, 0, -1.0, True]
    for value in odd:
        assert quality(rows([1.0, 2.0], [value, value])).n_points == 0
        assert quality(rows([value, value], [1.0, 2.0])).n_measured == 0


def test_a_point_that_failed_has_no_numbers_and_one_that_was_done_again_has():
    failed = {"point": POINT | {"layout": "ws1d"}, "source": "measured", "error": "no memory"}
    assert quality([*rows([None, 2.0], [1.0, 2.0]), failed]).n_measured == 1
    (line, _) = only([failed, *rows([1.0, 2.0], [1.0, 2.0])])
    assert line.measured_s == 1.0 and line.error is None
    (line, _) = only([*rows([1.0, 2.0], [1.0, 2.0]), failed])
    assert line.measured_s == 1.0 and line.error is None


def test_auto_is_predicted_from_its_program_and_not_from_the_plan():
    point = POINT | {"layout": "auto"}
    analytic = {"point": point, "source": "analytic", "latency_s": 9.0, "collective_bytes": 8}
    compiled = {"point": point, "source": "compiled", "latency_s": 3.0, "terms": {"matmul_s": 3.0}}
    (line,) = only([analytic, compiled])
    assert line.predicted_s == 3.0 and line.terms == {"matmul_s": 3.0}
    (line,) = only([analytic])
    assert line.predicted_s is None


@given(st.lists(st.tuples(times, times).map(lambda t: (min(t), max(t))), min_size=2, max_size=4))
def test_runs_agree_with_themselves_and_in_any_order(spreads):
    assert agree([spreads[0]] * 2) is True
    assert agree(spreads) == agree(spreads[::-1])
    assert agree([spreads[0], (spreads[0][1] * 1.01, spreads[0][1] * 2)]) is False
    assert agree([*spreads, None]) is None and agree(spreads[:1]) is None


def duel(tokens, gathered, stationary, source="measured"):
    return [
        {"point": POINT | {"layout": name, "batch": tokens}, "source": source, "latency_s": t}
        for name, t in (("wgx", gathered), ("ws2d", stationary), ("replicated", 1e-9))
    ]


def test_the_crossover_lies_where_the_ratio_falls_through_one():
    rows_ = duel(8, 4.0, 1.0) + duel(128, 1.0, 4.0) + duel(8, 2.0, 1.0, "analytic") + duel(128, 3.0, 2.0, "analytic")
    (found,) = crossovers(groups(rows_))
    assert found.tokens("measured") == pytest.approx(32)  # halfway between 8 and 128 in the logarithms
    assert found.tokens("predicted") is None
    assert [d.best for d in found.duels["measured"]] == ["ws2d/batch", "wgx/batch"]
    (sentence,) = crossover_sentences(groups(rows_))
    assert "measured from about 32 tokens; predicted not up to 128 tokens" in sentence
    assert crossover_sentences(groups(duel(8, 4.0, 1.0))) == []


def test_whether_weights_move_is_the_plans_to_say():
    moved = {"point": POINT | {"layout": "mine"}, "source": "analytic"}
    gathers = {"scope": "layer/w_in", "kind": "all-gather", "axes": ["x"], "bytes": 8, "count": 1}
    assert only([moved])[0].is_gathered is None
    assert only([moved | {"collectives": [gathers]}])[0].is_gathered is True
    assert only([moved | {"collectives": [gathers | {"scope": "layer/x"}]}])[0].is_gathered is False


def test_no_jax_is_needed():
    program = "import sys, toruslab.benchmarks.reports.quality; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
