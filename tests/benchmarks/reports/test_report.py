"""The report: what it says of rows that are complete, odd or failed, its page as HTML, and the comparison of runs."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.points import POINT
from toruslab.benchmarks import cli, report
from toruslab.benchmarks.report import load, objects
from toruslab.benchmarks.reports import bench_report, mesh_picture, side_by_side
from toruslab.benchmarks.reports.bench_report import markdown, show, write
from toruslab.benchmarks.reports.cells import groups, traced
from toruslab.benchmarks.reports.page import comparison_page
from toruslab.benchmarks.reports.style import Picture
from toruslab.benchmarks.reports.tables import Column, DataTable, Value
from toruslab.benchmarks.runs.rows import RowFile

ENVIRONMENT = {"n_devices": 8, "platform": "cpu", "cores": 2, "jax": "0.10.2", "commit": "abc", "load_1m": 0.5}
GATHER = {"scope": "layer/w_in", "kind": "all-gather", "axes": ["x", "y"], "bytes": 4096, "count": 4}
REDUCE = {"scope": "layer/out", "kind": "reduce-scatter", "axes": ["z"], "bytes": 512, "count": 4}
PICTURES = ("latency", "predicted", "roofline", "crossover", "terms", "bytes", "torus")


def one(layout, measured_s, predicted_s, **changes):
    """The three rows of a point with everything in them."""
    point = POINT | {"layout": layout} | changes
    planned = [GATHER, REDUCE] if layout.startswith("wg") else [REDUCE]
    priced = {"latency_s": predicted_s, "terms": {"matmul_s": predicted_s * 0.75, "collective_s": predicted_s * 0.25}}
    total = {"collectives": planned, "collective_bytes": sum(c["bytes"] * c["count"] for c in planned)}
    total["n_collectives"] = 4 * len(planned)
    roof = {"roofline": {"flops_per_s": 5e10, "bytes_per_s": 1e10}, "flops": 4e8, "memory_bytes": 1e8, "chip": "here"}
    verdicts = [c | {"verdict": "as planned"} for c in planned]
    spread = {"quartiles_s": [measured_s * 0.9, measured_s * 1.1], "times_s": [measured_s] * 3, "outliers": 0}
    profile = {"step_s": measured_s, "rows": [{"scope": "layer/h", "kind": "matmul", "device_s": 2.0}]}
    common = {"point": point, "environment": ENVIRONMENT}
    is_auto = layout == "auto"
    return [
        common | {"source": "analytic"} | total | roof | ({} if is_auto else priced),
        common
        | {"source": "compiled", "peak_bytes_per_chip": 1e6, "compile_s": 1.0, "unexplained": 0}
        | total
        | {"collectives": verdicts}
        | (priced if is_auto else {}),
        common | {"source": "measured", "latency_s": measured_s, "profile": profile} | spread,
    ]


def grid(scale=1.0):
    """Two cells, in one of which gathering wins."""
    found = []
    for batch, times in ((8, (0.004, 0.009, 0.02)), (64, (0.04, 0.02, 0.05))):
        for layout, t in zip(("ws2d", "wgxy", "auto"), times, strict=True):
            found += one(layout, t * scale, t * 1.1, batch=batch)
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with the report of the whole grid."""
    folder = tmp_path_factory.mktemp("run")
    for row in grid():
        RowFile(folder / "rows.jsonl").add(row)
    write(grid(), folder)
    return folder


@pytest.fixture
def no_sheets(monkeypatch):
    """Leaves out the pictures' own files, whose panels the page has, too."""

    def saved(picture, folder):
        path = folder / f"{picture.name}.png"
        path.write_text("a sheet")
        return [path]

    monkeypatch.setattr(bench_report, "save", saved)


class Page(HTMLParser):
    """What a test asks of a page: ids, links, tables, and whether every element is closed in its turn."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.tables, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert len(given) == len(attrs), f"{tag} has an attribute twice"
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[k] for k in ("href", "xlink:href") if k in given]
        self.loads += [given[k] for k in ("src", "srcset", "data", "poster") if k in given]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def check(text) -> Page:
    """A page that loads nothing, whose ids are unique, whose links lead somewhere and whose tables are rectangles."""
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.loads == []
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert page.tables and all(len(set(rows)) == 1 for rows in page.tables)
    assert not re.search(r"url\((?!#)|@import|<link|<script src", text)
    assert all(u.startswith("http://www.w3.org/") for u in re.findall(r"https?://[^\"'\s<]+", text))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    return page


def test_the_page_is_self_contained(drawn):
    page = check((drawn / "report.html").read_text())
    said = " ".join(page.texts)
    for words in ("median of |error|", "at most 20%", "met", "abc", "Weight-gathered is faster", "failed"):
        assert (words in said) == (words != "failed")
    assert {p.name for p in drawn.iterdir()} >= {f"{n}.{s}" for n in PICTURES for s in ("svg", "png")}


def test_a_page_is_the_same_again(drawn, tmp_path, no_sheets):
    write(grid(), tmp_path)
    name = f"toruslab bench: {tmp_path.name}"
    again = (tmp_path / "report.html").read_text().replace(name, f"toruslab bench: {drawn.name}")
    assert again == (drawn / "report.html").read_text()


def without(rows, *fields):
    return [{k: v for k, v in r.items() if k not in fields} for r in rows]


ODD = {
    "no predictions": without(one("ws2d", 1.0, 1.0), "latency_s", "terms")[:2] + one("ws2d", 1.0, 1.0)[2:],
    "only measured": one("ws2d", 0.1, 0.1)[2:],
    "only planned": one("ws2d", 0.1, 0.1)[:1],
    "nothing but points": [{"point": POINT, "source": s} for s in ("analytic", "compiled", "measured")],
    "only failures": [{"point": POINT, "source": "compiled", "error": "<b>no</b> & never\n|"}],
    "no quartiles": without(grid(), "quartiles_s", "times_s", "environment", "profile"),
    "no collectives": without(grid(), "collectives", "collective_bytes", "roofline"),
    "values that are none": [
        r | {"latency_s": None, "quartiles_s": [None, 1], "terms": [], "collectives": None, "profile": {"rows": [1]}}
        for r in grid()
    ],
    "numbers that are none": [
        r | {"latency_s": float("nan"), "flops": "many", "environment": {"x": None}} for r in grid()
    ],
    "terms below zero": [r | {"terms": {"matmul_s": 1.0, "dispatch_s": -0.5, "new_s": 0.1}} for r in grid()],
    "a layout of one's own": [
        *one("ws2d", 1.0, 1.0)[:1],
        one("ws2d", 1.0, 1.0)[2] | {"point": POINT | {"layout": "mine<&"}},
    ],
    "nothing moves": [r | {"collective_bytes": 0, "n_collectives": 0, "collectives": []} for r in grid()],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=list(ODD))
def test_what_is_missing_is_blank_and_never_an_error(rows, tmp_path, capsys, no_sheets):
    from rich.console import Console

    (tmp_path / "torus.png").write_text("of an earlier report")
    paths = write(rows, tmp_path)
    check((tmp_path / "report.html").read_text())
    assert all(p.stat().st_size for p in paths) and {p.name for p in paths} == {p.name for p in tmp_path.iterdir()}
    show(rows, Console(width=120))
    shown = capsys.readouterr().out + markdown(rows)
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", shown)
    json.dumps(objects(rows), allow_nan=False)


def test_a_failure_is_told_and_escaped(tmp_path):
    write(ODD["only failures"], tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; &amp; never" in text and "<b>no</b>" not in text
    assert "1 point(s) failed" in text


def test_the_terminal_has_predictions_and_says_how_good_they_are(drawn, capsys, no_sheets):
    assert report.main([str(drawn)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4.40 (+10%)" in out and "4.00 (3.60..4.40)" in out
    assert "Prediction, 6 points: median error 10%" in out and "All targets are met." in out
    assert "measured from about" in out and "report.html" in out


def test_json_has_a_point_a_line_and_the_summary(drawn, capsys, no_sheets):
    assert report.main([str(drawn), "--json"]) == 0
    *points, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(points) == 6 and points[0]["relative_error"] == pytest.approx(0.1)
    assert last["kind"] == "summary" and last["median_error"] == pytest.approx(0.1)


def test_bad_input_is_one_sentence(drawn, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "rows.jsonl").touch()
    for argv, sentence in (
        (["no/such/folder"], "holds no rows.jsonl"),
        ([str(empty)], "holds no rows yet"),
        ([str(drawn), "--out", "x"], "out is for several folders"),
        ([str(drawn), str(drawn)], "the same folder is given twice"),
        ([], "DIR"),
    ):
        assert cli.guarded(report.main, argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


@pytest.fixture
def other(tmp_path):
    """A second run: one cell slower by a half, and one point not measured."""
    folder = tmp_path / "other"
    rows = [r for r in grid(1.5) if r["point"]["batch"] == 8][:-1] + [
        r for r in grid(1.02) if r["point"]["batch"] == 64
    ]
    for row in rows:
        RowFile(folder / "rows.jsonl").add(row)
    return folder


def test_runs_are_compared_point_by_point(drawn, other, tmp_path, capsys):
    out = tmp_path / "compared"
    assert report.main([str(drawn), str(other), "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "5 of 6 points were measured in all 2 runs." in said
    assert "3 of 5 agree within the runs' spread (60%)." in said
    assert "1.02 to 1.50 over all points" in said and "Prediction of other" in said
    check((out / "compare.html").read_text())
    assert (out / "ratio.png").stat().st_size and (out / "ratio.svg").stat().st_size

    assert report.main([str(drawn), str(other), "--out", str(out), "--json"]) == 0
    *points, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [p["agrees"] for p in points] == [False, False, None, True, True, True]
    assert points[0]["ratios"] == [pytest.approx(1.5)] and points[2]["medians_s"][1] is None
    assert (last["n_points"], last["n_compared"], last["n_agree"]) == (6, 5, 3)


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    a, b = tmp_path / "a" / "bench", tmp_path / "b" / "bench"
    assert side_by_side.names([a, b]) == ["a/bench", "b/bench"]
    assert side_by_side.names([a, tmp_path / "other"]) == ["bench", "other"]


def test_load_gives_the_rows_of_a_folder(drawn):
    assert load(drawn) == grid()


def test_tables_sort_by_numbers_and_escape():
    numbers = [Column("name", lambda x: x[0], numeric=False), Column("ms", lambda x: Value(text=x[1], sort=x[2]))]

    def drawn(record):
        table = DataTable(title="times", columns=numbers, records=[record])
        return comparison_page({}, [], "", table, [], Picture(name="ratio", heading="", says="", panels=[]))

    text = drawn(("<a>", "1,000", 1000.0))
    assert 'data-v="1000.0"' in text and "&lt;a&gt;" in text and text.count("<button") == 2
    assert 'data-v=""' in drawn(("a", "", None))


@pytest.mark.parametrize(
    ("point", "shape"),
    [
        ({"slice": "v5e:4x4"}, (4, 4, 1)),
        ({"slice": "v4:4x4x8", "mesh": "8x16"}, (8, 16, 1)),
        ({"slice": "cpu:8"}, (8, 1, 1)),
        ({"slice": "nonsense"}, None),
    ],
)
def test_the_torus_has_the_meshs_extents(point, shape):
    assert mesh_picture.mesh_of(point) == shape


def test_the_torus_weighs_axes_by_what_runs_over_them():
    lines = groups(one("wgxy", 1.0, 1.0))
    (line,) = next(iter(lines.values()))
    used = mesh_picture.of_a_layer(line.collectives)
    assert mesh_picture.by_axis(used) == {"x": 4096, "y": 4096, "z": 512}
    assert [p.title for p in mesh_picture.torus(lines).panels] == ["wgxy/batch"]


def test_a_profiles_collectives_stand_beside_their_price():
    rows = [
        {"scope": "layer/x", "kind": "collective", "collective": "all-gather", "axes": ["y", "z"], "device_s": 0.5},
        {"scope": "layer/x", "kind": "other", "device_s": 0.25, "count": 4},
    ]
    gather = {"scope": "layer/x", "kind": "all-gather", "axes": ("y", "z"), "seconds": 0.125, "count": 4}
    one, other = traced({"rows": [*rows, 1]}, [gather, gather | {"axes": ("x",)}, {}])
    assert (one.what, one.predicted_s, one.device_s) == ("all-gather(yz)", 0.5, 0.5)
    assert (other.what, other.predicted_s, other.count) == ("other", None, 4)
    assert traced({}, ()) == []
