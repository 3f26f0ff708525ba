"""`toruslab train`: bad input, rows, runs that are stopped and go on exactly, a disk that is full."""

import errno
import functools
import json
import shutil
import signal

import numpy as np
import pytest

from toruslab.benchmarks import cli, generate, serve_bench, train
from toruslab.benchmarks.measure import serving_run as serve_runs
from toruslab.benchmarks.measure import training_run
from toruslab.benchmarks.reports.figures import loss
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import serving_setting
from toruslab.benchmarks.runs.training_options import TrainingSetting
from toruslab.models.programs import checkpoint_folder
from toruslab.models.programs.checkpoints import Checkpoints, named
from toruslab.models.programs.training import Trainer
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.torus.mesh import attach

SMALL = ["--model", "toy-s-1l", "--batch", "4", "--length", "16", "--steps", "6", "--evaluate-every", "2"]
SMALL += ["--slice", "cpu:2x1x1", "--layout", "wgx", "--attention", "batch"]
WRITE = training_run.TrainingRun.write


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    """The tests' devices are there already; what a model writes is left out, but where it is looked at."""
    monkeypatch.setattr(train.processes, "join", lambda *_: None)
    monkeypatch.setattr(training_run.TrainingRun, "write", lambda self: [])


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """A short text, so that its held-out part is quickly read."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(corpus.read().encode("ascii", "ignore")[:20_000])
    return str(path)


def go(manual, out, *argv):
    return cli.guarded(train.main, [*SMALL, "--text", manual, "--out", str(out), *argv])


def resume(out, *argv):
    return cli.guarded(train.main, ["--resume", "--out", str(out), *argv])


def losses(out):
    return [(row["step"], row["loss_nats_per_byte"]) for row in training_run.rows(out) if "loss_nats_per_byte" in row]


def final(out):
    (row,) = [row for row in training_run.rows(out) if row.get("final")]
    return row["held_out_nats_per_byte"]


@pytest.fixture(scope="module")
def whole(manual, tmp_path_factory):
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.processes, "join", lambda *_: None)
        patch.setattr(training_run.TrainingRun, "write", lambda self: [])
        out = tmp_path_factory.mktemp("whole") / "run"
        assert go(manual, out) == 0
    return out


def stopped(monkeypatch, at, number=signal.SIGINT):
    """A signal comes while the step after `at` reads its text."""
    windows = corpus.windows

    def read(ids, batch, length, seed, step):
        if step == at:
            signal.raise_signal(number)
        return windows(ids, batch, length, seed, step)

    monkeypatch.setattr(corpus, "windows", read)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--text", "no/such/file"], "text='no/such/file': there is no such file"),
        (["--model", "toi"], "model='toi' is not known"),
        (["--model", "toy-s-v100"], "vocab=100 of toy-s-v100 is smaller than the tokenizer's 258"),
        (["--model", "toy-s-h16"], "n_padding_heads=8 must be 0 to train"),
        (["--slice", "cpu"], "slice='cpu' must be CHIP:DIMS"),
        (["--slice", "cpu:16", "--batch", "16"], "needs 16 devices"),
        (["--slice", "gpu:1"], "needs gpu devices"),
        (["--mesh", "3"], "mesh='3' has 3 places"),
        (["--layout", "ws3d"], "layout='ws3d' is unknown"),
        (["--attention", "tails"], "attention='tails' must be"),
        (["--weights", "int8"], "weights='int8' must be one of f32, bf16"),
        (["--batch", "3"], "batch=3 is not divisible by X=2"),
        (["--accumulate", "3"], "accumulate=3 must divide batch=4"),
        (["--accumulate", "4"], "batch/accumulate=1 is not divisible by X=2"),
        (["--length", "0"], "length=0 must be a positive integer"),
        (["--length", "1500"], "a held-out text of 2000 bytes is shorter than 4 windows of length=1500"),
        (["--steps", "0"], "steps=0 must be an integer of at least 1"),
        (["--warm-up", "6"], "warm_up=6 must be less than steps=6"),
        (["--learning-rate", "nan"], "learning_rate=nan must be a number"),
        (["--clip", "0"], "clip=0.0 must be a number above 0"),
        (["--weight-decay", "-1"], "weight_decay=-1.0 must be a number from 0"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--evaluate-every", "-1"], "evaluate_every=-1 must be at least 0"),
        (["--resume"], "has no checkpoint to go on from; start it without --resume"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(capsys, manual, tmp_path, argv, sentence):
    assert go(manual, tmp_path, *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_is_rows_a_picture_and_text(capsys, manual, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run.TrainingRun, "write", WRITE)
    monkeypatch.setattr(training_run, "NEW_BYTES", 4)
    monkeypatch.setattr(training_run, "STEPS_PER_CALL", 1)
    assert go(manual, tmp_path) == 0
    out, _ = capsys.readouterr()
    assert "nats per byte after 6 steps of 4 x 16 bytes" in out and "byte frequencies alone: " in out
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "checkpoints", "loss.svg", "loss.png"}
    head, *rows = training_run.rows(tmp_path)
    assert head["training"]["layout"] == "wgx" and head["environment"]["seed"] == 0 and head["train_bytes"] == 18_000
    assert [row["step"] for row in rows if "loss_nats_per_byte" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_nats_per_byte" in row] == [2, 4, 6]
    assert len(rows[-1]["written"]) == 2 and rows[-1]["held_out_bytes"] == 1984
    assert loss([head, *rows]).name == "loss"


def test_json_is_the_rows(capsys, manual, tmp_path):
    assert go(manual, tmp_path, "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == training_run.rows(tmp_path)


def test_the_held_out_text_is_never_trained_on(manual, tmp_path, monkeypatch):
    seen, windows = [], corpus.windows
    monkeypatch.setattr(corpus, "windows", lambda ids, *rest: seen.append(ids) or windows(ids, *rest))
    assert go(manual, tmp_path) == 0
    whole = byte_ids.encode(corpus.read(manual), bos=False)
    assert len(seen) == 6 and all(np.array_equal(ids, whole[:18_000]) for ids in seen)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_last_digit(capsys, manual, whole, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stopped(patch, 2, number)
        assert go(manual, tmp_path) == 128 + number
    err = capsys.readouterr().err
    assert f"after step 3 of 6, saved at step 3; it goes on with: toruslab train --resume --out {tmp_path}" in err
    assert signal.getsignal(number) == before
    assert resume(tmp_path) == 0
    assert losses(tmp_path) == losses(whole) and final(tmp_path) == final(whole)
    for name, array in named(state(tmp_path)).items():
        np.testing.assert_array_equal(array, named(state(whole))[name])


def state(out):
    """The last state that was saved."""
    setting = TrainingSetting.of(training_run.rows(out)[0]["training"])
    mesh = attach(setting.shape, chip="cpu")
    made = {"config": setting.config, "layout": setting.layout_value, "mesh": mesh, "pass_": setting.pass_}
    saved = Checkpoints(out / training_run.CHECKPOINTS, setting.config)
    assert saved.latest() == setting.steps
    return saved.restore(Trainer(**made).abstract())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["--slice", "cpu:2x2x2", "--layout", "ws2d", "--attention", "heads"],
        ["--slice", "cpu:1", "--layout", "replicated"],
        ["--slice", "cpu:2x2", "--layout", "auto", "--attention", "heads", "--accumulate", "2", "--remat", "layer"],
    ],
)
def test_a_run_goes_on_under_another_layout_and_mesh(manual, whole, tmp_path, monkeypatch, changes):
    with monkeypatch.context() as patch:
        stopped(patch, 2)
        assert go(manual, tmp_path) == 130
    assert resume(tmp_path, *changes) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)
    assert final(tmp_path) == pytest.approx(final(whole), rel=1e-5)


def test_what_would_change_the_result_cannot_change(capsys, manual, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped(patch, 1)
        go(manual, tmp_path)
    for argv, sentence in (
        (["--steps", "9"], "steps=9 cannot change in a run that goes on, which has 6"),
        (["--learning-rate", "1"], "learning_rate=1.0 cannot change in a run that goes on, which has 0.003"),
        (["--slice", "cpu:8", "--layout", "ws3d"], "layout='ws3d' is unknown"),
    ):
        capsys.readouterr()
        assert resume(tmp_path, *argv) == 2
        assert sentence in capsys.readouterr().err


def test_another_text_is_refused(capsys, tmp_path, monkeypatch):
    own = tmp_path / "text"
    own.write_text(corpus.read()[:20_000])
    with monkeypatch.context() as patch:
        stopped(patch, 1)
        go(str(own), tmp_path / "run")
    own.write_text(corpus.read()[1:20_000])
    assert resume(tmp_path / "run") == 2
    assert "is not the text that the run in out=" in capsys.readouterr().err


@pytest.mark.slow
def test_an_earlier_run_is_put_aside(manual, tmp_path):
    out = tmp_path / "run"
    for _ in range(2):
        assert go(manual, out) == 0
    assert losses(out) == losses(tmp_path / "run.1")


def test_a_folder_in_use_is_refused(capsys, manual, tmp_path):
    out = tmp_path / "run"
    with run_folder.claim(out):
        (out / "rows.jsonl").touch()
        assert go(manual, out) == 2
        assert "is in use by another run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_killed_run_repeats_what_came_after_its_checkpoint(manual, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, row):
        if row.get("step") == 5:
            raise Killed
        original(self, row)

    original = training_run.TrainingRun._say
    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "_say", killed)
        with pytest.raises(Killed):
            go(manual, tmp_path, "--checkpoint-every", "2")
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"step": 5, "loss')  # what a kill -9 leaves
    assert resume(tmp_path) == 0
    assert losses(tmp_path) == losses(whole)


def test_a_full_disk_is_a_warning(capsys, manual, whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "write", full)
    assert go(manual, tmp_path, "--checkpoint-every", "2") == 1
    out, err = capsys.readouterr()
    assert err.count("could not be written") == 3 and "No space left on device" in err
    assert losses(tmp_path) == losses(whole) and "nats per byte after 6 steps" in out


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_keeps_its_checkpoints(capsys, manual, tmp_path, monkeypatch):
    """A gradient that is not finite spoils the state: nothing of it is saved, and no row has it."""
    step = Trainer.step.func  # pyright: ignore[reportFunctionMemberAccess]

    def spoilt(self):
        taken = step(self)

        def run(state, ids):
            state, report = taken(state, ids)
            return state, report._replace(norm=np.inf) if int(state.step) == 5 else report

        return run

    monkeypatch.setattr(Trainer, "step", property(spoilt))
    assert go(manual, tmp_path, "--checkpoint-every", "2") == 1
    said = capsys.readouterr().err
    assert "step 5 of 6 has loss=" in said and "norm=inf" in said and "the latest checkpoint is that of step 4" in said
    assert checkpoint_folder.steps(tmp_path / "checkpoints") == [2, 4]
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]


def test_generate_and_serve_bench_take_what_was_trained(capsys, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(generate.processes, "join", lambda *_: None)
    said = []
    for layouts in (["--prefill", "wgx/batch", "--decode", "ws2d/heads"], ["--slice", "cpu:1"]):
        argv = ["--checkpoint", str(whole), "--prompt", "The", "--max-new-tokens", "6", "--json", *layouts]
        assert cli.guarded(generate.main, argv) == 0
        out, err = capsys.readouterr()
        assert "step 6 of training" in err
        said.append(json.loads(out)["ids"])
    assert said[0] == said[1]
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    file = damaged / "checkpoints" / "6" / "params" / "_METADATA"
    file.write_bytes(file.read_bytes()[:-1])
    assert cli.guarded(generate.main, ["--checkpoint", str(damaged), "--prompt", "The"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: checkpoint=") and "params/_METADATA has" in err and err.count("\n") == 1
    setting = serving_setting.read(serve_bench.options_of(["--checkpoint", str(whole), "--slice", "cpu:1"]))
    assert setting.config.n_layers == 1 and setting.to_json()["checkpoint"] == str(whole)
    packed = serve_runs.engine_weights(setting)
    for name, array in named(state(whole).params).items():
        np.testing.assert_array_equal(functools.reduce(lambda at, key: at[key], name.split("."), packed), array)
    assert cli.guarded(serve_bench.main, ["--checkpoint", str(whole), "--model", "toy"]) == 2
    assert "--model stands beside --checkpoint" in capsys.readouterr().err
