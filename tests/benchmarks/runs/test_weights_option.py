"""`--checkpoint`: a folder's weights and tokenizer in a command, and what is refused in one sentence."""

import dataclasses
import doctest
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.weights.test_huggingface import GEMMA, LLAMA, described, theirs, write
from toruslab.benchmarks import cli, generate
from toruslab.models.decoder import reference
from toruslab.models.weights import tokenizer

SMALL = dataclasses.replace(GEMMA, vocab=300)


def test_doctests():
    assert doctest.testmod(tokenizer).failed == 0


def save_words(folder: Path) -> dict[str, int]:
    """A tokenizer of a few words, as a `tokenizer.json`; returns their ids."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, the extra `hf`")
    ids = {word: i for i, word in enumerate(["<unk>", "one", "two", "three", "four", "five"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / tokenizer.FILE))
    return ids


def said(capsys, *argv: str) -> tuple[dict, str]:
    """The one row of `generate`, and what it tells besides."""
    assert generate.main([*argv, "--json", "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def greedy(config, weights, prompt: list[int], n: int, stops=(7, 5)) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        token = int(reference.logits(config, weights, ids)[-1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_checkpoint_says_what_the_reference_says(capsys, tmp_path, n_shards):
    weights = reference.init(SMALL, 0)
    write(tmp_path, SMALL, theirs(SMALL, weights), n_shards)
    row, told = said(capsys, "--prompt", "hé", "--checkpoint", str(tmp_path), "--decode", "wgxyz/batch")
    assert row["ids"] == greedy(SMALL, weights, [256, *"hé".encode()], 4)
    assert row["prompt"] == "hé"
    assert "million parameters); text as bytes: there is no tokenizer.json in" in told


def test_its_tokenizer(capsys, tmp_path):
    config = dataclasses.replace(LLAMA, vocab=6, tied=False)
    weights = reference.init(config, 4)
    ids = save_words(write(tmp_path, config, theirs(config, weights)))
    row, told = said(capsys, "--prompt", "three one two", "--checkpoint", str(tmp_path))
    assert row["ids"] == greedy(config, weights, [3, 1, 2], 4)
    words = {i: word for word, i in ids.items()}
    assert row["prompt"] == "three one two"
    assert row["text"].split() == [words[i] for i in row["ids"]]
    assert f"text as {tmp_path / 'tokenizer.json'}" in told


def test_it_ends_where_the_checkpoint_says(capsys, tmp_path):
    """At any of its stops, the second too, for which the program does not watch."""
    weights = reference.init(SMALL, 0)
    first, second = greedy(SMALL, weights, [256, 97], 2)
    write(tmp_path, SMALL, theirs(SMALL, weights))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [299, second]}))
    row, _ = said(capsys, "--prompt", "a", "--checkpoint", str(tmp_path))
    assert row["ids"] == ([first] if first != second else [])


def test_without_the_package_text_is_bytes(tmp_path, monkeypatch):
    (tmp_path / tokenizer.FILE).write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = tokenizer.of_folder(tmp_path, SMALL, (2,))
    assert found.name == "bytes: tokenizer.json needs the package tokenizers (pip install 'toruslab[hf]')"
    assert found.stops == (2,)
    np.testing.assert_array_equal(found.encode("a"), [256, 97])
    with pytest.raises(
        ValueError, match=r"vocab=91 of .* is smaller than the 258 ids of bytes, and tokenizer.json needs"
    ):
        tokenizer.of_folder(tmp_path, LLAMA, ())


def test_tokenizers_that_do_not_fit(tmp_path):
    save_words(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json' has 6 ids, more than vocab=5 of config.json"):
        tokenizer.of_folder(tmp_path, dataclasses.replace(LLAMA, vocab=5), ())
    (tmp_path / tokenizer.FILE).write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json' is damaged: "):
        tokenizer.of_folder(tmp_path, LLAMA, ())


def test_generate_refuses_in_one_sentence(capsys, tmp_path):
    def refused(*argv: str) -> str:
        assert cli.guarded(generate.main, ["--prompt", "a", *argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err

    folder = write(tmp_path / "small", LLAMA, theirs(LLAMA, reference.init(LLAMA, 0)))
    at = f"checkpoint={str(folder)!r}"
    assert f"model='toy' beside {at}: a checkpoint says" in refused("--model", "toy", "--checkpoint", str(folder))
    assert f"error: {at}: vocab=91 of" in refused("--checkpoint", str(folder))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-9])
    assert "is damaged or cut short" in refused("--checkpoint", str(folder))
    (folder / "config.json").write_text(json.dumps(described(LLAMA) | {"attention_bias": True}))
    assert f"error: {at}: model_type='llama' with attention_bias=true cannot" in refused("--checkpoint", str(folder))
    (folder / "config.json").unlink()
    assert "there is no file" in refused("--checkpoint", str(folder))
    assert "is no checkpoint that is known: Hugging Face" in refused("--checkpoint", str(tmp_path))
    assert "there is no such folder" in refused("--checkpoint", str(tmp_path / "nowhere"))
