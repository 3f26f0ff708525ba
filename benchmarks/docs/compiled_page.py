"""Tables of the page "What the TPU compiler does with each layout", from rows of `toruslab compile`.

    toruslab compile --points docs/data/points.jsonl --json > rows.jsonl
    python -m benchmarks.docs.compiled_page rows.jsonl         keeps what the page needs in docs/data/tpu_compiler.jsonl
    python -m benchmarks.docs.generate docs/tpu_compiler.md    writes the tables anew

The tables that the training page has as well take its rows as an argument. Published numbers are the only other source.
"""

import functools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from toruslab.benchmarks.reports.tables import markdown_table
from toruslab.benchmarks.runs.parser import guarded
from toruslab.benchmarks.runs.rows import Row, keep
from toruslab.partitioning.cost.estimate import estimate, estimate_many
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer
from toruslab.partitioning.published.papers import calibration, figures

DATA = Path(__file__).resolve().parents[2] / "docs" / "data" / "tpu_compiler.jsonl"
KEPT = [
    "point",
    "n_layers",
    "compile_s",
    "host_peak_bytes",
    "argument_bytes",
    "temporary_bytes",
    "peak_bytes_per_chip",
    "fits",
    "unexplained",
    "extra_bytes",
    "compute_s",
    "stack_compute_s",
    "n_unestimated",
    "overlapped",
    "findings",
    "versions",
]
"""Fields of a row that the page needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("compiled_page", __doc__, argv, compact, DATA)


def compact(row: Row) -> Row:
    """The fields of a row that a page needs; of the collectives, their number and the departures from the plan."""
    departures: list[Row] = []
    for c in row["collectives"]:
        if c["verdict"] == "as planned":
            continue
        extra = ((c["bytes"] or 0) - (c["planned_bytes"] or 0)) * c["count"]
        if c["planned_kind"] and not c["planned_bytes"]:  # a further part of the one before
            departures[-1]["extra_bytes"] += extra
            departures[-1]["algorithm"] = " + ".join(filter(None, (departures[-1]["algorithm"], c["algorithm"])))
        else:
            kept = {k: c[k] for k in ("scope", "verdict")}
            departures.append(kept | {"algorithm": c["algorithm"] or "", "extra_bytes": extra})
    return {name: row.get(name, 0) for name in KEPT} | {
        "n_collectives": len(row["collectives"]),
        "n_as_planned": sum(c["verdict"] == "as planned" for c in row["collectives"]),
        "departures": departures,
    }


@functools.cache
def data(path: Path = DATA) -> tuple[Row, ...]:
    """The rows of a page, each with the cost model's answer of today as `analytic`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = estimate_many([Point.from_json(row["point"]) for row in rows])
    return tuple(row | {"analytic": analytic} for row, analytic in zip(rows, found, strict=True))


def grouped(rows: Iterable[Row], key: Callable[[Row], tuple | str]) -> dict[Any, list[Row]]:
    """Rows by key, in the order of their first rows."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def totals(path: Path = DATA) -> str:
    """All rows in four lines: points, collectives, memory, time to compile."""
    rows = data(path)
    programs = [r for r in rows if r["n_layers"]]
    errors = sorted(abs(e) for r in rows if (e := memory_error(r)) is not None)
    by = ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items())
    compile_s = [r["compile_s"] for r in programs]
    return (
        f"- {len(rows)} points, by {by}; {sum(r['fits'] for r in rows)} fit their slice, "
        f"{len(rows) - len(programs)} leave no program to look at.\n"
        f"- collectives in these programs: {sum(r['n_collectives'] for r in programs):,}; unexplained: "
        f"{sum(r['unexplained'] for r in programs)}; as planned to the byte: "
        f"{sum(r['n_as_planned'] for r in programs):,}.\n"
        f"- peak memory against the analytic figure: median error {statistics.median(errors):.1%}, "
        f"90th percentile {errors[int(0.9 * len(errors))]:.1%}, worst {errors[-1]:.1%}; "
        f"{sum(e <= 0.1 for e in errors)} of {len(errors)} within 10%.\n"
        f"- to compile: median {statistics.median(compile_s):.1f} s, longest {max(compile_s):.1f} s (on two noisy "
        f"cores); host memory at most {max(r['host_peak_bytes'] for r in rows) / 2**30:.1f} GiB."
    )


def departures(path: Path = DATA) -> str:
    """Where the compiler departs from the plan, by what happened and to which tensor."""
    each = [row | {"departure": d} for row in data(path) for d in row["departures"]]
    found = grouped(each, lambda r: tuple(r["departure"][k] for k in ("verdict", "scope", "algorithm")))
    rows = []
    for (verdict, scope, algorithm), members in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        programs = len({json.dumps(r["point"]) for r in members})
        names = ", ".join(sorted({r["point"]["layout"] for r in members}))
        most = max(r["departure"]["extra_bytes"] for r in members) / 1e6
        rows.append((verdict, scope, str(programs), names, f"{most:,.3f}", algorithm or "(none named)"))
    headings = ("verdict", "tensor", "programs", "layouts", "MB beyond the plan, at most", "algorithm")
    return "\n".join(markdown_table(headings, rows))


def published() -> str:
    """The compiler's compute with the analytic collectives, beside the published times of the layers."""
    by_point = {json.dumps(r["point"], sort_keys=True): r for r in data()}
    rows, errors = [], {}
    for row in (*calibration(), *figures()):
        compiled = by_point.get(json.dumps(row.point.to_json(), sort_keys=True))
        if not compiled or compiled["stack_compute_s"] is None or row.stack_s is None:
            continue
        exposed = estimate(row.point, overlap=False)
        moving_s = math.fsum(c.seconds * c.count for c in exposed.collectives if of_a_layer(c.scope))
        both_s = (compiled["stack_compute_s"] + moving_s, compiled["analytic"].stack_latency_s)
        pair = tuple(s / row.stack_s - 1 for s in both_s)
        for name in (row.set, "all"):
            errors.setdefault(name, []).append(pair)
        beside = [text for s, e in zip(both_s, pair, strict=True) for text in (f"{s * 1e3:,.2f}", f"{e:+.1%}")]
        rows.append((row.set, _label(compiled), f"{row.stack_s * 1e3:,.2f}", *beside))
    headings = (
        *("published", "point", "published ms", "compiler + analytic ms", "error"),
        *("analytic alone", "error"),
    )
    out = [*markdown_table(headings, rows), ""]
    for name in sorted(errors, key=lambda name: (name == "all", name)):
        theirs, ours = (statistics.median(abs(p[i]) for p in errors[name]) for i in (0, 1))
        out.append(f"- {name}: {len(errors[name])} points, median error {theirs:.1%} (analytic alone {ours:.1%})")
    return "\n".join(out)


def overlap() -> str:
    """The share of the collectives' time that the compiled program computes beside them."""
    known = [r for r in data() if r["n_layers"] and r["overlapped"] is not None]
    rows = []
    for (slice_, phase), members in grouped(known, lambda r: (r["point"]["slice"], r["point"]["phase"])).items():
        most = max(members, key=lambda r: r["overlapped"])
        some = sum(r["overlapped"] > 0.005 for r in members)
        where = f"{most['point']['model']}, {_label(most, short=True)}" if some else ""
        rows.append((slice_, phase, str(len(members)), str(some), f"{most['overlapped']:.0%}", where))
    headings = ("slice", "phase", "programs", "with any overlap", "largest share", "at")
    return "\n".join(markdown_table(headings, rows))


def findings() -> str:
    """What the checks of whole programs found."""
    each = [row | {"finding": finding} for row in data() for finding in row["findings"]]

    def kind(row: Row) -> str:
        text = row["finding"]
        return text.split(" costs ")[0] if " costs " in text else text.lstrip("0123456789 ")

    rows = []
    for name, members in grouped(each, kind).items():
        where = Counter(f"{r['point']['phase']} {r['point']['layout']}" for r in members)
        rows.append((name, str(len(members)), ", ".join(f"{n} {w}" for w, n in sorted(where.items()))))
    clean = sum(not r["findings"] for r in data() if r["n_layers"])
    return "\n".join(
        [*markdown_table(("check", "programs", "of these"), rows), "", f"{clean} programs have no finding."]
    )


def everything() -> str:
    """A row for every point."""
    headings = (
        *("point", "GiB a chip", "analytic", "fits", "collectives", "not as planned", "unexplained"),
        *("compute ms: compiler", "analytic compute, memory"),
    )

    def cells(row: Row) -> list[str]:
        analytic = row["analytic"]
        return [
            _label(row, short=True),
            *memory(row),
            yes(row["fits"]),
            *collectives(row),
            compute(row, 1e3),
            f"{analytic.compute_s * 1e3:,.2f}, {analytic.memory_s * 1e3:,.2f}",
        ]

    return by_slice(data(), headings, cells)


def by_slice(rows: Iterable[Row], headings: Sequence[str], cells: Callable[[Row], Sequence[str]]) -> str:
    """A table for every model and slice, each under its heading."""
    found = grouped(rows, lambda r: (r["point"]["model"], r["point"]["slice"]))
    return "\n\n".join(
        "\n".join([f"### {model} on {slice_}", "", *markdown_table(headings, [cells(row) for row in members])])
        for (model, slice_), members in found.items()
    )


def yes(value: bool) -> str:
    """In words."""
    return "yes" if value else "no"


def memory(row: Row) -> tuple[str, str]:
    """GiB a chip of the compiler, and of the cost model with its error."""
    peak, error = row["peak_bytes_per_chip"], memory_error(row)
    beside = f"{row['analytic'].hbm_bytes_per_chip / 2**30:.2f}" + ("" if error is None else f" ({error:+.1%})")
    return "?" if peak is None else f"{peak / 2**30:.2f}", beside


def collectives(row: Row) -> tuple[str, str, str]:
    """Their number, that of those not as planned, and of the unexplained; blank without a program."""
    if not row["n_layers"]:
        return "", "", ""
    return str(row["n_collectives"]), str(row["n_collectives"] - row["n_as_planned"]), str(row["unexplained"])


def compute(row: Row, times: float) -> str:
    """The compiler's seconds of compute, times a unit; + where some operations have no estimate."""
    return "" if row["compute_s"] is None else f"{row['compute_s'] * times:,.2f}" + "+" * bool(row["n_unestimated"])


def memory_error(row: Row) -> float | None:
    """Analytic memory over the compiler's, minus 1; None where they cannot be compared.

    A refusal of the compiler counts what is live at once. Of an accepted step we add arguments and temporaries. The two
    are the same in a pass, but not in training, so that a refused training step is not compared.
    """
    if row["peak_bytes_per_chip"] is None or (row["point"]["phase"] == "train" and not row["fits"]):
        return None
    return row["analytic"].hbm_bytes_per_chip / row["peak_bytes_per_chip"] - 1


def _label(row: Row, *, short: bool = False) -> str:
    p = row["point"]
    sizes = f"{p['batch']} x {p['length']}" if p["phase"] == "prefill" else f"{p['batch']}, context {p['context']}"
    label = f"{p['phase']} {sizes}, {p['layout']}/{p['attention']}, {p['weights']}"
    where = p["slice"] + (f" as {p['mesh']}" if p.get("mesh") else "")
    return label if short else f"{p['model']} on {where}, {label}"


PARTS: dict[str, Callable[[], str]] = {
    "totals": totals,
    "departures": departures,
    "published": published,
    "overlap": overlap,
    "findings": findings,
    "everything": everything,
}

if __name__ == "__main__":
    sys.exit(guarded(main))
