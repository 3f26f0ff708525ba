"""The options `--model` and `--checkpoint`: which model, weights and tokenizer a command works with.

The files in a folder tell which format of `FORMATS` it has. Without a folder the weights are random. The formats' own
modules read them. Nothing here touches a device until `Chosen.params` is called.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.models.weights import tokenizer
from toruslab.models.weights.tensor_files import INDEX, SINGLE
from toruslab.models.weights.tokenizer import Tokenizer

DEFAULT_MODEL = "toy"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A model whose weights can be loaded.

    Args:
        config, tokenizer: of the model.
        params: (layout, mesh, dtype=, int8=) -> the parameters on their devices.
        said: where the weights are from, for people.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    params: Callable[..., Any]
    said: str


def add(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--checkpoint`."""
    parser.add_argument("--model", help=f"preset or config.json, with random weights (default: {DEFAULT_MODEL})")
    parser.add_argument("--checkpoint", metavar="DIR", help=f"model and weights from a folder: {_known()}")


def chosen(name: str | None, checkpoint: str | None, seed: int) -> Chosen:
    """The model and weights that the two options ask for.

    Args:
        name: of `--model`.
        checkpoint: of `--checkpoint`.
        seed: of random weights.

    Raises:
        ValueError: both of them, a folder that is no checkpoint, or a damaged one; an unknown model.
    """
    if checkpoint is None:
        return _random(name or DEFAULT_MODEL, seed)
    if name is not None:
        raise ValueError(f"model={name!r} beside checkpoint={checkpoint!r}: a checkpoint says which model it is")
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"checkpoint={checkpoint!r}: there is no such folder")
    for known in FORMATS:
        if known.fits(folder):
            try:
                return known.opened(folder)
            except ValueError as error:
                said = str(error).removeprefix(f"model={str(folder)!r}: ")
                raise ValueError(f"checkpoint={checkpoint!r}: {said}") from error
    raise ValueError(f"checkpoint={checkpoint!r} is no checkpoint that is known: {_known()}")


def _random(name: str, seed: int) -> Chosen:
    config = model(name)

    def params(layout, mesh, **types):
        from toruslab.models.decoder.parameters import initial

        return initial(config, layout, mesh, seed=seed, **types)

    said = f"random, seed {seed} (the text is noise)"
    return Chosen(config=config, tokenizer=tokenizer.of_bytes(config), params=params, said=said)


def _hugging_face(folder: Path) -> Chosen:
    from toruslab.models.weights.huggingface import open_folder

    checkpoint = open_folder(folder)
    config = checkpoint.config

    def params(layout, mesh, **types):
        from toruslab.models.decoder.parameters import read

        return read(checkpoint, layout, mesh, **types)

    found = tokenizer.of_folder(folder, config, checkpoint.stops)
    said = f"{folder} ({config.n_params / 1e6:,.1f} million parameters); text as {found.name}"
    return Chosen(config=config, tokenizer=found, params=params, said=said)


def _own(folder: Path) -> Chosen:
    from toruslab.models.programs import checkpoint_folder

    folder = _of_steps(folder)
    record = checkpoint_folder.read(folder)
    config = record.config

    def params(layout, mesh, *, dtype, int8=False):
        import jax
        import jax.numpy as jnp

        from toruslab.models.decoder.parameters import abstract, as_int8, shardings
        from toruslab.models.programs.checkpoints import restore_params

        if not int8:
            return restore_params(folder, config, layout, mesh, dtype, record.step)
        whole = restore_params(folder, config, layout, mesh, jnp.float32, record.step)
        places = shardings(abstract(config, dtype, True)[1], layout, mesh)
        return jax.jit(lambda p: as_int8(config, p, dtype), out_shardings=places)(whole)

    said = f"{folder}, step {record.step} of training ({config.n_params / 1e6:,.1f} million parameters)"
    return Chosen(config=config, tokenizer=tokenizer.of_bytes(config), params=params, said=said)


def _of_steps(folder: Path) -> Path:
    """The folder with the checkpoints of training: this one, or the one that `toruslab train` makes in it."""
    inner = folder / "checkpoints"
    return inner if inner.is_dir() else folder


def _has_steps(folder: Path) -> bool:
    from toruslab.models.programs.checkpoint_folder import steps

    return bool(steps(_of_steps(folder)))


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of checkpoints: its name, whether a folder has it, and how such a folder is opened."""

    name: str
    fits: Callable[[Path], bool]
    opened: Callable[[Path], Chosen]


def _has_safetensors(folder: Path) -> bool:
    return any((folder / file).exists() for file in (SINGLE, INDEX))


FORMATS = (
    Format(name="Hugging Face (config.json, *.safetensors)", fits=_has_safetensors, opened=_hugging_face),
    Format(name="toruslab train (its --out)", fits=_has_steps, opened=_own),
)
"""In the order in which they are tried."""


def _known() -> str:
    return ", ".join(known.name for known in FORMATS)
