"""Replica groups, in every spelling that XLA prints -> the axes of a mesh.

Decides which devices exchange anything: lists, iotas and named meshes of ids, XLA's four meanings of an id, and
whether the groups are a product of whole mesh axes. Leaves bytes to `hlo`. Device ids are row-major over the mesh.
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
_Mode = Literal["flat", "replicas", "partitions", "replicas with all partitions"]

_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"\{\s*(?:\{[\d,\s]*\}\s*,?\s*)*\}")
_MESH = re.compile(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\)(?= ?\{))? ?\{(.*?)\}")
_AXIS = re.compile(r"\s*'?([^',:=]+?)'?(?:=(\d+)|:\((\d+)\)(\d+))?\s*")


def _order(dims: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Row-major ids of an array of `dims`, its axes transposed to the order `axes`, flattened."""
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
    """`[2,4]T(1,0)`: ids of a [2,4] array, transposed, flattened."""
    found = _IOTA.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not dims, or dimsT(permutation)")
    dims = _numbers(found[1])
    axes = _numbers(found[2]) if found[2] else tuple(range(len(dims)))
    if sorted(axes) != list(range(len(dims))):
        raise ValueError(f"{text!r}: the permutation does not fit the dims")
    return _order(dims, axes)


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=2,'b'=4] {'b'}`, also with sub-axes `'b':(1)2` = (size before)size, and with a device order."""
    found = _MESH.fullmatch(text)
    if not found:
        raise ValueError("not mesh[axes] {axes}")
    axes = [_AXIS.fullmatch(a) for a in found[1].split(",")]
    sizes = {a[1]: int(a[2]) for a in axes if a and a[2]}
    wanted: dict[str, list[tuple[int, int]]] = {}  # axis -> its ranges [before, before * size)
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
    if found[2]:  # position in the mesh -> device
        devices = _iota(found[2]) if found[2].startswith("[") else list(_numbers(found[2]))
        if sorted(devices) != sorted(ids):
            raise ValueError(f"device_ids=({found[2]}) is no order of {len(ids)} devices")
        ids = [devices[i] for i in ids]
    return _chunks(ids, prod(dims[d] for d in inside))


def replica_groups(text: str, n: int) -> Groups:
    """The groups of ids that `replica_groups=` spells, in any of its spellings; `{}` is all `n` ids in one group.

    Raises:
        ValueError: a spelling that is not known, or that does not divide its ids into equal groups.

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
    """What the ids in its text count: XLA's four group modes."""
    if i.attributes.get("use_global_device_ids") == "true":
        return "flat"
    if "channel_id" not in i.attributes:
        return "replicas"
    moves = i.opcode.startswith(("all-to-all", "ragged-all-to-all", "collective-"))
    return "partitions" if moves else "replicas with all partitions"


def _devices(mode: _Mode, n_r: int, n_p: int) -> list[list[list[int]]]:
    """For each repetition of the groups: id -> flat device ids, which are replica * n_p + partition."""
    if mode == "flat":
        return [[[d] for d in range(n_r * n_p)]]
    if mode == "replicas":  # each partition for itself
        return [[[r * n_p + p] for r in range(n_r)] for p in range(n_p)]
    if mode == "partitions":  # each replica for itself
        return [[[r * n_p + p] for p in range(n_p)] for r in range(n_r)]
    return [[[r * n_p + p for p in range(n_p)] for r in range(n_r)]]


def _strides(mesh: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Each axis, the distance of its neighbours' ids, and its size."""
    found, stride = [], prod(mesh.values())
    for name, size in mesh.items():
        stride //= size
        found.append((name, stride, size))
    return found


@lru_cache(maxsize=1024)
def _locate(
    text: str, mode: _Mode, n_r: int, n_p: int, mesh: tuple[tuple[str, int], ...], partial_axes: bool
) -> tuple[tuple[str, ...], int]:
    """The mesh axes that replica groups run over, and K."""
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
    """The axes along which a permute moves anything."""
    devices = _devices(mode, n_r, n_p)
    pairs = [_numbers(p) for p in re.findall(r"\{([\d,\s]*)\}", text[1:-1])]
    if not _LISTED.fullmatch(text) or any(len(p) != 2 or max(p) >= len(devices[0]) for p in pairs):
        raise ValueError("not pairs of this program's ids")
    moves = [(ids[a][0], ids[b][0]) for ids in devices for a, b in pairs]
    return tuple(name for name, s, k in _strides(mesh) if any(a // s % k != b // s % k for a, b in moves))


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """The mesh axes of size > 1 along which ids of a group differ, and whether the groups are their whole product."""
    strides = _strides(mesh)
    varying = [tuple(n for n, s, k in strides if len({d // s % k for d in group}) > 1) for group in groups]
    axes = tuple(name for name in mesh if any(name in names for names in varying))
    whole = all(names == axes for names in varying) and prod(mesh[n] for n in axes) == len(groups[0])
    return axes, whole


def mesh_axes(
    i: Instruction, module: Module, mesh: Mapping[str, int], partial_axes: bool = False
) -> tuple[tuple[str, ...], int]:
    """The mesh axes of size > 1 that a collective runs over, in mesh order, and K, the chips in one group.

    A permute's axes are those along which any pair differs. `partial_axes`: as in `hlo.read`.

    Raises:
        HloError: ids that are not those of the program, groups that are no product of whole axes.
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
