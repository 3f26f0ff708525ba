"""The HLO reader: programs of three compilers (`texts/*.txt`, made by `texts/make.py`), spellings, loops, refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toruslab.partitioning.hlo.collectives import Collective, read
from toruslab.partitioning.hlo.cycles import copies, estimated_cycles
from toruslab.partitioning.hlo.groups import replica_groups
from toruslab.partitioning.hlo.text import HloError, parse

CORPUS = Path(__file__).parent / "texts"
FILES = sorted(CORPUS.glob("*.txt"))


@dataclass(frozen=True, kw_only=True)
class CompiledText:
    """One file of the corpus; its name says what it is."""

    name: str
    on_cpu: bool
    mesh: Mapping[str, int]
    text: str

    @property
    def e(self) -> int:
        """Bytes of one element as it moves: XLA:CPU widens bf16."""
        return 4 if self.on_cpu or "-f32-" in self.name else 2

    def size(self, axes: str) -> int:
        return prod(self.mesh[a] for a in axes)


@cache
def program(name: str) -> CompiledText:
    _, _, chip, dims, _ = name.split("-")
    mesh = dict(zip("xyz", map(int, dims.split("x")), strict=True))
    return CompiledText(name=name, on_cpu=chip == "cpu", mesh=mesh, text=(CORPUS / name).read_text())


def named(program_name: str) -> list[str]:
    return [f.name for f in FILES if f.name.startswith(f"{program_name}-")]


def brief(c: Collective) -> tuple[str, str, int, int]:
    """What a plan gives of a collective: kind, axes, bytes, trips."""
    return c.kind, "".join(c.axes), c.bytes, c.trips


def plan(
    p: CompiledText, kind: str, axes: str, n_elements: float, trips: int = 1, e: int = 0
) -> tuple[str, str, int, int]:
    """The same by definition: `n_elements` is that of the larger side, a gather's output or else the input."""
    k = p.size(axes)
    share = {"all-reduce": 2 * (k - 1) / k, "collective-permute": float(k > 1)}.get(kind, (k - 1) / k)
    real = "".join(a for a in axes if p.mesh[a] > 1)
    return kind, real, ceil(n_elements * (e or p.e) * share), trips


# ------------------------------------------------------------------------------------------------------ real programs


@pytest.mark.parametrize("name", named("kinds"))
def test_one_of_each_kind(name: str) -> None:
    p = program(name)
    x, yz, z = p.mesh["x"], p.size("yz"), p.mesh["z"]
    found = {(c.scope or c.near[0]).split("/")[-2]: c for c in read(p.text, p.mesh)}
    here = 256 / x * 512 / yz
    scatter = "all-reduce" if found["scatter_x"].sliced else "reduce-scatter"
    assert {scope: brief(c) for scope, c in found.items()} == {
        "gather_y": plan(p, "all-gather", "y", 256 / x * 512 / z),
        "gather_yz": plan(p, "all-gather", "yz", 256 / x * 512),
        "scatter_x": plan(p, scatter, "x", 256 / x * 512 / z),
        "sum_xz": plan(p, "all-reduce", "xz", 256 / x**2 * 512 / z),
        "all_to_all_z": plan(p, "all-to-all", "z", here),
        "shift_y": plan(p, "collective-permute", "y", here),
    }
    assert {c.logical_dtype for c in found.values()} == {"bf16"}
    assert {c.dtype for c in found.values()} == {"f32" if p.on_cpu else "bf16"}
    assert {c.logical_bytes * p.e // 2 for c in found.values()} == {c.bytes for c in found.values()}
    assert found["shift_y"].asynchronous is not p.on_cpu


@pytest.mark.parametrize("name", named("loops"))
def test_nested_loops_multiply(name: str) -> None:
    p = program(name)
    w = 4 if p.on_cpu else 2  # TPU multiplies in bf16 and gathers the f32 weights as such
    assert [brief(c) for c in read(p.text, p.mesh)] == [
        plan(p, "all-gather", "x", 512 * 512 / p.size("yz"), 6, e=w),
        plan(p, "all-gather", "yz", 64 * 512, 6),
        plan(p, "all-reduce", "y", 64 * 512, 18),
    ]


@pytest.mark.parametrize("name", named("branches"))
def test_every_branch_is_reported_and_named(name: str) -> None:
    p = program(name)
    found = read(p.text, p.mesh)
    assert [brief(c) for c in found] == [plan(p, "all-reduce", a, 64 * 512 / p.size("xy")) for a in "xyz"]
    assert [re.sub(r".*\[", "[", c.branch or "") for c in found] == ["[0]", "[1]", "[1]"]


@pytest.mark.parametrize("name", named("merged"))
def test_a_merged_all_reduce_is_several(name: str) -> None:
    p = program(name)
    found = read(p.text, p.mesh)
    sizes = [64 * 512 / p.size("xy"), 16 * 32 / p.size("xy"), 1]
    assert [brief(c) for c in found] == [plan(p, "all-reduce", "z", n) for n in sizes]
    assert [(c.part, c.n_merged, c.line == found[0].line, c.logical_dtype) for c in found] == [
        (n, 3, True, "bf16") for n in range(3)
    ]


@pytest.mark.parametrize(
    ("name", "kind", "sliced"),
    [
        ("scatter-f32-cpu-2x2x2-jax0.10.txt", "reduce-scatter", False),
        ("scatter-f32-v4-2x2x2-jax0.10.txt", "reduce-scatter", False),
        ("scatter-bf16-v5e-4x4x1-jax0.10.txt", "all-reduce", True),
        ("reshard-bf16-cpu-2x2x2-jax0.10.txt", "all-reduce", True),
        ("reshard-bf16-v4-2x2x2-jax0.10.txt", "all-reduce", True),
        ("reshard-bf16-v4-4x4x4-jax0.10.txt", "reduce-scatter", False),  # a fusion that calls all-reduce-scatter
    ],
)
def test_a_scattered_partial_sum_in_its_three_disguises(name: str, kind: str, sliced: bool) -> None:
    p = program(name)
    (c,) = read(p.text, p.mesh)
    assert (brief(c), c.sliced) == (plan(p, kind, "x", 64 * 1024 / p.size("yz")), sliced)
    assert (c.strategy is None) == p.on_cpu
    assert c.strategy in (None, "StrategyRing")
    assert "scatter" in "".join((c.scope, *c.near)) or "dot_general" in c.scope


def test_a_gather_that_tpu_overlaps_with_a_matmul_counts_once() -> None:
    p = program("weights-bf16-v5e-4x4x1-jax0.10.txt")
    assert p.text.count("channel_id=5,") == 3  # its start, its step beside the matmul, its end
    found = read(p.text, p.mesh)
    first, second = plan(p, "all-gather", "x", 4096 * 4096, 8), plan(p, "all-gather", "yz", 4096 * 16384, 8)
    assert [brief(c) for c in found] == [first, first, second, second]
    assert [c.asynchronous for c in found] == [False, False, False, True]
    with pytest.raises(HloError, match="nothing began"):
        read(p.text.replace('"AsyncCollectiveStart"', '"AsyncCollectiveDone"'), p.mesh)


def test_padding_that_the_compiler_added_moves_too() -> None:
    p = program("stationary-bf16-v6e-4x4x1-jax0.10.txt")
    assert [brief(c) for c in read(p.text, p.mesh)] == [
        plan(p, "all-gather", "yz", 4096 * 4096 / 4, 8),
        plan(p, "reduce-scatter", "x", 4096 * (4096 + 64), 8),
        plan(p, "collective-permute", "x", 4096 * 48, 8),  # moves the padded shards into place
        plan(p, "all-gather", "x", 4096 * 4096, 8),
        plan(p, "reduce-scatter", "yz", 4096 * 4096 / 4, 8),
    ]


@pytest.mark.parametrize("name", named("unbounded"))
def test_a_trip_count_that_is_not_in_the_text(name: str) -> None:
    p = program(name)
    found = read(p.text, p.mesh, unknown_trips=7)
    if p.mesh["z"] == 1:  # nothing to sum: without a collective in the loop, its trips do not matter
        assert not found
        assert not read(p.text, p.mesh)
        with pytest.raises(HloError, match="trip count of while"):
            estimated_cycles(p.text)
    else:
        assert [brief(c) for c in found] == [plan(p, "all-reduce", "z", 64 * 512 / p.size("xy"), 7)]
        with pytest.raises(HloError, match="trip count of while") as error:
            read(p.text, p.mesh)
        assert " while(" in p.text.splitlines()[error.value.line - 1]


def test_cycles_follow_the_trips_and_the_slowest_branch() -> None:
    def total(name: str, **options: int) -> int:
        cycles = estimated_cycles(program(name).text, **options)
        assert cycles
        assert cycles.total == sum(cycles.by_scope.values())
        return cycles.total

    p = program("weights-bf16-v5e-4x4x1-jax0.10.txt")
    in_body = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', p.text)]
    assert total(p.name) == 8 * sum(in_body)
    seven, eight = (total("unbounded-f32-v5e-4x4x1-jax0.10.txt", unknown_trips=n) for n in (7, 8))
    assert 0 < eight - seven < seven
    p = program("branches-bf16-v4-2x2x2-jax0.10.txt")
    all_of_them = sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', p.text))
    assert 0 < total(p.name) < all_of_them
    assert estimated_cycles(program("loops-bf16-cpu-2x2x2-jax0.10.txt").text) is None


def test_copies() -> None:
    p = program("weights-bf16-v5e-4x4x1-jax0.10.txt")  # the activations go to fast memory, and back
    found = copies(p.text, 128 * 4096 * 2)
    assert [(c.bytes, c.dims, c.trips, c.from_space, c.to_space) for c in found] == [
        (128 * 4096 * 2, (128, 4096), 1, 0, 1),
        (128 * 4096 * 2, (128, 4096), 1, 1, 0),
    ]
    p = program("loops-bf16-cpu-2x2x2-jax0.10.txt")  # layouts of the gathers, inside fusions of the loop
    assert {(c.trips, c.fused, c.dtype) for c in copies(p.text, 1 << 15)} == {(1, False, "bf16"), (6, True, "f32")}
    assert not copies(p.text, 1 << 20)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_corpus_is_small_and_names_no_machine(file: Path) -> None:
    text = file.read_text()
    assert len(text) < 30_000
    assert not re.search(r"source_file|FileNames|StackFrames|\.py|/home|/root|/tmp", text)
    p = program(file.name)
    for c in read(text, p.mesh, unknown_trips=1):
        assert any(c.kind.split("-")[0] in w for w in text.splitlines()[c.line - 1].split())
        assert c.group_size > 0


# --------------------------------------------------------------------------------------------------------- spellings


def module(lines: str, *, n: int, more: str = "", replicas: int = 1) -> str:
    """An HLO module of `n` partitions around the lines of its entry."""
    body = "\n".join(f"  {line.strip()}" for line in lines.strip().splitlines())
    counts = f"replica_count={replicas}, num_partitions={n}"
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    add += "  ROOT %sum = f32[] add(%a, %b)\n}\n"
    return (
        f"HloModule m, is_scheduled=true, {counts}\n\n{add}\n{more}\nENTRY %main (p: f32[24]) -> f32[] {{\n{body}\n}}\n"
    )


def all_reduce(groups: str, how: str = "channel_id=1, use_global_device_ids=true") -> str:
    line = f"ROOT %r = f32[24]{{0}} all-reduce(%p), replica_groups={groups}, {how}, to_apply=%add"
    return f"%p = f32[24]{{0}} parameter(0)\n{line}"


def listed(groups: list[list[int]]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups) + "}"


@st.composite
def groups_in_some_spelling(draw: st.DrawFn) -> tuple[dict[str, int], tuple[str, ...], list[list[int]], str]:
    """A mesh, axes of it, the groups that they make, and one of the ways to write those."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda s: prod(s) <= 96))
    mesh = dict(zip("xyzw", sizes, strict=False))
    inside = sorted(draw(st.sets(st.sampled_from(range(len(sizes))))))
    coordinates = [[i // prod(sizes[a + 1 :]) % sizes[a] for a in range(len(sizes))] for i in range(prod(sizes))]
    by_rest: dict[tuple[int, ...], list[int]] = {}
    for i, c in enumerate(coordinates):
        by_rest.setdefault(tuple(c[a] for a in range(len(sizes)) if a not in inside), []).append(i)
    groups = list(by_rest.values())
    outside = [a for a in range(len(sizes)) if a not in inside]
    dims, k = ",".join(map(str, sizes)), len(groups[0])
    kind = draw(
        st.sampled_from(["listed", "shuffled", "iota", "named", "anonymous", "old", "parts", "ordered", "empty"])
    )
    axes = [f"'{list(mesh)[a]}'" for a in inside]
    whole = "mesh[" + ",".join(f"'{n}'={s}" for n, s in mesh.items()) + "]"
    text = listed(groups)
    if kind == "shuffled":
        text = listed([draw(st.permutations(g)) for g in draw(st.permutations(groups))])
    elif kind == "iota":
        text = f"[{len(groups)},{k}]<=[{dims}]T({','.join(map(str, outside + inside))})"
    elif kind == "named":
        text = f"{whole} {{{','.join(draw(st.permutations(axes)))}}}"
    elif kind == "anonymous":  # the partitioner's own names, as XLA has them for Auto axes
        text = re.sub(r"'(\w)'", lambda m: f"'axis_{'xyzw'.index(m[1])}'", f"{whole} {{{','.join(axes)}}}")
    elif kind == "old":
        text = f"@mesh<{','.join(f'{n}={s}' for n, s in mesh.items())}> {{{','.join(axes)}}}".replace("'", "")
    elif kind == "parts":  # one flat axis, and ours as parts of it: (size before)size
        before = [prod(sizes[:a]) for a in range(len(sizes))]
        parts = [f"'d':({before[a]}){sizes[a]}" for a in inside]
        text = f"mesh['d'={prod(sizes)}] {{{','.join(parts)}}}"
    elif kind == "ordered":  # axes in another order, and the order of the devices with it
        turned = draw(st.permutations(range(len(sizes))))
        names = ",".join(f"'{list(mesh)[a]}'={sizes[a]}" for a in turned)
        order = f"[{dims}]T({','.join(map(str, turned))})"
        text = f"mesh[{names}], device_ids=({order}) {{{','.join(axes)}}}"
    elif kind == "empty" and k == prod(sizes):
        text = "{}"
    return mesh, tuple(n for a, n in enumerate(mesh) if a in inside and sizes[a] > 1), groups, text


@given(groups_in_some_spelling())
def test_every_spelling_of_the_groups_reads_back(
    case: tuple[dict[str, int], tuple[str, ...], list[list[int]], str],
) -> None:
    mesh, axes, groups, text = case
    n, k = prod(mesh.values()), len(groups[0])
    assert {frozenset(g) for g in replica_groups(text, n)} == {frozenset(g) for g in groups}
    (c,) = read(module(all_reduce(text), n=n), mesh)
    assert (c.axes, c.group_size, c.bytes) == (axes, k, ceil(2 * 96 * (k - 1) / k))


@given(st.permutations(range(8)), st.sampled_from([2, 4]))
def test_groups_that_are_no_axes_are_refused(ids: list[int], k: int) -> None:
    groups = [ids[i : i + k] for i in range(0, 8, k)]
    mesh = {"x": 2, "y": 2, "z": 2}
    bits = {frozenset(b for a in g for b in range(3) if (a ^ g[0]) >> b & 1) for g in groups}
    assume(len(bits) > 1 or len(next(iter(bits))) != k.bit_length() - 1)
    with pytest.raises(HloError, match=r"line 12: r, over .* whole axes") as error:
        read(module(all_reduce(listed(groups)), n=8), mesh)
    assert error.value.line == 12
    (c,) = read(module(all_reduce(listed(groups)), n=8), mesh, partial_axes=True)
    assert c.group_size == k < 2 ** len(c.axes)
    assert c.bytes == 2 * 96 * (k - 1) // k


@pytest.mark.parametrize(
    ("how", "groups", "axes"),
    [
        ("channel_id=1, use_global_device_ids=true", "{{0,1,2,3},{4,5,6,7}}", ("p",)),
        ("channel_id=1, use_global_device_ids=true", "{{0,4},{1,5},{2,6},{3,7}}", ("r",)),
        ("channel_id=1", "{{0},{1}}", ("p",)),  # replicas, with all their partitions
        ("channel_id=1", "{{0,1}}", ("r", "p")),
        ("channel_id=1", "{}", ("r", "p")),
        ("constrain_layout=false", "{{0,1}}", ("r",)),  # replicas, for each partition
        ("constrain_layout=false", "{}", ("r",)),
    ],
)
def test_what_ids_count(how: str, groups: str, axes: tuple[str, ...]) -> None:
    (c,) = read(module(all_reduce(groups, how), n=4, replicas=2), {"r": 2, "p": 4})
    assert c.axes == axes


@given(st.sampled_from(["x", "y", "z"]), st.integers(1, 3), st.booleans())
def test_permutes(axis: str, shift: int, wraps: bool) -> None:
    mesh = {"x": 2, "y": 3, "z": 4}
    stride, size = {"x": (12, 2), "y": (4, 3), "z": (1, 4)}[axis]
    pairs = []
    for i in range(24):
        at = i // stride % size
        if wraps or at + shift < size:
            pairs.append([i, i + ((at + shift) % size - at) * stride])
    line = f"collective-permute(%p), channel_id=1, source_target_pairs={listed(pairs)}"
    (c,) = read(module(f"%p = f32[24]{{0}} parameter(0)\nROOT %r = f32[24]{{0}} {line}", n=24), mesh)
    moves = any(a != b for a, b in pairs)
    assert (c.axes, c.bytes) == (((axis,), 96) if moves else ((), 0))


# ------------------------------------------------------------------------------------------------ loops, calls, pairs


def loop(first: int, limit: int, step: int, direction: str, *, swap: bool = False, carried: bool = False) -> str:
    """An all-reduce in a counted loop; `carried`: the limit is in the loop's state, as TPU has it."""
    tuple_type = "(s32[], f32[24]{0}, s32[])"
    limit_line = "get-tuple-element(%c), index=2" if carried else f"constant({limit})"
    a, b = ("%limit", "%i") if swap else ("%i", "%limit")
    direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction) if swap else direction
    more = f"""%cond (c: {tuple_type}) -> pred[] {{
  %c = {tuple_type} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] {limit_line}
  ROOT %go = pred[] compare({a}, {b}), direction={direction}
}}

%body (s: {tuple_type}) -> {tuple_type} {{
  %s = {tuple_type} parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %l = s32[] get-tuple-element(%s), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%j, %step)
  %h = f32[24]{{0}} get-tuple-element(%s), index=1
  %r = f32[24]{{0}} all-reduce(%h), channel_id=1, replica_groups={{}}, use_global_device_ids=true, to_apply=%add
  ROOT %t = {tuple_type} tuple(%next, %r, %l)
}}
"""
    lines = f"""%p = f32[24]{{0}} parameter(0)
        %first = s32[] constant({first})
        %k = s32[] copy(%first)
        %end = s32[] constant({limit})
        %state = {tuple_type} tuple(%k, %p, %end)
        ROOT %w = {tuple_type} while(%state), condition=%cond, body=%body"""
    return module(lines, n=2, more=more)


@given(
    st.integers(-9, 9), st.integers(-9, 9), st.integers(-4, 4), st.sampled_from(["LT", "LE", "GT", "GE", "NE"]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_trips_of_a_counted_loop(first: int, limit: int, step: int, direction: str, swap: bool, carried: bool) -> None:
    goes = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}[direction]
    i, n = first, 0
    while goes(i, limit) and n < 100:
        i, n = i + step, n + 1
    text = loop(first, limit, step, direction, swap=swap, carried=carried)
    if n == 100:
        with pytest.raises(HloError, match="trip count of w"):
            read(text, {"x": 2})
    else:
        assert [c.trips for c in read(text, {"x": 2})] == [n]


def test_the_compilers_trip_count_wins() -> None:
    text = loop(0, 5, 1, "LT").replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"4"}}')
    assert [c.trips for c in read(text, {"x": 2})] == [4]


def test_start_and_done_count_once() -> None:
    ids = "channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true"
    wrapped = f"""%wrapped (q: f32[24]) -> f32[12] {{
  %q = f32[24]{{0}} parameter(0)
  ROOT %s = f32[12]{{0}} reduce-scatter(%q), {ids}, dimensions={{0}}, to_apply=%add
}}
"""
    text = module(
        f"""%p = f32[24]{{0}} parameter(0)
        %a = (f32[24]{{0}}, f32[48]{{0}}) all-gather-start(%p), {ids}, dimensions={{0}}
        %b = f32[48]{{0}} all-gather-done(%a)
        %c = f32[24]{{0}} all-reduce-start(%p), {ids}, to_apply=%add
        %d = f32[24]{{0}} all-reduce-done(%c)
        %e = ((f32[24]{{0}}), f32[12]{{0}}, u32[]) async-start(%p), calls=%wrapped
        %f = ((f32[24]{{0}}), f32[12]{{0}}, u32[]) async-update(%e), calls=%wrapped
        %g = f32[12]{{0}} async-done(%f), calls=%wrapped
        %h = ((f32[24]{{0}}), f32[12]{{0}}, u32[]) reduce-scatter-start(%p), {ids}, dimensions={{0}}, to_apply=%add
        %i = f32[12]{{0}} reduce-scatter-done(%h)
        %j = s32[] constant(0)
        ROOT %k = f32[12]{{0}} dynamic-slice(%d, %j), dynamic_slice_sizes={{12}}""",
        n=4,
        more=wrapped,
    )
    found = read(text, {"x": 2, "y": 2})
    assert [(c.kind, c.bytes, c.asynchronous, c.sliced) for c in found] == [
        ("all-gather", 96, True, False),
        ("all-reduce", 96, True, True),
        ("reduce-scatter", 48, True, False),
        ("reduce-scatter", 48, True, False),
    ]


def test_what_is_called_twice_counts_twice_and_odd_types_have_sizes() -> None:
    more = """%f (q: bf16[8,128]) -> bf16[8,256] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %g = bf16[8,256]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={1}
}
"""
    more = more.replace("dimensions=", "use_global_device_ids=true, dimensions=")
    text = module(
        """%p = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
        %a = bf16[8,256]{1,0:T(8,128)(2,1)} call(%p), to_apply=%f
        %b = bf16[8,256]{1,0:T(8,128)(2,1)} call(%p), to_apply=%f
        %n = s4[9]{0:T(1024)(8,1)E(4)} constant({ 1, 2,
          3, 4, 5, 6, 7, 8, 9 })
        %d = pred[] constant(true)
        %c = (s4[9]{0}, f8e4m3fn[3]{0}) collective-permute(%n, %d), channel_id=2, source_target_pairs={{0,1},{1,0}}
        ROOT %e = c64[4]{0} custom-call(%p), custom_call_target="x(", metadata={op_name="p[\\'w\\']/(a, b)"}""",
        n=2,
        more=more,
    )
    text = text.replace("%d = pred[] constant(true)", "%d = f8e4m3fn[3]{0} constant({1,2,3})")
    assert [(c.bytes, c.dtype, c.part) for c in read(text, {"x": 2})] == [
        (2048, "bf16", 0), (2048, "bf16", 0), (5, "s4", 0), (3, "f8e4m3fn", 1),
    ]  # fmt: skip
    assert parse(text).entry.root.op_name == "p['w']/(a, b)"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("{{0,1},{2,3}}", "{{0,1},{2}}", "different sizes"),
        ("{{0,1},{2,3}}", "{{0,1},{1,2}}", "an id in two groups"),
        ("{{0,1},{2,3}}", "{{0,1}}", "not the 4 ids"),
        ("{{0,1},{2,3}}", "[2,2]<=[8]", "not .groups,size. of 8"),
        ("{{0,1},{2,3}}", "[2,2]<=[2,2]T(0,0)", "permutation"),
        ("{{0,1},{2,3}}", "mesh['x'=2,'y'=2] {'z'}", "does not have"),
        ("{{0,1},{2,3}}", "mesh['x'=2,'y'=2] {'x':(1)3}", "do not divide"),
        ("{{0,1},{2,3}}", "everyone", "not known"),
        ("all-reduce(", "all-shuffle(", "looks like a collective"),
        ("all-reduce(", "collective-mystery-start(", "looks like a collective"),
        ("all-reduce(", "send(", "looks like a collective"),
        ("all-reduce(%p)", 'custom-call(%p), custom_call_target="NcclAllReduce"', "looks like a collective"),
        ("all-reduce(%p)", "all-reduce(%q)", "operand 0 of r is not in main"),
        ("all-reduce(%p)", "all-gather(%p)", "do not fit a all-gather in groups of 2"),
        ("= f32[24]{0} all-reduce", "= f32[24]{0} all reduce", "no shape, opcode and operands"),
        ("f32[24]", "what[24]", "no known size"),
        ("num_partitions=4", "num_partitions=8", "not those of the mesh"),
        ("ENTRY %main", "%main", "no ENTRY"),
        ("HloModule m", "Module m", "not HLO text"),
        ("}\n\n\nENTRY", "}\nnonsense\nENTRY", "not HLO text"),
        ("  %b =", "  b is", "neither an instruction"),
        ("ROOT %sum", "ROOT %a", "a name twice"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_line(old: str, new: str, why: str) -> None:
    good = module(all_reduce("{{0,1},{2,3}}"), n=4)
    mesh = {"x": 2, "y": 2}
    assert len(read(good, mesh)) == 1
    assert old in good
    with pytest.raises(HloError, match=rf"line \d+: .*({why})"):
        read(good.replace(old, new), mesh)


def test_a_collective_that_nothing_reaches_is_an_error() -> None:
    lost = "%lost (q: f32[24]) -> f32[24] {\n  " + all_reduce("{}").replace("\n", "\n  ").replace("%p", "%q") + "\n}\n"
    with pytest.raises(HloError, match=r"line \d+: .*nothing seems to call"):
        read(module("ROOT %p = f32[24]{0} parameter(0)", n=2, more=lost), {"x": 2})


def test_text_that_stops_short_is_an_error() -> None:
    text = program("kinds-bf16-v4-4x4x4-jax0.10.txt").text
    lines = text.splitlines()
    for keep in range(0, len(lines) - 1, 7):
        with pytest.raises(HloError):
            parse("\n".join(lines[:keep]))
