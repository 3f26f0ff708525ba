"""The comparison of plan and program, one departure at a time, with invented collectives of the compilers' forms."""

from dataclasses import replace

import pytest

from toruslab.partitioning.hlo.collectives import Collective
from toruslab.partitioning.hlo.compare import compare
from toruslab.partitioning.plan.plan import Planned

UNIT = 10_000
"""The unit of bytes here, so large that a tile is small beside it."""


def planned(kind: str, axes: str, n_bytes: int, scope: str = "layer/h", itemsize: int = 2) -> Planned:
    return Planned(scope=scope, kind=kind, axes=tuple(axes), bytes=n_bytes * UNIT, count=3, itemsize=itemsize)  # pyright: ignore[reportArgumentType]


def found(kind: str, axes: str, n_bytes: int, scope: str = "jit(run)/while/body/layer/h/psum", **more) -> Collective:
    fields = {
        "dtype": "bf16",
        "logical_dtype": "bf16",
        "near": (),
        "trips": 3,
        "group_size": 2 ** len(axes),
        "asynchronous": False,
        "sliced": False,
        "strategy": None,
        "emitter": None,
        "branch": None,
        "line": 1,
        "part": 0,
        "n_merged": 1,
    }
    return Collective(kind=kind, axes=tuple(axes), bytes=n_bytes * UNIT, scope=scope, **fields | more)  # pyright: ignore


def verdicts(plan: list[Planned], program: list[Collective]) -> list[str]:
    matched = compare(plan, program)
    assert sum(m.bytes or 0 for m in matched) == sum(c.bytes for c in program), "every collective is there once"
    assert sum(m.planned_bytes or 0 for m in matched) == sum(p.bytes for p in plan), "every plan is there once"
    return [m.verdict for m in matched]


SCATTER = planned("reduce-scatter", "xyz", 960)


@pytest.mark.parametrize(
    ("plan", "program", "expected"),
    [
        ([SCATTER], [found("reduce-scatter", "xyz", 960)], ["as planned"]),
        ([SCATTER], [found("reduce-scatter", "xyz", 960, n_merged=2)], ["merged"]),
        ([SCATTER], [found("reduce-scatter", "xyz", 1920, dtype="f32")], ["widened to f32"]),
        ([planned("all-gather", "x", 960, itemsize=4)], [found("all-gather", "x", 480)], ["narrowed to bf16"]),
        ([SCATTER], [found("all-reduce", "xyz", 1920)], ["all-reduce instead of reduce-scatter"]),
        (
            [planned("all-gather", "xy", 96)],
            [found("all-reduce", "xy", 192)],
            ["all-reduce instead of all-gather"],
        ),
        ([SCATTER], [found("reduce-scatter", "xyz", 500), found("reduce-scatter", "xyz", 460)], ["split"] * 2),
        ([SCATTER], [found("reduce-scatter", "xy", 900), found("reduce-scatter", "z", 60)], ["split"] * 2),
        (
            [SCATTER],
            [found("reduce-scatter", "xy", 900), found("all-reduce", "z", 120)],
            ["all-reduce instead of reduce-scatter"] * 2,
        ),
        (
            [planned("reduce-scatter", "xyz", 960, itemsize=4)],
            [found("all-reduce", "xyz", 960)],
            ["all-reduce instead of reduce-scatter"],
        ),
        ([SCATTER], [found("reduce-scatter", "xyz", 1050), found("collective-permute", "z", 90)], ["padded"] * 2),
        ([SCATTER], [found("reduce-scatter", "xyz", 970), found("collective-permute", "z", 10)], ["padded"] * 2),
    ],
)
def test_departures(plan, program, expected):
    assert verdicts(plan, program) == expected
    assert all(m.explained for m in compare(plan, program))


@pytest.mark.parametrize(
    "program",
    [
        found("reduce-scatter", "xy", 960),  # other axes
        found("reduce-scatter", "xyz", 960, trips=1),  # another count
        found("reduce-scatter", "xyz", 960, scope="jit(run)/while/body/layer/g/psum"),  # another scope
        found("reduce-scatter", "xyz", 400),  # too few bytes
        found("reduce-scatter", "xyz", 1920, dtype="f32", logical_dtype="f32"),  # the program asked for f32
        found("reduce-scatter", "xyz", 480),  # half of it in the plan's own dtype
        found("reduce-scatter", "xyz", 1000),  # too many
        found("all-reduce", "xyz", 960),  # neither of the plan's kind nor of its size
        found("all-gather", "xyz", 960),  # another kind
    ],
)
def test_what_differs_otherwise_is_extra_and_missing(program):
    assert sorted(verdicts([SCATTER], [program])) == ["extra", "missing"]
    assert not any(m.explained for m in compare([SCATTER], [program]))


def test_a_collective_without_a_name_goes_by_what_it_reads_then_by_what_is_left():
    by_operand = found("all-reduce", "xyz", 1920, scope="", near=("jit(run)/while/body/layer/h/te,ec->tc",))
    assert verdicts([SCATTER], [by_operand]) == ["all-reduce instead of reduce-scatter"]
    misled = replace(by_operand, near=("jit(run)/embed/gather",))
    assert verdicts([SCATTER], [misled]) == ["all-reduce instead of reduce-scatter"]
    assert compare([SCATTER], [misled])[0].scope == "layer/h"
    named = replace(misled, scope="jit(run)/other_thing/psum")
    assert sorted(verdicts([SCATTER], [named])) == ["extra", "missing"]


def test_padding_is_bounded():
    """The limit is 3.5%, or a tile of 4 KiB for each of the 8 chips; also for an all-reduce instead."""
    for kind, times in (("reduce-scatter", 1), ("all-reduce", 2)):
        fits = found(kind, "xyz", 960 * times)
        more = lambda n, c=fits: replace(c, bytes=c.bytes + n)  # noqa: E731
        most = int(0.035 * 960 * times * UNIT)
        assert all(m.explained for m in compare([SCATTER], [more(most)]))
        assert not any(m.explained for m in compare([SCATTER], [more(most + 2)]))
        tiny = replace(SCATTER, bytes=960)
        small = replace(fits, bytes=960 * times)
        assert all(m.explained for m in compare([tiny], [more(8 * 4096, small)]))
        assert not any(m.explained for m in compare([tiny], [more(8 * 4096 + 1, small)]))


def test_more_padding_needs_the_shift_that_undoes_it():
    larger, shift = found("reduce-scatter", "xyz", 1050), found("collective-permute", "z", 90)
    assert not any(m.explained for m in compare([SCATTER], [larger, replace(shift, bytes=80 * UNIT)]))
    much, more = found("reduce-scatter", "xyz", 1080), replace(shift, bytes=120 * UNIT)
    assert not any(m.explained for m in compare([SCATTER], [much, more]))


def test_exact_ones_go_first():
    program = [found("reduce-scatter", "xyz", 970), found("reduce-scatter", "xyz", 960)]
    plan = [planned("reduce-scatter", "xyz", 960), planned("reduce-scatter", "xyz", 968)]
    matched = compare(plan, program)
    assert [((m.planned_bytes or 0) // UNIT, (m.bytes or 0) // UNIT, m.verdict) for m in matched] == [
        (960, 960, "as planned"),
        (968, 970, "padded"),
    ]
