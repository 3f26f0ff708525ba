"""Compiled evidence: fake CPU devices, and TPU slices that are described by libtpu."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.battery import legal
from toruslab.benchmarks import compile as command
from toruslab.benchmarks.runs import kept
from toruslab.benchmarks.runs.parser import InputError
from toruslab.models.programs import limit_search
from toruslab.models.programs.compiled import evidence
from toruslab.partitioning.cost.limits import largest_batch
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.torus import described as targets
from toruslab.partitioning.torus.mesh import Slice

ROOT = Path(__file__).parents[3]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'toruslab[tpu]'"
)


def on_cpu(name: str, attention: str, **more) -> Point:
    sizes = {"phase": "decode", "batch": 8, "context": 32} | more
    fields = {"model": "toy-2l", "slice": "cpu:2x2x2", "weights": "f32"} | sizes
    return Point.from_json(fields | {"layout": name, "attention": attention})


def on_v4(**more) -> Point:
    fields = {"model": "palm-540b-h64", "slice": "v4:4x4x4", "phase": "decode", "batch": 64, "context": 2048}
    return Point.from_json(fields | {"layout": "ws2d", "attention": "batch", "weights": "int8"} | more)


@pytest.mark.usefixtures("fusion_emitters")
@pytest.mark.parametrize(("name", "attention"), [pair for pair in legal() if pair[0] != "auto"])
@pytest.mark.parametrize(
    "phase", [{}, pytest.param({"phase": "prefill", "length": 16, "context": 0}, marks=pytest.mark.slow)]
)
def test_on_cpu_nothing_differs(name, attention, phase):
    found = evidence(on_cpu(name, attention, **phase))
    assert {m.verdict for m in found.collectives} <= {"as planned"}
    assert found.findings == () and found.unexplained == 0 and found.extra_bytes == 0
    assert found.peak_bytes_per_chip and found.fits is None and found.compute_s is None


def test_bf16_on_cpu_is_widened_and_explained():
    found = evidence(on_cpu("ws2d", "batch", weights="bf16"))
    assert found.unexplained == 0
    assert {m.verdict for m in found.collectives} == {"as planned", "widened to f32"}


def test_auto_is_held_against_ws2d():
    found = evidence(on_cpu("auto", "batch"))
    assert found.unexplained > 0 and found.analytic is None


@needs_libtpu
@pytest.mark.parametrize("weights", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_540b_decode_on_64_chips(weights):
    found = evidence(on_v4(weights=weights))
    assert found.unexplained == 0 and found.findings == ()
    assert found.peak_bytes_per_chip == pytest.approx(found.analytic.hbm_bytes_per_chip, rel=0.01)  # pyright: ignore
    assert found.fits and found.cache_copies == found.weight_copies == found.rematerialisations == 0
    scatters = [m for m in found.collectives if m.planned_kind == "reduce-scatter" and "layer" in m.scope]
    assert {m.scope for m in scatters if m.verdict != "as planned"} == {"layer/kv"}  # 4 rows: no tile to scatter
    assert found.compute_s and found.analytic
    assert 1 < found.compute_s / max(found.analytic.compute_s, found.analytic.memory_s) < 3


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "attention"),
    [("ws1d", "heads"), ("wgx", "heads"), ("wgxy", "batch"), ("wgxyz", "batch")],
)
def test_prefill_of_few_layers_on_64_chips(name, attention):
    sizes = {"phase": "prefill", "batch": 64, "length": 512, "context": 0, "weights": "bf16"}
    found = evidence(on_v4(model="palm-540b-h64-3l", layout=name, attention=attention, **sizes))
    assert found.unexplained == 0
    assert not any(m.verdict.startswith("all-reduce instead") and "layer" in m.scope for m in found.collectives)
    assert found.cache_copies == found.weight_copies == 0


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("slice_", ["v5e:4x4", "v6e:2x4", "v5p:2x2x2", "v4:2x2x1"])
def test_other_chips(slice_):
    found = evidence(on_v4(model="llama-3-70b-2l", slice=slice_, weights="bf16", layout="ws2d"))
    assert found.unexplained == 0 and found.fits and found.compute_s
    seconds = sum(found.compute_by_scope.values())
    assert seconds == pytest.approx(found.compute_s)


@pytest.mark.slow
@needs_libtpu
def test_heads_that_are_no_whole_tiles_cost_memory_and_no_copies():
    found = evidence(on_v4(model="mt-nlg-530b-3l", weights="bf16"))
    assert found.findings == () and found.analytic
    assert found.peak_bytes_per_chip == pytest.approx(found.analytic.hbm_bytes_per_chip, rel=0.01)


@pytest.mark.slow
@needs_libtpu
def test_a_cache_of_odd_length_is_not_copied():
    found = evidence(on_v4(model="palm-540b-h64-3l", context=2049, attention="heads"))
    assert found.findings == () and found.analytic
    assert found.peak_bytes_per_chip == pytest.approx(found.analytic.hbm_bytes_per_chip, rel=0.02)


@pytest.mark.slow
@needs_libtpu
def test_four_layers_stand_for_all():
    few, all_ = (evidence(on_v4(model=f"palm-540b-h64-{n}l")) for n in (4, 20))
    assert few.stack_compute_s and all_.stack_compute_s
    assert all_.stack_compute_s == pytest.approx(5 * few.stack_compute_s, rel=0.01)


@pytest.mark.slow
@needs_libtpu
def test_a_single_layer_is_a_stack_though_no_loop():
    """The stack of one layer is exactly the work of its scopes. Compilers differ in what a loop adds to a layer."""
    one, four = (evidence(on_v4(model=f"palm-540b-h64-{n}l")) for n in (1, 4))
    assert one.stack_compute_s and four.stack_compute_s
    assert one.stack_compute_s == pytest.approx(four.stack_compute_s / 4, rel=0.35)
    layer = [seconds for scope, seconds in one.compute_by_scope.items() if scope.split("/")[0] == "layer"]
    assert len(layer) >= 6
    assert one.stack_compute_s == pytest.approx(sum(layer), rel=1e-9)


@needs_libtpu
@pytest.mark.parametrize("slice_", ["v6e:1", "v5e:4", "v5p:1x1x1"])
def test_slices_of_one_axis(slice_):
    assert targets.describe(Slice.parse(slice_))


@pytest.mark.slow
@needs_libtpu
def test_asynchronous_gathers_have_no_absurd_seconds():
    point = on_v4(model="llama-3-70b-2l", slice="v5e:4x4", layout="wgx", attention="heads")
    found = evidence(point)
    assert found.compute_s and found.compute_s < 1 and found.overlapped is not None and 0 <= found.overlapped <= 1
    assert found.latency_s and found.exposed
    assert found.latency_s == pytest.approx(found.compute_s + found.exposed.collective_s)


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_an_answer_with_a_program_of_few_layers():
    point = on_v4(attention="heads", weights="bf16")
    found = evidence(point)
    assert found.fits is False
    assert found.refused and "RESOURCE_EXHAUSTED" in found.refused
    assert found.peak_bytes_per_chip == pytest.approx(found.analytic.hbm_bytes_per_chip, rel=0.01)  # pyright: ignore
    assert found.unexplained == 0
    assert found.n_layers == 4 and {m.count for m in found.collectives if "/" in m.scope} == {118}
    assert found.stack_compute_s and found.compute_s and found.stack_compute_s < found.compute_s


@needs_libtpu
def test_rows_of_the_command_and_that_they_are_kept(tmp_path, capsys, monkeypatch):
    argv = ["--model", "palm-8b-2l", "--slice", "v4:2x2x1", "--batch", "8", "--context", "128", "--json"]
    argv += ["--out", str(tmp_path)]
    assert command.main(argv) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("toruslab.models.programs.compiled.evidence", lambda *_, **__: pytest.fail("compiled again"))
    assert command.main(argv) == 0
    assert capsys.readouterr().out == first
    row = json.loads(first)
    assert {"point", "compile_s", "peak_bytes_per_chip", "fits", "collectives", "unexplained", "compute_s"} <= set(row)
    fields = {"scope", "kind", "axes", "bytes", "count", "planned_kind", "planned_bytes", "verdict"}
    assert all(fields <= set(c) for c in row["collectives"])
    for file in (tmp_path / "kept").iterdir():
        file.write_text(file.read_text()[:40])  # what a crash in the middle of a write might leave
    monkeypatch.undo()
    assert command.main(argv) == 0
    again = json.loads(capsys.readouterr().out)
    assert [c["verdict"] for c in again["collectives"]] == [c["verdict"] for c in row["collectives"]]


@pytest.mark.slow
@needs_libtpu
def test_the_largest_batch_that_compiles(tmp_path, capsys):
    argv = ["--model", "palm-8b", "--slice", "v5e:2x2", "--batch", "4", "--context", "2048", "--max-batch", "--json"]
    assert command.main([*argv, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["max_batch"]
    point = Point.from_json(
        {
            "model": "palm-8b",
            "slice": "v5e:2x2",
            "phase": "decode",
            "batch": 4,
            "context": 2048,
            "layout": "ws2d",
            "attention": "batch",
        }
    )
    assert found == pytest.approx(largest_batch(point), rel=0.15)


@given(st.integers(1, 64), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_search_finds_where_fitting_ends(step, end, guess):
    tried: list[int] = []

    def fits(n: int) -> bool:
        assert n % step == 0 and n > 0
        tried.append(n)
        return n <= end

    assert limit_search._last(step, guess, fits) == (end // step * step or None)
    assert len(tried) == len(set(tried)) <= 45


def test_without_libtpu_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu, which is not installed: pip install 'toruslab\[tpu\]'"):
        command.main(["--slice", "v4:4x4x4", "--weights", "int8"])


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--slice", "h100:2x2x2"], "nothing compiles for chip h100 from here; known are v4, v5e, v5p, v6e"),
        (["--slice", "v4:3x4x4"], "neither whole 4x4x4 cubes"),
        (["--slice", "cpu:2x2x2", "--batch", "3"], "batch=3 is not divisible by"),
        (["--slice", "cpu:2x2x2", "--model", "toy", "--max-batch"], "--max-batch needs a chip whose memory is known"),
        (['{"model":"toy"}', "--weights", "int8"], "weights='int8' stands beside a JSON point"),
        (["--points", "-", "--batch", "8"], "batch=8 stands beside --points"),
        (["--points", "no/such/file"], "points='no/such/file' cannot be read"),
        (["--slice", "cpu:2x2x2", "--model", "toy", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(argv, why):
    with pytest.raises(InputError) as error:
        command.main(argv)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_flags_and_models_are_part_of_the_key(monkeypatch, tmp_path):
    options = command.parser().parse_args([])
    options.flags = {}
    first = kept.key(on_cpu("ws2d", "batch"), "evidence", options)
    assert kept.key(on_cpu("ws2d", "batch"), "evidence", options) == first
    assert kept.key(on_cpu("ws2d", "batch"), "fits", options) != first
    assert kept.key(on_cpu("ws2d", "heads"), "evidence", options) != first
    options.flags = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=true"}
    assert kept.key(on_cpu("ws2d", "batch"), "evidence", options) != first


def test_programs_are_written_under_names_of_their_own(tmp_path):
    argv = ["--slice", "cpu:2x2x2", "--model", "toy-1l", "--batch", "8", "--hlo", str(tmp_path / "hlo"), "--json"]
    argv += ["--out", str(tmp_path)]
    for context in ("8", "16"):
        assert command.main([*argv, "--context", context]) == 0
    assert len(list((tmp_path / "hlo").iterdir())) == 2


def test_a_limit_that_fails_keeps_the_evidence(monkeypatch, tmp_path):
    def fail(*_):
        raise ValueError("no such thing")

    options = command.parser().parse_args(["--max-batch", "--out", str(tmp_path)])
    options.flags = {}
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(limit_search, "max_batch", fail)
    row = command._row(on_cpu("ws2d", "batch"), options)
    assert row["error"] == "ValueError: no such thing" and row["unexplained"] == 0 and row["collectives"]


@pytest.mark.parametrize(("end", "expected"), [(0, None), (1, 1), (127, 1), (128, 128), (5000, 4992)])
def test_the_longest_context_may_be_shorter_than_a_step(end, expected):
    point = on_v4()
    assert limit_search.max_context(point, lambda p: p.context <= end) == expected


def test_findings_are_found():
    found = evidence(on_cpu("ws2d", "batch"))
    bad = dataclasses.replace(found, cache_copies=2, weight_copies=1, relayouts={"w_in": 0.5}, rematerialisations=1)
    bad = dataclasses.replace(bad, compute_s=1.0, compute_by_scope={"other": 0.3})
    assert len(bad.findings) == 5


def test_a_file_of_points_is_answered_line_by_line(tmp_path, capsys):
    good = json.dumps(on_cpu("ws2d", "batch").to_json())
    failing = json.dumps(on_cpu("ws2d", "batch", context=33).to_json() | {"slice": "gpu:2x2x2"})
    points = tmp_path / "points.jsonl"
    points.write_text(f"{good}\nnonsense\n{failing}\n")
    assert command.main(["--points", str(points), "--json", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 2 and rows[0]["unexplained"] == 0 and "gpu" in rows[1]["error"]
    assert "line 2: not JSON" in said.err and "failed:" in said.err


def test_overlap_counts_what_runs_beside_a_collective():
    """The corpus program in which the TPU compiler overlaps weight gathers with matmuls."""
    from toruslab.partitioning.hlo.collectives import read
    from toruslab.partitioning.hlo.cycles import cycles_meanwhile

    text = (ROOT / "tests/partitioning/hlo/texts/weights-bf16-v5e-4x4x1-jax0.10.txt").read_text()
    beside = cycles_meanwhile(text)
    collectives = read(text, {"x": 4, "y": 4, "z": 1})
    asynchronous = {c.line for c in collectives if c.asynchronous}
    assert asynchronous and set(beside) >= asynchronous
    assert any(beside[line] > 0 for line in asynchronous)


@needs_libtpu
def test_the_mesh_of_a_description_is_a_torus():
    mesh = targets.target(Slice.parse("v4:2x2x4"), (2, 2, 4))
    assert [tuple(d.coords) for d in mesh.devices[1, 1]] == [(1, 1, z) for z in range(4)]


def test_the_cpu_path_does_not_load_libtpu(tmp_path):
    code = (
        "import sys; from toruslab.benchmarks.compile import main;"
        "main(['--slice','cpu:2x1x1','--model','toy-1l','--batch','2','--context','8','--json','--out',sys.argv[1]]);"
        "sys.exit('libtpu' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
