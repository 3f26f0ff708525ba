"""What a pass takes on a machine that was measured: the plan's collectives and the decoder's own blocks, added up.

The counterpart of `partitioning.cost.forward` for chips that `toruslab calibrate` has written. Nothing here is fitted
to steps. Fake devices share their cores, so nothing hides behind anything and all terms add up. Attention to an int8
cache is priced as if the cache had the dtype of the activations, for which there are samples.

    step = dispatch + layers x (matmuls + weights out of the stack + attention + the rest + collectives) + both ends

`auto` has no plan. `with_collectives` takes the collectives of its compiled program and the work of ws2d, whose weights
rest in the same places.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.partitioning.cost.sizes import PassSizes, matmuls
from toruslab.partitioning.cost.traffic import PERMUTE, CollectiveCost, splits, transfers
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.rings import looped_steps
from toruslab.partitioning.torus.calibrated import Machine
from toruslab.partitioning.torus.mesh import AXES, Shape

DTYPES = {4: ("f32", "f32"), 2: ("bf16", "bf16"), 1: ("int8", "bf16")}
"""Bytes of a weight -> dtype of weights and of activations."""
TERMS = ("matmul_s", "weights_s", "attention_s", "other_s", "collective_s", "dispatch_s")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds of a pass by what takes them, and what it computes and reads: arrays with one number per pass.

    Args:
        seconds: by `TERMS`, of the whole pass; they add up.
        layers_s: seconds of the layers alone.
        flops, memory_bytes: of all devices. Multiply-adds count two; weights and cache are read.
        collectives: with bytes and seconds.
    """

    seconds: Mapping[str, Any]
    layers_s: Any
    flops: Any
    memory_bytes: Any
    collectives: tuple[CollectiveCost, ...]

    @property
    def latency_s(self) -> Any:
        return sum(self.seconds.values())

    def bounds(self) -> dict[str, Any]:
        """`compute_s`, `memory_s` and `collective_s`, as an estimate has them."""
        s = self.seconds
        return {
            "compute_s": s["matmul_s"] + s["attention_s"] + s["other_s"],
            "memory_s": s["weights_s"],
            "collective_s": s["collective_s"],
        }


@functools.lru_cache(maxsize=4096)
def _cuts(layout: Layout, mesh: Shape) -> Mapping[str, tuple[int, int, int]]:
    """Weight -> into how many pieces the rows, the inner and the outer dimension of its looped matmul are cut."""
    sizes = dict(zip(AXES, mesh, strict=True))
    found = {}
    for target, loop in looped_steps(layout).items():
        k = loop.move.group(sizes)
        if loop.move.kind == "reduce-scatter":
            at, k = 2 * loop.move.target, 2 * k
        else:
            at = loop.move.source + loop.name.startswith("w_")
        found[{"h": "w_in", "kv": "w_kv", "out": "w_out"}[target]] = tuple(k if i == at else 1 for i in range(3))
    return found


def terms(layout: Layout, block: str, mesh: Shape, n: PassSizes, machine: Machine) -> Terms:
    """Seconds of passes of one layout on one mesh.

    Args:
        layout: made for the mesh, with a plan.
        block: `parallel` or `serial`.
        mesh: extents.
        n: the sizes of the passes.
        machine: what was measured.

    Raises:
        ValueError: the machine has no samples of a dtype or of a kind of collective.
    """
    widths = np.unique(n.weight)
    each = [_terms(layout, block, mesh, n, machine, *DTYPES[int(w)]) for w in widths]
    if len(each) == 1:
        return each[0]

    def pick(*arrays: Any) -> Any:
        """For each point the number that belongs to the dtype of its weights."""
        return np.select([np.asarray(n.weight) == w for w in widths], np.broadcast_arrays(*arrays))

    return Terms(
        seconds={k: pick(*(t.seconds[k] for t in each)) for k in TERMS},
        layers_s=pick(*(t.layers_s for t in each)),
        flops=each[0].flops,
        memory_bytes=each[0].memory_bytes,
        collectives=each[0].collectives,  # of any dtype, priced by their bytes
    )


def _terms(layout: Layout, block: str, mesh: Shape, n: PassSizes, machine: Machine, weight: str, act: str) -> Terms:
    """The terms where weights and activations have these dtypes."""
    split, size, n_chips = splits(layout, mesh), n.size, math.prod(mesh)

    # the layers' matmuls, and their weights out of the stack
    at_rest = [size[a] * size[b] / math.prod(split[w, 0]) * n.weight for a, b, w, _ in matmuls(block)]
    stack = sum(at_rest) * n.n_layers
    matmul_s = weights_s = flops = read = np.float64(0.0)
    for (inner, outer, name, rows), held in zip(matmuls(block), at_rest, strict=True):
        (a, b), t = split[name, -1], size["T"] / split[rows, -1][0]
        cut = _cuts(layout, mesh).get(name, (1, 1, 1))
        one = machine.matmul_s(t / cut[0], size[inner] / a / cut[1], size[outer] / b / cut[2], weight)
        matmul_s = matmul_s + math.prod(cut) * one
        weights_s = weights_s + machine.copy_s(held, stack, weight)
        flops = flops + 2 * t * size[inner] * size[outer] / (a * b)
        read = read + size[inner] * size[outer] / (a * b) * n.weight

    # element by element
    other_s = np.float64(0.0)
    stream = size["T"] * size["E"] / math.prod(split["x", -1])
    for suffix in ("",) if block == "parallel" else ("", "_mlp"):
        hidden = size["T"] * size["C" + suffix] / math.prod(split["h", -1])
        other_s = other_s + machine.elements_s("norm", stream, act)
        other_s = other_s + machine.elements_s("activation", hidden, act)
    heads, rows = size["H"] / split["q", -1][1], size["T"] / split["q", -1][0]
    other_s = other_s + machine.elements_s("rope", rows * heads * size["Q"], act)

    # attention
    seen = n.first + n.length
    b_split, k_split = split["cache", -1][:2]
    cache = 2 * size["B"] / b_split * size["K"] / k_split * seen * size["Q"]
    scores = rows * heads * seen
    macs = 2 * scores * size["Q"]
    attention_s = machine.attention_s(
        rows=size["B"] / b_split, cache=cache, scores=scores, macs=macs, length=n.length, dtype=act
    )
    flops, read = flops + 2 * macs, read + cache / size["Q"] * n.cached_bytes(size["Q"])

    # collectives
    element = {"act": n.act, "weight": n.weight, "f32": 4.0, "i32": 4.0}
    moved = [
        (t, t.factor * element[t.dtype] * math.prod(size[d] for d in t.dims)) for t in transfers(layout, block, mesh)
    ]
    collectives, in_layer_s, outside_s = [], np.float64(0.0), np.float64(0.0)
    for t, n_bytes in moved:
        columns = size[t.dims[1]] / t.column_parts if len(t.dims) == 2 else 0
        whole = n_bytes + sum(b for other, b in moved if other.fused and other.scope == t.scope)
        args = (t.kind, t.n_group, t.at, whole, columns, "".join(t.axes))
        taken = 0.0 if t.fused else collective_s(machine, *args)
        collectives.append((t, n_bytes, taken))
        if t.in_layer:
            in_layer_s = in_layer_s + taken
        else:
            outside_s = outside_s + taken

    # both ends
    v, e = split["table", -1]
    r = size["R"] / split["rows", -1][0]
    head_in, head_out = size["E"] / split["rows", -1][1], size["V"] / split["logits", 0][1]
    head = machine.matmul_s(r, head_in, head_out, act)
    ends = machine.elements_s("norm", r * head_in, act)
    ends = ends + machine.elements_s("norm", size["T"] / split["embed", 0][0] * size["E"] / e, act)

    scale = machine.scale(n_chips)
    layers_s = n.n_layers * (matmul_s + weights_s + attention_s + other_s + in_layer_s)
    dispatch_s = machine.of("dispatch", "f32")[0].cost_s * np.ones_like(layers_s)
    return Terms(
        seconds={
            "matmul_s": (n.n_layers * matmul_s + head) * scale,
            "weights_s": n.n_layers * weights_s * scale,
            "attention_s": n.n_layers * attention_s * scale,
            "other_s": (n.n_layers * other_s + ends) * scale,
            "collective_s": (n.n_layers * in_layer_s + outside_s) * scale,
            "dispatch_s": dispatch_s * scale / n.steps,
        },
        layers_s=layers_s * scale,
        flops=n_chips * (n.n_layers * flops + 2 * r * head_in * head_out),
        memory_bytes=n_chips * (n.n_layers * read + size["V"] * size["E"] / (v * e) * n.act),
        collectives=tuple(t.cost(n_bytes, taken * scale, n.n_layers) for t, n_bytes, taken in collectives),
    )


def collective_s(machine: Machine, kind: str, k: int, at: str, n_bytes: Any, columns: Any = 0, axes: str = "") -> Any:
    """Seconds of a collective over a group of `k`; see `Machine.collective_s`.

    A permute goes to one neighbour, however long the ring. It is priced as on the ring nearest in length that was
    measured. Older calibrations have no permutes: there an all-to-all of two counts for one, with a warning.
    """
    if kind == PERMUTE:
        rings = {s.sizes["group"] for s in machine.samples if s.what == kind}
        if rings:
            k = min(rings, key=lambda n: (abs(n - k), n))
        else:
            warnings.warn(
                "the calibration has no collective-permute: sends are priced as all-to-alls of two; run toruslab "
                "calibrate again",
                stacklevel=2,
            )
            kind, k, columns, axes = "all-to-all", 2, 0, ""
    return machine.collective_s(kind, k, at, n_bytes, columns, axes)


def with_collectives(found: Terms, collectives: Iterable[Any], machine: Machine, n_chips: int) -> dict[str, float]:
    """The seconds of a pass, by `TERMS`, with the collectives of a compiled program (`hlo.collectives.Collective`).

    The program does not say along which dimension it gathers and scatters: columns are assumed.
    """
    taken = 0.0
    for c in collectives:
        if c.group_size > 1 or c.kind == PERMUTE:
            at = "rows" if c.kind == "all-reduce" else "columns"
            taken += c.trips * float(collective_s(machine, c.kind, c.group_size, at, c.bytes)) * machine.scale(n_chips)
    return {name: float(np.ravel(s)[0]) for name, s in found.seconds.items()} | {"collective_s": taken}
