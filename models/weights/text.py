"""Text for toys: a byte-level tokenizer and an English corpus that needs no download.

Decides the ids of bytes and specials, where text comes from, and how it is cut into parts, prompts and the windows of
training. Leaves training and sampling to others. A model that reads these ids needs `vocab >= VOCAB`.
"""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOS = 256
EOS = 257
VOCAB = 258

Ids = NDArray[np.int32]


def encode(text: str, bos: bool = True) -> Ids:
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
    """The text of `ids`, specials skipped; bytes that are not UTF-8 come out as U+FFFD.

    Args:
        ids: [n] ids in 0..VOCAB-1.

    Returns:
        The text. `decode(encode(text))` is `text`; ids that cut a character in two do not come back.

    Raises:
        ValueError: an id outside the vocabulary, or ids that are not a row of integers.

    Example:
        >>> decode([256, 110, 195, 169, 257])
        'né'
        >>> decode([110, 195]) == "n\\ufffd"
        True
    """
    row = _checked_ids(ids)
    return row[row < BOS].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def corpus(path: str | None = None) -> str:
    """The text to train on and to draw prompts from.

    Args:
        path: a UTF-8 file of one's own (`--text FILE`), read as it is; None for the built-in text.

    Returns:
        The file's text, or the English of Python's own `help()` topics (`pydoc_data.topics`, joined in the order of
        their sorted keys), about half a megabyte. It ships with every CPython and differs slightly from one Python
        version to the next, and so do losses on it and prompts drawn from it: state the version with such numbers.

    Raises:
        OSError: no file at `path`, or none that can be read.
        ValueError: the file is empty, or not UTF-8.

    Example:
        >>> corpus()[:22], len(corpus()) > 300_000
        ('The "assert" statement', True)
    """
    if path is None:
        return "".join(topics[key] for key in sorted(topics))
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"text={path!r}: there is no such file; give a UTF-8 text file") from None
    except OSError as error:
        raise OSError(f"text={path!r} cannot be read: {error.strerror}; give a UTF-8 text file") from None
    if not content:
        raise ValueError(f"text={path!r}: the file is empty; it must hold UTF-8 text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={path!r}: byte {error.start} is not UTF-8; convert the file first") from error


def split(ids: ArrayLike, held_out: float = 0.1) -> tuple[Ids, Ids]:
    """Two contiguous parts: the beginning to train on, the end held out.

    Args:
        ids: [n] ids.
        held_out: share of the ids in the second part, between 0 and 1, rounded to whole ids.

    Returns:
        ([n - m], [m]) int32 with m = round(n * held_out); neither is empty.

    Raises:
        ValueError: a share outside (0, 1), an id outside the vocabulary, or too few ids for two parts.

    Example:
        >>> train, test = split(encode("abcdefghij", bos=False), held_out=0.2)
        >>> decode(train), decode(test)
        ('abcdefgh', 'ij')
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out} must be between 0 and 1, both excluded")
    row = _checked_ids(ids)
    n_held_out = round(row.size * held_out)
    if not 0 < n_held_out < row.size:
        raise ValueError(f"held_out={held_out} of {row.size} ids leaves a part empty; both must hold an id")
    return row[:-n_held_out], row[-n_held_out:]


def prompts(n: int, length: int, seed: int, text: str | None = None) -> Ids:
    """`n` windows of equal length, drawn evenly and independently from a text, so that they may overlap.

    Args:
        n: number of windows.
        length: ids in each; every one is a byte of the text. No `BOS`, no `EOS` and no padding, so a window can begin
            or end inside a word.
        seed: the same seed and text give the same windows under one NumPy version.
        text: where to draw from; None for `corpus()`.

    Returns:
        [n, length] int32.

    Raises:
        ValueError: `n` or `length` below one, or a text that is shorter than one window.

    Example:
        >>> prompts(2, 3, seed=0, text="abc").tolist()
        [[97, 98, 99], [97, 98, 99]]
    """
    for field, value in (("n", n), ("length", length)):
        if value < 1:
            raise ValueError(f"{field}={value} must be a positive integer")
    ids = encode(corpus() if text is None else text, bos=False)
    if ids.size < length:
        raise ValueError(f"length={length} is more than the {ids.size} bytes of the text; give a longer text")
    starts = np.random.default_rng(seed).integers(0, ids.size - length + 1, size=n)  # [n]
    return ids[starts[:, None] + np.arange(length)[None, :]]  # [n, length]


def windows(ids: ArrayLike, batch: int, length: int, seed: int, step: int) -> Ids:
    """What a training step reads: `batch` windows of a text, drawn evenly and independently.

    A pure function of its arguments, so that a run that goes on after an interruption reads what it would have read.

    Args:
        ids: [n] ids of the text, n at least `length`.
        batch: number of windows.
        length: L, the tokens that are predicted: `BOS` comes before them, as before a prompt.
        seed, step: not negative; the same give the same windows under one NumPy version.

    Returns:
        [batch, length + 1] int32.

    Example:
        >>> windows([7, 8, 9], 2, 3, seed=0, step=0).tolist()
        [[256, 7, 8, 9], [256, 7, 8, 9]]
    """
    row = np.asarray(ids, np.int32)
    starts = np.random.default_rng((seed, step)).integers(0, row.size - length + 1, size=batch)  # [batch]
    return _begun(row[starts[:, None] + np.arange(length)])


def in_order(ids: ArrayLike, length: int, rows: int) -> Ids:
    """A text cut into windows, one after the other, in groups; what fills no group is left out.

    Args:
        ids: [n] ids of the text.
        length: L, the tokens of a window, with `BOS` before them.
        rows: windows in a group.

    Returns:
        [groups, rows, length + 1] int32.

    Raises:
        ValueError: a text that does not fill one group.

    Example:
        >>> in_order(range(5), 2, 1).tolist()
        [[[256, 0, 1]], [[256, 2, 3]]]
    """
    row = np.asarray(ids, np.int32)
    groups = row.size // length // rows
    if groups < 1:
        raise ValueError(
            f"a held-out text of {row.size} bytes is shorter than {rows} windows of length={length}; give a longer text"
        )
    starts = np.arange(groups * rows).reshape(groups, rows) * length
    return _begun(row[starts[:, :, None] + np.arange(length)])


def _begun(windows: Ids) -> Ids:
    """With `BOS` before each."""
    return np.concatenate([np.full((*windows.shape[:-1], 1), BOS, np.int32), windows], axis=-1)


def unigram_loss(train: ArrayLike, targets: ArrayLike) -> float:
    """What a model that knows only how often each byte occurs loses on `targets`, in nats a byte.

    -mean log p(target), p from counts in `train`, each one more than it is.

    Example:
        >>> round(unigram_loss([0] * 127, [0] * 5), 4)  # p = 128 / (127 + 256)
        1.096
    """
    counts = np.bincount(np.asarray(train), minlength=BOS)[:BOS] + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[np.asarray(targets)]))


def _checked_ids(ids: ArrayLike) -> Ids:
    row = np.asarray(ids)
    if row.ndim != 1:
        raise ValueError(f"ids has shape {row.shape}; must be [n]")
    if row.size == 0:
        return np.zeros(0, np.int32)  # an empty list arrives as float64
    if row.dtype.kind not in "iu":
        raise ValueError(f"ids has dtype {row.dtype}; must be integers")
    outside = row[(row < 0) | (row >= VOCAB)]
    if outside.size:
        raise ValueError(f"ids holds {outside[0]}; must be in 0..{VOCAB - 1} (bytes, BOS={BOS}, EOS={EOS})")
    return row.astype(np.int32)
