"""int8 weights: the decoder computes with exactly the values that integers times scales stand for."""

import functools

import numpy as np
import pytest
from battery import BATCH, CAPACITY, TOTAL, Bench, assert_close, case, legal, model

from models.parameters import load
from models.quantise import dequantise, quantise
from models.reference import logits as reference_logits
from models.weights import pack, unpack
from partitioning.dataflow import Pass
from partitioning.program import Program


class Int8Bench(Bench):
    """A bench with int8 weights, and float32 activations beside them."""

    def __post_init__(self):
        super().__post_init__()
        self.params = load(self.config, case(self.config)[0], self.layout, self.mesh, int8=True)

    def program(self, length: int, all_logits: bool):
        if (length, all_logits) not in self.compiled:
            pass_ = Pass(batch=BATCH, length=length, capacity=CAPACITY, all_logits=all_logits, weight_itemsize=1)
            compiled = Program(config=self.config, layout=self.layout, mesh=self.mesh, pass_=pass_).compile()
            self.check(compiled, pass_)
            self.compiled[length, all_logits] = compiled
        return self.compiled[length, all_logits]


@functools.cache
def expected(config) -> np.ndarray:
    """The reference's logits with the weights that the quantised ones stand for."""
    weights, ids, _ = case(config)
    seen = unpack(config, dequantise(quantise(pack(config, weights), np.float64)))
    return np.stack([reference_logits(config, seen, row) for row in ids])


@pytest.mark.parametrize(("name", "attention"), legal())
@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_equals_its_dequantised_reference(name, attention, block):
    config = model(block, 1)
    bench = Int8Bench(config, name, attention, (2, 2, 2))
    logits, _ = bench.run(case(config)[1], np.zeros(BATCH), np.full(BATCH, TOTAL), bench.cache())
    assert_close(logits, expected(config))


def test_other_meshes():
    config = model("parallel", 4)
    for shape, name in (
        ((1, 2, 4), "wgxy"),
        ((4, 2, 1), "ws2d"),
        ((8, 1, 1), "wgx"),
        ((4, 2, 1), "wgx+biring"),
        ((1, 2, 4), "ws2d+ring"),
    ):
        bench = Int8Bench(config, name, "batch", shape)
        logits, _ = bench.run(case(config)[1], np.zeros(BATCH), np.full(BATCH, TOTAL), bench.cache())
        assert_close(logits, expected(config))


def test_error_against_float_is_of_the_size_of_a_step():
    config = model("parallel", 1)
    packed = pack(config, case(config)[0])
    back = dequantise(quantise(packed, np.float32))
    for name in ("w_in", "w_kv", "w_out"):
        exact, seen = packed["layer"][name], back["layer"][name]
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert (np.abs(seen - exact) <= 0.501 * step).all()
