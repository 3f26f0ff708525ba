"""float32 is multiplied as float32, also on hardware that rounds by default."""

import re

import pytest

from toruslab.models.programs.compiled import program
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import attach

PASSES = [("decode", 1, "ws2d"), ("prefill", 64, "wgxyz"), ("prefill", 64, "ws2d+ring"), ("train", 32, "wgx")]


@pytest.mark.parametrize(("phase", "length", "layout"), PASSES)
@pytest.mark.parametrize(("weights", "asked"), [("f32", True), ("bf16", False)])
def test_every_matmul_says_how_exact_it_is(phase, length, layout, weights, asked):
    sizes = {"batch": 8, "length": length, "context": 16 if phase == "decode" else 0}
    point = Point(
        model="toy-2l", slice="cpu:2x2x2", phase=phase, layout=layout, attention="batch", weights=weights, **sizes
    )
    text = program(point, point.config, attach((2, 2, 2), chip="cpu")).compile().text
    products = re.findall(r"^.* = \S+ dot\(.*$", text, re.MULTILINE)
    assert len(products) >= 6
    assert {"operand_precision={highest,highest}" in line for line in products} == {asked}
