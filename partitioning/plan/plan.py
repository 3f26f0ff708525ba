"""What one pass does, in order: every tensor that moves, its size, and the ladder that it follows.

This is the plan's side of the decoder. `models.decoder.decoder` runs the same ladders under the same scopes; the tests hold
the two together by comparing this plan with the collectives of the compiled program, one to one.
Reads a model's sizes; runs nothing.
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
from toruslab.partitioning.layouts.moves import Kind, Move, moves
from toruslab.partitioning.layouts.ownership import gradient_ladder, update_ladder
from toruslab.partitioning.layouts.rings import Loop, before, loops, sends
from toruslab.partitioning.torus.mesh import AXES, Shape

PlannedKind = Kind | Literal["collective-permute"]
Part = Literal["forward", "again", "backward", "update"]
TRANSPOSED: Mapping[PlannedKind, PlannedKind] = {
    "all-gather": "reduce-scatter",
    "reduce-scatter": "all-gather",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
}
"""What a collective is in the backward pass, where it moves as many bytes: of what all had alike, every chip has a part
of the gradient, and the other way round."""


REMAT = ("layer", "weights", "none")
"""What is worked out again for the gradient of a layer: all of it, from its input, which alone is kept; its gathered
weights, which are gathered again, while all else is kept; or nothing."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One tensor on its way: `scope` as in the program, `dims` as letters, `ladder` from the layout.

    `count` is how often the pass goes through it; `dtype` is `act` (the activations'), `weight`, `f32` or `i32`;
    `rides`: its one move shares the collective of another tensor of its scope; `loop`: the move of the ladder that is
    looped with a matmul, in so many `ways` round; `in_layer`: whether it is in every layer.
    `part` is `forward`; of a training step also `again` (the layer run again for its gradient), `backward` (the
    tensor's gradient, which goes back over the ladder) and `update`.
    """

    scope: str
    dims: tuple[str, ...]
    ladder: Ladder
    count: int = 1
    dtype: str = "act"
    rides: bool = False
    loop: Loop | None = None
    ways: int = 0
    in_layer: bool = False
    part: Part = "forward"

    def collectives(
        self, sizes: Mapping[str, int], size: Mapping[str, int] | None = None
    ) -> Iterator[tuple[PlannedKind, Axes, Fraction, Move]]:
        """What the stage runs on mesh axes of `sizes`, in order: kind, axes, share of its move's bytes, and the move.

        A looped move is its sends, any other one collective; slices move nothing and are not there. `size`: of the
        letters; without them halves of a shard are taken for equal.
        """
        for rung, move in enumerate(moves(self.ladder)):
            if self.loop and self.loop.rung == rung:
                n, k = 2 ** len(AXES), move.group(sizes)
                if size:
                    at = move.source if move.kind == "all-gather" else move.target
                    split = entries(move.src if move.kind == "all-gather" else move.dst)[at]
                    n = size[self.dims[at]] // math.prod(sizes[a] for a in axes_of(split))
                for axis, part in sends(move.kind, move.axes, sizes, n, self.ways):
                    yield "collective-permute", (axis,), Fraction(part, n * (k - 1)), move
            elif move.kind != "slice":
                yield move.kind, tuple(a for a in AXES if a in move.axes), Fraction(1), move


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A collective that the layout asks for. `bytes`: what one chip must receive, in one execution; `itemsize`: of one
    element of what moves; `merged`: with others of its scope it is one collective, of which all but one `rides`."""

    scope: str
    kind: PlannedKind
    axes: Axes
    bytes: int
    count: int
    itemsize: int
    merged: bool = False
    rides: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a pass trains: its batch in `accumulate` parts, one after the other, whose gradients are added; and what is
    worked out again for a layer's gradient, one of `REMAT`."""

    accumulate: int = 1
    remat: str = "layer"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The sizes of one pass: B = `batch` sequences of L = `length` new tokens over a cache of `capacity` positions.

    `all_logits`: logits for every token (scoring), else for the last of each sequence (generation, with sampling).
    `itemsize` is the activations' bytes per element; `int8_cache`: K and V are cached as int8, with scales.
    `steps`: decode steps in one call of the program, each over the token that the one before sampled. Sizes, plan and
    bytes are those of one step; the cache has room for the last.
    `training`: the pass is a training step, forward, backward and update; it has no cache, and `all_logits`.
    `mixed`: of a pass over tokens of many requests, how many tokens and rows of logits it has; `batch` is then that of
    the cache, its pages, and `length` 1.
    """

    batch: int
    length: int
    capacity: int
    itemsize: int = 4
    weight_itemsize: int = 4
    all_logits: bool = False
    steps: int = 1
    int8_cache: bool = False
    mixed: tuple[int, int] | None = None
    training: Training | None = None

    def __post_init__(self):
        for field in ("batch", "length", "capacity", "steps"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} must be a positive integer")
        if self.length > self.capacity:
            raise ValueError(f"length={self.length} does not fit a cache of capacity={self.capacity}")
        if self.steps > 1 and (self.length > 1 or self.all_logits):
            raise ValueError(f"steps={self.steps} must be 1 unless each takes one token and samples the next")
        if self.steps > self.capacity:
            raise ValueError(f"steps={self.steps} do not fit a cache of capacity={self.capacity}")
        if self.training and (self.training.accumulate < 1 or self.batch % self.training.accumulate):
            raise ValueError(f"accumulate={self.training.accumulate} must divide batch={self.batch}")

    @property
    def tokens(self) -> int:
        """T; of a training step those of one part of the batch."""
        return self.mixed[0] if self.mixed else self.rows * self.length

    @property
    def rows(self) -> int:
        """B; of a training step those of one part of the batch."""
        return self.batch // self.training.accumulate if self.training else self.batch

    @property
    def logits_rows(self) -> int:
        """R."""
        return self.mixed[1] if self.mixed else self.tokens if self.all_logits else self.batch


def letters(config: ModelConfig, pass_: Pass, layout: Layout, mesh: Shape) -> dict[str, int]:
    """The size of every letter that a stage's `dims` may hold.

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
def stages(layout: Layout, block: str, n_layers: int, sampling: bool) -> tuple[Stage, ...]:
    """The tensors of one pass, in order. A layout without constraints (`auto`) has no plan, and no stages."""
    if not layout.explicit:
        return ()
    found = [
        Stage(scope="embed", dims=("T",), ladder=layout.tokens, dtype="i32"),
        Stage(scope="embed", dims=("T", "E"), ladder=layout.embed),
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
        Stage(scope="rows", dims=("R", "E"), ladder=layout.rows),
        Stage(scope="norm", dims=("R",), ladder=norm_ladder(layout.rows[-1]), dtype="f32"),
        Stage(scope="logits", dims=("R", "V"), ladder=layout.logits),
    ]
    if sampling:
        found += [
            Stage(scope="sample", dims=("n", "2", "R"), ladder=pick_ladder(layout), dtype="i32"),
            Stage(scope="sample", dims=("R",), ladder=layout.ids, dtype="i32"),
        ]
    return tuple(found)


def _block(layout: Layout, scope: str, c: str, g: str, attends: bool, n: int) -> Iterator[Stage]:
    for stage in _stages_of(layout, scope, c, g, attends, n):
        yield dataclasses.replace(stage, in_layer=True)


def _stages_of(layout: Layout, scope: str, c: str, g: str, attends: bool, n: int) -> Iterator[Stage]:
    stat, kv, rides = norm_ladder(layout.x[-1]), layout.kv, layout.together
    looped: dict[str, Any] = {m.name: {"loop": m, "ways": layout.rings} for m in loops(layout).values()}

    def weight(name: str, dims: tuple[str, str]) -> Stage:
        at = f"{scope}/{name}"
        return Stage(scope=at, dims=dims, ladder=getattr(layout, name), count=n, dtype="weight", **looped.get(name, {}))

    yield Stage(scope=f"{scope}/x", dims=("T", "E"), ladder=layout.x, count=n)
    if not rides:
        yield Stage(scope=f"{scope}/norm", dims=("T",), ladder=stat, count=n, dtype="f32")
    yield weight("w_in", ("E", c))
    yield Stage(scope=f"{scope}/h", dims=("T", c), ladder=layout.h, count=n, **looped.get("h", {}))
    if rides:
        yield Stage(scope=f"{scope}/h", dims=("T",), ladder=stat, count=n, dtype="f32", rides=True)
    if attends:
        if rides:
            yield Stage(scope=f"{scope}/h", dims=("T", "D"), ladder=kv[:2], count=n, rides=True)
            kv = kv[1:]
        yield Stage(scope=f"{scope}/kv", dims=("T", "E"), ladder=layout.x_kv, count=n)
        yield weight("w_kv", ("E", "D"))
        yield Stage(scope=f"{scope}/kv", dims=("T", "D"), ladder=kv, count=n)
        yield Stage(scope=f"{scope}/q", dims=("T", "H", "Q"), ladder=layout.q, count=n)
        yield Stage(scope=f"{scope}/o", dims=("T", "H", "Q"), ladder=layout.o, count=n)
    yield Stage(scope=f"{scope}/g", dims=("T", g), ladder=layout.g, count=n, **looped.get("g", {}))
    yield weight("w_out", (g, "E"))
    yield Stage(scope=f"{scope}/out", dims=("T", "E"), ladder=layout.out, count=n, **looped.get("out", {}))


def norm_ladder(at: P) -> Ladder:
    """The mean square of a norm, T or R numbers: summed over the axes that E is split over in `at` = TE."""
    t, e = entries(at)
    return (P(t, unreduced=frozenset(axes_of(e))), P(t)) if axes_of(e) else (P(t),)


def pick_ladder(layout: Layout) -> Ladder:
    """Greedy sampling: every chip's best value and id of R rows, [n, 2, R] over the axes that V is split over."""
    r, v = entries(layout.logits[-1])
    return (P(v, None, r), P(None, None, r)) if axes_of(v) else (P(None, None, r),)


def plan(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Planned]:
    """Every collective of one pass, in order, from the layout alone; of several steps in one call, those of one step.

    Raises:
        ValueError: a size that the layout cannot divide (see `check`).
    """
    check(layout, config, pass_, mesh)
    sizes = dict(zip(AXES, mesh, strict=True))
    size = letters(config, pass_, layout, mesh)
    found = tensors(layout, config, pass_, mesh)
    shared = {stage.scope for stage in found if stage.rides}

    def planned(stage: Stage) -> Iterator[Planned]:
        ran = list(stage.collectives(sizes, size))
        for kind, axes, share, move in reversed(ran) if stage.part == "backward" else ran:
            yield Planned(
                scope=stage.scope,
                kind=TRANSPOSED[kind] if stage.part == "backward" else kind,
                axes=axes,
                bytes=int(bytes_of(move, stage, size, pass_, sizes) * share),
                count=stage.count,
                itemsize=_itemsize(stage, pass_),
                merged=stage.scope in shared,
                rides=stage.rides,
            )

    return [p for s in found for p in planned(s)]


def tensors(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> list[Stage]:
    """The tensors of one pass, in order; none of a layout without constraints (`auto`), which has no plan."""
    if not pass_.training or not layout.explicit:
        return list(stages(layout, config.block, config.n_layers, not pass_.all_logits))
    sizes = dict(zip(AXES, mesh, strict=True))
    return _trained(layout, config, pass_.training, letters(config, pass_, layout, mesh), sizes)


def _trained(
    layout: Layout, config: ModelConfig, training: Training, size: dict[str, int], sizes: dict[str, int]
) -> list[Stage]:
    """The tensors of a training step.

    The loss keeps what its gradient needs. Of a layer that is run again, nothing needs what its last block put out.
    """
    ahead = stages(layout, config.block, config.n_layers, False)
    number = norm_ladder(layout.logits[-1])
    ahead += tuple(Stage(scope="loss", dims=("R",), ladder=number, dtype="f32") for _ in range(2))
    times = [dataclasses.replace(s, count=s.count * training.accumulate) for s in ahead]
    last = "layer/out" if config.block == "parallel" else "mlp/out"
    again = {
        "layer": [s for s in times if s.in_layer and s.scope != last],
        "weights": [s for s in times if s.in_layer and s.dtype == "weight"],
        "none": [],
    }[training.remat]
    back = [s for s in reversed(times) if s.dtype != "i32" and s.scope != "loss"]
    parts: tuple[tuple[Part, list[Stage]], ...] = (("again", again), ("backward", back))
    times += [dataclasses.replace(s, part=part) for part, some in parts for s in some]
    after = []
    for name, (dims, spec) in parameters(layout, config).items():
        summed, spread = [ladder(spec, [size[d] for d in dims], sizes) for ladder in (gradient_ladder, update_ladder)]
        after.append(Stage(scope=f"gradients/{name}", dims=dims, ladder=summed, dtype="f32"))
        after.append(Stage(scope=f"update/{name}", dims=dims, ladder=spread))
    every = frozenset(a for a in AXES if sizes[a] > 1)
    if every:
        after += [
            Stage(scope="clip", dims=(), ladder=(P(unreduced=every), P()), dtype="f32", rides=bool(i)) for i in range(2)
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


def bytes_of(move: Move, stage: Stage, size: dict[str, int], pass_: Pass, sizes: dict[str, int]) -> int:
    """What one chip must receive for a move of a stage; `size` of `letters`, `sizes` of the mesh axes."""
    return move.bytes([size[d] for d in stage.dims], _itemsize(stage, pass_), sizes)


def _itemsize(stage: Stage, pass_: Pass) -> int:
    return {"act": pass_.itemsize, "weight": pass_.weight_itemsize, "f32": 4, "i32": 4}[stage.dtype]


@functools.lru_cache(maxsize=4096)
def requirements(layout: Layout, block: str) -> tuple[tuple[str, Axes], ...]:
    """Every (dimension, axes in mesh order) that the layout splits: what must divide what."""
    rungs = [(stage.dims, spec) for stage in stages(layout, block, 1, True) for spec in stage.ladder]
    rest = (("E", "C"), ("E", "D"), ("G", "E"))
    rungs += zip(rest, (layout.w_in[0], layout.w_kv[0], layout.w_out[0]), strict=True)
    rungs += [(("V", "E"), layout.table), (("B", "K", "S", "Q"), layout.cache)]
    found = {
        (dim, tuple(a for a in AXES if a in axes_of(entry)))
        for dims, spec in rungs
        for dim, entry in zip(dims, entries(spec), strict=True)
        if axes_of(entry) and dim not in ("n", "2")
    }
    return tuple(sorted(found))


def check(layout: Layout, config: ModelConfig, pass_: Pass, mesh: Shape) -> None:
    """Refuses sizes that the layout cannot divide evenly.

    Raises:
        ValueError: field, value and rule, and how to mend it where heads can be padded.
    """
    looped = [loop.name for loop in loops(layout).values() if loop.name.startswith("w_")]
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
