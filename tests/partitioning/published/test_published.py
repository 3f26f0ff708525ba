"""The analytic model against published numbers: how far off it is, what it orders rightly, and a file of one's own.

Figure 3 and Table 1 are in test_closed_forms.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toruslab.benchmarks import cli, published
from toruslab.benchmarks.reports.figures import PUBLISHED
from toruslab.partitioning.cost.forward import constants_of
from toruslab.partitioning.published.fit import SOFT
from toruslab.partitioning.torus.chip import chip

ROW = {
    "source": "a paper, Table 9",
    "stack_s": 0.03,
    "point": {
        "model": "palm-540b-h64",
        "slice": "v4:4x4x4",
        "phase": "decode",
        "batch": 128,
        "context": 2048,
        "layout": "ws2d",
        "attention": "batch",
        "weights": "int8",
    },
}


def own(rows: list[dict]) -> list[dict]:
    """The rows that came from the user's file."""
    return [r for r in rows if "line" in r]


def run(capsys, *argv: str, code: int = 0) -> tuple[list[dict], str]:
    """The command's rows and what it said on standard error."""
    assert cli.guarded(published.main, ["--json", *argv]) == code
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    return [published.answer(p) for p in (*published.calibration(), *published.figures())]


@pytest.fixture(scope="module")
def fitted() -> dict[str, float]:
    return published.fit(published.calibration())


def of(rows: list[dict], name: str, layout: str) -> list[dict]:
    return [r for r in rows if r["set"] == name and r["point"]["layout"] == layout]


def test_calibration_rows_are_within_12_percent(answers):
    rows = [r for r in answers if r["set"] in published.CALIBRATION]
    assert len(rows) == 28 and all(r["calibrated"] for r in rows)
    assert max(abs(r["error"]) for r in rows) < 0.12
    assert np.median([abs(r["error"]) for r in rows]) < 0.04
    assert max(abs(r["pass_error"]) for r in rows if "pass_error" in r) < 0.12


@pytest.mark.parametrize(("name", "n", "n_repeated"), [("Figure 6", 6, 1), ("Figure 7", 8, 1)])
def test_figures_6_and_7_are_predicted_within_15_percent(answers, name, n, n_repeated):
    """One point of each figure is a row of Table 2 again."""
    rows = [r for r in answers if r["set"] == name]
    assert len(rows) == n and sum(r["calibrated"] for r in rows) == n_repeated
    assert max(abs(r["error"]) for r in rows) < 0.15


@pytest.mark.parametrize("number", ["stack_s", "analytic_s"])
def test_2d_is_ahead_of_1d_and_the_gap_grows_with_chips(answers, number):
    one_d, two_d = ([r[number] for r in of(answers, "Figure 6", x)] for x in ("ws1d", "ws2d"))
    gaps = [a / b for a, b in zip(one_d, two_d, strict=True)]
    assert 1 < gaps[0] < gaps[1] < gaps[2]


@pytest.mark.parametrize("number", ["stack_s", "analytic_s"])
def test_prefill_switches_to_gathered_weights_between_131k_and_262k_tokens(answers, number):
    stationary, gathered = ([r[number] for r in of(answers, "Figure 7", x)] for x in ("ws2d", "wgxyz"))
    faster = [g < s for s, g in zip(stationary, gathered, strict=True)]
    assert faster == [False, True, True, True]


def test_mfu_is_the_tables(answers):
    """Tables 2 and 3 print two digits of the whole pass; Figure 7 is where its seconds are from."""
    for row in (r for r in answers if "mfu" in r):
        seconds = row.get("published_s", row.get("stack_s"))
        analytic_s = row.get("analytic_pass_s", row["analytic_s"])
        assert row["analytic_mfu"] * analytic_s / seconds == pytest.approx(row["mfu"], abs=0.011)


def test_the_chip_file_holds_what_the_fit_gives(fitted):
    assert fitted == pytest.approx(constants_of(chip("v4")), rel=0.01)


def test_the_fit_is_a_minimum_and_does_not_depend_on_its_start(fitted):
    """No constant moved by 1% makes the loss smaller."""

    def loss(constants):
        errors = np.log([1 + published.answer(p, constants)["error"] for p in published.calibration()])
        return np.sum(np.sqrt(1 + (errors / SOFT) ** 2) - 1)

    best = loss(fitted)
    for name in fitted:
        for factor in (0.99, 1.01):
            assert loss({**fitted, name: fitted[name] * factor}) > best
    far = dict(zip(fitted, (0.4, 1.4, 0.5, 20e-6, 0.0), strict=True))
    assert published.fit(published.calibration(), far) == pytest.approx(fitted, rel=1e-3)


def test_the_fit_finds_constants_that_made_the_numbers():
    """Rows computed from known constants; one of them a tenth off, which the loss forgives."""
    known = dict(zip(constants_of(chip("v4")), (0.7, 0.9, 0.8, 6e-6, 1e-6), strict=True))
    rows = []
    for i, row in enumerate(published.calibration()):
        seconds = published.answer(row, known)["analytic_s"] * (1.1 if i == 3 else 1)
        rows.append(published.Published(point=row.point, set="made", citation="made", stack_s=seconds))
    assert published.fit(rows) == pytest.approx(known, rel=0.02)


@pytest.mark.slow
def test_leaving_rows_out_is_reported_beside_the_fit(capsys):
    rows, _ = run(capsys, "--fit")
    assert rows[0]["source"] == "fitted" and rows[0]["n"] == 28
    left_out = [r for r in rows if "loo_error" in r]
    assert len(left_out) == 28 and all(r["set"] in published.CALIBRATION for r in left_out)
    assert max(abs(r["loo_error"]) for r in left_out) < 0.12
    assert np.median([abs(r["loo_error"]) for r in left_out]) >= np.median([abs(r["error"]) for r in left_out])


def test_malformed_lines_are_named_and_the_others_answered(capsys, tmp_path):
    bad = [
        ("{", "not JSON"),
        ("[1, 2]", "a row is a JSON object, not list"),
        (json.dumps({k: v for k, v in ROW.items() if k != "source"}), "source=None must be text"),
        (json.dumps({k: v for k, v in ROW.items() if k != "stack_s"}), "missing field 'stack_s' or 'published_s'"),
        (json.dumps({k: v for k, v in ROW.items() if k != "point"}), "missing field 'point'"),
        (json.dumps(ROW | {"stack_s": -1}), "stack_s=-1 must be a positive number"),
        (json.dumps(ROW | {"stack_s": "0.03"}), "stack_s='0.03' must be a positive number"),
        (json.dumps(ROW | {"stack_s": float("nan")}), "stack_s=nan must be a positive number"),
        (json.dumps(ROW | {"published_s": True}), "published_s=True must be a positive number"),
        (json.dumps(ROW | {"mfu": 43}), "mfu=43 must be a positive number, at most 1"),
        (json.dumps(ROW | {"point": 3}), "a point is a JSON object, not int"),
        (json.dumps(ROW | {"point": ROW["point"] | {"batch": 3}}), "batch=3 is not divisible by"),
        (json.dumps(ROW | {"point": ROW["point"] | {"layuot": "ws2d"}}), "did you mean 'layout'?"),
        (json.dumps(ROW | {"point": ROW["point"] | {"slice": "v5e:4x4x4"}}), "slice 4x4x4"),
        (json.dumps(ROW | {"point": ROW["point"] | {"layout": "auto"}}), "layout='auto' has no plan"),
        (json.dumps(ROW | {"point": ROW["point"] | {"slice": "cpu:4x4x4"}}), "chip='cpu'"),
        ("[" * 100_000, "not JSON"),
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([json.dumps(ROW), "", *(line for line, _ in bad), json.dumps(ROW), ""]))
    rows, err = run(capsys, "--points", str(file), code=1)
    assert [r["line"] for r in own(rows)] == [1, 3 + len(bad)]
    said = err.splitlines()
    assert len(said) == len(bad)
    for number, (sentence, (_, reason)) in enumerate(zip(said, bad, strict=True), start=3):
        assert sentence.startswith(f"error: mine.jsonl, line {number}: ") and reason in sentence


@pytest.mark.parametrize(
    "text", [json.dumps([ROW, ROW]), json.dumps([ROW, ROW], indent=1), f"{json.dumps(ROW)}\r\n" * 2]
)
def test_own_points_as_lines_or_as_an_array(capsys, tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    rows, err = run(capsys, "--points", str(file))
    found = own(rows)
    assert err == "" and len(found) == 2
    assert found[0]["source"] == "published" and found[0]["citation"] == ROW["source"] and not found[0]["calibrated"]
    assert found[0]["error"] == pytest.approx(found[0]["analytic_s"] / 0.03 - 1)


def test_a_number_of_the_whole_pass_is_held_against_the_whole_pass(capsys, tmp_path):
    whole = {k: v for k, v in ROW.items() if k != "stack_s"} | {"published_s": 0.03}
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, (ROW, whole, ROW | whole))))
    layers, alone, both = own(run(capsys, "--points", str(file))[0])
    assert layers["analytic_s"] < alone["analytic_s"] == both["analytic_pass_s"]
    assert both["analytic_s"] == layers["analytic_s"] and both["pass_error"] == alone["error"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "No such file"), ("\n\n", "holds no rows"), ("[]", "holds no rows"), ("[{]", "not a JSON array")],
)
def test_a_file_without_rows_is_refused(capsys, tmp_path, text, sentence):
    file = tmp_path / "mine.jsonl"
    if text is not None:
        file.write_text(text)
    assert cli.guarded(published.main, ["--points", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: points=") and sentence in err and err.count("\n") == 1


def test_a_binary_file_is_refused(capsys, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    assert cli.guarded(published.main, ["--points", str(file)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_tables_and_pictures(capsys, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW | {"source": "[a] paper"}))
    assert published.main(["--points", str(file), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "mine.jsonl: [a] paper" in out and "all of mine.jsonl" in out and "Figure 7, " not in out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"rows.jsonl"} | {f"{name}.{kind}" for name in PUBLISHED for kind in ("svg", "png")}


def test_no_backend_is_initialised():
    code = (
        "from benchmarks import published\n"
        "assert published.main(['--json']) == 0\n"
        "from jax._src import xla_bridge\n"
        "assert len(xla_bridge._backends) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[3])
