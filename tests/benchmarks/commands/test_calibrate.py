"""The command `calibrate`: it writes a chip that prices passes, and refuses bad input before it measures."""

import json

import pytest

from toruslab.benchmarks import calibrate, cli
from toruslab.benchmarks.measure import building_blocks
from toruslab.benchmarks.measure.building_blocks import blocks
from toruslab.partitioning.torus.chip import chip


@pytest.fixture
def few_blocks(monkeypatch):
    """A calibration of seconds: one size of everything."""

    def few(mesh, dtypes, platform, *, quick=False):
        seen = set()
        for block in blocks(mesh, dtypes, platform, quick=quick):
            s = block.sample
            key = (s.what, s.dtype, s.sizes.get("length") == 1, s.at, s.sizes.get("group"))
            if key not in seen:
                seen.add(key)
                yield block

    monkeypatch.setattr(building_blocks, "blocks", few)


@pytest.mark.slow
def test_the_command_writes_a_chip_that_prices_passes(few_blocks, tmp_path, capsys):
    out = tmp_path / "mine.toml"
    assert calibrate.main(["--repeats", "2", "--out", str(out), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = chip(out).machine
    assert written and len(rows) == len(written.samples) and rows[0]["what"] == "dispatch"
    assert cli.main(["estimate", "--slice", f"{out}:2x2x2", "--model", "toy", "--weights", "f32", "--batch", "8"]) == 0
    assert "collective" in capsys.readouterr().out
    assert calibrate.main(["--repeats", "1", "--out", str(out)]) == 0
    assert "GFLOP/s of 8 devices at once, which share the cores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--slice", "cpu"], "slice='cpu' must be CHIP:DIMS"),
        (["--dtypes", "f32,f16"], "dtypes='f32,f16': 'f16' is not one of f32, bf16, int8"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--platform", "gpu"], "platform='gpu' does not fit slice=cpu:2x2x2"),
        (["--processes", "3"], "processes=3 does not divide the 8 chips"),
        (["--mesh", "3x3"], "mesh='3x3' has 9 places"),
        (["--out", "chip.json"], "out='chip.json' must end in .toml"),
        (["--out", "/dev/null/chip.toml"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("it measured"))
    assert cli.guarded(calibrate.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence in err and err.count("\n") == 1
