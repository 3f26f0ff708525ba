"""How text becomes ids and back: bytes, or the `tokenizer.json` of a checkpoint.

Decides which of them a folder gets. Leaves the bytes' ids to `models.weights.byte_ids`, and everything that a `tokenizer.json`
can hold to the package `tokenizers`, where it is installed (the extra `hf`). Imports no JAX.
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
    """Text as ids of a model's vocabulary.

    `stops`: ids that end a text; the first is the one that a program watches for. `name`: what it is, for people.
    """

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> tuple[int, ...]: ...

    def encode(self, said: str) -> byte_ids.TokenIds: ...

    def decode(self, ids: byte_ids.TokenIds) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """UTF-8 bytes, see `models.weights.byte_ids`; ids past them are shown as U+FFFD.

    Example:
        >>> Bytes().decode(Bytes().encode("né"))
        'né'
    """

    stops: tuple[int, ...] = (byte_ids.EOS,)
    name: str = "bytes"

    def encode(self, said: str) -> byte_ids.TokenIds:
        """[n] ids, `BOS` first."""
        return byte_ids.encode(said)

    def decode(self, ids: byte_ids.TokenIds) -> str:
        """The text of any ids."""
        return byte_ids.decode(np.where(ids < byte_ids.VOCAB, ids, 0xFF))  # 0xFF begins no character


@dataclass(frozen=True, kw_only=True)
class FromFile:
    """A `tokenizer.json`; it adds what it says has to come first, such as a beginning of text."""

    held: Any
    stops: tuple[int, ...]
    name: str

    def encode(self, said: str) -> byte_ids.TokenIds:
        """[n] ids."""
        return np.array(self.held.encode(said).ids, np.int32)

    def decode(self, ids: byte_ids.TokenIds) -> str:
        """The text of any ids; unknown ones and specials are left out."""
        return self.held.decode(ids.tolist())


def of_bytes(config: ModelConfig) -> Bytes:
    """Bytes, for a model whose vocabulary holds them.

    Raises:
        ValueError: it does not.
    """
    if config.vocab < byte_ids.VOCAB:
        raise ValueError(f"vocab={config.vocab} of {config.name} is smaller than the {byte_ids.VOCAB} ids of bytes")
    return Bytes()


def of_folder(folder: Path, config: ModelConfig, stops: tuple[int, ...]) -> Tokenizer:
    """The folder's own tokenizer; bytes where it has none or `tokenizers` is not installed, which `name` then says.

    Raises:
        ValueError: a `tokenizer.json` that is damaged or has more ids than the model; or bytes, and too few ids.
    """
    file = folder / FILE
    why = ""
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
