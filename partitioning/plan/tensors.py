"""Tensors."""

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
StepPart = Literal["forward", "again", "backward", "update"]
TRANSPOSED: Mapping[PlannedKind, PlannedKind] = {
    "all-gather": "reduce-scatter",
    "reduce-scatter": "all-gather",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
}
"""What a collective is in the backward pass, where it moves as many bytes: of what all had alike, every chip has a part
of the gradient, and the other way round."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor on its way: `scope` as in the program, `dims` as letters, `ladder` from the layout.

    `count` is how often the pass goes through it; `dtype` is `act` (the activations'), `weight`, `f32` or `i32`;
    `fused`: its one move shares the collective of another tensor of its scope; `loop`: the move of the ladder that is
    looped with a matmul, in so many `ways` round; `in_layer`: whether it is in every layer.
    `part` is `forward`; of a training step also `again` (the layer run again for its gradient), `backward` (the
    tensor's gradient, which goes back over the ladder) and `update`.
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
        self, sizes: Mapping[str, int], size: Mapping[str, int] | None = None
    ) -> Iterator[tuple[PlannedKind, Axes, Fraction, Move]]:
        """What the tensor runs on mesh axes of `sizes`, in order: kind, axes, share of its move's bytes, and the move.

        A looped move is its sends, any other one collective; slices move nothing and are not there. `size`: of the
        letters; without them halves of a shard are taken for equal.
        """
        for step, move in enumerate(moves(self.ladder)):
            if self.loop and self.loop.step == step:
                n, k = 2 ** len(AXES), move.group(sizes)
                if size:
                    at = move.source if move.kind == "all-gather" else move.target
                    split = entries(move.src if move.kind == "all-gather" else move.dst)[at]
                    n = size[self.dims[at]] // math.prod(sizes[a] for a in axes_of(split))
                for axis, part in sends(move.kind, move.axes, sizes, n, self.ways):
                    yield "collective-permute", (axis,), Fraction(part, n * (k - 1)), move
            elif move.kind != "slice":
                yield move.kind, tuple(a for a in AXES if a in move.axes), Fraction(1), move

    def itemsize(self, pass_: Pass) -> int:
        """Bytes of one element."""
        return {"act": pass_.itemsize, "weight": pass_.weight_itemsize, "f32": 4, "i32": 4}[self.dtype]

    def bytes(self, move: Move, pass_: Pass, size: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        """Bytes that one chip must receive for one of the tensor's moves; `size` of `letters`, `sizes` of mesh axes."""
        return move.bytes([size[d] for d in self.dims], self.itemsize(pass_), sizes)


def letters(config: ModelConfig, pass_: Pass, layout: Layout, mesh: Shape) -> dict[str, int]:
    """The size of every letter that a tensor's `dims` may hold.

    Suffix `_mlp`: of the MLP's own block, if serial. n: the parts of the vocabulary.
    """
    sizes = dict(zip(AXES, mesh, strict=True))
    parts = axes_of(entries(layout.logits[-1])[1]) if layout.logits else ()
    return model_letters(config) | {
        "B": pass_.rows,
        "T": pass_.tokens,
        "R": pass_.logits_rows,
        "S": pass_.capacity,
        "n": math.prod(sizes[a] for a in parts),
        "2": 2,
    }


def model_letters(config: ModelConfig) -> dict[str, int]:
    """The letters that the model alone decides."""
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


@functools.lru_cache(maxsize=4096)
def forward_tensors(layout: Layout, block: str, n_layers: int, sampling: bool) -> tuple[Tensor, ...]:
    """The tensors of one pass, in order. A layout without constraints (`auto`) has no plan, and no stages."""
    if not layout.explicit:
        return ()
    found = [
        Tensor(scope="embed", dims=("T",), ladder=layout.tokens, dtype="i32"),
        Tensor(scope="embed", dims=("T", "E"), ladder=layout.embed),
    ]
    parts = {"layer": ("", True)} if block == "parallel" else {"attention": ("", True), "mlp": ("_mlp", False)}
    if layout.prefetch:  # the first layer's weights, which no layer before it gathers
        first = [
            s
            for scope, (suffix, attends) in parts.items()
            for s in _block(layout, scope, "C" + suffix, "G" + suffix, attends, 1)
        ]
        found += [
            dataclasses.replace(s, ladder=before(layout, s.scope.split("/")[1]), loop=None, in_layer=False)
            for s in first
            if s.dtype == "weight"
        ]
    for scope, (suffix, attends) in parts.items():
        found += _block(layout, scope, "C" + suffix, "G" + suffix, attends, n_layers)
    found += [
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


def _block(layout: Layout, scope: str, c: str, g: str, attends: bool, n: int) -> Iterator[Tensor]:
    for tensor in _block_tensors(layout, scope, c, g, attends, n):
        yield dataclasses.replace(tensor, in_layer=True)


def _block_tensors(layout: Layout, scope: str, c: str, g: str, attends: bool, n: int) -> Iterator[Tensor]:
    stat, kv, fused = norm_ladder(layout.x[-1]), layout.kv, layout.together
    looped: dict[str, Any] = {m.name: {"loop": m, "ways": layout.rings} for m in looped_steps(layout).values()}

    def weight(name: str, dims: tuple[str, str]) -> Tensor:
        at = f"{scope}/{name}"
        return Tensor(
            scope=at, dims=dims, ladder=getattr(layout, name), count=n, dtype="weight", **looped.get(name, {})
        )

    yield Tensor(scope=f"{scope}/x", dims=("T", "E"), ladder=layout.x, count=n)
    if not fused:
        yield Tensor(scope=f"{scope}/norm", dims=("T",), ladder=stat, count=n, dtype="f32")
    yield weight("w_in", ("E", c))
    yield Tensor(scope=f"{scope}/h", dims=("T", c), ladder=layout.h, count=n, **looped.get("h", {}))
    if fused:
        yield Tensor(scope=f"{scope}/h", dims=("T",), ladder=stat, count=n, dtype="f32", fused=True)
    if attends:
        if fused:
            yield Tensor(scope=f"{scope}/h", dims=("T", "D"), ladder=kv[:2], count=n, fused=True)
            kv = kv[1:]
        yield Tensor(scope=f"{scope}/kv", dims=("T", "E"), ladder=layout.x_kv, count=n)
        yield weight("w_kv", ("E", "D"))
        yield Tensor(scope=f"{scope}/kv", dims=("T", "D"), ladder=kv, count=n)
        yield Tensor(scope=f"{scope}/q", dims=("T", "H", "Q"), ladder=layout.q, count=n)
        yield Tensor(scope=f"{scope}/o", dims=("T", "H", "Q"), ladder=layout.o, count=n)
    yield Tensor(scope=f"{scope}/g", dims=("T", g), ladder=layout.g, count=n, **looped.get("g", {}))
    yield weight("w_out", (g, "E"))
    yield Tensor(scope=f"{scope}/out", dims=("T", "E"), ladder=layout.out, count=n, **looped.get("out", {}))


def norm_ladder(at: P) -> Ladder:
    """The mean square of a norm, T or R numbers: summed over the axes that E is split over in `at` = TE."""
    t, e = entries(at)
    return (P(t, unreduced=frozenset(axes_of(e))), P(t)) if axes_of(e) else (P(t),)


def pick_ladder(layout: Layout) -> Ladder:
    """Greedy sampling: every chip's best value and id of R rows, [n, 2, R] over the axes that V is split over."""
    r, v = entries(layout.logits[-1])
    return (P(v, None, r), P(None, None, r)) if axes_of(v) else (P(None, None, r),)


def tensors(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Tensor]:
    """The tensors of one pass, in order; none of a layout without constraints (`auto`), which has no plan."""
    if not pass_.training or not layout.explicit:
        return list(forward_tensors(layout, config.block, config.n_layers, not pass_.all_logits))
    sizes = dict(zip(AXES, mesh, strict=True))
    return _trained(layout, config, pass_.training, letters(config, pass_, layout, mesh), sizes)


def _trained(
    layout: Layout, config: ModelConfig, training: Training, size: dict[str, int], sizes: dict[str, int]
) -> list[Tensor]:
    """The tensors of a training step.

    The loss keeps what its gradient needs. Of a layer that is run again, nothing needs what its last block put out.
    """
    ahead = forward_tensors(layout, config.block, config.n_layers, False)
    number = norm_ladder(layout.logits[-1])
    ahead += tuple(Tensor(scope="loss", dims=("R",), ladder=number, dtype="f32") for _ in range(2))
    times = [dataclasses.replace(s, count=s.count * training.accumulate) for s in ahead]
    last = "layer/out" if config.block == "parallel" else "mlp/out"
    again = {
        "layer": [s for s in times if s.in_layer and s.scope != last],
        "weights": [s for s in times if s.in_layer and s.dtype == "weight"],
        "none": [],
    }[training.remat]
    back = [s for s in reversed(times) if s.dtype != "i32" and s.scope != "loss"]
    parts: tuple[tuple[StepPart, list[Tensor]], ...] = (("again", again), ("backward", back))
    times += [dataclasses.replace(s, part=part) for part, some in parts for s in some]
    after = []
    for name, (dims, spec) in parameters(layout, config).items():
        summed, spread = [ladder(spec, [size[d] for d in dims], sizes) for ladder in (gradient_ladder, update_ladder)]
        after.append(Tensor(scope=f"gradients/{name}", dims=dims, ladder=summed, dtype="f32"))
        after.append(Tensor(scope=f"update/{name}", dims=dims, ladder=spread))
    every = frozenset(a for a in AXES if sizes[a] > 1)
    if every:
        after += [
            Tensor(scope="clip", dims=(), ladder=(P(unreduced=every), P()), dtype="f32", fused=bool(i))
            for i in range(2)
        ]
    return times + [dataclasses.replace(s, part="update") for s in after]


def parameters(layout: Layout, config: ModelConfig) -> dict[str, tuple[tuple[str, ...], P]]:
    """The letters of every parameter and where it rests, by its name in the decoder; see `models.decoder.parameters.specs`."""
    tables = ("table",) if config.tied else ("table", "unembed")
    found: dict[str, tuple[tuple[str, ...], P]] = dict.fromkeys(tables, (("V", "E"), layout.table))
    found["final_norm"] = (("E",), P(None))
    for block, suffix in (
        {"layer": ""}.items() if config.block == "parallel" else {"attention": "", "mlp": "_mlp"}.items()
    ):
        found[f"{block}/norm"] = (("N", "E"), P(None, None))
        letters = {"w_in": ("E", "C" + suffix), "w_kv": ("E", "D"), "w_out": ("G" + suffix, "E")}
        if suffix:
            del letters["w_kv"]
        for name, dims in letters.items():
            found[f"{block}/{name}"] = (("N", *dims), P(None, *entries(getattr(layout, name)[0])))
    return found
