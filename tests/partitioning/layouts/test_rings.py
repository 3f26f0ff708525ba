"""Looped einsums alone: every side, ring size and direction, compared with the plain matmul."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.layouts.rings import RingMatmul, sends
from toruslab.partitioning.plan.scopes import scope_of
from toruslab.partitioning.torus.mesh import AXES

MESHES = {
    (2, 1, 1): [("x",)],
    (1, 3, 1): [("y",)],
    (4, 1, 1): [("x",)],
    (1, 1, 8): [("z",)],
    (2, 2, 2): [("z", "y"), ("z", "y", "x")],
    (4, 2, 1): [("x",), ("y", "x")],
    (1, 2, 3): [("y", "z")],
}
GROUPS = [(shape, axes) for shape, groups in MESHES.items() for axes in groups]
QUICK = (((1, 3, 1), ("y",)), ((2, 2, 2), ("z", "y", "x")), ((1, 2, 3), ("y", "z")))
SIDES = list(itertools.product(("x", "w", "out"), (0, 1)))
T, N, M = 3, 5, 7
"""Elements of a split dimension on each chip: odd, so that halves differ; 1 has no halves."""


def mesh_of(shape):
    n = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:n]).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * 3)


def looped(shape, ring, x, w, *, over=()):
    """The looped matmul of whole arrays: its compiled program, and what it computes.

    `over`: other axes that the contracted dimension is split over, whose partial sums are left.
    """
    mesh = mesh_of(shape)
    rows = ring.axes if (ring.side, ring.dim) in (("x", 0), ("out", 0)) else ()
    columns = ring.axes if (ring.side, ring.dim) in (("w", 1), ("out", 1)) else ()
    contracted = ring.axes if ring.side == "out" else ()
    at_x = P(rows if ring.side == "x" else (), (over + ring.axes) if ring.side == "x" and ring.dim == 1 else over)
    at_w = P(over, columns if ring.side == "w" else ())
    if ring.side == "w" and ring.dim == 0:
        at_w = P(over + ring.axes, ())
    if ring.side == "out":
        at_x, at_w = P((), over + contracted), P(over + contracted, ())
    at_out = P(rows if ring.side == "out" else (), columns if ring.side == "out" else (), unreduced=frozenset(over))

    def run(x, w):
        def on_shards(x, w):
            out = ring(x, w)
            # the same on all chips of the ring where it gathers: said by an axis of its own, to show each chip's
            out = out[None] if ring.side != "out" else out
            return jax.lax.pcast(out, over, to="unreduced") if over else out

        spread = P(ring.axes, None, None, unreduced=frozenset(over))
        out_spec = at_out if ring.side == "out" else spread
        out = jax.shard_map(on_shards, in_specs=(at_x, at_w), out_specs=out_spec)(x, w)
        return jax.sharding.reshard(out, P(*[None] * out.ndim)) if over else out

    with jax.set_mesh(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, at_x), (w, at_w))]
        compiled = jax.jit(run).lower(*args).compile()
        return compiled, np.asarray(compiled(*args), np.float64)


def problem(shape, ring, *, of=1, dtype: type = np.float32):
    """Random integers, so that sums are exact; sizes with every split dimension a multiple of the group."""
    k = int(np.prod([shape[AXES.index(a)] for a in ring.axes]))
    rng = np.random.default_rng(0)
    t = T * (k if (ring.side, ring.dim) in (("x", 0), ("out", 0)) else 1)
    n = N * of * (k if ring.side == "out" or (ring.side, ring.dim) in (("x", 1), ("w", 0)) else 1)
    m = M * (k if (ring.side, ring.dim) in (("w", 1), ("out", 1)) else 1)
    return rng.integers(-8, 8, (t, n)).astype(np.float32), rng.integers(-8, 8, (n, m)).astype(dtype)


def assert_equal(out, ring, expected):
    for got in [out] if ring.side == "out" else out:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize(("side", "dim"), SIDES)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [pytest.param(*group, marks=[] if group in QUICK else pytest.mark.slow) for group in GROUPS],
)
def test_equals_the_matmul_of_the_whole(shape, axes, side, dim, ways):
    ring = RingMatmul(side=side, dim=dim, axes=axes, ways=ways, scopes=("h", "out"))
    x, w = problem(shape, ring)
    compiled, out = looped(shape, ring, x, w)
    assert_equal(out, ring, x.astype(np.float64) @ w)

    sizes = dict(zip(AXES, shape, strict=True))
    found = [c for c in read(compiled.as_text() or "", sizes) if c.axes]
    shard = {"x": x, "w": w, "out": out}[side]
    n = shard.shape[dim] // int(np.prod([sizes[a] for a in axes]))
    whole = 4 * shard.size // shard.shape[dim]  # of one element along dim
    kind = "reduce-scatter" if side == "out" else "all-gather"
    expected = sorted((axis, m * whole) for axis, m in sends(kind, axes, sizes, n, ways))
    assert sorted((c.axes[0], c.bytes) for c in found) == expected
    assert {c.kind for c in found} == {"collective-permute"}
    assert {scope_of(c.scope) for c in found} == {"h"}
    moved = sum(c.bytes for c in found)
    assert moved == 4 * shard.size - whole * n  # as the plain collective: all but the chip's own shard


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize(("side", "dim"), SIDES)
def test_shards_of_one_row_have_no_halves(side, dim, ways, monkeypatch):
    for name in "TNM":
        monkeypatch.setitem(globals(), name, 1)
    ring = RingMatmul(side=side, dim=dim, axes=("x",), ways=ways)
    x, w = problem((4, 2, 1), ring)
    assert_equal(looped((4, 2, 1), ring, x, w)[1], ring, x.astype(np.float64) @ w)


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize(("side", "dim"), SIDES)
@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2), (3, 1, 2)])
def test_partial_sums_over_other_axes_are_left(shape, side, dim, ways):
    over = ("y", "z")
    ring = RingMatmul(side=side, dim=dim, axes=("x",), ways=ways)
    x, w = problem(shape, ring, of=shape[1] * shape[2])
    assert_equal(looped(shape, ring, x, w, over=over)[1], ring, x.astype(np.float64) @ w)


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_int8_weights_travel_as_such(dim, ways):
    ring = RingMatmul(side="w", dim=dim, axes=("x",), ways=ways)
    x, w = problem((4, 2, 1), ring, dtype=np.int8)
    compiled, out = looped((4, 2, 1), ring, x, w)
    assert_equal(out, ring, x.astype(np.float64) @ w.astype(np.float64))
    found = [c for c in read(compiled.as_text() or "", {"x": 4, "y": 2, "z": 1}) if c.axes]
    assert {c.dtype for c in found} == {"s8"}
    assert sum(c.bytes for c in found) == w.size * 3 // 4


def test_bfloat16_adds_up_in_float32_where_nothing_travels():
    """1 + 2^-9 a hundred times: bfloat16 sums would stay at the first."""
    ring = RingMatmul(side="w", dim=0, axes=("x",), ways=1)
    x = np.ones((2, 8), np.float32)
    x[:, 1:] = 2.0**-7
    w = np.ones((8, 3), jnp.bfloat16)
    _, out = looped((8, 1, 1), ring, x.astype(jnp.bfloat16), w)
    np.testing.assert_array_equal(out, np.float32(jnp.bfloat16(1 + 7 * 2.0**-7)))


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize(("side", "dim"), SIDES)
def test_gradients_pass(side, dim, ways):
    ring = RingMatmul(side=side, dim=dim, axes=("x",), ways=ways)
    shape = (4, 1, 1)
    x, w = problem(shape, ring)
    mesh = mesh_of(shape)
    specs = {
        ("x", 0): (P("x", None), P(None, None)),
        ("x", 1): (P(None, "x"), P(None, None)),
        ("w", 0): (P(None, None), P("x", None)),
        ("w", 1): (P(None, None), P(None, "x")),
        ("out", 0): (P(None, "x"), P("x", None)),
        ("out", 1): (P(None, "x"), P("x", None)),
    }[side, dim]
    out = P("x", None) if (side, dim) == ("out", 0) else P(None, "x") if side == "out" else P("x", None, None)

    def total(x, w):
        run = jax.shard_map(functools.partial(_first, ring), in_specs=specs, out_specs=out)
        return jnp.sum(jnp.square(run(x, w)))

    with jax.set_mesh(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, w), specs, strict=True)]
        found = jax.jit(jax.grad(total, (0, 1)))(*args)
    copies = 1 if side == "out" else 4  # each chip has the whole gathered array
    expected = jax.grad(lambda x, w: copies * jnp.sum(jnp.square(x @ w)), (0, 1))(x, w)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def _first(ring, x, w):
    out = ring(x, w)
    return out if ring.side == "out" else out[None]


def test_a_result_that_does_not_divide_is_refused():
    ring = RingMatmul(side="out", dim=1, axes=("x",), ways=1)
    with pytest.raises(ValueError, match="a result of 7 along dimension 1 cannot be scattered over 4 chips"):
        looped((4, 1, 1), ring, np.ones((3, 8), np.float32), np.ones((8, 7), np.float32))
