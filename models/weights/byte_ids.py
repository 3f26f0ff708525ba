"""The byte tokenizer: a token id for each UTF-8 byte, and two ids for the beginning and the end of a text.

A model that reads these ids needs `vocab >= VOCAB`. `models.weights.tokenizer` chooses between this tokenizer and that
of a checkpoint.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOS = 256
EOS = 257
VOCAB = 258

TokenIds = NDArray[np.int32]


def encode(text: str, bos: bool = True) -> TokenIds:
    """The UTF-8 bytes of `text` as ids 0..255.

    Args:
        text: any text that UTF-8 can hold (lone surrogates cannot).
        bos: put `BOS` first. `EOS` is never added: the text may go on.

    Returns:
        [n_bytes + bos] int32.

    Raises:
        UnicodeEncodeError: a ValueError; a lone surrogate, and where.

    Example:
        >>> encode("né").tolist()
        [256, 110, 195, 169]
    """
    body = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)
    return np.concatenate([np.array([BOS], np.int32), body]) if bos else body


def decode(ids: ArrayLike) -> str:
    """The text of `ids`, without `BOS` and `EOS`. Bytes that are not UTF-8 become U+FFFD.

    Args:
        ids: [n] ids in 0..VOCAB-1.

    Returns:
        The text. `decode(encode(text))` is `text`; ids that cut a character in two do not come back.

    Raises:
        ValueError: an id outside the vocabulary, or ids that are not a 1-D array of integers.

    Example:
        >>> decode([256, 110, 195, 169, 257])
        'né'
        >>> decode([110, 195]) == "n\\ufffd"
        True
    """
    checked = check(ids)
    return checked[checked < BOS].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def check(ids: ArrayLike) -> TokenIds:
    """`ids` as an int32 array.

    Raises:
        ValueError: an id outside the vocabulary, or ids that are not a 1-D array of integers.
    """
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"ids has shape {array.shape}; must be [n]")
    if array.size == 0:
        return np.zeros(0, np.int32)  # an empty list arrives as float64
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids has dtype {array.dtype}; must be integers")
    outside = array[(array < 0) | (array >= VOCAB)]
    if outside.size:
        raise ValueError(f"ids holds {outside[0]}; must be in 0..{VOCAB - 1} (bytes, BOS={BOS}, EOS={EOS})")
    return array.astype(np.int32)
