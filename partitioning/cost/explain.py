"""A pass in the paper's notation: every tensor, every step of its ladder, and what each step moves.

`BLE_xyz` is a tensor of B*L tokens by E, split over all three axes along E. `(partialsum-x)` says that the chips along
x hold terms of a sum. Touches no device.
"""

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.layouts.layout import axes_of, entries
from toruslab.partitioning.layouts.moves import Move, moves
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.tensors import TRANSPOSED, Tensor, letters, tensors
from toruslab.partitioning.torus.chip import PLATFORMS
from toruslab.partitioning.torus.mesh import AXES

NOTATION = {"T": "BL", "R": "B", "C_mlp": "C", "G_mlp": "G", "n": "", "2": ""}
"""Letters of the plan -> the paper's, where they differ."""
WHAT = {
    "embed": "look up",
    "x": "into the matmuls",
    "norm": "sum of squares",
    "w_in": "weights in",
    "h": "out of the input projection",
    "kv": "K and V",
    "w_kv": "weights of K, V",
    "q": "Q to attention",
    "o": "attention's output back",
    "g": "into the output projection",
    "w_out": "weights out",
    "out": "to the residual stream",
    "rows": "into the unembedding",
    "logits": "logits",
    "sample": "best token of every part",
    "loss": "largest logit, then sums",
    "clip": "the loss",
}
"""Last part of a scope -> what its tensor is."""
FUSED = {("T",): "with it: sum of squares", ("T", "D"): "with it: K and V", (): "with it: the gradient's square"}
"""Letters of a tensor that shares a collective -> what it is."""


def notation(dims: Sequence[str], spec: P) -> str:
    """A tensor's dimensions and spec as the paper writes them; axes always in the order x, y, z.

    Example:
        >>> notation(("T", "C"), P(None, ("z", "y"), unreduced=frozenset("x")))
        'BLC_yz(partialsum-x)'
    """
    parts = []
    for dim, entry in zip(dims, entries(spec), strict=True):
        axes = "".join(a for a in AXES if a in axes_of(entry))
        written = NOTATION.get(dim, dim)
        parts.append(written[:1] + (f"_{axes}" if axes else "") + written[1:])
    partial = "".join(a for a in AXES if a in spec.unreduced)
    return "".join(parts) + (f"(partialsum-{partial})" if partial else "")


def steps(point: Point) -> list[dict]:
    """Every step of a pass, in order; a tensor that does not move is one step without a kind.

    Returns:
        A row per step, with these fields:

        - `scope`, `tensor`, `shape`: what moves; in training also the `part` of the step (forward, backward, ...).
        - `from`, `kind`, `axes`, `to`: the step, in the paper's notation.
        - `bytes`: bytes that one chip receives in one execution; `count`: executions in the pass.
        - `seconds`: analytic, of one execution; None for chips without a data sheet and for steps that move nothing.
        - `rides`: whether it shares the collective of another tensor in the same scope.
        - `in_layer`: whether it is in every layer.
        - `sends`: number of collective-permutes, of a step that is looped with its matmul only.

    Raises:
        ValueError: a mesh that cannot be laid over the slice.

    Example: the residual stream of 2D weight-stationary is gathered over y and z before the matmuls.
        >>> rows = steps(Point(model="palm-540b-h64", slice="v4:4x4x4", phase="decode", batch=64, context=2048,
        ...                    layout="ws2d", attention="batch"))
        >>> next((row["from"], row["kind"], row["to"]) for row in rows if row["scope"] == "layer/x")
        ('BLE_xyz', 'all-gather', 'BLE_x')
    """
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    config, layout = point.config, point.layout_value
    size = letters(config, point.pass_, layout, point.mesh_shape)
    priced = iter(() if point.chip in PLATFORMS else estimate(point).collectives)
    found = []
    for tensor in tensors(layout, config, point.pass_, point.mesh_shape):
        common = {"scope": tensor.scope, "tensor": _what(tensor), "shape": [size[d] for d in tensor.dims]}
        common |= {"rides": tensor.fused, "in_layer": tensor.in_layer}
        common |= {"part": tensor.part} if point.phase == "train" else {}
        back = tensor.part == "backward"
        if len(tensor.ladder) == 1:
            at = notation(tensor.dims, dual(tensor.ladder[0], sizes) if back else tensor.ladder[0])
            nothing = {"kind": None, "axes": [], "to": at, "bytes": 0, "seconds": None, "count": tensor.count}
            found.append({**common, "from": at, **nothing})
        runs = list(tensor.collectives(sizes, size))
        ladder = list(moves(tensor.ladder))
        for move in reversed(ladder) if back else ladder:
            parts = [kind for kind, _, _, of in runs if of == move]
            seconds = [c.seconds for _, c in zip(parts, priced, strict=False)]
            src, dst = (dual(move.dst, sizes), dual(move.src, sizes)) if back else (move.src, move.dst)
            found.append(
                {
                    **common,
                    "from": notation(tensor.dims, src),
                    "kind": _kind(move, back),
                    "axes": [a for a in AXES if a in move.axes],
                    "to": notation(tensor.dims, dst),
                    "bytes": tensor.bytes(move, point.pass_, size, sizes),
                    "seconds": sum(seconds) if seconds else None,
                    "count": tensor.count,
                }
                | ({"sends": len(parts)} if "collective-permute" in parts else {})
            )
    return found


def dual(spec: P, sizes: Mapping[str, int]) -> P:
    """The spec of the gradient of a tensor. It is split as the tensor is.

    Where chips hold copies of the tensor, each has a term of the gradient's sum. Where chips hold terms of a partial
    sum, all have the whole gradient.

    Example:
        >>> dual(P("y", None, unreduced=frozenset("x")), {"x": 2, "y": 2, "z": 2}) == P("y", None, unreduced={"z"})
        True
    """
    split = {a for entry in entries(spec) for a in axes_of(entry)} | spec.unreduced
    return P(*entries(spec), unreduced=frozenset(a for a in AXES if sizes[a] > 1 and a not in split))


def _kind(move: Move, back: bool) -> str:
    """The name of a move, or of its transpose. A slice moves nothing, and its transpose pads with zeros."""
    if not back:
        return move.kind
    return "pad" if move.kind == "slice" else TRANSPOSED[move.kind]


def _what(tensor: Tensor) -> str:
    if tensor.fused and tensor.scope != "loss":
        return FUSED[tensor.dims]
    first, last = tensor.scope.split("/")[0], tensor.scope.rsplit("/", 1)[-1]
    if first in ("gradients", "update"):
        return {"gradients": "its sum, to its owner", "update": "new values, to all copies"}[first]
    return "its gradient" if tensor.part == "backward" else WHAT[last]
