"""The comparisons of blocks and of attention: rows, pictures, the paper's shape, and what is refused."""

import json

import pytest

from tests.benchmarks.commands.test_commands import refused
from toruslab.benchmarks.studies import comparisons, dispatch
from toruslab.benchmarks.studies.comparisons import KINDS


def rows_of(capsys, *argv):
    assert comparisons.main(["--json", *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def rows(capsys):
    return rows_of(capsys)


def test_serial_against_parallel(rows):
    """The model's ratio is on the paper's side of 1, and made of collectives; it hides none, and so lies above."""
    parallel, serial, published = (r for r in rows if r["comparison"] == "block")
    assert [r["source"] for r in (parallel, serial, published)] == ["analytic", "analytic", "published"]
    assert published["ratio"] == 1.14 and "Pope et al. 2022" in published["citation"]
    assert 1.1 < serial["ratio"] < 1.3
    more = serial["latency_s"] - parallel["latency_s"]
    assert serial["collective_s"] - parallel["collective_s"] == pytest.approx(more, rel=0.2)
    assert serial["compute_s"] == pytest.approx(parallel["compute_s"], rel=1e-9)


def test_attention_has_the_shape_of_figure_8(rows):
    """Over batch hardly grows; over heads multiquery holds every key on every chip, twice a share of multihead."""
    line = {k: [r for r in rows if (r["comparison"], r["kind"]) == ("attention", k)] for k in KINDS}
    multihead, heads, batch = ([r["latency_s"] for r in line[k]] for k in KINDS)
    assert batch[-1] < 1.4 * batch[0] and multihead[-1] > 9 * multihead[0] and heads[-1] > 15 * heads[0]
    assert heads[-1] > 1.8 * multihead[-1]
    assert [r["fits"] for r in line["multiquery over batch"]] == [True] * 9
    assert not line["multihead over heads"][-1]["fits"]


def test_memory_runs_out_as_in_table_1(rows):
    """Half of what Table 1 has at batch 128: 1320, 660 and 43000 tokens."""
    found = {r["kind"]: r for r in rows if r["comparison"] == "memory"}
    limits = [found[k]["max_context_by_rule"] for k in KINDS]
    assert limits == pytest.approx([660, 330, 21500], rel=0.02)
    assert all(found[k]["max_context"] < found[k]["max_context_few_layers"] for k in KINDS)


def test_tables_and_pictures(capsys, tmp_path):
    assert comparisons.main(["--contexts", "128,32768", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1.140" in out and "does not fit" in out and "multiquery over batch" in out
    assert {f.name for f in tmp_path.iterdir()} == {
        "rows.jsonl",
        *(f"{name}.{suffix}" for name in ("block", "attention") for suffix in ("svg", "png")),
    }


def test_measured_rows_stand_beside_the_others(capsys):
    small = ["--measured-model", "toy-s", "--measured-batch", "8", "--measured-contexts", "16", "--repeats", "1"]
    found = [r for r in rows_of(capsys, "--contexts", "128", "--measure", *small) if r["source"] == "measured"]
    assert [r["comparison"] for r in found] == ["block"] * 2 + ["attention"] * 3
    assert all(r["latency_s"] > 0 and r["environment"]["n_devices"] == 8 for r in found)
    assert found[1]["ratio"] > 0
    assert [r["point"]["model"] for r in found] == ["toy-s", "toy-s-serial", "toy-s-mha", "toy-s", "toy-s"]


def test_a_model_that_is_a_path_is_refused(capsys, tmp_path):
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    llama |= {"num_hidden_layers": 2, "vocab_size": 512}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(llama))
    found = refused(capsys, comparisons.main, "--model", str(path), "--out", str(tmp_path / "out"))
    assert f"model='{path}' must be a preset's name" in found and not (tmp_path / "out").exists()


def test_layers_that_a_model_has_are_replaced(capsys):
    found = [r["point"]["model"] for r in rows_of(capsys, "--model", "palm-540b-4l-h64", "--contexts", "128")]
    assert found[2:] == [
        f"palm-540b-h64-8l{s}" if i % 2 == 0 else f"palm-540b-4l-h64{s}" for s in ("-mha", "", "") for i in range(2)
    ]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--contexts", "many"], "contexts='many' must be integers"),
        (["--contexts", "0"], "context=0 must be at least 1 in decode"),
        (["--model", "llama-3-70b"], "model='llama-3-70b' must be parallel and multiquery"),
        (["--model", "palm-540b-h64-mha"], "it is parallel, with n_kv_heads=64"),
        (["--model", "palm-540c"], "model='palm-540c' is not known: did you mean 'palm-540b'"),
        (["--measure", "--measured-model", "gemma-2b"], "measured_model='gemma-2b' must be parallel and multiquery"),
        (["--measure", "--measured-model", "toi"], "measured_model='toi' is not known: did you mean 'toy'"),
        (["--model", "no/such/config.json"], "there is no file 'no/such/config.json'"),
        (["--model", "palm-540b"], "n_heads=48 is not divisible by X*Y*Z=64"),
        (["--layers", "0"], "layers=0 must be at least 1"),
        (["--layers", "-3"], "layers=-3 must be at least 1"),
        (["--layers", "119"], "n_layers=119 must be in 1..118"),
        (["--batch", "100"], "batch=100 is not divisible by"),
        (["--slice", "cpu:2x2x2"], "cpu"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--measure", "--measured-contexts", "x"], "measured_contexts='x' must be integers"),
        (["--measure", "--measured-batch", "3"], "batch=3 is not divisible by"),
        (["--measured-contexts", "16"], "measured_contexts='16' is of what is measured; give --measure, too"),
        (["--out", __file__], "is a file, not a folder"),
        (["--measure", "--out", f"{__file__}/below"], "below' cannot be written: Not a directory"),
    ],
)
def test_bad_options_are_refused(capsys, argv, sentence):
    assert sentence in refused(capsys, comparisons.main, *argv)


@pytest.mark.slow
def test_dispatch_is_a_share_of_the_call(capsys):
    assert dispatch.main(["--steps", "1,3", "--batch", "8", "--context", "16", "--repeats", "3", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["point"].get("steps_per_call", 1) for r in found] == [1, 3]
    for r in found:
        steps = r["point"].get("steps_per_call", 1)
        assert r["latency_s"] == pytest.approx(r["call_s"] / steps)
        assert r["empty_call_s"] > 0 and r["dispatch_share"] > 0
    dispatch.show(found)
    assert "steps a call" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--steps", "one"], "steps='one' must be integers"),
        (["--steps", "0"], "steps_per_call=0 must be an integer of at least 1"),
        (["--batch", "3"], "batch=3 is not divisible by"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
    ],
)
def test_dispatch_refuses_in_one_sentence(capsys, argv, sentence):
    assert sentence in refused(capsys, dispatch.main, *argv)
