"""Training under a layout: one program for all layouts, and an optimiser whose state is split over the chips.

The decoder's body runs as the program of one chip (`partitioning.layouts.moves.on_a_chip`) and is differentiated there.
The transpose of every move is a move: an all-gather becomes a reduce-scatter and vice versa. The backward pass thus
follows the layout's ladders backwards. If several chips hold copies of a parameter, each of them sums the gradient of a
part and updates that part (`partitioning.layouts.ownership`). Text, checkpoints and the training loop are elsewhere.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import Cache
from toruslab.models.decoder.loss import cross_entropy
from toruslab.models.decoder.parameters import abstract, bare, initial, keys_of, placed, specs
from toruslab.models.decoder.sequences import Causal, split_axes
from toruslab.models.programs.program import Compiled
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.moves import follow
from toruslab.partitioning.layouts.ownership import copy_axes, gradient_ladder, owned, update_ladder
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.torus.mesh import AXES

NO_CACHE = Cache(None, None, None, None)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimiser: AdamW (Loshchilov and Hutter 2019) with a linear warm-up and a cosine decay.

    Args:
        steps: steps of the schedule.
        warm_up: the first of them, in which the learning rate rises from 0 to `learning_rate`.
        last: share of `learning_rate` that is left at the end of the cosine.
        weight_decay: of the matrices; the scales of norms do not decay.
        clip: largest norm of a step's whole gradient.
        b1, b2: decay of Adam's two moments.

    Raises:
        ValueError: field, value and rule.
    """

    steps: int = 1000
    warm_up: int = 50
    learning_rate: float = 3e-3
    last: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self):
        for field, least in (("steps", 1), ("warm_up", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field}={value!r} must be an integer of at least {least}")
        ranges = {"learning_rate": 10.0, "last": 1.0, "weight_decay": 10.0, "clip": math.inf, "b1": 1.0, "b2": 1.0}
        for field, high in ranges.items():
            value, zero = getattr(self, field), field not in ("learning_rate", "clip")
            if not isinstance(value, int | float) or not (value >= 0 if zero else value > 0) or value > high:
                raise ValueError(f"{field}={value!r} must be a number {'from' if zero else 'above'} 0 to {high:g}")
        if self.warm_up >= self.steps:
            raise ValueError(f"warm_up={self.warm_up} must be less than steps={self.steps}")

    def schedule(self) -> optax.Schedule:
        """The learning rate at a step. Step 0 has the first part of the warm-up, not zero."""
        first, last = self.learning_rate / max(self.warm_up, 1), self.learning_rate * self.last
        return optax.warmup_cosine_decay_schedule(first, self.learning_rate, self.warm_up, self.steps, last)

    def optimiser(self) -> optax.GradientTransformation:
        """The optimiser without clipping, which needs the gradients of all chips and is in `Trainer`."""
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2),
            optax.add_decayed_weights(self.weight_decay, _matrices),
            optax.scale_by_learning_rate(self.schedule()),
        )


def _matrices(params: Any) -> Any:
    """Whether each parameter is a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in keys_of(path)[-1], params)


class TrainState(NamedTuple):
    """All that a step changes.

    - `params`, placed as the layout says, in the activations' dtype.
    - `master`, the same in float32 if `params` are bfloat16, else None; each chip has the parts that it owns.
    - `moments`, optax's float32 state, split as `master`.
    """

    step: Any
    params: Any
    master: Any
    moments: Any


class LossAndNorm(NamedTuple):
    """A step's mean loss in nats per token, before the update, and the norm of its whole gradient, before clipping."""

    loss: Any
    norm: Any


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The programs that train a model under a layout on a mesh: `initial`, `step` and `evaluate`.

    Args:
        config, layout, pass_: what runs; the layout must be made for the mesh's shape. `pass_.training` has the number
            of parts of a step's batch, and what gradients recompute.
        mesh: devices, with Explicit axes if `layout.explicit`, else with Auto axes.
        recipe: the optimiser.

    Raises:
        ValueError: a model with padding heads, because training would make them real heads.
    """

    config: ModelConfig
    layout: Layout
    mesh: Mesh
    pass_: Pass
    recipe: Recipe = Recipe()

    def __post_init__(self):
        if self.pass_.training is None:
            raise ValueError("pass_.training is None: it must say how to train")
        if self.config.n_padding_heads:
            raise ValueError(
                f"n_padding_heads={self.config.n_padding_heads} must be 0: training would make real heads of them"
            )

    @property
    def sizes(self) -> dict[str, int]:
        return {a: self.mesh.shape[a] for a in AXES}

    @property
    def dtype(self):
        """The dtype of parameters and activations."""
        return jnp.float32 if self.pass_.itemsize == 4 else jnp.bfloat16

    @functools.cached_property
    def _optimiser(self) -> optax.GradientTransformation:
        return self.recipe.optimiser()

    def abstract(self) -> TrainState:
        """The state as shapes with their shardings; nothing is allocated."""
        return placed(self._shapes, self.shardings())

    def shardings(self) -> TrainState:
        """The state's shardings, in the form of the state."""
        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), self.specs(), is_leaf=_is_spec)

    def specs(self) -> TrainState:
        """The state's `PartitionSpec`s, in the form of the state."""
        shapes = self._shapes
        resting = specs(shapes.params, self.layout)
        mine = jax.tree.map(self._owned, resting, shapes.params, is_leaf=_is_spec)
        moments = optax.tree_map_params(
            self._optimiser, lambda _, spec: spec, shapes.moments, mine, transform_non_params=lambda _: P()
        )
        return TrainState(P(), resting, mine if shapes.master is not None else None, moments)

    def initial(self, seed: int = 0) -> TrainState:
        """The state of step 0 with random parameters (`models.decoder.parameters.initial`)."""
        return self.begin(initial(self.config, self.layout, self.mesh, seed=seed))

    def begin(self, params: nnx.State) -> TrainState:
        """The state of step 0 with these float32 parameters."""
        return jax.jit(self._begin, out_shardings=self.shardings())(params)

    def _begin(self, params: nnx.State) -> TrainState:
        half = self.dtype != jnp.float32
        return TrainState(
            step=jnp.int32(0),
            params=jax.tree.map(lambda p: p.astype(self.dtype), params),
            master=params if half else None,
            moments=self._optimiser.init(params),
        )

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return bare(jax.eval_shape(self._begin, abstract(self.config)[1]))

    def _owned(self, spec: P, leaf: Any) -> P:
        return owned(spec, leaf.shape, self.sizes)

    @functools.cached_property
    def step(self) -> Any:
        """`(state, ids [B, L + 1]) -> (state, LossAndNorm)`; the state is donated, `ids` are whole on every chip."""
        return self._jitted(self._step, (self.specs(), P()), (self.specs(), LossAndNorm(P(), P())), donate_argnums=0)

    def compile(self, *, text: bool = True) -> Compiled:
        """The step, compiled ahead of time from shapes alone. See `models.programs.program.Program.compile`."""
        shape = (self.pass_.batch, self.pass_.length + 1)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, P()))
        return Compiled.of(self.step, (self.abstract(), ids), self.mesh, text=text)

    @functools.cached_property
    def evaluate(self) -> Any:
        """`(params, ids [b, L + 1]) -> ` the mean loss in nats per token, for every b that the layout can split."""

        def run(params: nnx.State, ids: jax.Array) -> jax.Array:
            return self._everywhere(self._loss(params, ids)).loss

        return self._jitted(run, (self.specs().params, P()), P())

    def _jitted(self, function: Any, ins: Any, outs: Any, **more: Any) -> Any:
        """`function` as the program of one chip, run on all; unchanged for a layout without constraints."""
        at = jax.tree.map(lambda s: NamedSharding(self.mesh, s), (ins, outs), is_leaf=_is_spec)
        if self.layout.explicit:
            function = jax.shard_map(function, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return jax.jit(function, in_shardings=at[0], out_shardings=at[1], **more)

    def _step(self, state: TrainState, ids: jax.Array) -> tuple[TrainState, LossAndNorm]:
        loss, gradients = self._gradients(state.params, ids)
        resting = specs(state.params, self.layout)
        with jax.named_scope("gradients"):
            gradients = self._along(gradient_ladder, gradients, resting)
        report = self._everywhere(loss, self._squares(gradients, resting))
        factor = jnp.minimum(1.0, self.recipe.clip / jnp.maximum(report.norm, 1e-30))
        gradients = jax.tree.map(lambda g: g * factor, gradients)
        with jax.named_scope("update"):
            mine = state.master
            if mine is None:
                mine = self._along(lambda *leaf: tuple(reversed(update_ladder(*leaf))), state.params, resting)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counter with floats
                change, moments = self._optimiser.update(gradients, state.moments, mine)
            mine = optax.apply_updates(mine, change)
            params = jax.tree.map(lambda p: p.astype(self.dtype), mine)
            params = self._along(update_ladder, params, resting)
        master = None if state.master is None else mine
        return TrainState(state.step + 1, params, master, moments), report

    def _gradients(self, params: nnx.State, ids: jax.Array) -> tuple[jax.Array, nnx.State]:
        """This chip's terms of the mean loss and of its float32 gradient, accumulated over the parts of the batch."""
        training = self.pass_.training
        assert training is not None
        parts = ids.reshape(training.accumulate, -1, ids.shape[1])

        def loss(params: nnx.State, part: jax.Array) -> jax.Array:
            return self._loss(params, part, remat=training.remat) / training.accumulate

        of_part = jax.value_and_grad(loss)

        def add(so_far, part):
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), so_far, of_part(params, part)), None

        if training.accumulate == 1:
            found, gradients = of_part(params, parts[0])
            return found, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        nothing = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        return lax.scan(add, nothing, parts)[0]

    def _loss(self, params: nnx.State, ids: jax.Array, *, remat: str = "none") -> jax.Array:
        """This chip's term of the mean loss over `ids` [b, L + 1]; each token is predicted from those before it.

        If several chips hold copies of the same logits, each takes an equal share, so that the sum over all chips
        counts every token once.
        """
        layout, length = self.layout, ids.shape[1] - 1
        decoder = nnx.merge(abstract(self.config, self.dtype)[0], params)
        x = decoder.embed(ids[:, :-1].reshape(-1), layout)
        sequences = Causal.of(length, self.config)
        x, _ = decoder.through_layers(x, NO_CACHE, sequences, layout, remat=remat)
        logits = decoder.logits(x, layout)
        total = cross_entropy(logits, ids[:, 1:].reshape(-1), layout)
        used = split_axes(layout.logits, 0) + split_axes(layout.logits, 1)
        same = self.mesh.size // math.prod(self.sizes[a] for a in used) if layout.explicit else 1
        return total / (ids.shape[0] * length * same)

    def _everywhere(self, loss: jax.Array, squares: jax.Array | int = 0) -> LossAndNorm:
        """The sums over all chips of their terms of the loss and of the gradient's square, in one collective."""
        if self.layout.explicit:
            with jax.named_scope("clip"):
                axes = tuple(a for a in AXES if self.sizes[a] > 1)
                loss, squares = lax.psum((loss, jnp.float32(squares)), axes) if axes else (loss, squares)
        return LossAndNorm(loss, jnp.sqrt(squares))

    def _along(self, ladder: Any, arrays: Any, resting: Any) -> Any:
        """Arrays in the form of the parameters, each at the last step of its `ladder`."""
        if not self.layout.explicit:
            return arrays

        def along(path: tuple, spec: P, array: jax.Array, like: Any) -> jax.Array:
            with jax.named_scope("/".join(keys_of(path))):
                return follow(array, ladder(spec, like.shape, self.sizes))

        shapes = self._shapes.params
        return jax.tree_util.tree_map_with_path(along, resting, arrays, shapes, is_leaf=_is_spec)

    def _squares(self, gradients: Any, resting: Any) -> jax.Array:
        """This chip's term of the sum of squares of the gradient. Elements with several owners count once."""

        def of_leaf(spec: P, g: jax.Array, like: Any) -> jax.Array:
            left = copy_axes(self._owned(spec, like), self.sizes) if self.layout.explicit else ()
            return jnp.sum(jnp.square(g)) / math.prod(self.sizes[a] for a in left)

        found = jax.tree.map(of_leaf, resting, gradients, self._shapes.params, is_leaf=_is_spec)
        return jax.tree.reduce(jnp.add, found)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)
