"""`toruslab simulate`: Orca's figure within its errors, figures that repeat, input that is refused, no device."""

import json
import subprocess
import sys

import pytest

from benchmarks import cli, orca_figure, simulate
from serving.pricing import Pipeline, Pricing
from serving.scenario import highest_rate

TOY = ["--slices", "v5e:4x4", "--requests", "60", "--max-bs", "8"]


def rows(capsys, *argv: str) -> list[dict]:
    assert simulate.main([*TOY, *argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def figure() -> list[dict]:
    return orca_figure.compare(500)


def test_orcas_peaks_are_within_a_fifth(figure):
    peaks = {r["line"]: r["error"] for r in figure if r["what"].startswith("peak")}
    assert len(peaks) == 6 and max(map(abs, peaks.values())) <= 0.20, peaks


def test_orcas_curve_is_within_15_percent_up_to_6_requests_a_second(figure):
    curve = {r["at"]: r["error"] for r in figure if r["line"] == "orca32" and r["what"].startswith("latency")}
    assert len(curve) == 12 and max(curve) == 6.0 and max(map(abs, curve.values())) <= 0.15, curve


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
    pricing = orca_figure.scenario(orca_figure.CONTENDERS[3], "orca-341b").server.times
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


def test_capacity_is_where_limits_are_just_met(capsys):
    argv = ("--requests", "300", "--limits", "1:0.03")
    (found,) = rows(capsys, *argv, "--capacity")
    assert found["within_limits"] >= 0.9 and found["rate"] < found["peak_per_s"]
    (above,) = rows(capsys, *argv, "--rates", str(found["rate"] * 1.05))
    assert above["within_limits"] < 0.9
    (none,) = rows(capsys, "--limits", "0.001:0.001", "--capacity")
    assert none["rate"] is None and none["chip_s_per_token"] is None
    assert simulate.main([*TOY, "--limits", "0.001:0.001", "--capacity"]) == 0


def test_highest_rate_stops_at_the_top():
    assert highest_rate(lambda rate: True, 5.0) == 5.0


def test_prompts_on_a_slice_of_their_own(capsys):
    argv = ("--weights", "int8", "--rates", "2")
    together, apart = rows(capsys, *argv), rows(capsys, *argv, "--disaggregate", "v5e:2x4")
    assert apart[0]["prefill_slice"] == "v5e:2x4" and apart[0]["returned"] == 60
    assert apart[0]["itl_s"]["p99"] < together[0]["itl_s"]["p99"], "no prompt stands in the way of a token"
    assert len(apart[0]["stage_busy"]) == 2


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
        (["--arrivals", "gamma"], "arrivals='gamma' must be poisson, or gamma-CV"),
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
        (["--figure", "orca-9"], "invalid choice"),
        (["--out", __file__], "is a file, not a folder"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(capsys, argv, sentence):
    assert cli.guarded(simulate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_simulate_touches_no_device():
    program = (
        "import sys; from benchmarks import simulate; code = simulate.main(['--requests', '20', '--rates', '1']);"
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_a_pipeline_of_an_unpriced_chip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Pipeline(model="toy", slice=f"{tmp_path.name}/none.toml:2x2x2")
