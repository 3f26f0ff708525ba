"""Serial against parallel blocks, and kinds of attention over context: analytic beside published, measured if asked.

    python -m benchmarks.studies.comparisons
    python -m benchmarks.studies.comparisons --measure
    python -m benchmarks.studies.comparisons --contexts 128,2048,32768 --json

- Block: the decode step of PaLM 540B on 64 TPU v4 at batch 512. The paper found the serial block 14% slower.
- Attention: Figure 8 of the paper, 8 layers at batch 256, from short contexts to long ones, and the context at which
  memory runs out. Multihead and multiquery split over heads, multiquery split over batch. Multihead has heads of half
  the width, so that attention has as many parameters (suffix -mha).
- With --measure also the bench's own model on 8 fake CPU devices, kinds in turn.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from toruslab.benchmarks.reports.tables import Column, DataTable
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.studies import ratios
from toruslab.models.presets import model, suffixed
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.limits import longest_context
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published import closed_forms
from toruslab.partitioning.published.papers import data
from toruslab.partitioning.torus.chip import chip

BLOCKS: dict[str, tuple[str, ...]] = {"parallel": (), "serial": ("-serial",)}
"""Suffixes of the model."""
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "multihead over heads": (("-mha",), "heads"),
    "multiquery over heads": ((), "heads"),
    "multiquery over batch": ((), "batch"),
}
"""Suffixes of the model, and the dimension over which attention is split."""
MEASURED = ("measured_model", "measured_batch", "measured_contexts", "repeats", "seed")
"""Options that need --measure."""
KV_FRACTION = 0.3
"""The share of a chip's memory for K and V: the rule of the paper's Table 1 and Figure 8."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser("python -m benchmarks.studies.comparisons", __doc__)
    p.add_argument("--model", default="palm-540b-h64", help="preset, multiquery and parallel (default: %(default)s)")
    p.add_argument("--slice", default="v4:4x4x4", help="default: %(default)s")
    p.add_argument("--weights", default="bf16", help="default: %(default)s")
    p.add_argument("--layers", type=int, default=8, help="of the attention's comparison (default: %(default)s)")
    p.add_argument("--batch", type=int, default=256, help="of the attention's comparison (default: %(default)s)")
    p.add_argument("--contexts", default="128,256,512,1024,2048,4096,8192,16384,32768", help="default: %(default)s")
    p.add_argument("--measure", action="store_true", help="also on 8 fake CPU devices, with a small model")
    p.add_argument("--measured-model", default="toy", help="as --model (default: %(default)s)")
    p.add_argument("--measured-batch", type=int, default=16, help="default: %(default)s")
    p.add_argument("--measured-contexts", default="128,512,2048,4096", help="default: %(default)s")
    p.add_argument("--repeats", type=int, default=20, help="times each step is timed (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", type=Path, help="folder of the rows and pictures (default: results/comparisons; with --json none)"
    )
    p.add_argument("--json", action="store_true", help="one JSON row a line on standard output instead of tables")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a step could not be measured."""
    options = parser().parse_args(argv)
    folder = options.out or (None if options.json else Path("results/comparisons"))
    try:
        _check(options)
        rows = analytic(options)
        measured = _measured_points(options) if options.measure else []
    except ValueError as error:
        raise InputError(str(error)) from None
    if folder:
        run_folder.writable(folder)
    if measured:
        rows += measure(measured, options)
    if options.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        show(rows, output.console())
    if folder:
        from toruslab.benchmarks.reports import figures, style

        drawn = style.sheets(figures.blocks(rows), figures.attention(rows))
        for path in run_folder.save(folder, "rows", rows, drawn):
            print(path, file=sys.stderr)
    failed = [r for r in rows if "error" in r]
    for row in failed:
        print(f"failed: {row['kind']} at context {row['point']['context']}: {row['error']}", file=sys.stderr)
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Refuses options that make no sense.

    Raises:
        ValueError: field, value and rule.
    """
    ratios.at_least(options, repeats=1, seed=0, layers=1)
    for field in MEASURED if not options.measure else ():
        if getattr(options, field) != parser().get_default(field):
            raise ValueError(f"{field}={getattr(options, field)!r} is of what is measured; give --measure, too")
    for field in ("model", "measured_model"):
        name = getattr(options, field)
        try:
            config, _ = model(name), suffixed(name)
        except ValueError as error:
            said = str(error)
            raise ValueError(said if field == "model" else said.replace("model=", f"{field}=", 1)) from None
        if config.block != "parallel" or config.n_kv_heads != 1:
            raise ValueError(
                f"{field}={name!r} must be parallel and multiquery, to be compared with its serial and multihead "
                f"forms; it is {config.block}, with n_kv_heads={config.n_kv_heads}"
            )


def _point(name: str, slice_: str, batch: int, context: int, attention: str, weights: str) -> Point:
    sizes = {"batch": batch, "context": context, "weights": weights}
    return Point(model=name, slice=slice_, phase="decode", layout="ws2d", attention=attention, **sizes)


def analytic(options: argparse.Namespace) -> list[Row]:
    """The rows that need no device: both comparisons, the published ratio, and the limits of memory.

    Raises:
        ValueError: what a point or the cost model refuses.
    """
    paper = data("serial_parallel")
    found = []
    for kind, suffixes in BLOCKS.items():
        name = suffixed(options.model, *suffixes)
        point = _point(name, options.slice, paper["batch"], 2048, "batch", options.weights)
        found.append(_row(point, "block", kind))
    found[1]["ratio"] = found[1]["latency_s"] / found[0]["latency_s"]
    published = {"point": found[1]["point"], "source": "published", "comparison": "block", "kind": "serial"}
    if (options.model, options.slice, options.weights) == ("palm-540b-h64", "v4:4x4x4", "bf16"):
        found.append(published | {"ratio": paper["ratio"], "citation": paper["source"]})
    contexts = ratios.integers("contexts", options.contexts)
    for kind, (suffixes, attention) in KINDS.items():
        few, whole = (suffixed(options.model, *more, *suffixes) for more in ((f"-{options.layers}l",), ()))
        points = [_point(few, options.slice, options.batch, n, attention, options.weights) for n in sorted(contexts)]
        found += [_row(p, "attention", kind) for p in points]
        found.append(_memory(options, few, whole, attention, kind))
    return found


def _row(point: Point, comparison: str, kind: str) -> Row:
    e = estimate(point)
    names = ("latency_s", "stack_latency_s", "compute_s", "memory_s", "collective_s", "hbm_bytes_per_chip", "fits")
    numbers = {name: getattr(e, name) for name in names}
    return {"point": point.to_json(), "source": "analytic", "comparison": comparison, "kind": kind, **numbers}


def _memory(options: argparse.Namespace, few: str, whole: str, attention: str, kind: str) -> Row:
    """The longest context: of few layers and of the whole model with all memory, and by Table 1's rule."""
    few_layers, all_layers = (
        _point(m, options.slice, options.batch, 1, attention, options.weights) for m in (few, whole)
    )
    config, n_chips = all_layers.config, all_layers.n_chips
    n_shards = n_chips if attention == "batch" else math.gcd(config.n_kv_heads, n_chips)
    kv_bytes = closed_forms.kv_bytes_per_token(config.n_layers, config.n_kv_heads, config.d_head)
    rule = closed_forms.longest_context(chip(all_layers.chip).hbm_bytes, n_shards, options.batch, kv_bytes, KV_FRACTION)
    return {
        "point": all_layers.to_json(),
        "source": "analytic",
        "comparison": "memory",
        "kind": kind,
        "max_context_few_layers": longest_context(few_layers),
        "max_context": longest_context(all_layers),
        "max_context_by_rule": int(rule),
    }


Measured = tuple[Point, str, str]
"""A point, its comparison and its kind."""


def _measured_points(options: argparse.Namespace) -> list[list[Measured]]:
    """The measured points, in groups that are timed in turn."""
    contexts = ratios.integers("measured_contexts", options.measured_contexts)

    def point(suffixes: Sequence[str], context: int, attention: str) -> Point:
        name = suffixed(options.measured_model, *suffixes)
        return _point(name, "cpu:2x2x2", options.measured_batch, context, attention, "f32")

    blocks = [(point(suffixes, 256, "batch"), "block", kind) for kind, suffixes in BLOCKS.items()]
    return [
        blocks,
        *(
            [(point(suffixes, n, attention), "attention", kind) for kind, (suffixes, attention) in KINDS.items()]
            for n in sorted(contexts)
        ),
    ]


def measure(groups: Sequence[Sequence[Measured]], options: argparse.Namespace) -> list[Row]:
    """Times the members of every group in turn. The ratio of the blocks is the median over repetitions."""
    from toruslab.benchmarks.runs import processes

    processes.join("cpu", 8, 1)

    from toruslab.benchmarks.runs.rows import environment

    found = []
    for group in groups:
        points = [point for point, _, _ in group]
        timed = ratios.measured(points, repeats=options.repeats, budget_s=5, seed=options.seed)
        rows: list[Row] = [
            {
                "point": x.point.to_json(),
                "source": "measured",
                "comparison": comparison,
                "kind": kind,
                "environment": environment(options.seed),
                **(x.timing.numbers() if x.timing else {"error": x.error}),
            }
            for x, (_, comparison, kind) in zip(timed, group, strict=True)
        ]
        if group[0][1] == "block" and timed[0].timing and timed[1].timing:
            _, rows[1]["ratio"], _ = ratios.shares(timed[1].timing.times_s, timed[0].timing.times_s)
        found += rows
    return found


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints both comparisons and the limits of memory."""
    console.print(_blocks([r for r in rows if r["comparison"] == "block"]).rich())
    parallel, serial = (r for r in rows if (r["comparison"], r["source"]) == ("block", "analytic"))
    more, moved = (serial[n] - parallel[n] for n in ("latency_s", "collective_s"))
    console.print(
        f"analytic: the second norm, gather and reduce-scatter of a serial block cost {more * 1e3:,.2f} ms a step, of "
        f"which {moved * 1e3:,.2f} ms are collectives, none of them hidden: what hides some lowers the ratio"
    )
    for source in ("analytic", "measured"):
        members = [r for r in rows if (r["comparison"], r["source"]) == ("attention", source)]
        if members:
            console.print(_over_context(members, source).rich())
            if not all(r.get("fits", True) for r in members):
                console.print("(in brackets: does not fit the chips)")
    console.print(_limits([r for r in rows if r["comparison"] == "memory"]).rich())


def _blocks(rows: Sequence[Row]) -> DataTable:
    def where(r: Row) -> str:
        p = r["point"]
        return f"{p['model']}, {p['slice']}, batch {p['batch']}, context {p['context']}"

    return DataTable(
        title="Decode step, serial against parallel block",
        records=rows,
        columns=[
            Column("point", where, numeric=False),
            Column("source", lambda r: r["source"], numeric=False),
            Column("block", lambda r: r["kind"], numeric=False),
            Column("ms a step", lambda r: f"{r['latency_s'] * 1e3:,.2f}" if "latency_s" in r else ""),
            Column("serial / parallel", lambda r: f"{r['ratio']:.3f}" if "ratio" in r else ""),
        ],
    )


def _over_context(members: Sequence[Row], source: str) -> DataTable:
    p = members[0]["point"]
    known = {(r["kind"], r["point"]["context"]): r for r in members}

    def time(kind: str, context: int) -> str:
        r = known[kind, context]
        taken = f"{r['latency_s'] * 1e3:,.2f}" if "latency_s" in r else "failed"
        return taken if r.get("fits", True) else f"({taken})"

    model = p["model"].replace("-mha", "")
    return DataTable(
        title=f"Decode step over context, ms, {source}: {model} on {p['slice']}, batch {p['batch']}",
        records=sorted({r["point"]["context"] for r in members}),
        columns=[
            Column("context", lambda context: f"{context:,}"),
            *(Column(kind, lambda context, kind=kind: time(kind, context)) for kind in KINDS),
        ],
    )


def _limits(rows: Sequence[Row]) -> DataTable:
    def tokens(field: str):
        return lambda r: "none" if r[field] is None else f"{r[field]:,}"

    return DataTable(
        title="Longest context that memory allows",
        records=rows,
        columns=[
            Column("attention", lambda r: r["kind"], numeric=False),
            Column("few layers", tokens("max_context_few_layers")),
            Column("whole model", tokens("max_context")),
            Column(f"whole model, {KV_FRACTION:.0%} of memory for K, V", tokens("max_context_by_rule")),
        ],
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
