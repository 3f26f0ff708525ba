"""`toruslab simulate`: Orca's figure within its errors, figures that repeat, input that is refused, no device."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from toruslab.benchmarks import cli, simulate
from toruslab.benchmarks.reports.figures import front
from toruslab.benchmarks.reports.style import sheets
from toruslab.benchmarks.studies import orca as orca_figure
from toruslab.serving.simulation.pricing import Pipeline, Pricing
from toruslab.serving.simulation.scenario import highest_rate

TOY = ["--slices", "v5e:4x4", "--requests", "60", "--max-bs", "8"]


def rows(capsys, *argv: str) -> list[dict]:
    assert simulate.main([*TOY, *argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def figure() -> list[dict]:
    return orca_figure.compare(500)


@pytest.mark.slow
def test_orcas_peaks_are_within_a_fifth(figure):
    peaks = {r["line"]: r["error"] for r in figure if r["what"].startswith("peak")}
    assert len(peaks) == 6 and max(map(abs, peaks.values())) <= 0.20, peaks


@pytest.mark.slow
def test_orcas_curve_is_within_15_percent_up_to_6_requests_a_second(figure):
    curve = {r["at"]: r["error"] for r in figure if r["line"] == "orca32" and r["what"].startswith("latency")}
    assert len(curve) == 12 and max(curve) == 6.0 and max(map(abs, curve.values())) <= 0.15, curve


@pytest.mark.slow
def test_the_headline_and_its_baseline(figure):
    at = {r["line"]: r["error"] for r in figure if r["what"].startswith("requests/s")}
    assert abs(at["orca32"]) <= 0.15 and abs(at["ft1"]) <= 0.20, at


def test_the_fit_is_three_constants():
    assert len(orca_figure.FITTED) == 3 and not set(orca_figure.FITTED) & set(orca_figure.ASSUMED)


def test_the_ladder_only_lacks_its_second_batch_rule():
    """Every step is worth something, but for larger batches under the baseline's rule, which waits for the longest."""
    found = [r["rate"] for r in orca_figure.ladder(60)]
    assert found[2] < found[1] and [*found[:2], *found[3:]] == sorted([*found[:2], *found[3:]])
    assert 25 < found[-1] / found[0] < 70


def test_other_panels_follow_from_the_weights():
    found = {(r["figure"], r["what"][:4]): r["simulated"] for r in orca_figure.predict(["orca-341b"], 60)[6:8]}
    pricing = orca_figure.scenario(orca_figure.SYSTEMS[3], "orca-341b").server.times
    assert isinstance(pricing, Pricing) and pricing.pipeline.n_chips == 32
    weights_s = 341e9 * 2 / (8 * 1.555e12 * orca_figure.FITTED["hbm_efficiency"])
    assert found["orca-341b", "late"] == pytest.approx(weights_s * 1e3, rel=0.15)


def test_the_same_seed_gives_the_same_rows(capsys):
    once, again = rows(capsys), rows(capsys)
    assert once == again and len(once) == 4
    other = rows(capsys, "--seed", "1")
    assert other != once and [set(r) for r in other] == [set(r) for r in once]
    assert all(r["returned"] == r["arrived"] == 60 and r["source"] == "analytic stage times" for r in once)


def test_a_sweep_has_a_front_and_files(capsys, tmp_path):
    argv = ("--layouts", "ws1d,ws2d", "--attention", "heads", "--policies", "orca,request-level", "--rates", "2,8")
    found = rows(capsys, *argv, "--out", str(tmp_path / "run"))
    assert len(found) == 8 and 0 < sum(r["pareto"] for r in found) < 8
    front = [(r["chip_s_per_token"], r["normalised_s"]["median"]) for r in found if r["pareto"]]
    for r in found:
        assert any(c <= r["chip_s_per_token"] and s <= r["normalised_s"]["median"] for c, s in front)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"rows.jsonl", "pareto.svg", "pareto.png"}
    assert simulate.main([*TOY, *argv]) == 0
    assert "request-level" in capsys.readouterr().out


def test_labels_of_the_pictures_are_plain_and_do_not_touch(capsys):
    steps = [{"figure": "ladder", "step": f"step {i}", "rate": 0.16 * 1.7**i, "factor": 1.7**i} for i in range(8)]
    spans = {"median": 0.03}
    runs = [
        {"slice": "v5e:4x4", "layout": "ws2d", "policy": "orca", "rate": i, "pareto": i == 1, "normalised_s": spans}
        | {"chip_s_per_token": 0.1 / i}
        for i in (1, 2, 3)
    ]
    for figure, axes in (
        (sheets(orca_figure.ladder_picture(steps))["ladder"], "x"),
        (sheets(front(runs))["pareto"], "xy"),
    ):
        FigureCanvasAgg(figure).draw()
        panel = figure.axes[0]
        for name in axes:
            axis = getattr(panel, f"{name}axis")
            boxes = [label.get_window_extent() for label in axis.get_ticklabels(which="both") if label.get_text()]
            assert not any("10^" in label.get_text() for label in axis.get_ticklabels(which="both"))
            ends = sorted((b.x0, b.x1) if name == "x" else (b.y0, b.y1) for b in boxes)
            assert all(a[1] < b[0] for a, b in pairwise(ends))
        edge = panel.get_window_extent()
        assert all(text.get_window_extent().x1 < edge.x1 for text in panel.texts)


def test_capacity_is_where_limits_are_just_met(capsys):
    argv = ("--requests", "300", "--limits", "1:0.03")
    (found,) = rows(capsys, *argv, "--capacity")
    assert found["within_limits"] >= 0.9 and found["rate"] < found["peak_per_s"]
    (above,) = rows(capsys, *argv, "--rates", str(found["rate"] * 1.05))
    assert above["within_limits"] < 0.9
    (none,) = rows(capsys, "--limits", "0.001:0.001", "--capacity")
    assert none["rate"] is None and none["chip_s_per_token"] is None
    argv = ["--limits", "0.001:0.001", "--capacity", "--policies", "orca,request-level"]
    assert simulate.main([*TOY, *argv]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for policy in ("orca", "request-level"):
        assert f"policy {policy}: no rate keeps the limits: at a hundredth of the peak" in said


def test_refused_requests_are_in_the_table(capsys):
    argv = [*TOY, "--policies", "chunked-512", "--rates", "1"]
    for slots, is_there in (("300", True), ("640", False)):
        (found,) = rows(capsys, *argv, "--slots", slots)
        assert bool(found["refused"]) is is_there
        assert simulate.main([*argv, "--slots", slots]) == 0
        out = capsys.readouterr().out
        assert ("refused" in out) is is_there and (not is_there or str(found["refused"]) in out)


def test_highest_rate_stops_at_the_top():
    assert highest_rate(lambda rate: True, 5.0) == 5.0


def test_prompts_on_a_slice_of_their_own(capsys):
    argv = ("--weights", "int8", "--rates", "2")
    together, apart = rows(capsys, *argv), rows(capsys, *argv, "--disaggregate", "v5e:2x4")
    assert apart[0]["prefill_slice"] == "v5e:2x4" and apart[0]["returned"] == 60
    assert apart[0]["itl_s"]["p99"] < together[0]["itl_s"]["p99"], "no prompt stands in the way of a token"
    assert len(apart[0]["stage_busy"]) == 2
    assert (together[0]["chips"], apart[0]["chips"], apart[0]["prefill_chips"]) == (16, 24, 8)
    assert apart[0]["chip_s_per_token"] == pytest.approx(24 / apart[0]["tokens_per_s"])


def test_measured_stage_times_and_a_timeline(capsys, tmp_path):
    table, picture = tmp_path / "times.jsonl", tmp_path / "run.json"
    table.write_text(
        "".join(
            json.dumps({"stage": s, "tokens": t, "context": c, "seconds": 1e-3 * t}) + "\n"
            for s in (0, 1)
            for t in (1, 100)
            for c in (1, 1000)
        )
    )
    argv = ("--stage-times", str(table), "--slices", "cpu:2x2x1", "--slots", "5000", "--rates", "1")
    (found,) = rows(capsys, *argv, "--timeline", str(picture))
    assert (found["stages"], found["chips"], found["source"]) == (2, 8, "measured stage times")
    assert json.loads(picture.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model", "palm-8c"], "palm-8b"),
        (["--slices", "v5e"], "slice='v5e' must be CHIP:DIMS"),
        (["--slices", "cpu:2x2x2"], "attached platform"),
        (["--slices", "v5e:2x2"], "GB a chip"),
        (["--layouts", "ws3d"], "layout='ws3d' is unknown"),
        (["--layouts", "ws1d,ws1d"], "each once"),
        (["--policy", "orka"], "policy='orka' must be one of"),
        (["--reservation", "none"], "reservation='none' must be one of"),
        (["--trace", "mine"], "trace='mine' must be one of"),
        (["--prompt", "9..1"], "prompt='9..1' must be N or LOW..HIGH"),
        (["--arrivals", "gamma"], "arrivals='gamma' must be poisson, gamma:CV with"),
        (["--arrivals", __file__], "line 1: "),
        (["--rates", "1,-2"], "rates='1,-2' must be numbers of requests per second"),
        (["--rates", "x"], "rates='x' must be numbers of requests per second"),
        (["--requests", "0"], "requests=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--max-bs", "0"], "max_bs=0 must be at least 1"),
        (["--in-flight", "0"], "in_flight=0 must be at least 1"),
        (["--slots", "100000000"], "slots=100000000 are more than the"),
        (["--slots", "10"], "every request was refused"),
        (["--stages", "3"], "stages=3 must divide the 80 layers"),
        (["--limits", "2"], "limits='2' must be TTFT:TPOT"),
        (["--capacity"], "capacity needs --limits"),
        (["--capacity", "--limits", "1:1", "--rates", "1"], "stands beside --capacity"),
        (["--warm-up", "1"], "warm_up=1.0 must be a share"),
        (["--host-us", "nan"], "host_us=nan must be"),
        (["--max-output", "0"], "max_output=0 must be at least 1"),
        (["--constants", '{"hbm": 1}'], "constants='{\"hbm\": 1}' must be a JSON object"),
        (["--constants", '{"hbm_efficiency": 0}'], "hbm_efficiency=0 must be a number from 0.001 to 1"),
        (["--disaggregate", "v5e:4x4", "--policy", "request-level"], "cannot go on"),
        (["--prefill-layout", "ws1d"], "needs --disaggregate"),
        (["--stage-times", "no/such/file", "--slots", "9"], "no/such/file"),
        (["--stage-times", "no/such/file"], "stage_times need --slots"),
        (["--timeline", "x.json"], "timeline='x.json' is of one run"),
        (["--figure", "orca-9"], "--figure is a study now: run python -m benchmarks.studies.orca"),
        (["--out", __file__], "is a file, not a folder"),
        (["--out", ""], "argument --out: '' must be a path"),
        (["--disaggregate", ""], "disaggregate='' must not be empty"),
        (["--prefill-max-bs", "4"], "prefill_max_bs=4 needs --disaggregate"),
        (["--figure", "orca-10b", "--max-bs", "32"], "--figure is a study now: run python -m benchmarks.studies.orca"),
        (
            ["--figure", "orca-10b", "--timeline", "x.json"],
            "--figure is a study now: run python -m benchmarks.studies.orca",
        ),
        (["--policies", "chunked-64,chunked-064"], "must be different ones"),
        (["--policies", "chunked-0"], "policy='chunked-0' must have a budget of at least 1 token"),
        (["--arrivals", "gamma-0"], "arrivals='gamma-0' must be poisson, gamma:CV with a CV from 0.01 to 100"),
        (["--stages", "0"], "stages=0 must be at least 1"),
        (["--stage-times", "x", "--slots", "9", "--mesh", "2x2"], "--mesh stands beside --stage-times"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(capsys, argv, sentence):
    assert cli.guarded(simulate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_arrivals_of_a_file_are_taken_as_they_are_or_stretched(capsys, tmp_path):
    file = tmp_path / "times"
    file.write_text("\n".join(str(0.5 * i) for i in range(61)))
    (found,) = rows(capsys, "--arrivals", str(file))
    assert found["rate"] == 60 / 29.5 and found["window_s"] == [0.2 * 29.5, 29.5] and found["returned"] == 60
    twice, thrice = rows(capsys, "--arrivals", str(file), "--rates", "4,6")
    assert twice["window_s"][1] == pytest.approx(15) and thrice["window_s"][1] == pytest.approx(10)
    assert cli.guarded(simulate.main, ["--requests", "62", "--arrivals", str(file)]) == 2
    assert "has 61 times, fewer than requests=62" in capsys.readouterr().err


def test_simulate_touches_no_device():
    program = (
        "import sys; from benchmarks import simulate; code = simulate.main(['--requests', '20', '--rates', '1']);"
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_a_pipeline_of_an_unpriced_chip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Pipeline(model="toy", slice=f"{tmp_path.name}/none.toml:2x2x2")
