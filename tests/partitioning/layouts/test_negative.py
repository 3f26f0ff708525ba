"""Wrong programs: the battery catches each of these mistakes."""

import pytest

from tests import battery
from toruslab.models.decoder import sequences
from toruslab.partitioning.layouts import moves as collectives


@pytest.fixture
def bench():
    return battery.Bench(battery.model("parallel", 1), "ws2d", "batch", (2, 2, 2))


def test_sound(bench):
    battery.check_mixed_lengths(bench)


def test_a_dropped_reduction(bench, monkeypatch):
    def keeps_own_terms(move, shard):
        size = shard.shape[move.target] // collectives.math.prod(collectives.lax.axis_size(a) for a in move.axes)
        index = collectives.lax.axis_index(move.axes)
        return collectives.lax.dynamic_slice_in_dim(shard, index * size, size, axis=move.target)

    def unchecked(self, array):
        if self.kind == "slice":
            return collectives.jax.sharding.reshard(array, self.dst)
        run = collectives._RUN[self.kind]
        return collectives.jax.shard_map(
            lambda shard: run(self, shard), in_specs=self.src, out_specs=self.dst, check_vma=False
        )(array)

    monkeypatch.setattr(collectives.Move, "__call__", unchecked)
    monkeypatch.setitem(collectives._RUN, "reduce-scatter", keeps_own_terms)
    monkeypatch.setattr(battery.Bench, "check", lambda *args: None)
    with pytest.raises(AssertionError, match="relative error"):
        battery.check_mixed_lengths(bench)


def test_a_dropped_reduction_is_missing_from_the_program(bench, monkeypatch):
    def all_reduced(move, shard):
        whole = collectives.lax.psum(shard, move.axes)
        size = shard.shape[move.target] // collectives.math.prod(collectives.lax.axis_size(a) for a in move.axes)
        index = collectives.lax.axis_index(move.axes)
        return collectives.lax.dynamic_slice_in_dim(whole, index * size, size, axis=move.target)

    monkeypatch.setitem(collectives._RUN, "reduce-scatter", all_reduced)
    with pytest.raises(AssertionError, match="all-reduce instead of reduce-scatter"):
        battery.check_mixed_lengths(bench)


def test_a_position_off_by_one(bench, monkeypatch):
    """RoPE depends on distances only, so that the mistake must be in one step: one row of one token on each chip."""
    tables = sequences.rope_tables
    monkeypatch.setattr(sequences, "rope_tables", lambda at, *sizes: tables(at + int(at.shape[0] == 1), *sizes))
    with pytest.raises(AssertionError, match="relative error"):
        battery.check_chunks_then_decode(bench)


def test_a_missing_mask(bench, monkeypatch):
    from toruslab.models.decoder import attention

    tile = attention.jnp.tile
    monkeypatch.setattr(attention.jnp, "tile", lambda a, reps: tile(a, reps) + 10**6)
    with pytest.raises(AssertionError, match="relative error"):
        battery.check_full_pass(bench)
