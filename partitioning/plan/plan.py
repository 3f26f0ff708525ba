"""What one pass does, in order: every tensor that moves, its size, and the ladder that it follows.

This is the plan's side of the decoder. `models.decoder.decoder` runs the same ladders under the same scopes; the tests hold
the two together by comparing this plan with the collectives of the compiled program, one to one.
Reads a model's sizes; runs nothing.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from toruslab.models.config import ModelConfig
from toruslab.partitioning.layouts.layout import Axes, Layout, axes_of, entries
from toruslab.partitioning.layouts.rings import looped_steps
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.tensors import TRANSPOSED, PlannedKind, Tensor, forward_tensors, letters, tensors
from toruslab.partitioning.torus.mesh import AXES, Shape


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A collective that the layout asks for. `bytes`: what one chip must receive, in one execution; `itemsize`: of one
    element of what moves; `merged`: with others of its scope it is one collective, of which all but one `fused`."""

    scope: str
    kind: PlannedKind
    axes: Axes
    bytes: int
    count: int
    itemsize: int
    merged: bool = False
    fused: bool = False


def plan(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Planned]:
    """Every collective of one pass, in order, from the layout alone; of several steps in one call, those of one step.

    Raises:
        ValueError: a size that the layout cannot divide (see `check`).
    """
    check(layout, config, pass_, mesh)
    sizes = dict(zip(AXES, mesh, strict=True))
    size = letters(config, pass_, layout, mesh)
    found = tensors(layout, config, pass_, mesh)
    shared = {tensor.scope for tensor in found if tensor.fused}

    def planned(tensor: Tensor) -> Iterator[Planned]:
        ran = list(tensor.collectives(sizes, size))
        for kind, axes, share, move in reversed(ran) if tensor.part == "backward" else ran:
            yield Planned(
                scope=tensor.scope,
                kind=TRANSPOSED[kind] if tensor.part == "backward" else kind,
                axes=axes,
                bytes=int(tensor.bytes(move, pass_, size, sizes) * share),
                count=tensor.count,
                itemsize=tensor.itemsize(pass_),
                merged=tensor.scope in shared,
                fused=tensor.fused,
            )

    return [p for s in found for p in planned(s)]


@functools.lru_cache(maxsize=4096)
def requirements(layout: Layout, block: str) -> tuple[tuple[str, Axes], ...]:
    """Every (dimension, axes in mesh order) that the layout splits: what must divide what."""
    specs = [(tensor.dims, spec) for tensor in forward_tensors(layout, block, 1, True) for spec in tensor.ladder]
    rest = (("E", "C"), ("E", "D"), ("G", "E"))
    specs += zip(rest, (layout.w_in[0], layout.w_kv[0], layout.w_out[0]), strict=True)
    specs += [(("V", "E"), layout.table), (("B", "K", "S", "Q"), layout.cache)]
    found = {
        (dim, tuple(a for a in AXES if a in axes_of(entry)))
        for dims, spec in specs
        for dim, entry in zip(dims, entries(spec), strict=True)
        if axes_of(entry) and dim not in ("n", "2")
    }
    return tuple(sorted(found))


def check(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> None:
    """Refuses sizes that the layout cannot divide evenly.

    Raises:
        ValueError: field, value and rule, and how to mend it where heads can be padded.
    """
    looped = [loop.name for loop in looped_steps(layout).values() if loop.name.startswith("w_")]
    if pass_.training and pass_.training.remat == "weights" and looped:
        raise ValueError(
            f"remat='weights' is for weights that are gathered before their matmul, but layout={layout.name!r} gathers "
            f"{looped[0]} with it"
        )
    if pass_.training and layout.prefetch:
        raise ValueError(f"layout={layout.name!r}: training gathers no weights ahead, it would keep all of them")
    x, y, z = mesh
    sizes = {"x": x, "y": y, "z": z}
    rows = "batch/accumulate" if pass_.training and pass_.training.accumulate > 1 else "batch"
    units = {
        "B": (rows, pass_.rows),
        "T": (rows, pass_.rows),
        "R": (rows, pass_.rows),
        "C": ("n_heads", config.n_heads),
        "G": ("n_heads", config.n_heads),
        "H": ("n_heads", config.n_heads),
        "C_mlp": ("d_ff groups", config.mlp_groups),
        "G_mlp": ("d_ff groups", config.mlp_groups),
        "D": ("n_kv_heads", config.n_kv_heads),
        "K": ("n_kv_heads", config.n_kv_heads),
        "E": ("d_model", config.d_model),
        "V": ("padded vocab", config.vocab_rows),
    }
    refused: list[tuple[int, bool, str]] = []
    for dim, axes in requirements(layout, config.block):
        n = 1
        for axis in axes:
            n *= sizes[axis]
        field, value = units[dim]
        if value % n:
            padded = -(-value // n) * n
            mend = f"; pad with n_heads={padded} (model suffix -h{padded})" if field == "n_heads" else ""
            rule = f"{field}={value} is not divisible by {'*'.join(axes).upper()}={n}, which layout "
            rule += f"{layout.name}/{layout.attention} splits it over{mend}"
            refused.append((n, field == "n_heads", rule))
    if refused:
        raise ValueError(max(refused)[2])
