"""The page "What the TPU compiler makes of looped collectives": its tables, from rows of `toruslab compile`.

    toruslab compile --points docs/data/loops_points.jsonl --json > rows.jsonl
    python -m benchmarks.docs.loops_page rows.jsonl      keeps what the page needs of them in docs/data/loops.jsonl
    python -m benchmarks.docs.generate docs/loops.md         writes the tables anew (--check: are they those of the data?)

Reads rows and nothing else; what a collective takes is the cost model's answer of today.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from toruslab.benchmarks.runs.options import guarded
from toruslab.benchmarks.runs.rows import Row, keep
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import of_a_layer

DATA = Path(__file__).parents[2] / "docs" / "data" / "loops.jsonl"
KEPT = ("point", "n_layers", "stack_compute_s", "peak_bytes_per_chip", "unexplained", "versions")
KEPT_OF_COLLECTIVES = ("scope", "kind", "axes", "bytes", "count", "asynchronous", "hidden_s")


def main(argv: Sequence[str] | None = None) -> int:
    """Keeps the rows."""
    return keep("loops_page", __doc__, argv, compact, DATA)


def compact(row: Row) -> Row:
    """What the page needs of a row: the collectives of the layers, and of the whole what `KEPT` names."""
    in_layers = [c for c in row["collectives"] if of_a_layer(c["scope"])]
    return {name: row[name] for name in KEPT} | {
        "collectives": [{k: c[k] for k in KEPT_OF_COLLECTIVES} for c in in_layers]
    }


@functools.cache
def data() -> tuple[Row, ...]:
    """The rows, each collective with its analytic seconds and what of these is exposed.

    Sends that go both ways at once have half their time each, and half of what is computed meanwhile.
    """
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    for row in rows:
        point = Point.from_json(row["point"])
        row["n"] = point.config.n_layers
        price = {(c.scope, c.kind, c.bytes): c.seconds for c in estimate(point, overlap=False).collectives}
        for c in row["collectives"]:
            share = 0.5 if c["kind"] == "collective-permute" and point.layout_value.rings == 2 else 1.0
            times = c["count"] / row["n"]  # the first layer's weights, gathered before it, come once
            c["seconds"] = times * price.get((c["scope"], c["kind"], c["bytes"]), 0.0)
            c["exposed"] = max(0.0, c["seconds"] - share * (c["hidden_s"] or 0.0))
    return tuple(rows)


def steps() -> str:
    """Every program in a line."""
    out = [
        "| pass | weights | layout | compute, us | collectives, us | of which exposed, us | together, us | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data():
        compute = row["stack_compute_s"] / row["n"]
        total = sum(c["seconds"] for c in row["collectives"])
        exposed = sum(c["exposed"] for c in row["collectives"])
        figures = " | ".join(f"{1e6 * s:,.0f}" for s in (compute, total, exposed, compute + exposed))
        point = row["point"]
        out.append(
            f"| {_pass(point)} | {point['weights']} | {point['layout']} | {figures} | "
            f"{row['peak_bytes_per_chip'] / 2**30:.2f} |"
        )
    return "\n".join(out)


def sends() -> str:
    """Every looped collective in a line."""
    out = [
        "| pass | weights | layout | looped | sends | MB each | on its way, us | meanwhile computed, us | exposed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data():
        groups: dict[tuple[str, str, int], list[Row]] = {}
        for c in row["collectives"]:
            if c["kind"] == "collective-permute" and c["asynchronous"]:
                groups.setdefault((c["scope"].rsplit("/", 1)[-1], "".join(c["axes"]), c["bytes"]), []).append(c)
        point = row["point"]
        ways = 2 if "biring" in point["layout"] else 1
        for (name, axes, n_bytes), found in groups.items():
            meanwhile = sorted(c["hidden_s"] or 0.0 for c in found)
            span = f"{1e6 * meanwhile[0]:,.0f} to {1e6 * meanwhile[-1]:,.0f}"
            out.append(
                f"| {_pass(point)} | {point['weights']} | {point['layout']} | {name}({axes}) | {len(found)} | "
                f"{n_bytes / 1e6:,.2f} | {1e6 * ways * found[0]['seconds']:,.0f} | {span} | "
                f"{1e6 * sum(c['exposed'] for c in found):,.0f} |"
            )
    return "\n".join(out)


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


def _pass(point: Row) -> str:
    if point["phase"] == "decode":
        return f"decode {point['batch']}"
    return f"prefill {point['batch']} x {point['length']}"


PARTS: dict[str, Callable[[], str]] = {"totals": totals, "steps": steps, "sends": sends}
"""The generated parts of the page."""


if __name__ == "__main__":
    sys.exit(guarded(main))
