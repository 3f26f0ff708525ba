"""Tables of the page "What the TPU compiler makes of looped collectives", from rows of `toruslab compile`.

    toruslab compile --points docs/data/loops_points.jsonl --json > rows.jsonl
    python -m benchmarks.docs.loops_page rows.jsonl     keeps what the page needs in docs/data/loops.jsonl
    python -m benchmarks.docs.generate docs/loops.md    writes the tables anew

The time of a collective is the cost model's answer of today.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence

from toruslab.benchmarks.docs.compiled_page import DATA as COMPILED
from toruslab.benchmarks.docs.compiled_page import grouped
from toruslab.benchmarks.reports.tables import markdown_table
from toruslab.benchmarks.runs.parser import guarded
from toruslab.benchmarks.runs.rows import Row, keep
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer

DATA = COMPILED.with_name("loops.jsonl")
KEPT = ("point", "n_layers", "stack_compute_s", "peak_bytes_per_chip", "unexplained", "versions")
KEPT_OF_COLLECTIVES = ("scope", "kind", "axes", "bytes", "count", "asynchronous", "hidden_s")


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("loops_page", __doc__, argv, compact, DATA)


def compact(row: Row) -> Row:
    """The fields of a row that the page needs, and those of the collectives in its layers."""
    in_layers = [c for c in row["collectives"] if of_a_layer(c["scope"])]
    kept = [{k: c[k] for k in KEPT_OF_COLLECTIVES} for c in in_layers]
    return {name: row[name] for name in KEPT} | {"collectives": kept}


@functools.cache
def data() -> tuple[Row, ...]:
    """The rows; each collective with its analytic `seconds` and the part of them that is `exposed`.

    Collective-permutes that run in both directions at once take half the time each, and each has half of the
    computation beside it.
    """
    rows = [json.loads(text) for text in DATA.read_text().splitlines()]
    for row in rows:
        point = Point.from_json(row["point"])
        row["n"] = point.config.n_layers
        price = {(c.scope, c.kind, c.bytes): c.seconds for c in estimate(point, overlap=False).collectives}
        for c in row["collectives"]:
            share = 0.5 if c["kind"] == "collective-permute" and point.layout_value.rings == 2 else 1.0
            times = c["count"] / row["n"]  # the first layer's weights are gathered once, before the layer
            c["seconds"] = times * price.get((c["scope"], c["kind"], c["bytes"]), 0.0)
            c["exposed"] = max(0.0, c["seconds"] - share * (c["hidden_s"] or 0.0))
    return tuple(rows)


def steps() -> str:
    """A row for every program: microseconds of compute and collectives in a layer, and memory."""
    rows = []
    for row in data():
        compute = row["stack_compute_s"] / row["n"]
        total = sum(c["seconds"] for c in row["collectives"])
        exposed = sum(c["exposed"] for c in row["collectives"])
        times = [f"{1e6 * s:,.0f}" for s in (compute, total, exposed, compute + exposed)]
        rows.append((*_program(row), *times, f"{row['peak_bytes_per_chip'] / 2**30:.2f}"))
    headings = (
        *("pass", "weights", "layout", "compute, us", "collectives, us", "of which exposed, us"),
        *("together, us", "peak, GiB"),
    )
    return "\n".join(markdown_table(headings, rows))


def sends() -> str:
    """A row for every looped collective of every program."""
    rows = []
    for row in data():
        looped = [c for c in row["collectives"] if c["kind"] == "collective-permute" and c["asynchronous"]]
        ways = 2 if "biring" in row["point"]["layout"] else 1
        of = grouped(looped, lambda c: (c["scope"].rsplit("/", 1)[-1], "".join(c["axes"]), c["bytes"]))
        for (name, axes, n_bytes), found in of.items():
            meanwhile = sorted(c["hidden_s"] or 0.0 for c in found)
            rows.append(
                (
                    *_program(row),
                    f"{name}({axes})",
                    str(len(found)),
                    f"{n_bytes / 1e6:,.2f}",
                    f"{1e6 * ways * found[0]['seconds']:,.0f}",
                    f"{1e6 * meanwhile[0]:,.0f} to {1e6 * meanwhile[-1]:,.0f}",
                    f"{1e6 * sum(c['exposed'] for c in found):,.0f}",
                )
            )
    headings = (
        *("pass", "weights", "layout", "looped", "sends", "MB each"),
        *("on its way, us", "meanwhile computed, us", "exposed"),
    )
    return "\n".join(markdown_table(headings, rows))


def totals() -> str:
    """All rows in two lines."""
    rows = data()
    looped = [c for row in rows for c in row["collectives"] if c["kind"] == "collective-permute"]
    total, exposed = (sum(c[name] for c in looped) for name in ("seconds", "exposed"))
    by = ", ".join(f"{k} {v}" for k, v in rows[0]["versions"].items())
    return (
        f"- {len(rows)} programs, by {by}; collectives that no plan explains: {sum(r['unexplained'] for r in rows)}.\n"
        f"- sends of looped collectives: {len(looped)}, asynchronous: {sum(c['asynchronous'] for c in looped)}; "
        f"of their time, {1 - exposed / total:.0%} has computation beside it."
    )


def _program(row: Row) -> tuple[str, str, str]:
    """Pass, weights and layout."""
    p = row["point"]
    sizes = f"decode {p['batch']}" if p["phase"] == "decode" else f"prefill {p['batch']} x {p['length']}"
    return sizes, p["weights"], p["layout"]


PARTS: dict[str, Callable[[], str]] = {"totals": totals, "steps": steps, "sends": sends}


if __name__ == "__main__":
    sys.exit(guarded(main))
