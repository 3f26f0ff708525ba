"""The plan: every collective that a layout asks for in one pass, with its bytes.

The analytic cost prices this list, and the check of a compiled program compares it with XLA's collectives. `check`
refuses models that the layout cannot divide. The tensors behind the collectives are in `partitioning.plan.tensors`.
"""

import functools
import math
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
    """A collective that the layout asks for.

    Args:
        scope: where the program runs it, see `scopes`.
        kind: of collective.
        axes: mesh axes of the group.
        bytes: what one chip must receive in one execution.
        count: executions in one pass.
        itemsize: bytes of one element of the tensor.
        merged: several tensors of this scope share one collective, of which this is one part.
        fused: one of the parts of such a collective, but not the first.
    """

    scope: str
    kind: PlannedKind
    axes: Axes
    bytes: int
    count: int
    itemsize: int
    merged: bool = False
    fused: bool = False


def plan(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Planned]:
    """Every collective of one pass, in order. With several decode steps in a call, those of one step.

    Args:
        layout: the layout, for this mesh.
        config: the model.
        pass_: the sizes of the pass.
        mesh: extents X, Y, Z.

    Raises:
        ValueError: a size that the layout cannot divide (see `check`).

    Example: the reduce-scatter of the hidden units.
        >>> from toruslab.models.presets import model
        >>> from toruslab.partitioning.layouts.variants import layout
        >>> mesh, decode = (2, 2, 2), Pass(batch=8, length=1, capacity=4)
        >>> found = plan(layout("ws2d", "batch", mesh, 1), model("toy"), decode, mesh)
        >>> next((p.kind, p.axes, p.bytes, p.count) for p in found if p.scope == "layer/h")
        ('reduce-scatter', ('x',), 20480, 4)
    """
    check(layout, config, pass_, mesh)
    sizes = dict(zip(AXES, mesh, strict=True))
    extents = letters(config, pass_, layout, mesh)
    found = tensors(layout, config, pass_, mesh)
    shared = {tensor.scope for tensor in found if tensor.fused}

    def planned(tensor: Tensor) -> Iterator[Planned]:
        forward, back = list(tensor.collectives(sizes, extents)), tensor.part == "backward"
        for kind, axes, share, move in reversed(forward) if back else forward:
            yield Planned(
                scope=tensor.scope,
                kind=TRANSPOSED[kind] if back else kind,
                axes=axes,
                bytes=int(tensor.bytes(move, pass_, extents, sizes) * share),
                count=tensor.count,
                itemsize=tensor.itemsize(pass_),
                merged=tensor.scope in shared,
                fused=tensor.fused,
            )

    return [p for tensor in found for p in planned(tensor)]


@functools.lru_cache(maxsize=4096)
def requirements(layout: Layout, block: str) -> tuple[tuple[str, Axes], ...]:
    """Every split of the layout as (letter, axes in mesh order): the axes must divide the letter's size."""
    splits = [(tensor.dims, spec) for tensor in forward_tensors(layout, block, 1, True) for spec in tensor.ladder]
    at_rest = (("E", "C"), ("E", "D"), ("G", "E"))
    splits += zip(at_rest, (layout.w_in[0], layout.w_kv[0], layout.w_out[0]), strict=True)
    splits += [(("V", "E"), layout.table), (("B", "K", "S", "Q"), layout.cache)]
    found = {
        (dim, tuple(a for a in AXES if a in axes_of(entry)))
        for dims, spec in splits
        for dim, entry in zip(dims, entries(spec), strict=True)
        if axes_of(entry) and dim not in ("n", "2")
    }
    return tuple(sorted(found))


def check(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> None:
    """Refuses sizes that the layout cannot divide evenly, and training that it cannot do.

    Raises:
        ValueError: field, value and rule; and the padding that helps, if the field is `n_heads`.
    """
    looped = [loop.name for loop in looped_steps(layout).values() if loop.name.startswith("w_")]
    if pass_.training and pass_.training.remat == "weights" and looped:
        raise ValueError(
            f"remat='weights' is for weights that are gathered before their matmul, but layout={layout.name!r} gathers "
            f"{looped[0]} with it"
        )
    if pass_.training and layout.prefetch:
        raise ValueError(f"layout={layout.name!r}: training gathers no weights ahead, it would keep all of them")
    sizes = dict(zip(AXES, mesh, strict=True))
    batch = "batch/accumulate" if pass_.training and pass_.training.accumulate > 1 else "batch"
    units = {
        **dict.fromkeys(("B", "T", "R"), (batch, pass_.sequences)),
        **dict.fromkeys(("C", "G", "H"), ("n_heads", config.n_heads)),
        **dict.fromkeys(("C_mlp", "G_mlp"), ("d_ff groups", config.mlp_groups)),
        **dict.fromkeys(("D", "K"), ("n_kv_heads", config.n_kv_heads)),
        "E": ("d_model", config.d_model),
        "V": ("padded vocab", config.vocab_rows),
    }
    refused: list[tuple[int, bool, str]] = []
    for dim, axes in requirements(layout, config.block):
        n = math.prod(sizes[axis] for axis in axes)
        field, value = units[dim]
        if value % n:
            padded = -(-value // n) * n
            mend = f"; pad with n_heads={padded} (model suffix -h{padded})" if field == "n_heads" else ""
            rule = f"{field}={value} is not divisible by {'*'.join(axes).upper()}={n}, which layout "
            rule += f"{layout.name}/{layout.attention} splits it over{mend}"
            refused.append((n, field == "n_heads", rule))
    if refused:
        raise ValueError(max(refused)[2])
