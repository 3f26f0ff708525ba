"""Steps as collectives: their kinds and bytes, and that running one never changes the values of the array."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.layouts.moves import classify, follow
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import AXES, attach

SIZES = {"x": 2, "y": 2, "z": 2}


@pytest.mark.parametrize(
    ("src", "dst", "kind", "axes", "n_bytes"),
    [
        (P(None, ("x", "y")), P(None, "x"), "all-gather", ("y",), 16 * 16 * 4 // 2),
        (P(None, "x"), P("y", "x"), "slice", ("y",), 0),
        (P(None, "z", unreduced=frozenset("x")), P(None, ("z", "x")), "reduce-scatter", ("x",), 16 * 16 * 4 // 2),
        (
            P(None, None, unreduced=frozenset("xy")),
            P(("y", "x"), None),
            "reduce-scatter",
            ("y", "x"),
            16 * 32 * 4 * 3 // 4,
        ),
        (P("z", None, unreduced=frozenset("x")), P("z", None), "all-reduce", ("x",), 2 * 8 * 32 * 4 // 2),
        (P(None, ("z", "y")), P(("z", "y"), None), "all-to-all", ("z", "y"), 16 * 8 * 4 * 3 // 4),
        (
            P(None, "x", unreduced=frozenset("z")),
            P("x", None, unreduced=frozenset("z")),
            "all-to-all",
            ("x",),
            16 * 16 * 4 // 2,
        ),
    ],
)
def test_kinds_and_bytes(src, dst, kind, axes, n_bytes):
    move = classify(src, dst)
    assert (move.kind, move.axes) == (kind, axes)
    assert move.bytes((16, 32), 4, SIZES) == n_bytes


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (P("x", "y"), P(None, None)),  # two gathers
        (P(None, ("x", "y")), P(None, "y")),  # gathers the major axis: the parts would be out of order
        (P(None, None, unreduced=frozenset("x")), P(None, "y")),  # reduces one axis, scatters over another
        (P("x", None), P("y", None)),  # a permutation
        (P(None, None), P(None, None, unreduced=frozenset("x"))),  # a sum cannot be split into terms
        (P(None, ("x", "y")), P(("y", "x"), None)),  # an all-to-all that changes the order of the axes
    ],
)
def test_two_collectives_in_one_step_are_refused(src, dst):
    with pytest.raises(ValueError, match="is not one collective; spell it as several steps"):
        classify(src, dst)


def every_step():
    """Every step of every ladder of every layout."""
    found = set()
    for name in LAYOUTS:
        for attention in ("heads", "batch"):
            for kv in (1, 2, 16):
                try:
                    made = layout(name, attention, (2, 2, 2), kv)
                except ValueError:
                    continue
                for ladder in vars(made).values():
                    if isinstance(ladder, tuple) and not isinstance(ladder, P):
                        found |= {(a, b) for a, b in itertools.pairwise(ladder)}
    return sorted(found, key=str)


def test_running_a_step_never_changes_the_array():
    mesh = attach((2, 2, 2), chip="cpu")
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        for src, dst in every_step():
            if src.unreduced:  # partial sums cannot be placed on devices; the battery runs these
                continue
            array = rng.standard_normal([16] * len(src.partitions)).astype(np.float32)
            placed = jax.device_put(array, NamedSharding(mesh, src))
            moved = jax.jit(lambda a, ladder=(src, dst): follow(a, ladder))(placed)
            np.testing.assert_array_equal(moved, array)
            assert moved.sharding.is_equivalent_to(NamedSharding(mesh, dst), array.ndim)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_bytes_against_counting_elements(data):
    """Bytes received, counted element by element: those that a chip has afterwards, but not before."""
    sizes = dict(zip(AXES, data.draw(st.permutations([2, 3, 4])), strict=True))
    axes = data.draw(st.permutations(AXES))
    n = data.draw(st.integers(1, 3))
    shape = (24, 48)
    k = int(np.prod([sizes[a] for a in axes[:n]]))
    gather = classify(P(None, tuple(axes[:n])), P(None, None))
    assert gather.bytes(shape, 4, sizes) == 4 * (24 * 48 - 24 * 48 // k)
    exchange = classify(P(None, tuple(axes[:n])), P(tuple(axes[:n]), None))
    held, kept = 24 * 48 // k, 24 * 48 // k // k
    assert exchange.bytes((24 * k, 48), 4, sizes) == 4 * (held - kept) * k
