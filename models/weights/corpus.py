"""A corpus for toy models: English text that needs no download, and the windows that training and prompts take from it.

Text is tokenized as bytes (`models.weights.byte_ids`). Training and sampling are elsewhere.
"""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from numpy.typing import ArrayLike

from toruslab.models.weights.byte_ids import BOS, TokenIds, check, encode


def read(path: str | None = None) -> str:
    """The text to train on and to draw prompts from.

    Args:
        path: a UTF-8 file of one's own (`--text FILE`), read as it is; None for the built-in text.

    Returns:
        The file's text, or the English of Python's own `help()` topics (`pydoc_data.topics`, joined in the order of
        their sorted keys), about half a megabyte. Every CPython has these topics, but they differ slightly from one
        Python version to the next. State the version with every loss that is measured on them.

    Raises:
        OSError: no file at `path`, or none that can be read.
        ValueError: the file is empty, or not UTF-8.

    Example:
        >>> read()[:22], len(read()) > 300_000
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


def split(ids: ArrayLike, held_out: float = 0.1) -> tuple[TokenIds, TokenIds]:
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
        >>> bytes(train.tolist()), bytes(test.tolist())
        (b'abcdefgh', b'ij')
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out} must be between 0 and 1, both excluded")
    checked = check(ids)
    n_held_out = round(checked.size * held_out)
    if not 0 < n_held_out < checked.size:
        raise ValueError(f"held_out={held_out} of {checked.size} ids leaves a part empty; both must hold an id")
    return checked[:-n_held_out], checked[-n_held_out:]


def prompts(n: int, length: int, seed: int, text: str | None = None) -> TokenIds:
    """`n` windows of equal length at random places of a text. Windows may overlap.

    Args:
        n: number of windows.
        length: ids in each. All are bytes of the text, without `BOS`, `EOS` and padding. A window can begin or end
            inside a word.
        seed: the same seed and text give the same windows under one NumPy version.
        text: where to draw from; None for the built-in text.

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
    ids = encode(read() if text is None else text, bos=False)
    if ids.size < length:
        raise ValueError(f"length={length} is more than the {ids.size} bytes of the text; give a longer text")
    starts = np.random.default_rng(seed).integers(0, ids.size - length + 1, size=n)  # [n]
    return ids[starts[:, None] + np.arange(length)]  # [n, length]


def windows(ids: ArrayLike, batch: int, length: int, seed: int, step: int) -> TokenIds:
    """The batch of one training step: windows at random places of a text.

    A pure function of its arguments, so that a resumed run reads the same batches as an uninterrupted one.

    Args:
        ids: [n] ids of the text, n at least `length`.
        batch: number of windows.
        length: L, the tokens that are predicted; `BOS` is put before them.
        seed, step: not negative; the same give the same windows under one NumPy version.

    Returns:
        [batch, length + 1] int32.

    Example:
        >>> windows([7, 8, 9], 2, 3, seed=0, step=0).tolist()
        [[256, 7, 8, 9], [256, 7, 8, 9]]
    """
    text = np.asarray(ids, np.int32)
    starts = np.random.default_rng((seed, step)).integers(0, text.size - length + 1, size=batch)  # [batch]
    return _with_bos(text[starts[:, None] + np.arange(length)])


def in_order(ids: ArrayLike, length: int, n_windows: int) -> TokenIds:
    """A text cut into consecutive windows, in groups. The end that does not fill a group is left out.

    Args:
        ids: [n] ids of the text.
        length: L, the tokens of a window; `BOS` is put before them.
        n_windows: windows in a group.

    Returns:
        [groups, n_windows, length + 1] int32.

    Raises:
        ValueError: a text that does not fill one group.

    Example:
        >>> in_order(range(5), 2, 1).tolist()
        [[[256, 0, 1]], [[256, 2, 3]]]
    """
    text = np.asarray(ids, np.int32)
    groups = text.size // length // n_windows
    if groups < 1:
        size = f"a held-out text of {text.size} bytes"
        raise ValueError(f"{size} is shorter than {n_windows} windows of length={length}; give a longer text")
    return _with_bos(text[: groups * n_windows * length].reshape(groups, n_windows, length))


def _with_bos(windows: TokenIds) -> TokenIds:
    return np.concatenate([np.full((*windows.shape[:-1], 1), BOS, np.int32), windows], axis=-1)


def unigram_loss(train: ArrayLike, targets: ArrayLike) -> float:
    """The loss on `targets` of a model that knows only how often each byte occurs, in nats per byte.

    -mean log p(target), with p from the counts in `train`, each increased by one.

    Example:
        >>> round(unigram_loss([0] * 127, [0] * 5), 4)  # p = 128 / (127 + 256)
        1.096
    """
    counts = np.bincount(np.asarray(train), minlength=BOS)[:BOS] + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[np.asarray(targets)]))
