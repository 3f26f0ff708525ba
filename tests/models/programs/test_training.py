"""Training under every layout: gradients, ten steps, the plan, and where everything lies.

The gradient of a step is read off Adam's first moment after it, which is a tenth of it: the program that is tested is
the one that trains.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.battery import TOLERANCE, legal, model
from tests.canonical import unpack
from toruslab.models.config import ModelConfig
from toruslab.models.decoder.parameters import abstract, everywhere, keys_of, put
from toruslab.models.decoder.reference import init
from toruslab.models.decoder.reference import logits as reference_logits
from toruslab.models.programs.compiled import program
from toruslab.models.programs.training import Recipe, Trainer
from toruslab.models.weights.packing import pack
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.compare import compare
from toruslab.partitioning.layouts.layout import entries
from toruslab.partitioning.layouts.ownership import owned
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass, Training
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import AXES, Shape, attach

BATCH, LENGTH, STEPS = 8, 6, 10
LAYOUTS = (*legal(), *legal(["ws1d+lean", "ws2d+lean", "ws2d+biring", "wgx+ring"]))
QUICK = (("ws2d", "batch"), ("wgxyz", "batch"), ("auto", "batch"), ("wgx+ring", "batch"))
RECIPE = Recipe(steps=STEPS, warm_up=2, learning_rate=1e-2, clip=math.inf)


@functools.lru_cache(maxsize=8)
def text(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab, (BATCH, LENGTH + 1)).astype(np.int32)


def trainer(
    config: ModelConfig, name: str, attention: str, shape: Shape, *, recipe: Recipe = RECIPE, itemsize: int = 4, **how
) -> Trainer:
    made = layout(name, attention, shape, config.n_kv_heads)
    pass_ = Pass(
        batch=BATCH,
        length=LENGTH,
        capacity=LENGTH,
        itemsize=itemsize,
        weight_itemsize=itemsize,
        all_logits=True,
        training=Training(**how),
    )
    mesh = attach(shape, chip="cpu", explicit=made.explicit)
    return Trainer(config=config, layout=made, mesh=mesh, pass_=pass_, recipe=recipe)


def run(made: Trainer, steps: int = STEPS) -> tuple[list[float], dict[str, np.ndarray], list[str]]:
    """Losses of the steps from the reference's weights, the first gradient by parameter, and collectives that are not
    as planned."""
    compiled = made.compile()
    sizes = dict(zip(AXES, made.mesh.devices.shape, strict=True))
    wrong = []
    if made.layout.explicit:
        found = compare(plan(made.layout, made.config, made.pass_, made.mesh.devices.shape), read(compiled.text, sizes))
        wrong = [str(m) for m in found if m.verdict not in ("as planned", "merged", "widened to f32")]
    with jax.set_mesh(made.mesh):
        packed = pack(made.config, init(made.config, 0))
        state = made.begin(put(packed, abstract(made.config)[1], made.layout, made.mesh))
        losses, gradients = [], {}
        ids = everywhere(made.mesh, text(made.config))
        for step in range(steps):
            state, report = compiled.executable(state, ids)
            losses.append(float(report.loss))
            if step == 0:
                first = jax.tree_util.tree_leaves_with_path(state.moments[0].mu)
                gradients = {"/".join(keys_of(path)): np.asarray(a) / (1 - RECIPE.b1) for path, a in first}
    return losses, gradients, wrong


@functools.lru_cache(maxsize=8)
def alone(config: ModelConfig) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same on one device."""
    return run(trainer(config, "ws2d", "heads", (1, 1, 1)))[:2]


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.abs(found[name] - gradient).max() / np.abs(gradient).max()
        assert error <= TOLERANCE["float32"], f"{name}: relative error {error:.1e}"


def loss(config: ModelConfig, packed: dict) -> float:
    """The loss of the reference, in float64."""
    weights, total = unpack(config, packed), 0.0
    for row in text(config):
        scores = reference_logits(config, weights, row[:-1])
        total += (np.logaddexp.reduce(scores, axis=-1) - scores[np.arange(LENGTH), row[1:]]).sum()
    return total / (BATCH * LENGTH)


@pytest.mark.parametrize("config", [model("parallel", 1), model("serial", 16, "gelu")], ids=lambda c: c.name)
def test_the_gradient_is_that_of_the_reference(config):
    """Derivatives along random directions of every parameter equal differences of the float64 reference's loss."""
    losses, gradients = alone(config)
    packed = jax.tree.map(lambda a: a.astype(np.float64), pack(config, init(config, 0)))
    assert losses[0] == pytest.approx(loss(config, packed), rel=1e-6)
    rng, step = np.random.default_rng(3), 1e-5
    for name, gradient in gradients.items():
        *modules, leaf = name.split("/")
        holder = functools.reduce(lambda inner, key: inner[key], modules, packed)
        value = holder[leaf]
        way = rng.standard_normal(value.shape) * (np.abs(gradient) + np.abs(gradient).mean())
        if leaf in ("table", "unembed"):
            way[config.vocab :] = 0  # what pads the vocabulary is no parameter
        holder[leaf] = value + step * way
        above = loss(config, packed)
        holder[leaf] = value - step * way
        slope = (above - loss(config, packed)) / (2 * step)
        holder[leaf] = value
        size = np.linalg.norm(gradient) * np.linalg.norm(way)
        assert abs(slope - (gradient * way).sum()) / size <= TOLERANCE["float32"], name


@pytest.mark.parametrize(
    ("name", "attention"),
    [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in LAYOUTS],
)
def test_every_layout_trains_alike(name, attention):
    """Gradients and ten steps' losses are equal and planned = compiled, with layers recomputed or kept."""
    config = model("parallel", 1)
    losses, gradients, wrong = run(
        trainer(config, name, attention, (2, 2, 2), remat="layer" if attention == "batch" else "none")
    )
    assert not wrong
    assert_same(gradients, alone(config)[1])
    np.testing.assert_allclose(losses, alone(config)[0], rtol=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("config", "name", "attention", "shape", "how"),
    [
        (model("serial", 16, "gelu"), "ws2d", "batch", (2, 2, 2), {}),
        pytest.param(
            model("serial", 16, "gelu"), "wgxy", "heads", (4, 2, 1), {"remat": "none"}, marks=pytest.mark.slow
        ),
        pytest.param(model("serial", 16, "gelu"), "ws1d+lean", "heads", (8, 1, 1), {}, marks=pytest.mark.slow),
        pytest.param(model("parallel", 1), "ws2d", "heads", (1, 2, 4), {"accumulate": 4}, marks=pytest.mark.slow),
        (model("parallel", 1), "wgx", "heads", (2, 2, 2), {"accumulate": 2, "remat": "none"}),
        pytest.param(model("parallel", 16), "wgxyz", "batch", (4, 2, 1), {"accumulate": 1}, marks=pytest.mark.slow),
        pytest.param(
            model("serial", 16, "gelu"),
            "wgxyz",
            "batch",
            (2, 2, 2),
            {"remat": "weights", "accumulate": 1},
            marks=pytest.mark.slow,
        ),
        (model("parallel", 1), "wgxy", "heads", (2, 2, 2), {"remat": "weights"}),
        pytest.param(model("parallel", 1), "ws2d", "batch", (2, 2, 2), {"remat": "weights"}, marks=pytest.mark.slow),
    ],
)
def test_serial_blocks_parts_of_the_batch_and_other_meshes_train_alike(config, name, attention, shape, how):
    losses, gradients, wrong = run(trainer(config, name, attention, shape, **how))
    assert not wrong
    assert_same(gradients, alone(config)[1])
    np.testing.assert_allclose(losses, alone(config)[0], rtol=TOLERANCE["float32"])


@pytest.mark.slow
def test_bfloat16_trains_with_float32_masters():
    """bfloat16 is close to float32, and a change too small for bfloat16 is not lost."""
    config = model("parallel", 1)
    made = trainer(config, "ws2d", "batch", (2, 2, 2), itemsize=2)
    losses, _, wrong = run(made)
    assert not wrong
    np.testing.assert_allclose(losses, alone(config)[0], rtol=0.03)
    slow = dataclasses.replace(RECIPE, learning_rate=1e-6, warm_up=0, weight_decay=0.0)
    made = dataclasses.replace(made, recipe=slow)
    with jax.set_mesh(made.mesh):
        state = made.initial()
        before = [np.asarray(a) for a in jax.tree.leaves(state.master)]
        for _ in range(2):
            state, _ = made.step(state, everywhere(made.mesh, text(config)))
    for old, new, rounded in zip(before, jax.tree.leaves(state.master), jax.tree.leaves(state.params), strict=True):
        moved = np.abs(np.asarray(new) - old).max()
        assert 1e-7 < moved < 1e-5
        np.testing.assert_array_equal(np.asarray(new).astype(rounded.dtype), np.asarray(rounded))


@pytest.mark.parametrize(("name", "attention"), [("ws2d", "batch"), ("ws1d", "heads"), ("replicated", "batch")])
def test_nothing_is_kept_twice_that_can_be_shared_out(name, attention):
    """Moments are split over all chips, even if the layout repeats weights. A step keeps the placement of the state."""
    made = trainer(model("parallel", 1), name, attention, (2, 2, 2))
    for leaf in jax.tree.leaves(made.abstract().moments):
        if leaf.shape:
            assert leaf.sharding.num_devices == math.prod(leaf.shape) // math.prod(
                leaf.sharding.shard_shape(leaf.shape)
            )
    with jax.set_mesh(made.mesh):
        state = made.initial()
        after, _ = made.step(state, everywhere(made.mesh, text(made.config)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.moments) if leaf.ndim)
    for leaf, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(made.abstract()), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_what_cannot_be_shared_out_evenly_is_kept_whole():
    sizes = {"x": 2, "y": 2, "z": 2}
    assert owned(P(None, None), (3, 5), sizes) == P(None, None)
    assert owned(P(None, "x", None), (3, 6, 5), sizes) == P(None, "x", None)
    assert set(entries(owned(P(None, "x", None), (8, 6, 5), sizes))[0]) == {"y", "z"}
    assert owned(P(None, None), (3, 1024), sizes) == P(None, ("x", "y", "z"))  # whole tiles


def test_the_gradient_is_clipped_by_the_norm_of_all_of_it():
    config = model("parallel", 1)
    expected = math.sqrt(sum((g**2).sum() for g in alone(config)[1].values()))
    made = trainer(config, "wgxy", "batch", (2, 2, 2), recipe=dataclasses.replace(RECIPE, clip=expected / 3))
    with jax.set_mesh(made.mesh):
        state = made.begin(put(pack(config, init(config, 0)), abstract(config)[1], made.layout, made.mesh))
        state, report = made.step(state, everywhere(made.mesh, text(config)))
    assert float(report.norm) == pytest.approx(expected, rel=1e-5)
    clipped = math.sqrt(sum((np.asarray(g, float) ** 2).sum() for g in jax.tree.leaves(state.moments[0].mu)))
    assert clipped == pytest.approx((1 - RECIPE.b1) * expected / 3, rel=1e-5)


def test_evaluation_is_the_loss():
    config = model("parallel", 1)
    made = trainer(config, "wgx", "heads", (2, 2, 2))
    with jax.set_mesh(made.mesh):
        params = put(pack(config, init(config, 0)), made.abstract().params, made.layout, made.mesh)
        found = float(made.evaluate(params, everywhere(made.mesh, text(config))))
    assert found == pytest.approx(alone(config)[0][0], rel=1e-6)


POINT = {"model": "toy", "slice": "v4:2x2x2", "phase": "train", "batch": 16, "length": 64, "weights": "bf16"}


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"context": 5}, "context=5"),
        ({"weights": "int8"}, "weights='int8'"),
        ({"cache": "int8"}, "cache="),
        ({"accumulate": 3}, "accumulate=3"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"remat": True}, "remat=True must be one of layer, weights, none"),
        ({"phase": "prefill", "remat": "none"}, "remat='none'"),
        ({"steps_per_call": 2}, "steps_per_call=2"),
        ({"layout": "wgx+prefetch"}, "ahead"),
        ({"layout": "wgx+ring", "remat": "weights"}, "layout='wgx.ring' gathers w_in with it"),
        ({"model": "palm-540b-h64"}, "padding"),
        ({"accumulate": 4, "layout": "wgxyz", "attention": "batch"}, "batch/accumulate=4"),
    ],
)
def test_points_that_make_no_sense_are_refused(changed, word):
    with pytest.raises(ValueError, match=word):
        Point(**{**POINT, "layout": "ws2d", "attention": "heads", **changed})


def test_a_point_of_training_goes_through_json_and_makes_its_program():
    point = Point(**POINT, layout="wgx", attention="heads", accumulate=2, remat="none")
    assert Point.from_json(point.to_json()) == point
    assert "accumulate" not in Point(**POINT, layout="wgx", attention="heads").to_json()
    mesh = attach((2, 2, 2), chip="cpu")
    made = program(dataclasses.replace(point, slice="cpu:2x2x2"), point.config, mesh)
    assert isinstance(made, Trainer)
    assert made.pass_.training == Training(accumulate=2, remat="none")


def test_the_price_of_a_step():
    """Three forward passes, a fourth where layers are run again; parts of a batch repeat what
    moves weights; MFU counts six."""
    point = Point(
        model="palm-62b", slice="v4:4x4x4", phase="train", batch=512, length=2048, layout="wgxyz", attention="batch"
    )
    found = estimate(point)
    assert found.mfu == pytest.approx(6 * point.config.n_params * point.tokens / (found.latency_s * 64 * 275e12))
    kept = estimate(dataclasses.replace(point, remat="none"))
    assert 0.7 < kept.compute_s / found.compute_s < 0.8
    assert kept.hbm_bytes_per_chip > found.hbm_bytes_per_chip
    parts = estimate(dataclasses.replace(point, accumulate=8))
    moved = {
        p: sum(c.bytes * c.count for c in e.collectives if c.scope.endswith("w_in"))
        for p, e in ((1, found), (8, parts))
    }
    assert moved[8] == pytest.approx(8 * moved[1])
    assert parts.hbm_bytes_per_chip < found.hbm_bytes_per_chip
    ideal = 6 * point.config.n_params * point.tokens * 4 / 3 / (64 * 275e12)
    assert ideal < found.compute_s < 1.6 * ideal
