"""Profiles: the time of overlapping operations, their purposes, and real traces of fake CPU devices."""

import dataclasses
import io
import json
from collections import Counter

import pytest
from rich.console import Console

from toruslab.benchmarks import profile as command
from toruslab.benchmarks.measure.attribution import Piece, core_seconds, exclusive
from toruslab.benchmarks.measure.contenders import Contender, prepare
from toruslab.benchmarks.measure.profiler_events import Event, TraceError, events
from toruslab.benchmarks.measure.profiling import KINDS, Profile, attribute, profile
from toruslab.benchmarks.runs.parser import InputError
from toruslab.models.programs.compiled import planned
from toruslab.models.weights import corpus
from toruslab.partitioning.hlo.purposes import Operation, operations
from toruslab.partitioning.plan.point import Point

MESH = {"x": 2, "y": 2, "z": 2}
POINT = {
    "model": "toy-2l",
    "slice": "cpu:2x2x2",
    "phase": "decode",
    "batch": 8,
    "context": 31,
    "layout": "ws2d",
    "attention": "batch",
    "weights": "f32",
}
KNOWN = {
    "while": Operation(scope="", purpose="other", contains=True),
    "call": Operation(scope="", purpose="other", contains=True),
    "dot": Operation(scope="layer/h", purpose="matmul"),
    "add": Operation(scope="layer", purpose="other"),
    "gather": Operation(scope="layer/x", purpose="collective", collective="all-gather", axes=("y", "z")),
}
RANKS = {"while": 0, "call": 0, "dot": 2, "add": 2, "gather": 1}


def contender(**more) -> Contender:
    return prepare(Point.from_json(POINT | more), 0, corpus.read())


@pytest.fixture(scope="module")
def measured() -> tuple[Contender, Profile]:
    ready = contender()
    ready.step()
    return ready, profile(ready.step, ready.text, mesh=MESH, n_calls=3)


def ran(name: str, start: float, end: float, *, device: int = 0, step: int = 0, waits=()) -> Event:
    return Event(device=device, step=step, name=name, start=start, end=end, waits=tuple(waits))


def lengths(pieces: list[Piece]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for p in pieces:
        found[p.name] += p.end - p.start  # pyright: ignore[reportArgumentType]
    return dict(found)


def test_what_contains_others_keeps_what_they_leave():
    nested = [ran("while", 0, 100), ran("call", 10, 60), ran("dot", 20, 50), ran("add", 60, 70), ran("dot", 120, 130)]
    assert lengths(exclusive(nested, RANKS)) == {"while": 40, "call": 20, "dot": 40, "add": 10}


def test_a_loop_that_ends_before_its_body_hides_nothing():
    """Another thread continues the loop."""
    moved = [ran("while", 0, 40), ran("dot", 10, 40), ran("dot", 45, 90)]
    assert lengths(exclusive(moved, RANKS)) == {"while": 10, "dot": 75}


def test_a_collective_costs_what_is_seen_of_it():
    beside = [ran("gather", 0, 100), ran("dot", 20, 50), ran("gather", 60, 80), ran("add", 95, 110)]
    assert lengths(exclusive(beside, RANKS)) == {"gather": 65, "dot": 30, "add": 15}
    assert lengths(exclusive([ran("mystery", 0, 10), ran("gather", 2, 9)], RANKS)) == {"mystery": 3, "gather": 7}


def test_time_in_which_a_collective_waits_is_told_apart():
    pieces = exclusive([ran("gather", 0, 100, waits=[(10, 60)]), ran("dot", 100, 110)], RANKS)
    assert sum(p.end - p.start for p in pieces if p.waiting) == 50
    assert {p.name for p in pieces if p.waiting} == {"gather"}


def test_devices_share_the_cores_and_those_that_wait_take_none():
    def at(name: str, start: float, end: float, waiting: bool = False) -> Piece:
        return Piece(start=start, end=end, name=name, waiting=waiting)

    four = [at("dot", 0, 100), at("dot", 0, 100), at("add", 0, 100), at("add", 0, 100)]
    assert core_seconds(four, RANKS, 2) == {"dot": 50, "add": 50}
    assert core_seconds([at("dot", 0, 100), at("gather", 0, 100, True)], RANKS, 2) == {"dot": 50}
    assert core_seconds([at("dot", 0, 100), at("gather", 0, 100)], RANKS, 2) == {"dot": 50, "gather": 50}
    assert core_seconds([*four, at("gather", 0, 100)], RANKS, 2)["gather"] == 0
    assert core_seconds([at("dot", 0, 40), at("dot", 60, 100)], RANKS, 4) == {"dot": 20}


def test_terms_are_means_over_devices_and_steps():
    one = [ran("while", 10, 90), ran("dot", 20, 60), ran("mystery", 60, 70), ran("gather", 95, 100, waits=[(95, 98)])]
    two = [dataclasses.replace(e, device=1) for e in one]
    later = [dataclasses.replace(e, step=1, start=e.start + 1000, end=e.end + 1000, waits=()) for e in (*one, *two)]
    found = attribute([*one, *two, *later], KNOWN, [120e-9, 140e-9], cores=2)
    rows = {(r.scope, r.kind): r for r in found.rows}
    assert rows["layer/h", "matmul"].device_s == pytest.approx(40e-9)
    assert rows["layer/h", "matmul"].work_s == pytest.approx(40e-9) and rows["layer/h", "matmul"].count == 1
    assert rows["", "other"].device_s == pytest.approx(40e-9)  # the loop by itself, and what nobody knows
    assert found.unknown == ("mystery",)
    gathered = rows["layer/x", "collective"]
    assert (gathered.collective, gathered.axes) == ("all-gather", ("y", "z"))
    assert gathered.device_s == pytest.approx(5e-9) and gathered.wait_s == pytest.approx(1.5e-9)
    assert gathered.work_s == pytest.approx(3.5e-9)
    assert found.between_s == pytest.approx(5e-9) and found.dispatch_s == pytest.approx(40e-9)
    assert found.step_s == found.mean_s == pytest.approx(130e-9)
    alone = attribute([*one, *two, *later], KNOWN, [120e-9, 140e-9], cores=None)
    assert all(r.work_s == r.device_s and r.wait_s is None for r in alone.rows)


def test_the_terms_are_the_step(measured):
    _, found = measured
    in_operations = sum(r.device_s for r in found.rows)
    assert in_operations + found.between_s + found.dispatch_s == pytest.approx(found.mean_s, rel=1e-6)
    assert found.between_s >= 0 and found.dispatch_s > 0
    assert found.n_devices == 8 and found.n_steps == 3 and found.cores
    assert all(0 <= (r.wait_s or 0) <= r.device_s * (1 + 1e-9) for r in found.rows)
    assert sum(r.work_s for r in found.rows) <= found.mean_s
    by_kind = found.by_kind
    assert sum(s.device_s for s in by_kind.values()) == pytest.approx(in_operations)
    assert all(by_kind[kind].device_s > 0 for kind in KINDS)


def test_no_operation_of_a_real_trace_is_unknown(measured):
    assert measured[1].unknown == ()


def test_every_planned_collective_has_its_row_and_runs_as_often(measured):
    ready, found = measured
    wanted: Counter[tuple] = Counter()
    for p in planned(ready.point):
        wanted[p.scope, p.kind, p.axes] += p.count
    rows = {(r.scope, r.collective, r.axes): r.count for r in found.rows if r.kind == "collective"}
    assert rows == dict(wanted)


def test_the_kinds_of_the_decoder(measured):
    rows = {(r.scope, r.kind): r.count for r in measured[1].rows}
    n_layers = 2
    for scope in ("layer/h", "layer/kv", "layer/out"):
        assert rows[scope, "matmul"] == n_layers and rows[scope, "weights"] >= n_layers
    assert rows["logits", "matmul"] == 1
    assert {scope for scope, kind in rows if kind == "attention"} == {"layer/attend"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"weights": "int8"}, {"layer/h", "layer/kv", "layer/out"}),
        ({"layout": "wgxyz", "phase": "prefill", "length": 8, "context": 0}, {"layer/w_in", "layer/w_out"}),
    ],
)
def test_weights_that_are_dequantised_or_gathered(more, expected):
    found = operations(contender(**more).text, MESH)
    moved = {o.scope for o in found.values() if o.purpose == "weights"}
    assert moved >= expected
    assert not any("attend" in scope or "norm" in scope for scope in moved)
    matmuls = {o.scope for o in found.values() if o.purpose == "matmul"}
    assert matmuls == {"layer/h", "layer/kv", "layer/out", "logits"}
    assert any(o.purpose == "attention" for o in found.values())


def test_a_profile_is_json_and_a_table(measured):
    ready, found = measured
    again = json.loads(json.dumps(found.to_json()))
    assert set(again["by_kind"]) == set(KINDS)
    row = {"point": ready.point.to_json(), "latency_s": 0.01, "profile": again}
    console = Console(record=True, width=140, file=io.StringIO())
    collectives = [{"scope": "layer/q", "kind": "all-to-all", "axes": ["x", "y", "z"], "count": 4, "seconds": 0.25}]
    analytic = {"terms": {"matmul_s": 0.001, "collective_s": 0.011345}, "collectives": collectives}
    command.show(row, console, analytic)
    said = console.export_text()
    assert "layer/attend" in said and "all-to-all(xyz)" in said and "dispatch" in said and "12.345" in said
    assert "1,000.000" in said  # four of a quarter of a second


def test_a_trace_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="no trace"):
        events(tmp_path, "jit_run")


def test_the_command_prints_a_row_and_keeps_the_trace(tmp_path, capsys):
    point = json.dumps(Point.from_json(POINT).to_json())
    assert command.main([point, "--steps", "1", "--keep", str(tmp_path / "trace"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["point"] == json.loads(point) and row["source"] == "measured"
    assert row["latency_s"] > 0 and row["profile"]["n_steps"] == 1 and row["environment"]["platform"] == "cpu"
    assert len(list((tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--batch", "3"], "batch=3 is not divisible by"),
        (["--layout", "ws3d"], "did you mean 'ws2d'?"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--keep", "/dev/null/x"], "keep='/dev/null/x' cannot be written: Not a directory"),
        (["--slice", "v5e:2x2x2"], "v5e"),
        (['{"model":"toy"}', "--weights", "int8"], "weights='int8' stands beside a JSON point"),
    ],
)
def test_bad_input_is_one_sentence(argv, why):
    with pytest.raises(InputError) as error:
        command.main(argv)
    assert why in str(error.value) and "\n" not in str(error.value)
