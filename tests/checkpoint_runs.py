"""Runs that save checkpoints in processes of their own, which tests kill, give a full disk, or start twice.

`python -m tests.checkpoint_runs WHAT FOLDER ...`; `benchmarks.runs.processes` starts several and connects them.
"""

import dataclasses
import hashlib
import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import battery
from toruslab.benchmarks.runs import processes
from toruslab.models.config import ModelConfig
from toruslab.models.decoder.parameters import abstract, shardings
from toruslab.models.programs.checkpoints import Checkpoints, named
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import Shape, attach

CONFIG = battery.model("serial", 16)
LARGE = dataclasses.replace(CONFIG, d_model=256, d_ff=512, n_layers=2)
"""Large enough that a save takes a while and fills a small disk halfway: 15 MB with its moments."""


def wanted(config: ModelConfig, name: str, shape: Shape) -> dict[str, Any]:
    """A state of training as shapes with shardings: bfloat16 parameters, float32 masters and moments, counters."""
    made = layout(name, "batch", shape, config.n_kv_heads)
    mesh = attach(shape, chip="cpu", explicit=made.explicit)
    whole = NamedSharding(mesh, P())

    def of(dtype) -> Any:
        params = abstract(config, dtype)[1]
        place = shardings(params, made, mesh)
        return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, place)

    counters = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
    counters["tokens"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return {
        "params": of(jnp.bfloat16),
        "master": of(jnp.float32),
        "mu": of(jnp.float32),
        "nu": of(jnp.float32),
        "counters": counters,
    }


def state(config: ModelConfig, name: str, shape: Shape, step: int) -> dict[str, Any]:
    """Such a state at a step, with the same values under every layout and mesh."""
    rng = np.random.default_rng(step)

    def make(leaf) -> jax.Array:
        array = (
            rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype) if leaf.shape else np.array(step, leaf.dtype)
        )
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree.map(make, wanted(config, name, shape))


def sums(tree: Any) -> dict[str, list[str]]:
    """The dtype and a hash of every array."""
    leaves = named(tree).items()
    return {n: [str(a.dtype), hashlib.sha256(np.asarray(a).tobytes()).hexdigest()] for n, a in leaves}


def save_for_ever(folder: Path) -> None:
    """Checks the last checkpoint of the folder, then saves step after step until killed."""
    checkpoints = Checkpoints(folder, LARGE, keep=2)
    last = checkpoints.latest()
    if last is not None:
        found = checkpoints.restore(wanted(LARGE, "ws2d", (1, 1, 1)))
        assert sums(found) == checkpoints.facts()["sums"], "restored otherwise than saved"
        assert int(found["counters"]["step"]) == last
    step = 0 if last is None else last + 1
    now = state(LARGE, "ws2d", (2, 2, 2), step)
    exact = sums(now)
    again = jax.jit(lambda s: s | {"counters": s["counters"] | {"step": s["counters"]["step"] + 1}}, donate_argnums=0)
    print("from", last, flush=True)
    while True:
        exact["counters.step"] = sums(now["counters"])["step"]
        checkpoints.save(step, now, {"sums": exact})
        now, step = again(now), step + 1


def fill(folder: Path, how: str) -> None:
    """Three saves; the second has no room. `limit`: files may not grow past half a mebibyte. `disk`: the disk fills up
    after it was seen to have room. `before`: the disk is full when the save begins."""
    warnings: list[str] = []
    checkpoints = Checkpoints(folder, LARGE, keep=5, warn=warnings.append)
    states = [state(LARGE, "ws2d", (2, 2, 2), step) for step in range(3)]
    exact = [sums(s) for s in states]
    ballast, limits, usage = folder.parent / "ballast", resource.getrlimit(resource.RLIMIT_FSIZE), shutil.disk_usage
    room = usage(folder.parent)
    for step, now in enumerate(states):
        if step == 1 and how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
        elif step == 1:
            if how == "disk":
                shutil.disk_usage = lambda path: room
            _fill(ballast, leave=2 << 20)
        checkpoints.save(step, now, {})
        checkpoints.wait()
        if step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            shutil.disk_usage = usage
            assert checkpoints.latest() == 0
            assert sums(checkpoints.restore(wanted(LARGE, "wgxyz", (4, 2, 1)))) == exact[0]
            ballast.unlink(missing_ok=True)
    assert sums(checkpoints.restore(wanted(LARGE, "wgxyz", (4, 2, 1)))) == exact[2]
    checkpoints.close()
    print(json.dumps({"warnings": warnings, "steps": sorted(p.name for p in folder.iterdir())}))


def _fill(ballast: Path, leave: int) -> None:
    with open(ballast, "wb", buffering=0) as out:
        size = 0
        while size >= 0:
            try:
                size += out.write(bytes(1 << 16))
            except OSError:
                break
        out.truncate(size - leave)


def write(folder: Path, name: str) -> None:
    """Saves two steps, by all processes."""
    checkpoints = Checkpoints(folder, CONFIG)
    for step in (7, 8):
        checkpoints.save(step, state(CONFIG, name, (2, 2, 2), step), {})
    checkpoints.close()


def check(folder: Path, name: str) -> None:
    """Reads both steps by all processes under a layout. Each process checks its own devices."""
    checkpoints = Checkpoints(folder, CONFIG)
    for step in (7, 8):
        found = checkpoints.restore(wanted(CONFIG, name, (2, 2, 2)), step)
        exact = state(CONFIG, name, (2, 2, 2), step)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert a.sharding == b.sharding and a.dtype == b.dtype
            for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
                assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()
    sys.stderr.write("same\n")


def refuse(folder: Path, name: str) -> None:
    """Says why a checkpoint is refused."""
    try:
        Checkpoints(folder, CONFIG).restore(wanted(CONFIG, name, (2, 2, 2)), 8)
    except ValueError as error:
        sys.stderr.write(f"refused: {error}\n")


RUNS = {"kill": save_for_ever, "fill": fill, "write": write, "check": check, "refuse": refuse}

if __name__ == "__main__":
    what, where, *more = sys.argv[1:]
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    processes.join("cpu", 8, 2 if processes.is_started() else 1)
    RUNS[what](Path(where), *more)
