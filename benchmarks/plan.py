"""Ranks layouts, meshes, slices, batches and weights for a goal; draws cost against latency; says what it refused.

    toruslab plan --model palm-540b-h64 --slices v4:4x4x4 --prompt 2048 --output 64 --goal cost --max-latency 30
    toruslab plan --phase decode --context 2048 --slices v4,v5e --max-chips 256 --goal latency --json
    toruslab plan --phase prefill --prompt 2048 --slices v4:4x4x4 --goal cost --out results/plan

Latency is that of the phase: a whole request (prefill, then all steps), a prefill, or one decode step. Cost is in
chip-seconds per token: per generated token of a request or a step, per prompt token of a prefill. Touches no device.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, guarded, one_of, refused, seconds
from toruslab.benchmarks.runs.progress import progress
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.planner import GOALS, Plan, search
from toruslab.partitioning.cost.space import BATCHES, PHASES, PLANNED, Job, Space, read_slices
from toruslab.partitioning.plan.point import CACHES

WITHIN = {"latency": "lowest latency", "cost": "lowest cost", "batch": "largest batch"}


def row(plan: Plan, i: int) -> dict[str, Any]:
    """One option: its points by phase and its numbers, under the names of `toruslab estimate`."""
    points = plan.points(i)
    column = {name: float(values[i]) for name, values in plan.columns.items()}
    by_phase, useful_s = {}, 0.0
    for phase, point in points.items():
        found = estimate(point)
        by_phase[phase] = {k: getattr(found, k) for k in ("compute_s", "memory_s", "collective_s", "bound", "mfu")}
        times = plan.job.output if (phase, plan.job.phase) == ("decode", "request") else 1
        useful_s += times * found.mfu * found.latency_s
    request = plan.job.phase == "request"
    alone = {} if request else {"point": next(iter(points.values())).to_json()}
    parts = {k: column[k] for k in ("prefill_s", "step_s", "handoff_s")} if request else {}
    return {
        **alone,
        "points": {phase: point.to_json() for phase, point in points.items()},
        "source": "analytic",
        "latency_s": column["latency_s"],
        **parts,
        "cost_chip_s_per_token": column["cost_chip_s_per_token"],
        "mfu": useful_s / column["latency_s"],
        "hbm_bytes_per_chip": int(column["hbm_bytes_per_chip"]),
        "fits": True,
        "n_chips": next(iter(points.values())).n_chips,
        "phases": by_phase,
    }


def front_of(plan: Plan) -> list[int]:
    """The options on the Pareto front, by latency; of equal ones the first."""
    at = np.flatnonzero(plan.front())
    latency = plan.columns["latency_s"][at]
    return at[np.unique(latency, return_index=True)[1]].tolist()


def show(plan: Plan, ranked: Sequence[dict], front: Sequence[dict], goal: str, console: Console) -> None:
    """Prints the ranking, the front and the refused."""
    w = plan.job
    what = {
        "request": f"request of {w.prompt} + {w.output} tokens",
        "prefill": f"prefill of {w.prompt} tokens",
        "decode": f"decode step over a context of {w.sizes('decode')['context']}",
    }[w.phase]
    if ranked:
        console.print(_table(f"{plan.space.model}, {what}: {WITHIN[goal]}, best of each slice and layouts", ranked, w))
    if front:
        every = np.unique(np.linspace(0, len(front) - 1, min(12, len(front))).round().astype(int))
        title = f"Pareto front of cost against latency: {len(every)} of its {len(front)} options"
        console.print(_table(title, [front[i] for i in every], w))
    rejected = Table(title="Refused", title_justify="left", title_style="bold")
    for name, kind in (("points", "right"), ("reason", "left"), ("for example", "left"), ("rule", "left")):
        rejected.add_column(name, justify=kind, overflow="fold")  # pyright: ignore[reportArgumentType]
    for r in plan.rejected:
        example = ", ".join(str(v) for v in r.example.values())
        rejected.add_row(f"{r.count:,}", r.reason, escape(example), escape(r.why))
    if plan.rejected:
        console.print(rejected)
    pairs = f"; {plan.n_pairs_refused:,} pairs of layouts would move weights" if plan.n_pairs_refused else ""
    console.print(
        f"{plan.n_points:,} points: {plan.n_considered:,} considered, {plan.n_points - plan.n_considered:,} refused"
        f"{pairs}; {plan.n_priced:,} priced in {plan.seconds:.2f} s ({plan.n_priced / plan.seconds:,.0f} a second)."
    )


def _table(title: str, rows: Sequence[dict], job: Job) -> Table:
    request = job.phase == "request"
    table = Table(title=title, title_justify="left", title_style="bold")
    names = ["slice", "mesh", "batch", "weights", *(f"{p} layout" for p in job.phases), "latency"]
    names += ["prefill", "step"] if request else []
    for name in (*names, "chip-ms/token", "MFU", "GiB/chip", "front"):
        table.add_column(name, justify="left" if name in ("slice", "mesh") or "layout" in name else "right")
    for found in rows:
        points = list(found["points"].values())
        first = points[0]
        table.add_row(
            first["slice"],
            first.get("mesh", ""),
            str(first["batch"]),
            first["weights"],
            *(f"{p['layout']}/{p['attention']}" for p in points),
            _seconds(found["latency_s"]),
            *([_seconds(found["prefill_s"]), _seconds(found["step_s"])] if request else []),
            f"{found['cost_chip_s_per_token'] * 1e3:,.3g}",
            f"{found['mfu']:.1%}",
            f"{found['hbm_bytes_per_chip'] / 2**30:.1f}",
            "yes" if found["pareto"] else "",
        )
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _batches(text: str) -> tuple[int, ...]:
    """`1,2,4` or `1..64`, or both."""
    found: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        low, dots, high = part.partition("..")
        try:
            ends = int(low), int(high if dots else low)
        except ValueError:
            raise InputError(f"batches={text!r} must be integers such as 1,2,4 or a range such as 1..64") from None
        if not ends[0] <= ends[1] < ends[0] + 65536:
            raise InputError(f"batches={part!r} must be a range of 1 to 65536 batches, lowest first")
        found += range(ends[0], ends[1] + 1)
    return tuple(found)


def _parser() -> Parser:
    p = Parser("toruslab plan", __doc__)
    p.add_argument("--model", default="palm-540b-h64", help="preset or config.json")
    p.add_argument(
        "--slices",
        default="v4:4x4x4",
        help="slices, or chips for all their power-of-two slices: v4:4x4x4,v5e (default: v4:4x4x4)",
    )
    p.add_argument("--max-chips", type=int, default=256, help="largest slice where only a chip is named (default: 256)")
    p.add_argument("--phase", default="request", help=", ".join(PHASES) + " (default: request)")
    p.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt (default: 2048)")
    p.add_argument("--output", type=int, default=64, help="generated tokens, as many decode steps (default: 64)")
    p.add_argument("--context", type=int, help="decode only: the one context of the step, instead of prompt and output")
    p.add_argument("--goal", type=one_of(GOALS), default="cost", help=", ".join(GOALS) + " (default: cost)")
    p.add_argument(
        "--max-latency", type=seconds, metavar="S", help="seconds of the phase: request, prefill or one step"
    )
    p.add_argument("--max-step", type=seconds, metavar="S", help="seconds of one decode step, also within a request")
    p.add_argument("--batches", help="such as 1,2,4 or 1..64 (default: to 1024, sixteen to a doubling)")
    p.add_argument("--weights", default="bf16,int8", help="(default: bf16,int8)")
    p.add_argument("--cache", choices=CACHES, help="of the KV cache (default: the activations' dtype)")
    p.add_argument("--layouts", default=",".join(PLANNED), help=f"(default: {','.join(PLANNED)})")
    p.add_argument("--attention", default="heads,batch", help="(default: heads,batch; also batch-x, batch-xy...)")
    p.add_argument("--top", type=at_least(1), default=10, help="options of the ranking (default: 10)")
    p.add_argument("--out", type=Path, help="folder for plan.svg, plan.png and plan.jsonl")
    p.add_argument("--json", action="store_true", help="one JSON object a line: ranking, front, refused, summary")
    p.add_moved("--speed", "planner_speed")
    return p


def _read(options: argparse.Namespace) -> tuple[Space, Job]:
    """The search that the options ask for."""
    if options.max_step is not None and options.phase == "prefill":
        raise InputError("max_step bounds decode steps, and phase='prefill' has none; use --max-latency")
    prompt, output_ = options.prompt, options.output
    if options.context is not None:
        if options.phase != "decode":
            raise InputError(f"context={options.context} is for phase='decode'; give --prompt and --output instead")
        if options.context < 1:
            raise InputError(f"context={options.context} must be at least 1: it counts the step's own token")
        prompt, output_ = options.context - 1, 1

    def listed(text: str) -> tuple[str, ...]:
        return tuple(filter(None, (part.strip() for part in text.split(","))))

    with refused():
        job = Job(phase=options.phase, prompt=prompt, output=1 if options.phase == "prefill" else output_)
        space = Space(
            model=options.model,
            slices=read_slices(options.slices, options.max_chips),
            batches=BATCHES if options.batches is None else _batches(options.batches),
            weights=listed(options.weights),
            layouts=listed(options.layouts),
            attentions=listed(options.attention),
            cache=options.cache,
        )
    if options.out is not None:
        run_folder.writable(options.out)
    return space, job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when no option is left."""
    options = _parser().parse_args(argv)
    space, job = _read(options)
    with progress("toruslab plan", what="pricing"), refused():
        plan = search(space, job)
    allowed = plan.allowed(options.max_latency, options.max_step)
    ranking = plan.ranking(options.goal, allowed)[: options.top]
    is_on_front, front = plan.front(), front_of(plan)
    ranked = [
        {"rank": rank, "chosen": rank == 1, "goal": options.goal, "pareto": bool(is_on_front[i]), **row(plan, i)}
        for rank, i in enumerate(ranking, 1)
    ]
    on_front = [{"pareto": True, **row(plan, i)} for i in front]
    counts = ("n_points", "n_considered", "n_priced", "n_pairs_refused", "seconds")
    objects = [
        *({"kind": "ranking", **r} for r in ranked),
        *({"kind": "front", **r} for r in on_front),
        *({"kind": "rejected", **vars(r)} for r in plan.rejected),
        {"kind": "summary"}
        | {k: getattr(plan, k) for k in counts}
        | {"n_options": len(plan), "n_within_limits": int(allowed.sum())},
    ]
    if options.out is not None:
        from toruslab.benchmarks.reports.plan_figure import draw

        figures = {"plan": draw(plan, front, ranking[0] if ranking else None)} if front else {}
        output.written(run_folder.save(options.out, "plan", objects, figures))
    if options.json:
        output.print_rows(objects)
    else:
        show(plan, ranked, on_front, options.goal, output.console(150))
    if not ranking:
        print(f"nothing is left: {_why(plan)}", file=sys.stderr)
    return 0 if ranking else 1


def _why(plan: Plan) -> str:
    if len(plan):
        fastest, step = plan.columns["latency_s"].min(), plan.columns["step_s"].min()
        steps = f", the fastest step {_seconds(step)}" if plan.job.phase != "prefill" else ""
        return f"no option keeps within the limits; the fastest takes {_seconds(fastest)}{steps}"
    if plan.n_considered:
        return "no batch and mesh serves both phases; see the refused"
    return f"every point was refused, most because: {plan.rejected[0].reason} ({plan.rejected[0].why})"


if __name__ == "__main__":
    sys.exit(guarded(main))
