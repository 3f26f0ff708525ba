"""The named tensors of a folder of safetensors files, read piece by piece.

Opening a folder reads the header of every file, but no data, and checks that the folder is whole. The names get their
meaning in `models.weights.huggingface`. Imports no JAX.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # also makes NumPy know the name bfloat16, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorFiles:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Args:
        folder: the folder with the files.

    Raises:
        ValueError: neither or both of `model.safetensors` and the index; a file that is missing, damaged or shorter
            than its header says; or an index that does not agree with the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file() and index.is_file():
            raise ValueError(f"{str(folder)!r} holds both {SINGLE} and {INDEX}; one of them must go")
        if not single.is_file() and not index.is_file():
            raise ValueError(f"{str(folder)!r} holds no {SINGLE} and no {INDEX}")
        listed = _listed(index) if index.is_file() else None
        files = sorted(set(listed.values())) if listed else [SINGLE]
        opened = {file: _opened(folder / file) for file in files}
        self._slices: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        for file, held in opened.items():
            for name in held.keys():  # noqa: SIM118 - no mapping
                if name in self._files:
                    raise ValueError(f"{str(folder)!r}: tensor {name!r} is both in {self._files[name]} and in {file}")
                if listed is not None and listed.get(name) != file:
                    said = listed.get(name, "nothing")
                    raise ValueError(f"{str(folder / file)!r} holds tensor {name!r}, for which {INDEX} says {said!r}")
                self._slices[name], self._files[name] = held.get_slice(name), file
        for name, file in (listed or {}).items():
            if name not in self._files:
                raise ValueError(f"{str(folder / file)!r} does not hold tensor {name!r}, but {INDEX} says so")
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s.get_shape()) for n, s in self._slices.items()}

    def check(self, expected: Mapping[str, tuple[int, ...]], unread: Collection[str] = ()) -> None:
        """Compares names, shapes and dtypes with those that a model needs.

        Args:
            expected: shape by name of the model's tensors.
            unread: names that may be in the files as well.

        Raises:
            ValueError: a tensor that is missing, unknown, of another shape, or of an unsupported dtype.
        """
        have = self.shapes.keys() - set(unread)
        for found, rule in ((expected.keys() - have, "is missing"), (have - expected.keys(), "is not of this model")):
            if names := sorted(found):
                more = f", and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"{str(self.folder)!r}: tensor {names[0]!r} {rule}{more}")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                found = list(self.shapes[name])
                raise ValueError(f"{self._where(name)} has shape {found}; config.json makes it {list(shape)}")
            if (dtype := self._slices[name].get_dtype()) not in DTYPES:
                raise ValueError(f"{self._where(name)} has dtype {dtype}; must be one of {', '.join(DTYPES)}")

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A piece of a tensor, in the file's dtype. Elements past the end of the tensor are zero.

        Args:
            name: of the tensor.
            index: a slice with start and stop for every dimension.
        """
        dtype = DTYPES[self._slices[name].get_dtype()]
        held = tuple(slice(s.start, min(s.stop, n)) for s, n in zip(index, self.shapes[name], strict=True))
        wanted = tuple(s.stop - s.start for s in index)
        if any(s.start >= s.stop for s in held):
            return np.zeros(wanted, dtype)
        found = self._slices[name][held]
        if found.shape == wanted:
            return found
        padding = [(0, n - have) for n, have in zip(wanted, found.shape, strict=True)]
        return np.pad(found, padding)

    def _where(self, name: str) -> str:
        return f"{str(self.folder / self._files[name])!r}: tensor {name!r}"


def _listed(index: Path) -> dict[str, str]:
    """The file of each tensor, from the index."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f"{str(index)!r} must be a JSON object with a 'weight_map': {error!r}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{str(index)!r}: 'weight_map' must be an object that names the file of every tensor")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{str(index)!r}: {name!r} is in {file!r}, which must be a .safetensors file beside it")
    return found


def _opened(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is missing; {INDEX} lists it")
    try:
        return safe_open(file, framework="np").__enter__()
    except (SafetensorError, OSError) as error:
        size = f"a file of {file.stat().st_size} bytes"
        raise ValueError(f"{str(file)!r}, {size}, is damaged or cut short: {error}") from error
