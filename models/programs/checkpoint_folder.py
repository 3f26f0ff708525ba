"""A folder of checkpoints: its steps, their records, and whether their files are whole.

A checkpoint is a folder named by its step. It has the arrays of the parameters (`params`) and of everything else
(`rest`), as orbax writes them, and our own record, `toruslab.json`: the model, every array's shape and dtype, every
file's length and CRC-32, and the caller's facts. The CRCs are needed: orbax reads a flipped byte of array data as wrong
numbers, without an error. A checkpoint that is being written or deleted has a name that is no step.

`models.programs.checkpoints` writes and reads the arrays. Imports no JAX.
"""

import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toruslab.models.config import ModelConfig

RECORD, FORMAT = "toruslab.json", 1
PARTS = ("params", "rest")
_LEFT_OVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of `toruslab.json`.

    Args:
        step: of training.
        config: the model.
        arrays: shape and dtype by name, such as `params.layer.w_in`.
        files: length in bytes and CRC-32 by path inside the checkpoint's folder.
        facts: the caller's facts, as JSON.
    """

    step: int
    config: ModelConfig
    arrays: Mapping[str, tuple[tuple[int, ...], str]]
    files: Mapping[str, tuple[int, int]]
    facts: Mapping[str, Any]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files on disk, without the record."""
        return sum(length for length, _ in self.files.values())


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, sorted; none if there is no folder.

    Raises:
        ValueError: `folder` is a file.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ValueError(f"checkpoint={str(folder)!r} is a file, not a folder of checkpoints")
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", path.name))


def read(folder: Path, step: int | None = None) -> Record:
    """The record of a checkpoint, by default of the latest.

    Raises:
        ValueError: there is no checkpoint, or its record is missing, damaged or of another format.
    """
    found = steps(folder)
    if not found:
        what = "has no checkpoint in it" if folder.exists() else "is not there"
        raise ValueError(f"checkpoint={str(folder)!r} {what}: it must be a folder that training wrote")
    step = found[-1] if step is None else step
    if step not in found:
        raise ValueError(f"step={step} is not in checkpoint={str(folder)!r}; there are {', '.join(map(str, found))}")
    path = folder / str(step) / RECORD
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint={str(path.parent)!r} has no {RECORD}: it is not one of ours, or damaged"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    try:
        whole = json.loads(text)
        format_, record = whole["format"], whole["record"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{str(path)!r} is damaged: it must be a JSON object with a format and a record") from None
    if format_ != FORMAT:
        raise ValueError(f"{str(path)!r} has format={str(format_)[:40]}, but must have {FORMAT} to be read here")
    if whole.get("crc32") != zlib.crc32(json.dumps(record).encode()):
        raise ValueError(f"{str(path)!r} is damaged: its sum is not that of what it says")
    try:
        config = ModelConfig(**record["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} describes no model that is known here: {error}") from None
    return Record(
        step=record["step"],
        config=config,
        arrays={name: (tuple(shape), dtype) for name, (shape, dtype) in record["arrays"].items()},
        files={name: (length, crc) for name, (length, crc) in record["files"].items()},
        facts=record["facts"],
    )


def write(
    directory: Path,
    *,
    step: int,
    config: ModelConfig,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    facts: Mapping[str, Any],
) -> None:
    """Writes the record of a checkpoint's folder, with lengths and CRCs of its files, and flushes it to the disk."""
    paths = [path for part in PARTS for path in sorted((directory / part).rglob("*")) if path.is_file()]
    files = {path.relative_to(directory).as_posix(): _sum(path) for path in paths}
    record = {"step": step, "config": dataclasses.asdict(config), "arrays": arrays, "files": files, "facts": facts}
    text = json.dumps(record)
    with open(directory / RECORD, "w") as out:
        out.write(f'{{"format": {FORMAT}, "crc32": {zlib.crc32(text.encode())}, "record": {text}}}\n')
        out.flush()
        os.fsync(out.fileno())


def damage(directory: Path, record: Record, parts: Iterable[str], share: int = 0, shares: int = 1) -> tuple[int, str]:
    """The first damaged file in some parts of a checkpoint.

    Args:
        parts: some of `PARTS`.
        share, shares: check every `shares`-th file of the record, from number `share` on.

    Returns:
        The file's number in the record and the damage in words. If all files are as they were written: the number of
        files and no words.
    """
    parts = set(parts)
    for number, (name, (length, crc)) in enumerate(record.files.items()):
        if number % shares != share or name.split("/")[0] not in parts:
            continue
        path = directory / name
        try:
            found = _sum(path)
        except OSError as error:
            return number, f"{name} {'is missing' if isinstance(error, FileNotFoundError) else error.strerror}"
        if found[0] != length:
            return number, f"{name} has {found[0]} bytes, but {length} were written"
        if found[1] != crc:
            return number, f"{name} has other bytes than were written (CRC-32 {found[1]:08x}, not {crc:08x})"
    return len(record.files), ""


def differences(there: ModelConfig, here: ModelConfig) -> str:
    """The fields in which two models differ, such as `d_model=512 there, 256 wanted`. Names are not compared."""
    fields = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "name"]
    differ = [(f, getattr(there, f), getattr(here, f)) for f in fields if getattr(there, f) != getattr(here, f)]
    return "; ".join(f"{name}={a!r} there, {b!r} wanted" for name, a, b in differ)


def clean(folder: Path) -> None:
    """Removes the remains of killed and failed saves, and of a deletion that was interrupted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Deletes all checkpoints but the newest `keep`. Each is renamed first, so that a kill leaves no part of one."""
    for step in steps(folder)[:-keep]:
        gone = folder / f"{step}.deleted"
        os.replace(folder / str(step), gone)
        shutil.rmtree(gone)


def _sum(path: Path) -> tuple[int, int]:
    """Length in bytes and CRC-32 of a file."""
    length = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            length, crc = length + len(block), zlib.crc32(block, crc)
    return length, crc


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as they will be read from JSON.

    Raises:
        ValueError: JSON cannot hold them.
    """
    try:
        return json.loads(json.dumps(facts))
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be what JSON can hold: {error}") from None
