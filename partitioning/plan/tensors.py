"""The tensors that one pass moves, in order: the size of each, and the ladder that it follows.

This list is the plan's copy of the decoder. `models.decoder` follows the same ladders under the same scopes, and the
tests compare the two: the collectives planned from this list with those of the compiled program, one to one. Nothing
here runs anything. Which collectives follow from the list is in `partitioning.plan.plan`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.partitioning.layouts.layout import Axes, Ladder, Layout, axes_of, entries
from toruslab.partitioning.layouts.moves import Move, MoveKind, moves
from toruslab.partitioning.layouts.ownership import gradient_ladder, update_ladder
from toruslab.partitioning.layouts.rings import LoopedStep, before, looped_steps, sends
from toruslab.partitioning.plan.passes import Pass, Training
from toruslab.partitioning.torus.mesh import AXES, Shape

PlannedKind = MoveKind | Literal["collective-permute"]
"""A planned collective; the sends of a looped one are collective-permutes."""
TRANSPOSED: Mapping[PlannedKind, PlannedKind] = {
    "all-gather": "reduce-scatter",
    "reduce-scatter": "all-gather",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
}
"""A collective -> the one that its gradient takes in the backward pass, with equal bytes. Where all chips have a value
alike, each has one term of the sum that is the gradient; where each has a term, all have the gradient alike."""
StepPart = Literal["forward", "again", "backward", "update"]
"""Part of a training step; `again`: layers that are run again for their gradient. Other passes are `forward` only."""

BLOCKS: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "parallel": {"layer": ("", True)},
    "serial": {"attention": ("", True), "mlp": ("_mlp", False)},
}
"""Kind of layer -> its blocks by scope, each with the suffix of its letters, and whether it holds attention."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of the pass and the ladder that it follows.

    Args:
        scope: where the program runs its collectives, such as `layer/h`.
        dims: letters of its dimensions, see `letters`.
        ladder: its specs, from the layout.
        count: times that the pass follows the ladder.
        dtype: `act` (that of the activations), `weight`, `f32` or `i32`.
        fused: this tensor shares the collective of another tensor in the same scope.
        loop: the step that overlaps a matmul as a ring.
        ways: ring directions, 1 or 2.
        in_layer: the tensor is in every layer.
        part: of a training step. In `backward` this is the tensor's gradient, and takes the ladder in reverse.
    """

    scope: str
    dims: tuple[str, ...]
    ladder: Ladder
    count: int = 1
    dtype: str = "act"
    fused: bool = False
    loop: LoopedStep | None = None
    ways: int = 0
    in_layer: bool = False
    part: StepPart = "forward"

    def collectives(
        self, sizes: Mapping[str, int], extents: Mapping[str, int] | None = None
    ) -> Iterator[tuple[PlannedKind, Axes, Fraction, Move]]:
        """The collectives of the ladder, in order. A looped step is its sends; a slice is no collective.

        Args:
            sizes: mesh axis -> size.
            extents: letter -> size. Without it, the halves of a shard that is sent both ways round count as equal.

        Yields:
            Kind, axes, share of the bytes of the step, and the step.
        """
        for step, move in enumerate(moves(self.ladder)):
            if self.loop and self.loop.step == step:
                n, k = 2 ** len(AXES), move.group(sizes)
                if extents:
                    at = move.source if move.kind == "all-gather" else move.target
                    split = entries(move.src if move.kind == "all-gather" else move.dst)[at]
                    n = extents[self.dims[at]] // math.prod(sizes[a] for a in axes_of(split))
                for axis, part in sends(move.kind, move.axes, sizes, n, self.ways):
                    yield "collective-permute", (axis,), Fraction(part, n * (k - 1)), move
            elif move.kind != "slice":
                yield move.kind, tuple(a for a in AXES if a in move.axes), Fraction(1), move

    def itemsize(self, pass_: Pass) -> int:
        """Bytes of one element."""
        return {"act": pass_.itemsize, "weight": pass_.weight_itemsize, "f32": 4, "i32": 4}[self.dtype]

    def bytes(self, move: Move, pass_: Pass, extents: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        """Bytes that one chip must receive for a step of the ladder; letter -> `extents`, mesh axis -> `sizes`."""
        return move.bytes([extents[d] for d in self.dims], self.itemsize(pass_), sizes)


def letters(config: ModelConfig, pass_: Pass, layout: Layout, mesh: Shape) -> dict[str, int]:
    """Letter -> size, for all letters that `Tensor.dims` may have: those of `layouts.layout`, and

    - C_mlp, G_mlp: C and G of the MLP's own block, in serial layers;
    - N: layers;
    - n: parts of the vocabulary, and "2": a sampled value and its id (`pick_ladder`).
    """
    sizes = dict(zip(AXES, mesh, strict=True))
    parts = axes_of(entries(layout.logits[-1])[1]) if layout.logits else ()
    return model_letters(config) | {
        "B": pass_.sequences,
        "T": pass_.tokens,
        "R": pass_.logits_rows,
        "S": pass_.capacity,
        "n": math.prod(sizes[a] for a in parts),
        "2": 2,
    }


def model_letters(config: ModelConfig) -> dict[str, int]:
    """The letters of which the model alone decides the size."""
    heads = config.n_heads * config.d_head
    mlp_in = (2 if config.gated else 1) * config.d_ff
    parallel = config.block == "parallel"
    return {
        "N": config.n_layers,
        "E": config.d_model,
        "C": heads + mlp_in if parallel else heads,
        "G": heads + config.d_ff if parallel else heads,
        "C_mlp": mlp_in,
        "G_mlp": config.d_ff,
        "D": 2 * config.n_kv_heads * config.d_head,
        "K": config.n_kv_heads,
        "H": config.n_heads,
        "Q": config.d_head,
        "V": config.vocab_rows,
    }


def tensors(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Tensor]:
    """The tensors of one pass, in order. A layout without constraints (`auto`) has none."""
    if not pass_.training or not layout.explicit:
        return list(forward_tensors(layout, config.block, config.n_layers, not pass_.all_logits))
    sizes = dict(zip(AXES, mesh, strict=True))
    return _training_tensors(layout, config, pass_.training, letters(config, pass_, layout, mesh), sizes)


@functools.lru_cache(maxsize=4096)
def forward_tensors(layout: Layout, block: str, n_layers: int, sampling: bool) -> tuple[Tensor, ...]:
    """The tensors of a forward pass, in order. A layout without constraints (`auto`) has none.

    Args:
        layout: the layout, for its mesh.
        block: `parallel` or `serial`.
        n_layers: number of layers.
        sampling: whether the pass samples a token for each row of logits.
    """
    if not layout.explicit:
        return ()

    def layers(n: int) -> list[Tensor]:
        return [
            t for scope, (suffix, attends) in BLOCKS[block].items() for t in _block(layout, scope, suffix, attends, n)
        ]

    found = [
        Tensor(scope="embed", dims=("T",), ladder=layout.tokens, dtype="i32"),
        Tensor(scope="embed", dims=("T", "E"), ladder=layout.embed),
    ]
    if layout.prefetch:  # no layer gathers the weights of the first
        found += [
            dataclasses.replace(t, ladder=before(layout, t.scope.split("/")[1]), loop=None, in_layer=False)
            for t in layers(1)
            if t.dtype == "weight"
        ]
    found += [
        *layers(n_layers),
        Tensor(scope="rows", dims=("R", "E"), ladder=layout.rows),
        Tensor(scope="norm", dims=("R",), ladder=norm_ladder(layout.rows[-1]), dtype="f32"),
        Tensor(scope="logits", dims=("R", "V"), ladder=layout.logits),
    ]
    if sampling:
        found += [
            Tensor(scope="sample", dims=("n", "2", "R"), ladder=pick_ladder(layout), dtype="i32"),
            Tensor(scope="sample", dims=("R",), ladder=layout.ids, dtype="i32"),
        ]
    return tuple(found)


def _block(layout: Layout, scope: str, suffix: str, attends: bool, n: int) -> Iterator[Tensor]:
    """The tensors of one block, which runs `n` times."""
    c, g, stat, kv = "C" + suffix, "G" + suffix, norm_ladder(layout.x[-1]), layout.kv
    loops = {loop.name: loop for loop in looped_steps(layout).values()}

    def tensor(name: str, dims: tuple[str, ...], ladder: Ladder | None = None, **more: Any) -> Tensor:
        """In scope `name`, on the layout's ladder of that name if no other is given."""
        steps: Ladder = getattr(layout, name) if ladder is None else ladder
        loop = loops.get(name) if ladder is None else None
        at, ways = f"{scope}/{name}", layout.rings if loop else 0
        return Tensor(scope=at, dims=dims, ladder=steps, count=n, in_layer=True, loop=loop, ways=ways, **more)

    yield tensor("x", ("T", "E"))
    if not layout.together:
        yield tensor("norm", ("T",), stat, dtype="f32")
    yield tensor("w_in", ("E", c), dtype="weight")
    yield tensor("h", ("T", c))
    if layout.together:
        yield tensor("h", ("T",), stat, dtype="f32", fused=True)
    if attends:
        if layout.together:
            yield tensor("h", ("T", "D"), kv[:2], fused=True)
            kv = kv[1:]
        yield tensor("kv", ("T", "E"), layout.x_kv)
        yield tensor("w_kv", ("E", "D"), dtype="weight")
        yield tensor("kv", ("T", "D"), kv)
        yield tensor("q", ("T", "H", "Q"))
        yield tensor("o", ("T", "H", "Q"))
    yield tensor("g", ("T", g))
    yield tensor("w_out", (g, "E"), dtype="weight")
    yield tensor("out", ("T", "E"))


def norm_ladder(at: P) -> Ladder:
    """Of a norm's mean squares, one for each row of an activation in spec `at` (TE or RE): E's axes are summed over."""
    t, e = entries(at)
    return (P(t, unreduced=frozenset(axes_of(e))), P(t)) if axes_of(e) else (P(t),)


def pick_ladder(layout: Layout) -> Ladder:
    """Of greedy sampling, [n, 2, R]: each of the n parts of the vocabulary has its best value and id for each row."""
    r, v = entries(layout.logits[-1])
    return (P(v, None, r), P(None, None, r)) if axes_of(v) else (P(None, None, r),)


def _training_tensors(
    layout: Layout, config: ModelConfig, training: Training, extents: dict[str, int], sizes: dict[str, int]
) -> list[Tensor]:
    """The tensors of a training step: forward, then what is run again, backward, and the update."""
    ahead = forward_tensors(layout, config.block, config.n_layers, False)
    number = norm_ladder(layout.logits[-1])
    ahead += tuple(Tensor(scope="loss", dims=("R",), ladder=number, dtype="f32") for _ in range(2))
    found = [dataclasses.replace(t, count=t.count * training.accumulate) for t in ahead]
    last = f"{list(BLOCKS[config.block])[-1]}/out"
    again = {
        "layer": [t for t in found if t.in_layer and t.scope != last],  # no gradient needs the layer's output
        "weights": [t for t in found if t.in_layer and t.dtype == "weight"],
        "none": [],
    }[training.remat]
    back = [t for t in reversed(found) if t.dtype != "i32" and t.scope != "loss"]  # the loss keeps what it needs
    parts: tuple[tuple[StepPart, list[Tensor]], ...] = (("again", again), ("backward", back))
    found += [dataclasses.replace(t, part=part) for part, some in parts for t in some]
    after = []
    for name, (dims, spec) in parameters(layout, config).items():
        shape = [extents[d] for d in dims]
        after += [
            Tensor(scope=f"gradients/{name}", dims=dims, ladder=gradient_ladder(spec, shape, sizes), dtype="f32"),
            Tensor(scope=f"update/{name}", dims=dims, ladder=update_ladder(spec, shape, sizes)),
        ]
    every = frozenset(a for a in AXES if sizes[a] > 1)
    if every:  # the loss, and the gradient's square
        number = (P(unreduced=every), P())
        after += [Tensor(scope="clip", dims=(), ladder=number, dtype="f32", fused=fused) for fused in (False, True)]
    return found + [dataclasses.replace(t, part="update") for t in after]


def parameters(layout: Layout, config: ModelConfig) -> dict[str, tuple[tuple[str, ...], P]]:
    """Parameter -> its letters and its spec at rest, under the names of `models.decoder.parameters.specs`."""
    tables = ("table",) if config.tied else ("table", "unembed")
    found: dict[str, tuple[tuple[str, ...], P]] = dict.fromkeys(tables, (("V", "E"), layout.table))
    found["final_norm"] = (("E",), P(None))
    for block, (suffix, attends) in BLOCKS[config.block].items():
        found[f"{block}/norm"] = (("N", "E"), P(None, None))
        weights = {"w_in": ("E", "C" + suffix), "w_kv": ("E", "D"), "w_out": ("G" + suffix, "E")}
        for name, dims in weights.items():
            if attends or name != "w_kv":
                found[f"{block}/{name}"] = (("N", *dims), P(None, *entries(getattr(layout, name)[0])))
    return found
