"""The page "What the TPU compiler does with each layout": its tables, from rows of `toruslab compile`.

    toruslab compile --points docs/data/points.jsonl --json > rows.jsonl
    python -m benchmarks.docs.compiled_page rows.jsonl      keeps what the page needs of them in docs/data/tpu_compiler.jsonl
    python -m benchmarks.docs.generate docs/tpu_compiler.md     writes the tables anew (--check: are they those of the data?)

Reads rows and nothing else, but for the published numbers beside them.
"""

import functools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from toruslab.benchmarks.runs.options import guarded
from toruslab.benchmarks.runs.rows import Row, keep
from toruslab.partitioning.cost.estimate import estimate, estimate_many
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer
from toruslab.partitioning.published.papers import calibration, figures

DATA = Path(__file__).parents[2] / "docs" / "data" / "tpu_compiler.jsonl"
KEPT = (
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
)


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("compiled_page", __doc__, argv, compact, DATA)


def compact(row: Row) -> Row:
    """What the page needs of a row."""
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
    """The rows that a page is made of, each with the cost model's answer of today."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = estimate_many([Point.from_json(row["point"]) for row in rows])
    return tuple(row | {"analytic": analytic} for row, analytic in zip(rows, found, strict=True))


def totals(path: Path = DATA) -> str:
    """All rows in a few lines."""
    rows = data(path)
    programs = [r for r in rows if r["n_layers"]]
    errors = sorted(abs(e) for r in rows if (e := memory_error(r)) is not None)
    by = ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items())
    within = sum(e <= 0.1 for e in errors)
    return "\n".join(
        [
            f"- {len(rows)} points, by {by}; {sum(r['fits'] for r in rows)} fit their slice, "
            f"{len(rows) - len(programs)} leave no program to look at.",
            f"- collectives in these programs: {sum(r['n_collectives'] for r in programs):,}; unexplained: "
            f"{sum(r['unexplained'] for r in programs)}; as planned to the byte: "
            f"{sum(r['n_as_planned'] for r in programs):,}.",
            f"- peak memory against the analytic figure: median error {statistics.median(errors):.1%}, "
            f"90th percentile {errors[int(0.9 * len(errors))]:.1%}, worst {errors[-1]:.1%}; "
            f"{within} of {len(errors)} within 10%.",
            f"- to compile: median {statistics.median(r['compile_s'] for r in programs):.1f} s, longest "
            f"{max(r['compile_s'] for r in programs):.1f} s (on two noisy cores); host memory at most "
            f"{max(r['host_peak_bytes'] for r in rows) / 2**30:.1f} GiB.",
        ]
    )


def departures(path: Path = DATA) -> str:
    """Where the compiler departs from the plan, by what happened and to which tensor."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in data(path):
        for d in row["departures"]:
            found.setdefault((d["verdict"], d["scope"], d["algorithm"]), []).append(row | {"departure": d})
    out = [
        "| verdict | tensor | programs | layouts | MB beyond the plan, at most | algorithm |",
        "|---|---|---|---|---|---|",
    ]
    for (verdict, scope, algorithm), rows in sorted(found.items(), key=lambda item: (item[0][0], -len(item[1]))):
        layouts = Counter(r["point"]["layout"] for r in rows)
        most = max(r["departure"]["extra_bytes"] for r in rows) / 1e6
        programs = len({json.dumps(r["point"]) for r in rows})
        names = ", ".join(sorted(layouts))
        out.append(f"| {verdict} | {scope} | {programs} | {names} | {most:,.3f} | {algorithm or '(none named)'} |")
    return "\n".join(out)


def published() -> str:
    """The compiler's compute with the analytic collectives, beside the published times of the layers."""
    by_point = {json.dumps(r["point"], sort_keys=True): r for r in data()}
    out = [
        "| published | point | published ms | compiler + analytic ms | error | analytic alone | error |",
        "|---|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[tuple[float, float]]] = {}
    for row in (*calibration(), *figures()):
        compiled = by_point.get(json.dumps(row.point.to_json(), sort_keys=True))
        if not compiled or compiled["stack_compute_s"] is None or row.stack_s is None:
            continue
        analytic = compiled["analytic"]
        exposed = estimate(row.point, overlap=False)
        moving = math.fsum(c.seconds * c.count for c in exposed.collectives if of_a_layer(c.scope))
        seconds = (compiled["stack_compute_s"] + moving, analytic.stack_latency_s)
        pair = (seconds[0] / row.stack_s - 1, seconds[1] / row.stack_s - 1)
        for name in (row.set, "all"):
            errors.setdefault(name, []).append(pair)
        out.append(
            f"| {row.set} | {_label(compiled)} | {row.stack_s * 1e3:,.2f} | {seconds[0] * 1e3:,.2f} | {pair[0]:+.1%} | "
            f"{seconds[1] * 1e3:,.2f} | {pair[1]:+.1%} |"
        )
    out.append("")
    for name in sorted(errors, key=lambda name: (name == "all", name)):
        theirs, ours = (statistics.median(abs(p[i]) for p in errors[name]) for i in (0, 1))
        out.append(f"- {name}: {len(errors[name])} points, median error {theirs:.1%} (analytic alone {ours:.1%})")
    return "\n".join(out)


def overlap() -> str:
    """How much of the collectives' time the compiled program computes beside them."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in data():
        if row["n_layers"] and row["overlapped"] is not None:
            found.setdefault((row["point"]["slice"], row["point"]["phase"]), []).append(row)
    out = ["| slice | phase | programs | with any overlap | largest share | at |", "|---|---|---|---|---|---|"]
    for (slice_, phase), rows in found.items():
        most = max(rows, key=lambda r: r["overlapped"])
        some = sum(r["overlapped"] > 0.005 for r in rows)
        where = f"{most['point']['model']}, {_label(most, short=True)}" if some else ""
        out.append(f"| {slice_} | {phase} | {len(rows)} | {some} | {most['overlapped']:.0%} | {where} |")
    return "\n".join(out)


def findings() -> str:
    """What the whole-program checks found."""
    found: dict[str, list[Row]] = {}
    for row in data():
        for finding in row["findings"]:
            kind = finding.split(" costs ")[0] if " costs " in finding else finding.lstrip("0123456789 ")
            found.setdefault(kind, []).append(row)
    out = ["| check | programs | of these |", "|---|---|---|"]
    for kind, rows in found.items():
        where = Counter(f"{r['point']['phase']} {r['point']['layout']}" for r in rows)
        out.append(f"| {kind} | {len(rows)} | {', '.join(f'{n} {w}' for w, n in sorted(where.items()))} |")
    clean = sum(not r["findings"] for r in data() if r["n_layers"])
    return "\n".join([*out, "", f"{clean} programs have no finding."])


def everything() -> str:
    """A line for every point."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in data():
        groups.setdefault((row["point"]["model"], row["point"]["slice"]), []).append(row)
    out: list[str] = []
    for (model, slice_), rows in groups.items():
        out += [
            f"### {model} on {slice_}",
            "",
            "| point | GiB a chip | analytic | fits | collectives | not as planned | unexplained | "
            "compute ms: compiler | analytic compute, memory |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(_line, rows),
            "",
        ]
    return "\n".join(out[:-1])


def _line(row: Row) -> str:
    analytic, error = row["analytic"], memory_error(row)
    peak = "?" if row["peak_bytes_per_chip"] is None else f"{row['peak_bytes_per_chip'] / 2**30:.2f}"
    beside = f"{analytic.hbm_bytes_per_chip / 2**30:.2f}" + ("" if error is None else f" ({error:+.1%})")
    seconds = "" if row["compute_s"] is None else f"{row['compute_s'] * 1e3:,.2f}" + "+" * bool(row["n_unestimated"])
    seen = (
        f"{row['n_collectives']} | {row['n_collectives'] - row['n_as_planned']} | {row['unexplained']}"
        if row["n_layers"]
        else " | | "
    )
    return (
        f"| {_label(row, short=True)} | {peak} | {beside} | {'yes' if row['fits'] else 'no'} | {seen} | {seconds} | "
        f"{analytic.compute_s * 1e3:,.2f}, {analytic.memory_s * 1e3:,.2f} |"
    )


def memory_error(row: Row) -> float | None:
    """The analytic figure over the compiler's, less one.

    What the compiler says when it refuses is what lives at once, of a step accepted we take arguments and temporaries:
    the same in a pass, not in training, where the two are not held against each other.
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
