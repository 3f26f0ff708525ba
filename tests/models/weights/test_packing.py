"""Fused matrices hold the canonical ones, and random parameters do not depend on layout or mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import battery
from tests.canonical import unpack
from toruslab.models.decoder.parameters import initial
from toruslab.models.decoder.reference import init
from toruslab.models.weights.packing import pack
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach


@pytest.mark.parametrize("block", ["parallel", "serial"])
@pytest.mark.parametrize("kv", [1, 4, 16])
@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "gelu"])
def test_unpack_is_the_inverse_of_pack(block, kv, mlp):
    config = battery.model(block, kv, mlp)
    weights = init(config, 0)
    back = unpack(config, pack(config, weights))
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


def test_random_parameters_are_the_same_everywhere():
    config = battery.model("parallel", 1)
    found = []
    for name, shape in (("ws2d", (2, 2, 2)), ("ws1d", (4, 2, 1)), ("replicated", (1, 1, 1))):
        made = layout(name, "heads", shape, 1)
        found.append(jax.tree.map(np.asarray, initial(config, made, attach(shape, chip="cpu"), seed=4)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


@pytest.mark.parametrize("mlp", ["gelu", "geglu"])
@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_gelu_models_pass_the_battery(block, mlp):
    bench = battery.Bench(battery.model(block, 1, mlp), "ws2d", "batch", (2, 2, 2))
    battery.check_mixed_lengths(bench)


@pytest.mark.parametrize(
    ("name", "attention"), [("ws1d", "heads"), ("wgxyz", "batch"), ("ws2d+lean", "batch"), ("auto", "heads")]
)
def test_scaled_embeddings_pass_the_battery(name, attention):
    """The one change of Gemma that a layout could get wrong: the table is split, the scale is not."""
    config = dataclasses.replace(battery.model("serial", 4, "geglu"), tied=True, scaled_embed=True)
    battery.check_full_pass(battery.Bench(config, name, attention, (2, 2, 2)))


def test_padding_heads_of_random_parameters_are_zero():
    config = battery.model("parallel", 1)
    config = config.__class__(**{**vars(config), "n_heads": 12, "d_ff": 96}).padded(16)
    made = layout("ws2d", "heads", (2, 2, 2), 1)
    params = initial(config, made, attach((2, 2, 2), chip="cpu"))
    q = config.d_head
    w_in = np.asarray(params["layer"]["w_in"][...]).reshape(3, 40, 16, -1)
    w_out = np.asarray(params["layer"]["w_out"][...]).reshape(3, 16, -1, 40)
    assert not w_in[:, :, 12:, :q].any() and w_in[:, :, :12, :q].all()
    assert not w_out[:, 12:, :q].any() and w_out[:, 12:, q:].all()
