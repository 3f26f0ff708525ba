"""Every layout, attention, block, kind of KV heads and mesh through the battery."""

import pytest

from tests import battery

CUBE = (2, 2, 2)


def cases(shapes, kv_heads):
    return [
        pytest.param(shape, block, kv, *pair, id=f"{'x'.join(map(str, shape))}-{block}-kv{kv}-{'-'.join(pair)}")
        for shape in shapes
        for block in ("parallel", "serial")
        for kv in kv_heads
        for pair in battery.legal()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "block", "kv", "name", "attention"), cases([CUBE], (1, 16)))
def test_battery(shape, block, kv, name, attention):
    bench = battery.Bench(battery.model(block, kv), name, attention, shape)
    for check in battery.CHECKS:
        check(bench)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "block", "kv", "name", "attention"),
    cases([s for s in battery.MESHES if s != CUBE], (1, 16)) + cases([CUBE, (4, 2, 1)], (4,)),
)
def test_short_battery(shape, block, kv, name, attention):
    bench = battery.Bench(battery.model(block, kv), name, attention, shape)
    for check in battery.SHORT_CHECKS:
        check(bench)


LOOPED = [((2, 2, 2), "parallel", 1), ((8, 1, 1), "serial", 16), ((1, 2, 4), "parallel", 4), ((4, 2, 1), "serial", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "block", "kv", "name", "attention"),
    [(*LOOPED[i % 2 + half], *pair) for i, pair in enumerate(battery.legal(battery.RINGS)) for half in (0, 2)],
)
def test_looped_collectives(shape, block, kv, name, attention):
    bench = battery.Bench(battery.model(block, kv), name, attention, shape)
    for check in battery.SHORT_CHECKS:
        check(bench)
