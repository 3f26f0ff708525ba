"""The int8 KV cache: every layout attends to exactly its integers times its scales."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.battery import MESHES, SHORT_CHECKS, Bench, check_rounding, legal, model
from toruslab.models.decoder.cache import _put, _put_in_tiles
from toruslab.models.decoder.quantise import quantise_rows


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), legal())
def test_the_battery(name, attention):
    bench = Bench(model("parallel", 1), name, attention, (2, 2, 2), int8_cache=True)
    for check in (*SHORT_CHECKS, check_rounding):
        check(bench)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), legal(["ws1d", "ws2d", "wgx", "replicated"]))
def test_serial_blocks_with_groups_of_heads(name, attention):
    bench = Bench(model("serial", 4), name, attention, (2, 2, 2), int8_cache=True)
    for check in SHORT_CHECKS:
        check(bench)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in MESHES if shape != (2, 2, 2)])
@pytest.mark.parametrize(("name", "attention"), [("ws2d", "heads"), ("ws2d", "batch"), ("wgxyz", "batch")])
def test_other_meshes(name, attention, shape):
    bench = Bench(model("parallel", 16), name, attention, shape, int8_cache=True)
    for check in SHORT_CHECKS:
        check(bench)


@pytest.mark.parametrize(
    ("name", "attention"), [pytest.param("wgx", "heads", marks=pytest.mark.slow), ("ws2d", "batch")]
)
def test_int8_weights_beside_it(name, attention):
    bench = Bench(model("parallel", 2), name, attention, (2, 2, 2), int8=True, int8_cache=True)
    for check in (*SHORT_CHECKS, check_rounding):
        check(bench)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_integers_are_within_half_a_step_also_where_the_scale_is_coarse(dtype):
    x = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    integers, scale = (np.asarray(a, np.float32) for a in quantise_rows(jnp.asarray(x), dtype))
    assert np.abs(integers - x / scale[:, None]).max() <= 0.5 + 1e-4
    assert np.abs(integers).max(-1).min() >= 126


@settings(deadline=None)
@given(st.integers(0, 63), st.integers(1, 40), st.integers(0, 2), st.integers(0, 3))
def test_whole_tiles_hold_what_single_updates_write(start, length, layer, row):
    """Updates across the edges of tiles, and at the end, where the last tiles slide back."""
    start = min(start, 64 - length)
    rng = np.random.default_rng(0)
    held = jnp.asarray(rng.integers(-127, 128, (3, 4, 1, 64, 8)), jnp.int8)
    new = jnp.asarray(rng.integers(-127, 128, (1, 1, 1, length, 8)), jnp.int8)
    at = jnp.int32(layer), jnp.int32(row), jnp.int32(start)
    np.testing.assert_array_equal(_put_in_tiles(held, new, *at), _put(held, new, *at))
