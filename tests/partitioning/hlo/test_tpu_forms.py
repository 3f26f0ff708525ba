"""The forms that our programs take on TPUs only, run on CPU devices that pretend to be TPUs: equal logits."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.battery import (
    BATCH,
    CHUNK,
    TOTAL,
    Bench,
    assert_close,
    case,
    check_chunks_then_decode,
    check_mixed_lengths,
    check_rounding,
    legal,
    model,
)
from toruslab.models.decoder import cache
from toruslab.partitioning.layouts import moves as collectives


class TpuBench(Bench):
    """Without the comparison with the plan: collectives in two steps are not one to one with it."""

    def check(self, compiled, pass_):
        pass


@pytest.fixture
def like_a_tpu(monkeypatch):
    for module in (collectives, cache):
        monkeypatch.setattr(module, "tpu", lambda: SimpleNamespace(num_cores=2))
    monkeypatch.setattr(collectives, "_steps", lambda axes, least: [axes[:-1], axes[-1:]] if len(axes) > 1 else [axes])


@pytest.mark.parametrize(("name", "attention"), [pair for pair in legal() if pair[0] != "auto"])
@pytest.mark.parametrize(
    ("block", "kv_heads", "shape"),
    [pytest.param("parallel", 1, (2, 2, 2), marks=pytest.mark.slow), ("serial", 4, (4, 2, 1))],
)
@pytest.mark.usefixtures("like_a_tpu")
def test_the_forms_for_tpus_compute_the_same(name, attention, block, kv_heads, shape):
    config = model(block, kv_heads)
    bench = TpuBench(config, name, attention, shape)
    _, ids, expected = case(config)
    logits, held = bench.run(ids[:, :CHUNK], np.zeros(BATCH), np.full(BATCH, CHUNK), bench.cache())
    assert_close(logits, expected[:, :CHUNK])
    rest = TOTAL - CHUNK
    logits, _ = bench.run(ids[:, CHUNK:], np.full(BATCH, CHUNK), np.full(BATCH, rest), held)
    assert_close(logits, expected[:, CHUNK:])


@pytest.mark.parametrize(
    ("name", "attention"),
    [("ws2d", "heads"), *(pytest.param(name, "batch", marks=pytest.mark.slow) for name in ("ws2d", "wgxy"))],
)
@pytest.mark.parametrize("unrolled", [3, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("like_a_tpu")
def test_an_int8_cache_written_update_by_update(monkeypatch, name, attention, unrolled):
    """With a low limit of unrolled updates, their groups are a loop."""
    monkeypatch.setattr(cache, "UNROLLED", unrolled)
    bench = TpuBench(model("serial", 4), name, attention, (2, 2, 2), int8_cache=True)
    for check in (check_chunks_then_decode, check_mixed_lengths, check_rounding):
        check(bench)
