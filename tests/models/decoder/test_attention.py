"""Attention on one device: blocks equal one piece, and both equal a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.models.decoder import attention
from toruslab.models.decoder.cache import _write_rows, pad_width, write


def plain(q, k, v, starts):
    """q [b, L, h, Q], k and v [b, k, S, Q] -> attention, sequence by sequence and head by head."""
    b, length, h, width = q.shape
    out = np.zeros_like(q)
    for i in range(b):
        for t in range(length):
            n = starts[i] + t + 1
            for j in range(h):
                kv = j // (h // k.shape[1])
                s = k[i, kv, :n] @ q[i, t, j] / np.sqrt(width)
                p = np.exp(s - s.max())
                out[i, t, j] = (p / p.sum()) @ v[i, kv, :n]
    return out


@pytest.mark.parametrize("block", [4, 7, 512])
@given(
    b=st.integers(1, 3),
    length=st.integers(1, 6),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    span=st.integers(6, 40),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_blocks_equal_plain_attention(block, b, length, kv, group, span, seed):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((b, length, kv * group, 8))
    k, v = rng.standard_normal((2, 2, b, kv, span, 8))
    starts = rng.integers(0, span - length + 1, b)
    before, attention.BLOCK = attention.BLOCK, block
    try:
        arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
        once = jax.jit(lambda *arrays: attention.attend(*arrays))  # a trace of its own: the block is no argument
        got = once(*arrays, jnp.int32(1), jnp.asarray(starts, jnp.int32))
    finally:
        attention.BLOCK = before
    np.testing.assert_allclose(got, plain(q, k[1], v[1], starts), atol=2e-6)


def test_long_prefill_never_holds_all_scores():
    """Temporaries of 4096 tokens over 4096 positions stay far below the 4096 x 4096 scores of a head."""
    shape = jax.ShapeDtypeStruct((1, 1, 1, 4096, 8), jnp.float32)
    q = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    starts = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = jax.jit(attention.attend).lower(q, shape, shape, index, starts).compile()
    memory = program.memory_analysis()
    assert memory and memory.temp_size_in_bytes < 4096 * 4096 * 4 / 2


@pytest.mark.parametrize("rows", [2, 11])  # one update per row, and one scatter
def test_rows_are_written_where_they_start(rows):
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((3, rows, 2, 9, 4)).astype(np.float32)
    new = rng.standard_normal((rows, 3, 2, 4)).astype(np.float32)
    starts = rng.integers(0, 7, rows).astype(np.int32)
    expected = cache.copy()
    for row, start in enumerate(starts):
        expected[1, row, :, start : start + 3] = new[row].swapaxes(0, 1)
    np.testing.assert_array_equal(jax.jit(write)(cache, new, jnp.int32(1), starts), expected)


def test_a_cache_wider_than_the_heads_changes_nothing():
    """A head of 6 in whole tiles, as TPUs store it."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4, 6), (2, 2, 2, 9, 6), (2, 2, 2, 9, 6)))
    starts = jnp.asarray([2, 5], jnp.int32)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    narrow = attention.attend(q, k, v, jnp.int32(1), starts)
    wide = attention.attend(q, pad_width(k, 16), pad_width(v, 16), jnp.int32(1), starts)
    np.testing.assert_allclose(wide, narrow, rtol=1e-6, atol=1e-6)


def test_the_ways_to_write_the_cache_agree():
    rng = np.random.default_rng(4)
    for b, length in ((2, 3), (11, 2)):  # row by row, and in one scatter
        cache = jnp.asarray(rng.standard_normal((3, b, 2, 9, 8)), jnp.float32)
        new = jnp.asarray(rng.standard_normal((b, length, 2, 8)), jnp.float32)
        starts = jnp.asarray(rng.integers(0, 9 - length + 1, b), jnp.int32)
        expected = np.array(cache)
        for row in range(b):
            expected[1, row, :, starts[row] : starts[row] + length] = np.swapaxes(new[row], 0, 1)
        np.testing.assert_array_equal(write(cache, new, jnp.int32(1), starts), expected)
        rows = _write_rows(cache, jnp.swapaxes(new, 1, 2), jnp.int32(1), starts)
        np.testing.assert_array_equal(rows, expected)
    narrow = write(cache, new[..., :5], jnp.int32(1), starts)
    np.testing.assert_array_equal(narrow[1, 0, :, starts[0], :5], new[0, 0, :, :5])
    assert not np.any(narrow[1, 0, :, starts[0], 5:])
