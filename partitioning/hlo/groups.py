"""Replica groups, in every spelling that XLA prints -> mesh axes.

The groups of a collective are written as lists of ids, as iotas (transposed ranges), or as axes of a named mesh, and an
id has one of four meanings. This file finds the devices of each group, and the mesh axes whose product the groups are.
Device ids are row-major over the mesh. Bytes are counted in `collectives`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Literal

from toruslab.partitioning.hlo.text import HloError, Instruction, Module

Groups = tuple[tuple[int, ...], ...]
"""Groups of ids."""
_Mode = Literal["flat", "replicas", "partitions", "replicas with all partitions"]
"""What an id in the text stands for: XLA's four group modes."""

_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"\{\s*(?:\{[\d,\s]*\}\s*,?\s*)*\}")
_MESH = re.compile(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\)(?= ?\{))? ?\{(.*?)\}")
_AXIS = re.compile(r"\s*'?([^',:=]+?)'?(?:=(\d+)|:\((\d+)\)(\d+))?\s*")


def _order(dims: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """The row-major ids of an array of `dims`, transposed to the order `axes` and flattened."""
    ids = [0]
    for axis in axes:
        stride = prod(dims[axis + 1 :])
        ids = [i + j * stride for i in ids for j in range(dims[axis])]
    return ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _chunks(ids: list[int], size: int) -> Groups:
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))


def _iota(text: str) -> list[int]:
    """`[2,4]T(1,0)`: the row-major ids of a [2,4] array, transposed and flattened."""
    found = _IOTA.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not dims, or dimsT(permutation)")
    dims = _numbers(found[1])
    axes = _numbers(found[2]) if found[2] else tuple(range(len(dims)))
    if sorted(axes) != list(range(len(dims))):
        raise ValueError(f"{text!r}: the permutation does not fit the dims")
    return _order(dims, axes)


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`: groups along axis b.

    An axis can be given in part: `'b':(2)4` is the part of size 4 after parts of size 2. A device order can be given.
    """
    found = _MESH.fullmatch(text)
    if not found:
        raise ValueError("not mesh[axes] {axes}")
    axes = [_AXIS.fullmatch(a) for a in found[1].split(",")]
    sizes = {a[1]: int(a[2]) for a in axes if a and a[2]}
    wanted: dict[str, list[tuple[int, int]]] = {}  # axis -> its parts as (before, before * size)
    for ref in [_AXIS.fullmatch(a) for a in found[3].split(",") if a.strip()]:
        if not ref or ref[1] not in sizes or ref[2]:
            raise ValueError(f"{found[3]!r} names an axis that the mesh does not have")
        before, size = (int(ref[3]), int(ref[4])) if ref[3] else (1, sizes[ref[1]])
        wanted.setdefault(ref[1], []).append((before, before * size))
    if len(sizes) != len(axes):
        raise ValueError(f"{found[1]!r} is not a list of axis=size")
    dims: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(c for r in wanted.get(name, []) for c in r)})
        if any(high % low for low, high in pairwise(cuts)) or cuts[-1] != size:
            raise ValueError(f"the parts of axis {name!r} do not divide its size {size}")
        for low, high in pairwise(cuts):
            inside += [len(dims)] if any(a <= low and high <= b for a, b in wanted.get(name, [])) else []
            dims.append(high // low)
    outside = [d for d in range(len(dims)) if d not in inside]
    ids = _order(tuple(dims), (*outside, *inside))
    if found[2]:  # maps positions in the mesh to devices
        devices = _iota(found[2]) if found[2].startswith("[") else list(_numbers(found[2]))
        if sorted(devices) != sorted(ids):
            raise ValueError(f"device_ids=({found[2]}) is no order of {len(ids)} devices")
        ids = [devices[i] for i in ids]
    return _chunks(ids, prod(dims[d] for d in inside))


def replica_groups(text: str, n: int) -> Groups:
    """The groups of ids that the text of `replica_groups=` gives. `{}` is one group of all `n` ids.

    Raises:
        ValueError: an unknown spelling, groups of different sizes, or an id in two groups.

    Example:
        >>> replica_groups("{{0,2},{1,3}}", 4) == replica_groups("[2,2]<=[2,2]T(1,0)", 4)
        True
        >>> replica_groups("mesh['x'=2,'y'=2] {'x'}", 4)
        ((0, 2), (1, 3))
    """
    text = text.strip()
    if _LISTED.fullmatch(text):
        groups = tuple(_numbers(g) for g in re.findall(r"\{([\d,\s]*)\}", text[1:-1]))
        groups = tuple(g for g in groups if g) or (tuple(range(n)),)
    elif "<=" in text and text.startswith("["):
        shape, _, order = text.partition("<=")
        found = _IOTA.fullmatch(shape)
        ids = _iota(order)
        if not found or found[2] or len(_numbers(found[1])) != 2 or prod(_numbers(found[1])) != len(ids):
            raise ValueError(f"{shape!r} is not [groups,size] of {len(ids)} ids")
        groups = _chunks(ids, _numbers(found[1])[1])
    elif "mesh" in text[:5]:
        groups = _mesh_groups(text)
    else:
        raise ValueError("a spelling of replica groups that is not known")
    if len({len(g) for g in groups}) != 1 or len({i for g in groups for i in g}) != sum(len(g) for g in groups):
        raise ValueError("groups of different sizes, or an id in two groups")
    return groups


def _mode(i: Instruction) -> _Mode:
    """What the ids of a collective stand for."""
    if i.attributes.get("use_global_device_ids") == "true":
        return "flat"
    if "channel_id" not in i.attributes:
        return "replicas"
    moves = i.opcode.startswith(("all-to-all", "ragged-all-to-all", "collective-"))
    return "partitions" if moves else "replicas with all partitions"


def _devices(mode: _Mode, n_r: int, n_p: int) -> list[list[list[int]]]:
    """For each repetition of the groups: id -> devices, which are replica * n_p + partition.

    `n_r` and `n_p` are the numbers of replicas and partitions.
    """
    if mode == "flat":
        return [[[d] for d in range(n_r * n_p)]]
    if mode == "replicas":  # repeated for each partition
        return [[[r * n_p + p] for r in range(n_r)] for p in range(n_p)]
    if mode == "partitions":  # repeated for each replica
        return [[[r * n_p + p] for p in range(n_p)] for r in range(n_r)]
    return [[[r * n_p + p for p in range(n_p)] for r in range(n_r)]]


def _strides(mesh: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """For each axis its name, the distance between neighbours' ids, and its size."""
    found, stride = [], prod(mesh.values())
    for name, size in mesh.items():
        stride //= size
        found.append((name, stride, size))
    return found


@lru_cache(maxsize=1024)
def _locate(
    text: str, mode: _Mode, n_r: int, n_p: int, mesh: tuple[tuple[str, int], ...], partial_axes: bool
) -> tuple[tuple[str, ...], int]:
    """The mesh axes of replica groups, and K, the size of a group."""
    devices = _devices(mode, n_r, n_p)
    n = len(devices[0])
    groups = replica_groups(text, n)
    if sorted(i for g in groups for i in g) != list(range(n)):
        raise ValueError(f"not the {n} ids of the program, once each")
    flat = tuple(tuple(d for i in group for d in ids[i]) for ids in devices for group in groups)
    axes, whole = _axes(flat, dict(mesh))
    if not whole and not partial_axes:
        raise ValueError(f"groups like {flat[0][:16]} are not a product of whole axes of the mesh {dict(mesh)}")
    return axes, len(flat[0])


def _permuted(text: str, mode: _Mode, n_r: int, n_p: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the two devices of any pair differ."""
    devices = _devices(mode, n_r, n_p)
    pairs = [_numbers(p) for p in re.findall(r"\{([\d,\s]*)\}", text[1:-1])]
    if not _LISTED.fullmatch(text) or any(len(p) != 2 or max(p) >= len(devices[0]) for p in pairs):
        raise ValueError("not pairs of this program's ids")
    moves = [(ids[a][0], ids[b][0]) for ids in devices for a, b in pairs]
    return tuple(name for name, s, k in _strides(mesh) if any(a // s % k != b // s % k for a, b in moves))


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """The mesh axes along which the ids of any group differ, and whether all groups are the whole product of them."""
    strides = _strides(mesh)
    varying = [tuple(n for n, s, k in strides if len({d // s % k for d in group}) > 1) for group in groups]
    axes = tuple(name for name in mesh if any(name in names for names in varying))
    whole = all(names == axes for names in varying) and prod(mesh[n] for n in axes) == len(groups[0])
    return axes, whole


def mesh_axes(
    i: Instruction, module: Module, mesh: Mapping[str, int], partial_axes: bool = False
) -> tuple[tuple[str, ...], int]:
    """The mesh axes that a collective runs over, and K, the number of chips in one group.

    Args:
        i: the collective.
        module: its program, for the numbers of replicas and partitions.
        mesh: mesh axis -> size, in mesh order.
        partial_axes: allow groups that are only a part of their axes, see `collectives.read`.

    Returns:
        Axes of size above 1 in mesh order, and K. The axes of a permute are those along which any pair differs.

    Raises:
        HloError: ids that are not the program's, or groups that are not a product of whole axes.
    """
    permutes = i.opcode.startswith("collective-permute")
    text = i.attributes.get("source_target_pairs" if permutes else "replica_groups", "" if permutes else "{}")
    try:
        if permutes:
            axes = _permuted(text, _mode(i), module.n_replicas, module.n_partitions, mesh)
            return axes, prod(mesh[a] for a in axes)
        return _locate(text, _mode(i), module.n_replicas, module.n_partitions, tuple(mesh.items()), partial_axes)
    except ValueError as error:
        raise HloError(i.line, f"{i.name}, over {text[:80] or 'nothing'}: {error}") from error
