"""The byte tokenizer: any text comes back, and ids outside the vocabulary are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toruslab.models.weights import byte_ids

IDS = st.lists(st.integers(0, byte_ids.VOCAB - 1), max_size=60)


@given(st.text(), st.booleans())
def test_any_text_comes_back(content: str, bos: bool):
    ids = byte_ids.encode(content, bos=bos)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert len(ids) == len(content.encode()) + bos
    assert (ids[bos:] < byte_ids.BOS).all() and (not bos or ids[0] == byte_ids.BOS)
    assert byte_ids.decode(ids) == content


@given(IDS)
def test_any_ids_decode_and_specials_leave_no_trace(ids: list[int]):
    """A special between two bytes of one character does not break the character."""
    assert byte_ids.decode(ids) == byte_ids.decode([i for i in ids if i < 256])


@given(IDS, st.integers().filter(lambda i: not 0 <= i < byte_ids.VOCAB and abs(i) < 2**62))
def test_ids_outside_the_vocabulary_are_named(ids: list[int], outside: int):
    with pytest.raises(ValueError, match=rf"ids holds {outside}; must be in 0\.\.257"):
        byte_ids.decode([*ids, outside])


def test_ids_must_be_a_row_of_integers():
    with pytest.raises(ValueError, match=r"ids has shape \(1, 2\)"):
        byte_ids.decode([[65, 66]])
    with pytest.raises(ValueError, match="ids has dtype float64"):
        byte_ids.decode([65.0])


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        byte_ids.encode("a\ud800")
