"""The tokenizer of a checkpoint: its `tokenizer.json`, or bytes.

A `tokenizer.json` is read by the package `tokenizers`, if it is installed (the extra `hf`). The ids of bytes are in
`models.weights.byte_ids`. Imports no JAX.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.models.weights import byte_ids

FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Text <-> ids of a model's vocabulary.

    `stops` are the ids that end a text; programs stop at the first of them. `name` describes the tokenizer to people.
    """

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> tuple[int, ...]: ...

    def encode(self, said: str) -> byte_ids.TokenIds: ...

    def decode(self, ids: byte_ids.TokenIds) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The byte tokenizer of `models.weights.byte_ids`. Ids outside its vocabulary decode to U+FFFD.

    Example:
        >>> Bytes().decode(Bytes().encode("né"))
        'né'
    """

    stops: tuple[int, ...] = (byte_ids.EOS,)
    name: str = "bytes"

    def encode(self, said: str) -> byte_ids.TokenIds:
        """The [n] ids of a text, `BOS` first."""
        return byte_ids.encode(said)

    def decode(self, ids: byte_ids.TokenIds) -> str:
        """The text of any ids."""
        return byte_ids.decode(np.where(ids < byte_ids.VOCAB, ids, 0xFF))  # 0xFF is in no character


@dataclass(frozen=True, kw_only=True)
class FromFile:
    """A `tokenizer.json`. It may put ids of its own first, such as a beginning of text."""

    held: Any
    stops: tuple[int, ...]
    name: str

    def encode(self, said: str) -> byte_ids.TokenIds:
        """The [n] ids of a text."""
        return np.array(self.held.encode(said).ids, np.int32)

    def decode(self, ids: byte_ids.TokenIds) -> str:
        """The text of any ids. Unknown and special ids are left out."""
        return self.held.decode(ids.tolist())


def of_bytes(config: ModelConfig) -> Bytes:
    """The byte tokenizer for a model.

    Raises:
        ValueError: the model's vocabulary is too small for the ids of bytes.
    """
    if config.vocab < byte_ids.VOCAB:
        raise ValueError(f"vocab={config.vocab} of {config.name} is smaller than the {byte_ids.VOCAB} ids of bytes")
    return Bytes()


def of_folder(folder: Path, config: ModelConfig, stops: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    Returns:
        The folder's own tokenizer; bytes if it has none or `tokenizers` is not installed, and `name` then says which.

    Raises:
        ValueError: a `tokenizer.json` that is damaged or has more ids than the model; or a vocabulary that is too small
            for bytes.
    """
    file, why = folder / FILE, ""
    if not file.is_file():
        why = f"there is no {FILE} in {str(folder)!r}"
    elif importlib.util.find_spec("tokenizers") is None:
        why = f"{FILE} needs the package tokenizers (pip install 'toruslab[hf]')"
    if why:
        try:
            return Bytes(stops=stops or Bytes().stops, name=f"bytes: {why}" if of_bytes(config) else "")
        except ValueError as error:
            raise ValueError(f"{error}, and {why}") from None
    try:
        held = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    if (n := held.get_vocab_size()) > config.vocab:
        raise ValueError(f"{str(file)!r} has {n} ids, more than vocab={config.vocab} of config.json")
    return FromFile(held=held, stops=stops, name=str(file))
