"""`toruslab serve-bench`: bad input, rows, runs that do not count, resumed runs, and what its rows say."""

import json
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest

from toruslab.benchmarks import cli, serve_bench
from toruslab.benchmarks.measure import serving_run as serve_runs
from toruslab.benchmarks.reports.serving_curves import MULTIPLE, LatencyCurve, findings, good
from toruslab.benchmarks.reports.serving_report import markdown
from toruslab.benchmarks.runs import serving_setting

ENGINE = ["--model", "toy-s-1l", "--slice", "cpu:2x1x1", "--max-bs", "2", "--trace", "fixed:5:3", "--scale", "1"]
SMALL = [*ENGINE, "--requests", "6", "--seeds", "1", "--rates", "50,200", "--policies", "request-level@2,orca"]


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    """The tests' devices are there already."""
    monkeypatch.setattr(serve_bench.processes, "join", lambda *_: None)


@pytest.fixture(scope="module")
def made():
    """An engine for all tests here: what is compiled is the same."""
    with serve_runs.engine(serving_setting.read(serve_bench.options_of(SMALL)), lambda done, of: None) as made:
        yield made


@pytest.fixture
def quick_engine(monkeypatch, made):
    """It stays open from one command to the next."""
    monkeypatch.setattr(serve_runs, "engine", lambda setting, compiled: nullcontext(made))


def rows(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model", "toi"], "model='toi' is not known"),
        (["--slice", "cpu"], "slice='cpu' must be CHIP:DIMS"),
        (["--slice", "cpu:4x4x1"], "mesh=16x1x1 needs 16 devices"),
        (["--slice", "gpu:1"], "needs gpu devices"),
        (["--stages", "3"], "stages=3 does not divide the 4 layers of toy"),
        (["--stages", "4", "--slice", "cpu:2x1x1"], "stages=4 does not divide the 2 chips of slice=cpu:2x1x1"),
        (["--stages", "4"], "stages=4 divides no extent of slice=cpu:2x2x2"),
        (["--stages", "0"], "stages=0 must be at least 1"),
        (["--stages", "2", "--mesh", "2x2x2"], "mesh='2x2x2' has 8 places"),
        (["--layout", "ws3d"], "layout='ws3d' is unknown"),
        (["--attention", "tails"], "attention='tails' must be"),
        (["--weights", "fp4"], "weights='fp4' must be one of"),
        (["--policies", "orcas"], "policy='orcas' must be one of"),
        (["--policies", "chunked-0"], "policy='chunked-0' must have a budget of at least 1 token"),
        (["--policies", "orca@0"], "'orca@0' must be POLICY or POLICY@N"),
        (["--policies", "orca,orca"], "policies='orca,orca' must be different ones"),
        (["--reservation", "none"], "reservation='none' must be one of own"),
        (["--held", "tight"], "held='tight' must be rows or pages"),
        (["--max-bs", "0"], "max_bs=0 must be at least 1"),
        (["--max-bs", "x"], "argument --max-bs: invalid int value: 'x'"),
        (["--slots", "10"], "slots=10 must be at least 96, what the longest request needs"),
        (["--trace", "azure"], "trace='azure' must be one of orca, azure-conversation"),
        (["--trace", "fixed:0:3"], "tokens=0 must be at least 1"),
        (["--scale", "0"], "scale='0' must be a positive factor"),
        (["--scale", "1/4:x"], "scale='1/4:x' must be a positive factor"),
        (["--arrivals", "gamma:-1"], "arrivals='gamma:-1' must be poisson, gamma:CV"),
        (["--arrivals", "no/such/file"], "or a file with a time in seconds on each line"),
        (["--arrivals", __file__], "line 1: "),
        (["--rates", "2,0"], "rates='2,0' must be positive"),
        (["--rates", "2,2"], "rates='2,2' must be positive, 0.001 to 1e+06, and each different"),
        (["--rates", "fast"], "rates='fast' must be numbers of requests per second"),
        (["--requests", "1"], "requests=1 must be at least 2"),
        (["--requests", "2000000"], "requests=2000000 must be at most 1000000"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
        (["--warm-up", "1"], "warm_up=1.0 must be a share of the time"),
        (["--limits", "0.5"], "limits='0.5' must be TTFT:TPOT in seconds"),
        (["--resume"], "holds no unfinished run"),
        (["--resume", "--rates", "2"], "--rates beside --resume: a run goes on as it was started"),
        (["--rates", ""], "rates='' must not be empty"),
        (["--policies", ""], "policies='' must not be empty"),
        (["--out", ""], "argument --out: '' must be a path"),
        (["--rates", "1e-320"], "must be positive, 0.001 to 1e+06"),
        (["--seeds", "1001"], "seeds=1001 must be at most 1000"),
        (["--max-bs", "5000"], "max_bs=5000 must be at most 4096"),
        (["--scale", "1e300"], "scale='1e300' must be a positive factor"),
        (["--arrivals", "gamma:1e-200"], "with a CV from 0.01 to 100"),
        (["--policies", "chunked-64,chunked-064"], "must be different ones"),
        (["--policies", "orca,orca@1"], "must be different ones; without @N there are stages=1 in flight"),
        (["--model", "palm-540b"], "weights and KV cache take at least 21"),
        (["--trace", "fixed:999999:999999", "--scale", "1"], "32 rows of 1999998 tokens: weights and KV cache take"),
    ],
)
def test_refuses_in_one_sentence(capsys, tmp_path, argv, sentence):
    assert cli.guarded(serve_bench.main, ["--out", str(tmp_path / "out"), *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_every_run_is_a_row_and_the_report_stands_beside(tmp_path, quick_engine, capsys):
    argv = [*SMALL, "--out", str(tmp_path), "--timeline", "--limits", "9:9"]
    assert cli.guarded(serve_bench.main, argv) == 0
    found = rows(tmp_path)
    assert {(r["rung"], r["rate_per_s"], r["seed"]) for r in found} == {
        (rung, rate, 0) for rung in ("request-level@2", "orca") for rate in (50.0, 200.0)
    }
    for row in found:
        assert row["arrived"] == row["returned"] == 6 and row["refused"] == row["compilations"] == 0
        assert 0 <= row["filling_share"] <= row["wasted_share"] < 1
        assert not row["dead_share"]  # 0, or None: no batch was made in so short a window
        assert 0 < row["pages_used_peak"] <= row["pages"] and len(row["stage_busy"]) == 1
        assert row["within_limits"] == 1 and row["tokens"] == 6 * (5 + 2)
        assert row["serving"]["n_slots"] == 2 * 8 and row["serving"]["rows"] == 4
    for name in ("serve.md", "summary.json", "latency.svg", "latency.png", "timeline.svg", "finished"):
        assert (tmp_path / name).exists()
    for rung in ("request-level@2", "orca"):
        assert json.loads((tmp_path / "timeline" / f"{rung}.json").read_text())["traceEvents"]
    assert "Orca over the strongest request-level rung" in " ".join(capsys.readouterr().out.split())


def test_an_interrupted_run_goes_on(tmp_path, quick_engine, monkeypatch, capsys):
    measure, left = serve_runs.measure, [3]

    def interrupted(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(*args)

    monkeypatch.setattr(serve_runs, "measure", interrupted)
    argv = [*SMALL[:-4], "--policies", "request-level@2,orca", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.guarded(serve_bench.main, argv) == 130
    before = rows(tmp_path)
    assert len(before) == 3 and not (tmp_path / "finished").exists()
    monkeypatch.setattr(serve_runs, "measure", measure)
    assert cli.guarded(serve_bench.main, ["--resume", "--out", str(tmp_path), "--json"]) == 0
    assert rows(tmp_path)[:3] == before
    rates = json.loads((tmp_path / "rates.json").read_text())["rates_per_s"]
    assert len(rows(tmp_path)) == 2 * len(rates)  # the rates that the first one has measured
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows(tmp_path)
    assert cli.guarded(serve_bench.main, ["--resume", "--out", str(tmp_path)]) == 2


def test_quick_leaves_alone_what_was_given_even_the_default():
    quick = serve_bench.options_of(["--quick", "--requests", "64"])
    assert (quick.requests, quick.seeds, quick.max_bs, quick.model) == (64, 1, 8, "toy-s")


def test_no_file_is_left_half_written_or_used_when_damaged(tmp_path, quick_engine, monkeypatch, capsys):
    argv = [*SMALL[:-4], "--policies", "request-level@2,orca", "--out", str(tmp_path)]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_runs, "measure", interrupted)
    assert cli.guarded(serve_bench.main, argv) == 130
    kept = tmp_path / "rates.json"
    assert kept.exists() and not list(tmp_path.glob("*.part"))
    for damaged in (kept.read_text()[:20], "[]", '{"rates_per_s": [null]}'):
        kept.write_text(damaged)
        assert cli.guarded(serve_bench.main, ["--resume", "--out", str(tmp_path)]) == 2
        assert "rates.json" in capsys.readouterr().err


def test_rows_on_standard_output_leave_the_report_in_the_folder(tmp_path, quick_engine, capsys):
    assert cli.guarded(serve_bench.main, [*SMALL, "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(text) for text in out.splitlines()] == rows(tmp_path) and "serve.md" in err
    assert {"serve.md", "summary.json", "latency.png"} <= {p.name for p in tmp_path.iterdir()}


def test_a_number_that_json_does_not_have_is_an_error_not_a_row(tmp_path, quick_engine, monkeypatch):
    measure = serve_runs.measure
    monkeypatch.setattr(serve_runs, "measure", lambda *args: measure(*args) | {"iteration_s": float("nan")})
    assert cli.guarded(serve_bench.main, [*SMALL, "--out", str(tmp_path)]) == 1
    assert all("JSON compliant" in row["error"] for row in rows(tmp_path))
    assert "NaN" not in (tmp_path / "rows.jsonl").read_text()


def test_a_run_that_compiled_or_lost_a_request_fails(tmp_path, quick_engine, monkeypatch, capsys):
    ids = serve_runs.prompt_ids
    fresh = iter(range(3, 1000))

    def compiles(request, seed):
        jax.jit(lambda x: x + 1)(jnp.zeros(next(fresh))).block_until_ready()
        return ids(request, seed)

    monkeypatch.setattr(serve_runs, "prompt_ids", compiles)
    argv = [*ENGINE, "--requests", "4", "--seeds", "1", "--policies", "request-level@2,orca", "--rates", "200"]
    assert cli.guarded(serve_bench.main, [*argv, "--out", str(tmp_path / "a")]) == 1
    assert all("compiled in measured traffic" in r["error"] and r["compilations"] for r in rows(tmp_path / "a"))
    assert not good(rows(tmp_path / "a"))
    assert "failed: orca, 200.0 requests/s, seed 0: " in capsys.readouterr().err

    monkeypatch.setattr(serve_runs, "prompt_ids", ids)
    seen = serve_runs.Metrics.arrived

    def counted(self, request):
        if request.id != 2:
            seen(self, request)

    monkeypatch.setattr(serve_runs.Metrics, "arrived", counted)
    assert cli.guarded(serve_bench.main, [*argv, "--out", str(tmp_path / "b")]) == 1
    assert all("requests were lost" in row["error"] for row in rows(tmp_path / "b"))


def test_a_run_that_raises_is_a_row_and_the_others_go_on(tmp_path, quick_engine, monkeypatch):
    measure = serve_runs.measure

    def fails(setting, made, scheme, rate, seed):
        if scheme.name == "orca":
            raise RuntimeError("out of pages\nat length")
        return measure(setting, made, scheme, rate, seed)

    monkeypatch.setattr(serve_runs, "measure", fails)
    assert cli.guarded(serve_bench.main, [*SMALL, "--out", str(tmp_path)]) == 1
    assert {row["rung"]: row.get("error") for row in rows(tmp_path)} == {
        "request-level@2": None,
        "orca": "RuntimeError: out of pages",
    }


def test_stages_have_equal_parts_of_layers_and_slice():
    def read(*argv):
        return serving_setting.read(serve_bench.options_of(argv))

    assert read("--stages", "2").shape == (1, 2, 2)
    assert read("--stages", "2", "--mesh", "2x2").shape == (2, 2, 1)
    assert read("--stages", "2", "--slice", "cpu:1x2x3", "--layout", "replicated", "--attention", "batch").shape == (
        1,
        1,
        3,
    )
    assert [(r.name, r.n_workers) for r in read("--stages", "2", "--policies", "orca,orca@1").schemes] == [
        ("orca", 2),
        ("orca@1", 1),
    ]


def test_schemes_alternate_and_have_the_same_traces():
    setting = serving_setting.read(serve_bench.options_of([]))
    runs = list(serving_setting.runs(setting, (1.0, 2.0)))
    n = len(setting.schemes)
    blocks = [runs[i : i + n] for i in range(0, len(runs), n)]
    assert len(blocks) == 6 and all(len({(rate, seed) for _, rate, seed in block}) == 1 for block in blocks)
    assert all(
        {scheme.name for scheme, _, _ in block} == {scheme.name for scheme in setting.schemes} for block in blocks
    )
    assert len({tuple(scheme.name for scheme, _, _ in block) for block in blocks}) > 1


def row(rung, rate, seed, per_s, latency_s):
    spread = {"p90": latency_s, "p99": latency_s, "median": latency_s}
    shares = {"refused": 0, "wasted_share": 0.5, "host_share": 0.01, "iteration_s": 0.02, "within_limits": None}
    serving = serving_setting.read(serve_bench.options_of([])).to_json()
    return {
        **{"rung": rung, "request_level": rung != "orca", "rate_per_s": rate, "seed": seed, "sustained_per_s": per_s},
        **{"normalised_s": spread, "itl_s": spread, "ttft_s": spread, "serving": serving, "load_1m": 1.0, **shares},
        "environment": {"n_devices": 8, "device_kind": "cpu", "cores": 2, "commit": "x"},
    }


def test_the_ratio_is_of_throughputs_at_the_same_latency():
    limit = MULTIPLE * 0.1
    of = [row("orca", 1.0, s, 1.0, 0.1) for s in (0, 1)] + [row("orca", 4.0, s, 4.0, limit * (1 + s)) for s in (0, 1)]
    of += [row("request-level", 1.0, s, 1.0, 0.2) for s in (0, 1)]
    of += [row("request-level", 4.0, s, 1.5, 9.9) for s in (0, 1)]
    of += [row("shortest-prompt", rate, s, 0.5, 5.0) for s in (0, 1) for rate in (1.0, 4.0)]
    of += [row("request-level", 1.0, 2, 9.0, 0.2)]  # of a run that was interrupted: it has no rate of 4
    found = findings(of)
    assert found and found.latency_s == pytest.approx(limit) and found.strongest == "request-level"
    orca = LatencyCurve(points=((1.0, 1.0, 0.1), (4.0, 4.0, 2 * limit)))
    base = LatencyCurve(points=((1.0, 1.0, 0.2), (4.0, 1.5, 9.9))).at(limit).per_s
    assert found.ratio and found.ratio[1:] == pytest.approx((orca.at(limit).per_s / base, 4.0 / base))
    assert found.ratio_bound == "≥"  # with seed 0 Orca never passes the latency
    assert [line.bound for line in found.lines] == ["≤", "", "≥"]
    assert "| orca |" in markdown(of)
    assert findings([{**row("orca", 1.0, 0, 1.0, 0.1), "error": "x"}]) is None


def test_refused_requests_stand_in_the_table():
    of = [row("orca", 1.0, s, 1.0, 0.1) for s in (0, 1)]
    assert "refused" not in markdown(of)
    text = markdown([{**one, "refused": 2} for one in of])
    assert "refused, requests |" in text and "| 4 |" in text


def test_arrivals_of_a_file_are_taken_as_they_are_or_stretched(tmp_path, quick_engine):
    times_s = [0.0, 0.01, 0.01, 0.02, 0.05, 0.06, 9.0]
    (tmp_path / "times").write_text("\n".join(map(str, times_s)))
    argv = [*ENGINE, "--policies", "orca", "--seeds", "1", "--requests", "6", "--arrivals", str(tmp_path / "times")]
    setting = serving_setting.read(serve_bench.options_of(argv))
    workload = serve_runs.traffic(setting, setting.arrivals.at(200.0), 4, 0)
    assert [r.arrival_s for r in workload.requests()] == pytest.approx([0.0, 0.005, 0.005, 0.01])
    assert cli.guarded(serve_bench.main, [*argv, "--out", str(tmp_path / "out"), "--timeline"]) == 0
    ((found),) = rows(tmp_path / "out")
    assert found["rate_per_s"] == pytest.approx(100) and found["returned"] == 6
    assert found["window_s"][0] == pytest.approx(0.2 * 0.06)
    assert len(found["serving"]["arrivals_digest"]) == 16


def test_a_rate_of_which_nothing_is_known_is_not_the_lowest():
    of = [row("orca", rate, 0, per_s, 0.1) for rate, per_s in ((0.5, None), (1.0, 1.0), (2.0, 2.0))]
    found = findings(of)
    assert found and found.latency_s == pytest.approx(MULTIPLE * 0.1) and found.reference_per_s == 2.0
    assert found.lines[0].saturation_per_s == (2.0, 2.0, 2.0)
