"""The study of what int8 costs."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from toruslab.benchmarks.runs.parser import InputError
from toruslab.benchmarks.studies import quantisation
from toruslab.models.config import ModelConfig
from toruslab.models.decoder.parameters import initial
from toruslab.models.decoder.quantise import dequantise, quantise

CONFIGS = {
    block: ModelConfig(
        n_layers=2, d_model=32, d_ff=48, n_heads=4, d_head=8, vocab=260, block=block, tied=block == "parallel"
    )
    for block in ("parallel", "serial")
}


def parameters(config: ModelConfig) -> nnx.State:
    return initial(config, *quantisation._alone(config, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_what_is_int8_already_has_no_error(block):
    """Weights that integers and scales stand for exactly lose nothing when they become int8; their cache does."""
    config, ids = CONFIGS[block], quantisation.held_out(2, 9, "held out " * 100)
    params = parameters(config)
    exact = dequantise(quantise(nnx.to_pure_dict(params), np.float32))
    nnx.replace_by_pure_dict(params, exact)
    for row in quantisation.layers(config, params, ids):
        cached = row.get("of") == "int8 cache"
        assert (1e-4 < row["output_error"] < 0.05) if cached else row["output_error"] < 1e-5
        assert row.get("weight_error", 0.0) < 1e-6
    found = {row["variant"]: row for row in quantisation.variants(config, params, ids)}
    assert found["int8 weights"]["largest_error"] < 1e-5 < found["int8 cache"]["largest_error"]
    assert found["int8 weights"]["greedy_agreement"] == found["float"]["greedy_agreement"] == 1


@pytest.mark.slow
def test_layers_one_after_the_other_are_the_model():
    """The stream that `layers` walks is the decoder's: an error of one layer's matrices shows in that layer alone."""
    config, ids = CONFIGS["serial"], quantisation.held_out(2, 9, "held out " * 100)
    params = parameters(config)
    nested = nnx.to_pure_dict(params)
    exact = dequantise(quantise(nested, np.float32))
    nested["mlp"]["w_out"] = nested["mlp"]["w_out"].at[0].set(exact["mlp"]["w_out"][0])
    nnx.replace_by_pure_dict(params, nested)
    rows = [r for r in quantisation.layers(config, params, ids) if r.get("matrix") == "w_out" and r["block"] == "mlp"]
    assert rows[0]["output_error"] < 1e-5 and 1e-3 < rows[1]["output_error"] < 0.02
    assert rows[0]["weight_error"] < 1e-6 and 2e-3 < rows[1]["weight_error"] < 0.01


def test_loss_is_that_of_the_reference():
    from tests.canonical import unpack
    from toruslab.models.decoder.reference import logits as reference_logits

    config, ids = CONFIGS["parallel"], quantisation.held_out(3, 9, "held out " * 100)
    params = parameters(config)
    weights = unpack(config, jax.tree.map(np.asarray, nnx.to_pure_dict(params)))
    by_row = np.concatenate([reference_logits(config, weights, row[:-1]) for row in ids])
    chosen = np.exp(by_row)[np.arange(27), ids[:, 1:].reshape(-1)] / np.exp(by_row).sum(-1)
    found = next(iter(quantisation.variants(config, params, ids)))
    assert found["loss_nats_per_byte"] == pytest.approx(-np.log(chosen).mean(), rel=1e-5)


@pytest.fixture
def devices_that_are_here(monkeypatch):
    """The suite has made its devices already."""
    monkeypatch.setattr(quantisation.processes, "join", lambda *_: None)


@pytest.mark.usefixtures("devices_that_are_here")
def test_rows_of_the_command(capsys):
    assert quantisation.main(["--model", "toy-1l", "--windows", "2", "--length", "16", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["kind"] for r in rows] == ["matrix"] * 3 + ["layer"] * 2 + ["variant"] * 4 + ["summary"]
    assert [r["variant"] for r in rows[5:9]] == ["float", "int8 weights", "int8 cache", "both"]
    assert all(0 < r["weight_error"] < 0.01 and 0 < r["output_error"] < 0.02 for r in rows[:3])
    assert rows[5]["largest_error"] == 0 and all(0 < r["rms_error"] < r["largest_error"] < 0.1 for r in rows[6:9])
    assert all(abs(r["loss_nats_per_byte"] - math.log(258)) < 1 for r in rows[5:9])
    assert rows[9]["ln_vocab"] == math.log(258) and rows[9]["weights"] == "random"


@pytest.mark.slow
@pytest.mark.usefixtures("devices_that_are_here")
def test_the_table_says_that_weights_are_random(capsys):
    assert quantisation.main(["--model", "toy-1l", "--windows", "2", "--length", "16", "--dtype", "bf16"]) == 0
    assert "The weights are random" in capsys.readouterr().out


def test_text_is_held_out():
    corpus = "".join(map(chr, range(32, 127))) * 10
    windows = quantisation.held_out(3, 20, corpus)
    assert windows.shape == (3, 21)
    assert all(bytes(w.tolist()).decode() in corpus[-95:] for w in windows)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--windows", "0"], "windows=0 must be at least 1"),
        (["--length", "1"], "length=1 must be at least 2"),
        (["--length", "10000000"], "held-out bytes of the text"),
        (["--text", "no/such/file"], "there is no such file"),
        (["--model", "tyo"], "tyo"),
    ],
)
def test_bad_input_is_one_sentence(argv, why):
    with pytest.raises(InputError) as error:
        quantisation.main(argv)
    assert why in str(error.value) and "\n" not in str(error.value)
