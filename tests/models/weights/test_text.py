"""The byte tokenizer comes back, the corpus is there, and prompts are windows of it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toruslab.models.weights import text

IDS = st.lists(st.integers(0, text.VOCAB - 1), max_size=60)


@given(st.text(), st.booleans())
def test_any_text_comes_back(content: str, bos: bool):
    ids = text.encode(content, bos=bos)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert len(ids) == len(content.encode()) + bos
    assert (ids[bos:] < text.BOS).all() and (not bos or ids[0] == text.BOS)
    assert text.decode(ids) == content


@given(IDS)
def test_any_ids_decode_and_specials_leave_no_trace(ids: list[int]):
    """A special between two bytes of one character does not break the character."""
    assert text.decode(ids) == text.decode([i for i in ids if i < 256])


@given(IDS, st.integers().filter(lambda i: not 0 <= i < text.VOCAB and abs(i) < 2**62))
def test_ids_outside_the_vocabulary_are_named(ids: list[int], outside: int):
    with pytest.raises(ValueError, match=rf"ids holds {outside}; must be in 0\.\.257"):
        text.decode([*ids, outside])


def test_ids_must_be_a_row_of_integers():
    with pytest.raises(ValueError, match=r"ids has shape \(1, 2\)"):
        text.decode([[65, 66]])
    with pytest.raises(ValueError, match="ids has dtype float64"):
        text.decode([65.0])


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        text.encode("a\ud800")


def test_the_built_in_corpus_is_long_and_english():
    content = text.corpus()
    assert content == text.corpus()
    assert len(content) > 300_000
    assert content.count(" the ") > 1_000


def test_a_corpus_of_ones_own_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_bytes("één\r\ntwee\n".encode())
    assert text.corpus(str(path)) == "één\r\ntwee\n"


def test_a_corpus_that_cannot_be_read_says_why(tmp_path: Path):
    missing, empty, latin = (tmp_path / name for name in ("missing", "empty", "latin"))
    empty.write_bytes(b"")
    latin.write_bytes("abcé".encode("latin-1"))
    with pytest.raises(FileNotFoundError, match=r"text=.*missing': there is no such file"):
        text.corpus(str(missing))
    with pytest.raises(OSError, match=r"text=.* cannot be read: Is a directory"):
        text.corpus(str(tmp_path))
    with pytest.raises(ValueError, match="empty': the file is empty"):
        text.corpus(str(empty))
    with pytest.raises(ValueError, match="latin': byte 3 is not UTF-8"):
        text.corpus(str(latin))


@given(st.integers(2, 500), st.floats(0.01, 0.99))
def test_split_loses_nothing_and_keeps_the_order(n: int, held_out: float):
    ids = np.arange(n) % text.VOCAB
    if not 0 < round(n * held_out) < n:
        with pytest.raises(ValueError, match="leaves a part empty"):
            text.split(ids, held_out)
        return
    train, test = text.split(ids, held_out)
    np.testing.assert_array_equal(np.concatenate([train, test]), ids)
    assert abs(len(test) - n * held_out) <= 0.5
    assert train.dtype == test.dtype == np.int32


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_split_refuses_a_share_that_is_none(held_out: float):
    with pytest.raises(ValueError, match=r"held_out=.* must be between 0 and 1"):
        text.split([1, 2, 3], held_out)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32))
def test_prompts_are_windows_of_the_text(n: int, length: int, seed: int):
    content = "".join(chr(32 + i % 90) for i in range(97))
    windows = text.prompts(n, length, seed, content)
    assert windows.shape == (n, length) and windows.dtype == np.int32
    assert all(text.decode(window) in content for window in windows)
    np.testing.assert_array_equal(windows, text.prompts(n, length, seed, content))


def test_prompts_reach_both_ends_and_depend_on_the_seed():
    starts = text.prompts(200, 3, seed=0, text="abcdef")[:, 0]
    assert set(starts.tolist()) == set(b"abcd")
    assert (text.prompts(8, 16, seed=0) != text.prompts(8, 16, seed=1)).any()


def test_prompts_come_from_the_corpus_by_default():
    content = text.corpus().encode()
    assert all(bytes(window.tolist()) in content for window in text.prompts(4, 50, seed=9))


def test_prompts_refuse_what_cannot_be_drawn():
    assert text.prompts(2, 5, seed=0, text="abcde").shape == (2, 5)
    with pytest.raises(ValueError, match="length=6 is more than the 5 bytes"):
        text.prompts(2, 6, seed=0, text="abcde")
    with pytest.raises(ValueError, match="n=0 must be a positive integer"):
        text.prompts(0, 5, seed=0, text="abcde")
    with pytest.raises(ValueError, match="length=0 must be a positive integer"):
        text.prompts(2, 0, seed=0, text="abcde")
