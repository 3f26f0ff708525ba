"""The built-in corpus is there, and prompts are windows of it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toruslab.models.weights import byte_ids, corpus


def test_the_built_in_corpus_is_long_and_english():
    content = corpus.read()
    assert content == corpus.read()
    assert len(content) > 300_000
    assert content.count(" the ") > 1_000


def test_a_corpus_of_ones_own_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_bytes("één\r\ntwee\n".encode())
    assert corpus.read(str(path)) == "één\r\ntwee\n"


def test_a_corpus_that_cannot_be_read_says_why(tmp_path: Path):
    missing, empty, latin = (tmp_path / name for name in ("missing", "empty", "latin"))
    empty.write_bytes(b"")
    latin.write_bytes("abcé".encode("latin-1"))
    with pytest.raises(FileNotFoundError, match=r"text=.*missing': there is no such file"):
        corpus.read(str(missing))
    with pytest.raises(OSError, match=r"text=.* cannot be read: Is a directory"):
        corpus.read(str(tmp_path))
    with pytest.raises(ValueError, match="empty': the file is empty"):
        corpus.read(str(empty))
    with pytest.raises(ValueError, match="latin': byte 3 is not UTF-8"):
        corpus.read(str(latin))


@given(st.integers(2, 500), st.floats(0.01, 0.99))
def test_split_loses_nothing_and_keeps_the_order(n: int, held_out: float):
    ids = np.arange(n) % byte_ids.VOCAB
    if not 0 < round(n * held_out) < n:
        with pytest.raises(ValueError, match="leaves a part empty"):
            corpus.split(ids, held_out)
        return
    train, test = corpus.split(ids, held_out)
    np.testing.assert_array_equal(np.concatenate([train, test]), ids)
    assert abs(len(test) - n * held_out) <= 0.5
    assert train.dtype == test.dtype == np.int32


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_refuses_a_share_that_is_none(held_out: float):
    with pytest.raises(ValueError, match=r"held_out=.* must be between 0 and 1"):
        corpus.split([1, 2, 3], held_out)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32))
def test_prompts_are_windows_of_the_text(n: int, length: int, seed: int):
    content = "".join(chr(32 + i % 90) for i in range(97))
    windows = corpus.prompts(n, length, seed, content)
    assert windows.shape == (n, length) and windows.dtype == np.int32
    assert all(byte_ids.decode(window) in content for window in windows)
    np.testing.assert_array_equal(windows, corpus.prompts(n, length, seed, content))


def test_prompts_reach_both_ends_and_depend_on_the_seed():
    starts = corpus.prompts(200, 3, seed=0, text="abcdef")[:, 0]
    assert set(starts.tolist()) == set(b"abcd")
    assert (corpus.prompts(8, 16, seed=0) != corpus.prompts(8, 16, seed=1)).any()


def test_prompts_come_from_the_corpus_by_default():
    content = corpus.read().encode()
    assert all(bytes(window.tolist()) in content for window in corpus.prompts(4, 50, seed=9))


def test_prompts_refuse_what_cannot_be_drawn():
    assert corpus.prompts(2, 5, seed=0, text="abcde").shape == (2, 5)
    with pytest.raises(ValueError, match="length=6 is more than the 5 bytes"):
        corpus.prompts(2, 6, seed=0, text="abcde")
    with pytest.raises(ValueError, match="n=0 must be a positive integer"):
        corpus.prompts(0, 5, seed=0, text="abcde")
    with pytest.raises(ValueError, match="length=0 must be a positive integer"):
        corpus.prompts(2, 0, seed=0, text="abcde")
