"""Every figure of the catalogue has a source, and what cannot be a chip or a slice is refused in plain words."""

import dataclasses
import doctest

import pytest

from toruslab.partitioning.torus import chip as chips
from toruslab.partitioning.torus.chip import Chip, chip, names

MINE = """
name = "mine"
peak_flops_per_s.f32 = { value = 1e11, source = "measured" }
hbm_bytes = { value = 16e9, source = "measured" }
hbm_bytes_per_s = { value = 2e10, source = "measured" }
link_bytes_per_s = { value = 1e9, source = "measured" }
n_links = { value = 1, source = "measured" }
torus_axes = { value = 0, source = "one host" }
wrap = { value = "switch", source = "one host" }
hop_s = { value = 0, source = "measured" }
max_dims = { value = [8], source = "devices" }
max_chips = { value = 8, source = "devices" }
[fitted]
matmul_efficiency = { value = 0.8, on = "products on this host" }
hbm_efficiency = { value = 0.9, on = "copies on this host" }
link_efficiency = { value = 1, on = "64 collectives on this host" }
hop_s = { value = 0, on = "64 collectives on this host" }
collective_s = { value = 1e-4, on = "64 collectives on this host" }
"""


def test_doctests():
    assert doctest.testmod(chips).failed == 0


def test_the_catalogue_is_complete():
    assert set(names()) == {"v4", "v5e", "v5p", "v6e", "v7x", "a100", "a100-40", "h100", "h200", "b200"}


@pytest.mark.parametrize("name", names())
def test_every_figure_has_a_source(name):
    sheet = chip(name)
    assert sheet.name == name
    hash(sheet)
    figures = {f.name for f in dataclasses.fields(Chip)} - {"name", "peak_flops_per_s", "sources", "others"}
    figures -= {"fitted", "machine"}
    figures |= {f"peak_flops_per_s.{dtype}" for dtype in sheet.peak_flops_per_s}
    assert figures - {"clock_hz"} <= set(sheet.sources)
    assert all(sheet.sources.values()) and all(other.source for other in sheet.others)
    assert {"bf16", "int8", "f32"} <= set(sheet.peak_flops_per_s)


def test_sources_that_disagree_are_kept():
    said = {other.value for other in chip("v5p").others if other.field == "hbm_bytes_per_s"}
    assert said == {2.8e12, 2.46e12}


@pytest.mark.parametrize(("name", "matrix_units"), [("v4", 8 * 128**2), ("v5e", 4 * 128**2), ("v5p", 8 * 128**2)])
def test_clocks_explain_the_peaks(name, matrix_units):
    sheet = chip(name)
    assert sheet.clock_hz is not None
    assert 2 * matrix_units * sheet.clock_hz == pytest.approx(sheet.peak("bf16"), rel=0.005)


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("v4", (4, 4, 4)),
        ("v4", (2, 4, 2)),
        ("v4", (4, 8, 8)),
        ("v5e", (8, 4)),
        ("v5e", (16, 16, 1)),
        ("h100", (2, 2, 2)),
    ],
)
def test_legal_slices(name, dims):
    chip(name).check_slice(dims)


@pytest.mark.parametrize(
    ("name", "dims", "rule"),
    [
        ("v5e", (32, 4), "allows at most 16"),
        ("v4", (6, 4, 4), "neither whole 4x4x4 cubes"),
        ("v4", (2, 8, 8), "neither whole 4x4x4 cubes"),
        ("v4", (32, 32, 32), "joins at most 4096"),
        ("h100", (16,), "joins at most 8"),
        ("v4", (0, 4), "positive whole extents"),
        ("v6e", (4, 4, 4), "a torus of 2"),
    ],
)
def test_illegal_slices_are_refused(name, dims, rule):
    with pytest.raises(ValueError, match=rule):
        chip(name).check_slice(dims)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="chip='v5' is not known: did you mean 'v5"):
        chip("v5")
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        chip("H100")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_platforms_are_to_be_calibrated(name):
    with pytest.raises(ValueError, match="toruslab calibrate"):
        chip(name)


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='fp4' has no peak rate on chip v4; it has bf16, int8, f32"):
        chip("v4").peak("fp4")


def test_a_chip_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    mine = chip(file)
    assert mine.hbm_bytes == 16_000_000_000 and mine.max_dims == (8,)
    assert mine.fitted["collective_s"] == 1e-4 and len(mine.fitted) == 5
    assert mine.sources["fitted.collective_s"] == "64 collectives on this host"


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('hop_s = { value = 0, source = "measured" }', "", "field 'hop_s' is missing"),
        (
            'hop_s = { value = 0, source = "measured" }',
            "hop_s = 0",
            "'hop_s' must be a table with 'value' and 'source'",
        ),
        ("hop_s = { value = 0,", "hops_s = { value = 0,", "unknown field 'hops_s'"),
        ("value = 2e10", "value = -2e10", "hbm_bytes_per_s=-20000000000.0 must be a positive number"),
        ('"switch"', '"ring"', "wrap='ring' must be one of"),
        ('value = 0, source = "one host"', 'value = 2, source = "one host"', "contradict each other"),
        ("value = [8]", "value = 8", "max_dims=8 must be a list"),
        ('name = "mine"', "name = 3", "field 'name' is missing"),
        ('name = "mine"', "name =", "not TOML"),
    ],
)
def test_bad_files_are_refused(tmp_path, old, new, rule):
    assert old in MINE
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(ValueError, match=rule):
        chip(file)


def test_missing_file_is_refused():
    with pytest.raises(ValueError, match="there is no such file"):
        chip("nowhere.toml")
