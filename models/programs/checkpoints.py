"""Checkpoints: the state of training on disk, written under one layout and mesh and read under any other.

orbax writes and reads the arrays, each chip its own shards, while training goes on. An array is stored under its name
and global shape, which no layout changes. With our own record beside the arrays (`models.programs.checkpoint_folder`),
damaged checkpoints and those of other models are refused.

This module imports orbax. Commands that may not need orbax import this module late.
"""

import contextlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.parameters import abstract, placed, shardings
from toruslab.models.programs import checkpoint_folder
from toruslab.models.programs.checkpoint_folder import Record
from toruslab.partitioning.layouts.layout import Layout

PARAMETERS = "params"
"""The field of a state that holds the decoder's parameters."""
Named = dict[str, Any]
"""The leaves of a state by name: the path to each, such as `params.layer.w_in`."""


def _say(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one training run in a folder.

    Args:
        folder: a folder for these checkpoints alone; the first save makes it.
        config: the model.
        keep: number of checkpoints to keep, the newest. An older one is deleted once a newer one is whole.
        warn: called by `save` and `wait` with a sentence about a save that failed. Training can go on.
        timeout_s: most seconds for a save. With several processes, also the wait of the others when one has failed.

    Raises:
        ValueError: `keep` below 1, or a folder that is a file, has checkpoints of another model, or has other files.
    """

    def __init__(
        self,
        folder: Path | str,
        config: ModelConfig,
        *,
        keep: int = 3,
        warn: Callable[[str], None] = _say,
        timeout_s: int = 600,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.folder, self.config, self.keep, self.warn = Path(folder).absolute(), config, keep, warn
        if self.latest() is not None:
            _same_model(self.folder, checkpoint_folder.read(self.folder), config)
        self._handler = _Handler()
        options = ocp.options.AsyncOptions(timeout_secs=timeout_s)
        self._writer = ocp.AsyncCheckpointer(self._handler, async_options=options)
        self._writing: int | None = None

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None before the first."""
        return max(checkpoint_folder.steps(self.folder), default=None)

    def facts(self, step: int | None = None) -> Mapping[str, Any]:
        """The facts that were saved with a checkpoint, by default with the latest.

        Raises:
            ValueError: see `models.programs.checkpoint_folder.read`.
        """
        return checkpoint_folder.read(self.folder, step).facts

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint. All processes must call it with the same step and facts.

        Waits for the save before, if it still runs. `state` may be donated as soon as this returns. A failure while
        writing (a full disk) becomes a warning of this call or a later one. Earlier checkpoints are not affected.

        Args:
            step: of training, above that of every checkpoint here.
            state: a pytree of JAX arrays; its field `params` can be read without the rest.
            facts: anything that JSON can hold.

        Raises:
            ValueError: a step that is not the newest, leaves that are no arrays, or facts that JSON cannot hold.
        """
        self.wait()
        latest = self.latest()
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        if latest is not None and step <= latest:
            raise ValueError(f"step={step} must be above {latest}, the latest in checkpoint={str(self.folder)!r}")
        arrays = named(state)
        for name, leaf in arrays.items():
            if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                raise ValueError(f"{name} is a {type(leaf).__name__}, but must be a JAX array of numbers to be saved")
        shapes = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in arrays.items()}
        facts = checkpoint_folder.as_json(facts)
        self._handler.record = {"step": step, "config": self.config, "arrays": shapes, "facts": facts}
        self._writing = step
        try:
            if jax.process_index() == 0:
                checkpoint_folder.clean(self.folder)
                self.folder.mkdir(parents=True, exist_ok=True)
            if no_room := self._no_room(arrays):
                raise OSError(no_room)
            items = {part: ocp.args.PyTreeSave(found) for part, found in _parts(arrays).items()}
            self._writer.save(self.folder / str(step), args=_Save(**items))
        except OSError as error:
            self._failed(error)

    def wait(self) -> None:
        """Waits until the last save is on disk or has failed, then deletes checkpoints that are too old."""
        if self._writing is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:  # a writing thread can raise anything, and training must go on
            self._failed(error)
            return
        self._writing = None
        if jax.process_index() == 0:
            checkpoint_folder.prune(self.folder, self.keep)

    def restore(self, wanted: Any, step: int | None = None) -> Any:
        """The state of a checkpoint, on its devices. All processes must call it with the same step.

        Args:
            wanted: the state as `jax.ShapeDtypeStruct`s with `NamedSharding`s, of any layout and mesh.
            step: of the checkpoint; by default the latest.

        Raises:
            ValueError: no such checkpoint, a damaged one, or one with other arrays, shapes or dtypes than wanted.
        """
        self.wait()
        record = checkpoint_folder.read(self.folder, step)
        wanted_by_name = named(wanted)
        where = f"checkpoint={str(self.folder / str(record.step))!r}"
        for name in record.arrays:
            if name not in wanted_by_name:
                raise ValueError(f"{where} has an array {name}, which is not wanted here")
        for name, leaf in wanted_by_name.items():
            if name in record.arrays and record.arrays[name][1] != str(leaf.dtype):
                raise ValueError(f"{where}: {name} is {record.arrays[name][1]} there, {leaf.dtype} wanted")
        read = _read(self.folder, record, wanted_by_name)
        return jax.tree.unflatten(jax.tree.structure(wanted), list(read.values()))

    def close(self) -> None:
        """Waits for the last save and ends the threads that write."""
        self.wait()
        self._writer.close()

    def _no_room(self, arrays: Named) -> str:
        """The refusal if the disk is too full for a save; all processes get the same. It may still fill up later."""
        needed = sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.folder).free if jax.process_index() == 0 else 0
        if jax.process_count() > 1:
            free = int(multihost_utils.broadcast_one_to_all(np.float32(free)))
        if needed <= free:
            return ""
        return f"it takes up to {needed / 1e6:.1f} MB, but the disk has only {free / 1e6:.1f} MB free"

    def _failed(self, error: Exception) -> None:
        """Removes what the failed save left and warns of it."""
        step, self._writing = self._writing, None
        self._handler.settle()
        if jax.process_index() == 0:
            checkpoint_folder.clean(self.folder)
        latest = self.latest()
        kept = "there is none before it" if latest is None else f"the latest is that of step {latest}"
        reason = " ".join(str(error).rsplit('": ', 1)[-1].split())[:300]  # without the paths before it
        self.warn(f"checkpoint={str(self.folder / str(step))!r} could not be written, {kept}: {reason}")


def restore_params(
    folder: Path | str,
    config: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    dtype=jnp.float32,
    step: int | None = None,
) -> nnx.State:
    """The decoder's parameters from a checkpoint, placed by the layout. The rest of the checkpoint is not read.

    Args:
        folder: of checkpoints.
        config: the model; `models.programs.checkpoint_folder.read(folder).config` is that of the checkpoint.
        dtype: the parameters are cast to it on their devices.
        step: of the checkpoint; by default the latest.

    Raises:
        ValueError: no such checkpoint, a damaged one, or one of another model.
    """
    folder = Path(folder).absolute()
    record = checkpoint_folder.read(folder, step)
    _same_model(folder, record, config)
    params = abstract(config, dtype)[1]
    params = placed(params, shardings(params, layout, mesh))
    wanted = named({PARAMETERS: params})
    stored = {
        name: jax.ShapeDtypeStruct(leaf.shape, record.arrays.get(name, ((), str(dtype)))[1], sharding=leaf.sharding)
        for name, leaf in wanted.items()
    }
    read = [array.astype(dtype) for array in _read(folder, record, stored).values()]
    return jax.tree.unflatten(jax.tree.structure(params), read)


def named(state: Any) -> Named:
    """The leaves of a state by name: the path to each, joined by dots, without Flax's wrappers of variables.

    Raises:
        ValueError: two leaves with one name.
    """
    found: Named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        if name in found:
            raise ValueError(f"state has two arrays named {name!r}; each must have a name of its own")
        found[name] = leaf
    return found


def _parts(arrays: Named) -> dict[str, Named]:
    """The arrays of each part that is written and read by itself: the parameters, and the rest."""
    first, rest = checkpoint_folder.PARTS
    parts: dict[str, Named] = {first: {}, rest: {}}
    for name, array in arrays.items():
        parts[first if name.split(".")[0] == PARAMETERS else rest][name] = array
    return {part: found for part, found in parts.items() if found}


def _same_model(folder: Path, record: Record, config: ModelConfig) -> None:
    if differ := checkpoint_folder.differences(record.config, config):
        raise ValueError(f"checkpoint={str(folder)!r} is of another model, {record.config.name}: {differ}")


def _read(folder: Path, record: Record, wanted: Named) -> Named:
    """The arrays with these names, shapes, dtypes and shardings. Their files are checked for damage first."""
    directory = folder / str(record.step)
    where = f"checkpoint={str(directory)!r}"
    for name, leaf in wanted.items():
        if name not in record.arrays:
            raise ValueError(f"{where} has no array {name}, which is wanted here")
        if record.arrays[name][0] != leaf.shape:
            raise ValueError(f"{where}: {name} is {list(record.arrays[name][0])} there, {list(leaf.shape)} wanted")
        if not isinstance(leaf.sharding, NamedSharding):
            raise ValueError(f"{name} is wanted without a NamedSharding: it must say where the array goes")
    parts = _parts(wanted)
    if damage := _damage(directory, record, list(parts)):
        raise ValueError(f"{where} is damaged: {damage}")
    found: Named = {}
    handler = ocp.PyTreeCheckpointHandler()
    for part, arrays in parts.items():
        places = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in arrays.items()
        }
        with ocp.Checkpointer(handler) as reader:
            found |= reader.restore(directory / part, args=ocp.args.PyTreeRestore(item=arrays, restore_args=places))
    return {name: found[name] for name in wanted}


def _damage(directory: Path, record: Record, parts: list[str]) -> str:
    """The damage in words, or none. Each process checks its share of the files, and all return the same verdict."""
    n = jax.process_count()
    number, words = checkpoint_folder.damage(directory, record, parts, jax.process_index(), n)
    if n == 1:
        return words
    first = int(np.min(multihost_utils.process_allgather(np.int32(number))))
    if first == len(record.files):
        return ""
    name = list(record.files)[first]
    return words if first == number else f"{name} is not as it was written"


class _Handler(ocp.CompositeCheckpointHandler):
    """orbax's handler of several items, which also writes our record before the folder gets its final name."""

    record: Mapping[str, Any]
    """The record of the running save."""

    _futures: Sequence[Any] = ()

    async def async_save(self, directory, args):
        self._futures = futures = await super().async_save(directory, args) or []
        return futures

    def settle(self) -> None:
        """Waits at most ten seconds for the other writers when one has failed."""
        until = time.monotonic() + 10
        for future in self._futures:
            with contextlib.suppress(Exception):  # the first failure is the one that is reported
                future.result(timeout=max(0.0, until - time.monotonic()))

    def finalize(self, directory):
        super().finalize(directory)
        checkpoint_folder.write(Path(directory), **self.record)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Save(ocp.args.Composite):
    """The arguments of `_Handler`; orbax finds the handler by their type."""


def _is_not_orbax_error(message: logging.LogRecord) -> bool:
    """A filter against orbax's tracebacks of a failed save, which `Checkpoints.warn` reports in a sentence."""
    return message.levelno < logging.ERROR or "orbax" not in f"{message.pathname} {message.getMessage()}"


for logger in ("absl", "asyncio"):
    logging.getLogger(logger).addFilter(_is_not_orbax_error)
