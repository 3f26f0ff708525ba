"""The commands as a user meets them: exit codes, one sentence for bad input, resumed runs, damaged files."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import toruslab
from tests.points import POINT
from toruslab.benchmarks import bench as step_latency
from toruslab.benchmarks import cli, explain, generate, plan
from toruslab.benchmarks.reports.bench_report import markdown, write
from toruslab.benchmarks.reports.cells import groups
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs.grid import grid
from toruslab.benchmarks.runs.rows import DamagedResults, RowFile
from toruslab.benchmarks.studies import ratio
from toruslab.partitioning.plan.point import Point

SMALL = ["--phases", "decode", "--batches", "8", "--context", "16", "--attention", "batch", "--repeats", "1"]
SMALL += ["--chip", "none", "--profile", "none"]


def refused(capsys, command, *argv) -> str:
    """The one sentence with which a command refuses its options."""
    assert cli.guarded(command, argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--layouts", "ws3d"], "layout='ws3d' is unknown (did you mean 'ws2d'?)"),
        (["--attention", "tails"], "attention='tails' must be one of heads, batch-x, "),
        (["--phases", "training"], "phase='training' must be one of prefill, decode, train"),
        (["--accumulate", "2"], "accumulate is for phase='train' only"),
        (["--phases", "train", "--accumulate", "0"], "accumulate=0 must be an integer of at least 1"),
        (["--phases", "train", "--cache", "int8"], "cache='int8' must be left out in train"),
        (["--batches", "3"], "batch=3 is not divisible by"),
        (["--batches", "eight"], "batches='eight' must be integers"),
        (["--batches", "0"], "batch=0 must be an integer of at least 1"),
        (["--slice", "cpu"], "slice='cpu' must be CHIP:DIMS"),
        (["--slice", "cpu:3x2x2"], "is not divisible by"),
        (["--mesh", "2x2"], "mesh='2x2' has 4 places, slice=cpu:2x2x2 has 8 chips"),
        (["--model", "palm-8c"], "palm-8b"),
        (["--weights", "fp4"], "weights='fp4' must be one of"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--budget", "inf"], "budget=inf must be a positive number"),
        (["--slice", "nosuchchip:2x2x2"], "nosuchchip"),
        (["--slice", "v5e:4x4x4", "--model", "toy-h64"], "v5e"),
        (["--platform", "gpu"], "platform='gpu' does not fit slice=cpu:2x2x2"),
        (["--processes", "3"], "processes=3 does not divide the 8 chips"),
        (["--points", "no/such/points"], "no/such/points"),
    ],
)
def test_bench_refuses_in_one_sentence(capsys, argv, sentence, tmp_path):
    assert sentence in refused(capsys, step_latency.main, "--out", str(tmp_path), *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": 6}, "batch=6 is not divisible by X*Y*Z=8"),
        ({"layuot": "ws2d"}, "unknown field 'layuot'; did you mean 'layout'?"),
        ({"context": -1}, "context=-1 must be an integer of at least 0"),
        ({"length": 2}, "length=2 must be 1 in decode"),
        ({"layout": "auto"}, "constrains nothing"),
        ({"layout": ["ws2d"]}, "layout=['ws2d'] must be text"),
        ({"batch": "8"}, "batch='8' must be an integer"),
        ({"mesh": {}}, "mesh={} must be text"),
        (
            {"model": "palm-8b-h64", "slice": "v4:4x4x12", "mesh": "3x8x8", "batch": 192, "layout": "replicated"},
            "cannot",
        ),
    ],
)
def test_explain_refuses_in_one_sentence(capsys, change, sentence):
    assert sentence in refused(capsys, explain.main, json.dumps(POINT | change))


def test_explain_refuses_what_is_no_point(capsys):
    assert "not JSON" in refused(capsys, explain.main, "{")
    assert "a point is a JSON object, not list" in refused(capsys, explain.main, "[]")
    short = {k: v for k, v in POINT.items() if k != "slice"}
    assert "missing field 'slice'" in refused(capsys, explain.main, json.dumps(short))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "prompt is missing"),
        (["--prompt", "a", "--prefill", "ws2d"], "prefill='ws2d' must be LAYOUT/ATTENTION"),
        (["--prompt", "a", "--decode", "wgxyz/heads"], "no axis is left to split heads over"),
        (["--prompt", "a" * 50, "--capacity", "40"], "capacity=40 is too small for a prompt of 51 tokens"),
        (["--prompt", "a", "--model", "m" * 300], "mmm"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0 must be in (0, 1]"),
    ],
)
def test_generate_refuses_in_one_sentence(capsys, argv, sentence):
    assert sentence in refused(capsys, generate.main, *argv)


def test_what_ratio_times_is_a_point_for_any_command():
    (point,) = ratio.points("decode", ["ws2d/batch"])
    spelled = json.dumps(point.to_json() | {"slice": "v4:2x2x2"})
    code = "import sys; from benchmarks import estimate; sys.exit(estimate.main(sys.argv[1:]))"  # presets as they are
    found = subprocess.run([sys.executable, "-c", code, spelled, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["point"]["model"] == "toy-v1024" and point.config.vocab == 1024


def test_unknown_commands_are_refused(capsys):
    assert cli.main(["bnech"]) == 2
    assert "did you mean 'bench'?" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    for study in ("comparisons", "quantisation"):
        assert cli.main([study]) == 2
        assert f"run python -m benchmarks.studies.{study}" in capsys.readouterr().err
    assert "--speed is a study now: run python -m benchmarks.studies.planner_speed" in refused(
        capsys, plan.main, "--speed"
    )


def test_there_are_13_commands_and_each_says_its_version(capsys):
    assert len(cli.COMMANDS) == 13
    for argv in ([], *([name] for name in cli.COMMANDS)):
        with pytest.raises(SystemExit, match="0") if argv else contextlib.nullcontext():
            cli.main([*argv, "--version"])
        assert capsys.readouterr().out == f"toruslab {toruslab.__version__}\n"


def test_explain_speaks_the_papers_notation(capsys):
    assert explain.main([json.dumps(POINT), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ladder = [(r["from"], r["kind"], r["to"]) for r in rows if r["scope"] == "layer/h"]
    assert ladder == [("BLC_yz(partialsum-x)", "reduce-scatter", "BLC_xyz")]
    assert {r["source"] for r in rows} == {"analytic"}


def test_explain_takes_a_training_step_back_over_the_same_ladders(capsys):
    """The gradient of what all chips had alike comes in parts; that of a sum is the same for all its terms."""
    assert explain.main([json.dumps(POINT | {"phase": "train", "context": 0, "length": 4}), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(r["part"] for r in rows)) == ["forward", "again", "backward", "update"]
    there, back = ([r for r in rows if r["scope"] == "layer/x" and r["part"] == p] for p in ("forward", "backward"))
    assert [(r["from"], r["kind"], r["to"]) for r in there] == [("BLE_xyz", "all-gather", "BLE_x")]
    assert [(r["from"], r["kind"], r["to"]) for r in back] == [("BLE_x(partialsum-yz)", "reduce-scatter", "BLE_xyz")]
    assert [r["bytes"] for r in there] == [r["bytes"] for r in back]
    summed = [r for r in rows if r["scope"] == "gradients/layer/w_kv"]
    assert [(r["from"], r["kind"]) for r in summed] == [("NE_xD(partialsum-yz)", "reduce-scatter")]


@pytest.mark.slow
def test_a_training_step_is_planned_compiled_predicted_and_measured(capsys, tmp_path):
    """The options of the bench; every source has its row of the same point."""
    argv = ["--phases", "train", "--lengths", "16", "--layouts", "wgx", "--attention", "batch", "--accumulate", "2"]
    argv += [
        "--remat",
        "weights",
        "--repeats",
        "1",
        "--chip",
        "none",
        "--profile",
        "all",
        "--json",
        "--out",
        str(tmp_path),
    ]
    assert step_latency.main(argv) == 0
    planned, compiled, measured = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (
        planned["point"] == measured["point"] == planned["point"] | {"phase": "train", "batch": 16, "remat": "weights"}
    )
    assert planned["n_collectives"] == compiled["n_collectives"] and compiled["unexplained"] == 0
    assert planned["collective_bytes"] == compiled["collective_bytes"]
    assert measured["latency_s"] > 0
    spent = {row["scope"] for row in measured["profile"]["rows"]}
    assert spent >= {"layer/h", "layer/w_in", "loss", "clip", "update"}
    assert "train, batch 16 x 16 tokens, 2 parts, remat weights" in next(iter(groups([planned, compiled, measured])))


def test_explain_touches_no_device():
    program = (
        "import sys; from benchmarks import explain; code = explain.main([]);"
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def bench(capsys, out, *argv):
    assert step_latency.main([*SMALL, "--out", str(out), *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_saved_shown_and_continued(capsys, tmp_path):
    out = tmp_path / "run"
    shown = bench(capsys, out, "--layouts", "ws2d,auto")
    assert "ws2d/batch" in shown and "yes" in shown and "x bytes" in shown
    rows = RowFile(out / "rows.jsonl")
    assert [r["source"] for r in rows.rows] == ["analytic", "compiled"] * 2 + ["measured"] * 2
    measured = rows.find(Point.from_json(POINT), "measured")
    assert measured and measured["latency_s"] > 0 and measured["environment"]["n_devices"] == 8
    compiled = rows.find(Point.from_json(POINT), "compiled")
    assert compiled and compiled["unexplained"] == 0
    assert {p.name for p in out.iterdir()} >= {"report.md", "latency.svg", "latency.png", "bytes.svg", "bytes.png"}

    # as if interrupted: what is measured stays, a half-written line goes, the rest is done again
    (out / "finished").unlink()
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:5]) + '{"point": {"mod')
    bench(capsys, out, "--layouts", "ws2d,auto")
    again = RowFile(out / "rows.jsonl").rows
    assert again[:5] == rows.rows[:5]
    assert [r["source"] for r in again[5:]] == ["measured"]

    # finished: the next run starts afresh and puts this one aside
    bench(capsys, out, "--layouts", "ws2d", "--json")
    assert len(RowFile(out / "rows.jsonl").rows) == 3
    assert RowFile(tmp_path / "run.1" / "rows.jsonl").rows == again


def test_damaged_results_are_refused_and_kept(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"point": POINT, "source": "measured"}) + "\nnot a row\n")
    before = path.read_bytes()
    sentence = refused(capsys, step_latency.main, *SMALL, "--layouts", "ws2d", "--out", str(tmp_path))
    assert "rows.jsonl, line 2 is not a result row" in sentence
    assert path.read_bytes() == before
    with pytest.raises(DamagedResults):
        RowFile(path)


def test_the_benches_of_readme_and_docs_are_legal():
    """Every `toruslab bench` line of README and docs names points that exist."""
    root = Path(__file__).parents[3]
    texts = [page.read_text() for page in (root / "README.md", *sorted((root / "docs").rglob("*.md")))]
    lines = re.findall(r"^    toruslab bench ([^#\n]+)", "\n".join(texts), re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        options = step_latency.parser().parse_args(line.split())
        assert grid(options)


def test_a_failed_point_is_a_row_and_an_exit_code(capsys, tmp_path, monkeypatch):
    from toruslab.benchmarks.measure import contenders

    def fails(point, *args):
        if point.layout == "ws1d":
            raise RuntimeError("no memory\nleft")
        return prepare(point, *args)

    prepare = contenders.prepare
    monkeypatch.setattr(contenders, "prepare", fails)
    assert step_latency.main([*SMALL, "--layouts", "ws1d,ws2d", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "failed: ws1d/batch RuntimeError: no memory" in err
    assert "failed" in out
    assert RowFile(tmp_path / "rows.jsonl").find(Point.from_json(POINT), "measured")


def test_a_report_draws_what_there_is(tmp_path):
    rows = [
        {"point": POINT | {"layout": name}, "source": "measured", "latency_s": t, "quartiles_s": [t, t]}
        for name, t in (("ws2d", 0.004), ("wgx", 0.009))
    ]
    assert [line.label for line in groups(rows)["decode, batch 8, context 16, toy f32 on cpu:2x2x2"]] == [
        "ws2d/batch",
        "wgx/batch",
    ]
    assert "| ws2d/batch |" in markdown(rows)
    assert all(path.stat().st_size for path in write(rows, tmp_path))


@pytest.mark.parametrize("module", ["toruslab.benchmarks.cli", "toruslab.benchmarks.estimate"])
def test_refused_however_it_is_started(module):
    """Also as `python -m benchmarks.cli`, where a module can come to exist twice."""
    command = ["estimate"] if module == "toruslab.benchmarks.cli" else []
    for wrong in (["--layout", "ws2"], ["--batch", "1.5"], ["--bacth", "3"]):
        done = subprocess.run([sys.executable, "-m", module, *command, *wrong], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_unfinished_run_is_resumed_as_it_was_started(capsys, tmp_path):
    """With `--resume` alone; what was measured is not measured again."""
    out = ["--out", str(tmp_path / "run")]
    assert step_latency.main([*SMALL, "--layouts", "ws1d,ws2d", *out]) == 0
    folder = tmp_path / "run"
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "finished").unlink()
    (folder / "rows.jsonl").write_text("\n".join(rows[:-1]) + "\n")  # the last measured row is missing
    kept = [json.loads(line) for line in rows[:-1]]
    capsys.readouterr()
    assert step_latency.main(["--resume", *out]) == 0
    found = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert found[: len(kept)] == kept and len(found) == len(rows)
    assert found[-1]["source"] == "measured" and found[-1]["point"] == json.loads(rows[-1])["point"]
    assert (folder / "finished").exists()


def test_only_an_unfinished_run_of_this_code_is_resumed(capsys, tmp_path):
    assert "holds no unfinished run" in refused(capsys, step_latency.main, "--resume", "--out", str(tmp_path))
    (tmp_path / "argv.json").write_text("[]")
    (tmp_path / "settings.json").write_text(json.dumps({"commit": "0" * 12, "changes": ""}))
    sentence = refused(capsys, step_latency.main, "--resume", "--out", str(tmp_path))
    assert "commit 000000000000, which is not what is here" in sentence


def test_grids_cover_what_they_say():
    cells = grid(step_latency.parser().parse_args(["--grid", "full"]))
    points = [p for cell in cells for p in cell]
    assert len(set(points)) == len(points) == 416 and {len(cell) for cell in cells} == {13}
    factors = {(p.model, p.mesh_shape, p.phase, p.batch) for p in points}
    assert len(factors) == 2 * 2 * 2 * 4
    wide = [p for cell in grid(step_latency.parser().parse_args(["--grid", "wide"])) for p in cell]
    assert set(wide) < set(points) and len(wide) == 208


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--chip", "no/such.toml"], "chip='no/such.toml'"),
        (["--chip", "v4"], "chip='v4' has no [machine]"),
        (["--grid", "wide", "--slice", "cpu:2x2x4"], "grid='wide' is made for 8"),
    ],
)
def test_chips_and_grids_that_make_no_sense(capsys, tmp_path, argv, sentence):
    assert sentence in refused(capsys, step_latency.main, *SMALL[:-4], "--out", str(tmp_path / "run"), *argv)


def test_a_quick_bench_is_small():
    options = step_latency.options_of(["--quick"])
    assert sum(map(len, grid(options))) == 14 and options.repeats == 5
    assert step_latency.options_of(["--quick", "--repeats", "9"]).repeats == 9
    assert step_latency.options_of(["--quick", "--lengths", "16,256"]).lengths == "16,256"  # the default, but given


def test_resume_stands_alone(capsys, tmp_path):
    out = ["--resume", "--out", str(tmp_path)]
    assert "--batches beside --resume" in refused(capsys, step_latency.main, *out, "--batches", "8")


def test_a_run_in_a_folder_that_another_one_uses_is_refused(capsys, tmp_path):
    out = tmp_path / "run"
    for more in ([], ["--processes", "2"]):
        with run_folder.claim(out):
            sentence = refused(capsys, step_latency.main, *SMALL, "--out", str(out), *more)
        assert f"out={str(out)!r} is in use by another run" in sentence
    assert not list(out.iterdir())
