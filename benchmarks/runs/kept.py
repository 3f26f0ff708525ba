"""Answers of the compiler that are kept on disk, so that no program is compiled twice by the same versions and code."""

import argparse
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.chip import PLATFORMS, chip
from toruslab.partitioning.torus.mesh import Slice

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")
"""Environment variables that change programs."""


def kept(options: argparse.Namespace, point: Point, what: str, make: Callable[[], Row]) -> Row:
    """The kept answer about a point, or the one that `make` gives now, which is kept from then on.

    Args:
        options: of `toruslab compile`: `out`, `fresh`, `hlo`, `attached`, and `flags`, the values of `FLAGS`.
        point: the answer is about.
        what: name of the question.
        make: answers it.
    """
    path = options.out / "kept" / f"{key(point, what, options)}.json"
    if not options.fresh and not (what == "evidence" and options.hlo):
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # not there, or half of it: it is made again
            pass
    row = make()
    write_whole(path, json.dumps(row))
    return row


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all: an interrupted run must not leave half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def key(point: Point, what: str, options: argparse.Namespace) -> str:
    """A name for the answer of these versions, this code and these flags to a question about a point."""
    from toruslab.partitioning.torus.described import versions

    slice_ = Slice.parse(point.slice)
    config = repr(point.config)  # the file behind a model's name may have changed
    known: dict[str, Any] = {"point": point.to_json(), "config": config, "what": what, "attached": options.attached}
    known |= {"versions": versions(slice_), "source": _source(), "flags": options.flags}
    if point.chip == "gpu" or options.attached:
        import jax

        known["device"] = jax.devices()[0].device_kind
    if point.chip not in PLATFORMS:
        known["chip"] = repr(chip(point.chip))
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    """A digest of the code that decides programs and how they are read."""
    root = Path(__file__).parents[2]
    files = sorted(f for folder in ("partitioning", "models") for f in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()
