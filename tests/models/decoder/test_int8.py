"""int8 weights: the decoder computes with exactly the integers times the scales. int8 halves the bytes that chips hold
and receive, in the plan, in programs and in arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.battery import BATCH, CAPACITY, TOTAL, Bench, case, check_full_pass, legal, model
from tests.models.programs.test_compiled import needs_libtpu, on_v4
from toruslab.models.decoder.cache import empty_cache
from toruslab.models.decoder.parameters import load
from toruslab.models.decoder.quantise import dequantise, quantise
from toruslab.models.programs.compiled import evidence, planned
from toruslab.models.programs.program import Program
from toruslab.models.weights.packing import pack
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.limits import largest_batch, longest_context
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus.mesh import AXES

GATHERED = ("w_in", "w_kv", "w_out")


@pytest.mark.parametrize(("name", "attention"), legal())
@pytest.mark.parametrize("block", [pytest.param("parallel", marks=pytest.mark.slow), "serial"])
def test_equals_its_dequantised_reference(name, attention, block):
    check_full_pass(Bench(model(block, 1), name, attention, (2, 2, 2), int8=True))


@pytest.mark.slow
def test_other_meshes():
    looped = (((4, 2, 1), "wgx+biring"), ((1, 2, 4), "ws2d+ring"))
    for shape, name in (((1, 2, 4), "wgxy"), ((4, 2, 1), "ws2d"), ((8, 1, 1), "wgx"), *looped):
        check_full_pass(Bench(model("parallel", 4), name, "batch", shape, int8=True))


def test_error_against_float_is_of_the_size_of_a_step():
    config = model("parallel", 1)
    packed = pack(config, case(config)[0])
    back = dequantise(quantise(packed, np.float32))
    for name in ("w_in", "w_kv", "w_out"):
        exact, seen = packed["layer"][name], back["layer"][name]
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert (np.abs(seen - exact) <= 0.501 * step).all()


@pytest.mark.parametrize("name", ["wgx", "wgxy", "wgxyz"])
def test_weights_are_gathered_as_int8(name):
    """The plan has a quarter of float32's bytes and half of bfloat16's. The program moves integers of these bytes."""
    bench = Bench(model("parallel", 1), name, "batch", (2, 2, 2))
    sizes = Pass(batch=BATCH, length=TOTAL, capacity=CAPACITY, weight_itemsize=1)
    found = {}
    for itemsize, act in ((4, 4), (2, 2), (1, 2), (1, 4)):
        pass_ = dataclasses.replace(sizes, itemsize=act, weight_itemsize=itemsize)
        planned_ = plan(bench.layout, bench.config, pass_, bench.shape)
        found[itemsize, act] = [p.bytes for p in planned_ if p.scope.split("/")[-1] in GATHERED]
    assert len(found[4, 4]) >= 3 and sum(found[4, 4]) > 0
    assert found[1, 2] == found[1, 4] == [n // 2 for n in found[2, 2]] == [n // 4 for n in found[4, 4]]

    program = Program(config=bench.config, layout=bench.layout, mesh=bench.mesh, pass_=sizes)
    collectives = read(program.compile().text, dict(zip(AXES, bench.shape, strict=True)))
    gathers = [c for c in collectives if any(f"/{w}/" in c.scope for w in GATHERED)]
    assert {(c.kind, c.dtype) for c in gathers} == {("all-gather", "s8")}
    assert sorted(c.bytes for c in gathers) == sorted(found[1, 4])


@pytest.mark.parametrize("name", ["ws1d", "ws2d", "wgxyz"])
def test_shards_of_weights_and_cache_are_half_of_bfloat16(name):
    """Beside the integers there are the scales: whole on every chip, one a column; and in the cache one a position."""
    config, shape = model("parallel", 1), (2, 2, 2)
    bench = Bench(config, name, "batch", shape)

    def held(arrays) -> list[int]:
        return [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays)]

    def matrices(dtype, int8: bool) -> dict[str, int]:
        params = load(config, case(config)[0], bench.layout, bench.mesh, dtype=dtype, int8=int8)
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        return {path[-2].key: leaf.addressable_shards[0].data.nbytes for path, leaf in leaves}

    wide, narrow = matrices(jnp.bfloat16, False), matrices(jnp.bfloat16, True)
    for matrix in GATHERED:
        assert 2 * narrow[matrix] == wide[matrix]
    columns = {"w_in": 16 * (6 + 2 * 6), "w_kv": 2 * 6, "w_out": 40}
    assert {w: narrow[f"{w}_scale"] for w in GATHERED} == {w: 3 * n * 2 for w, n in columns.items()}

    cached = [
        held(empty_cache(config, BATCH, CAPACITY, bench.layout, bench.mesh, jnp.bfloat16, int8))
        for int8 in (False, True)
    ]
    assert cached[1][:2] == [n // 2 for n in cached[0]]
    assert cached[1][2:] == [n // config.d_head for n in cached[0]]


def test_the_price_has_the_scales():
    point = on_v4(batch=512, context=8192)
    plain, small = (estimate(dataclasses.replace(point, cache=cache)) for cache in (None, "int8"))
    rows = 118 * 2 * 8 * 8192  # layers, K and V, sequences of a chip, positions
    assert plain.hbm_bytes_per_chip - small.hbm_bytes_per_chip == rows * (2 * 256 - (256 + 2))
    assert small.memory_s < plain.memory_s and small.latency_s <= plain.latency_s  # as the compiler has it: in compute
    by_heads = [estimate(dataclasses.replace(point, attention="heads", cache=cache)) for cache in (None, "int8")]
    assert by_heads[1].latency_s < 0.7 * by_heads[0].latency_s
    assert [c.bytes for c in small.collectives] == [c.bytes for c in plain.collectives]
    for limit, of in ((largest_batch, "batch"), (longest_context, "context")):
        most = [limit(dataclasses.replace(point, cache=cache)) for cache in (None, "int8")]
        assert most[0] and most[1] and 1.7 < most[1] / most[0] <= 2.0, of
        assert estimate(dataclasses.replace(point, cache="int8", **{of: most[1]})).fits


def test_the_field_cache_is_absent_where_it_is_not_given():
    point = on_v4()
    assert "cache" not in point.to_json() and Point.from_json(point.to_json()) == point
    small = Point.from_json(point.to_json() | {"cache": "int8"})
    assert small.to_json() == point.to_json() | {"cache": "int8"} and small.pass_.int8_cache
    with pytest.raises(ValueError, match="cache='int4' must be int8, or left out"):
        Point.from_json(point.to_json() | {"cache": "int4"})


def test_an_odd_context_is_stored_in_whole_tiles_of_int8():
    odd, even = (estimate(on_v4(cache="int8", context=n)).hbm_bytes_per_chip for n in (2049, 2080))
    assert odd == even


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("name", "length"), [("ws2d", 1), ("wgxyz", 512)])
def test_compiled_for_tpus_weights_halve_at_rest_and_on_the_wire(name, length):
    phase = {"phase": "decode", "context": 2048} if length == 1 else {"phase": "prefill", "context": 0}
    point = on_v4(model="palm-540b-h64-4l", layout=name, length=length, **phase)  # TPUs store 4 rows of scales for 3
    wide, narrow = (evidence(dataclasses.replace(point, weights=w)) for w in ("bf16", "int8"))
    for found in (wide, narrow):
        assert found.unexplained == found.cache_copies == found.weight_copies == 0
    config = point.config
    q, f = config.n_heads * config.d_head, config.d_ff
    columns = q + 2 * f + 2 * config.d_head + config.d_model
    matrices = config.d_model * (q + 2 * f + 2 * config.d_head) + (q + f) * config.d_model
    kv = config.d_model * 2 * config.d_head  # w_kv is split over x alone
    less = 4 * ((matrices - kv) // 64 + kv // 4) - 4 * 2 * columns
    assert wide.argument_bytes and narrow.argument_bytes
    assert wide.argument_bytes - narrow.argument_bytes == less

    def gathered(found) -> int:
        return sum((m.bytes or 0) * m.count for m in found.collectives if m.scope.split("/")[-1] in GATHERED)

    assert 2 * gathered(narrow) == gathered(wide)
    assert (gathered(wide) > 0) == (name == "wgxyz")
    asked = [p for p in planned(point) if p.scope.split("/")[-1] in GATHERED]
    assert gathered(narrow) == sum(p.bytes * p.count for p in asked)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 512, "context": 8192},
        {"batch": 512, "context": 2049, "attention": "heads"},
        {"batch": 64, "phase": "prefill", "length": 256, "context": 4096},
        {"model": "mt-nlg-530b-3l"},
        {"model": "llama-3-70b-4l", "slice": "v5e:4x4"},
    ],
)
def test_compiled_for_tpus_an_int8_cache_is_in_place_and_costs_what_is_said(changes):
    """Only the program's arguments, weights and cache, differ, by as many bytes as the price says."""
    point = on_v4(**{"model": "palm-540b-h64-3l"} | changes)
    wide, narrow = (evidence(dataclasses.replace(point, cache=cache)) for cache in (None, "int8"))
    assert narrow.findings == () and narrow.cache_copies == 0
    assert wide.argument_bytes and narrow.argument_bytes and wide.analytic and narrow.analytic
    saved = wide.analytic.hbm_bytes_per_chip - narrow.analytic.hbm_bytes_per_chip
    assert wide.argument_bytes - narrow.argument_bytes == pytest.approx(saved, rel=0.02)
    assert narrow.peak_bytes_per_chip and wide.peak_bytes_per_chip
    assert narrow.peak_bytes_per_chip < wide.peak_bytes_per_chip
