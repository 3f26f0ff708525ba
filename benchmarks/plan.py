"""Ranks layouts, meshes, slices, batches and weights for a goal; draws cost against latency; says what it refused.

    toruslab plan --model palm-540b-h64 --slices v4:4x4x4 --prompt 2048 --output 64 --goal cost --max-latency 30
    toruslab plan --phase decode --context 2048 --slices v4,v5e --max-chips 256 --goal latency --json
    toruslab plan --phase prefill --prompt 2048 --slices v4:4x4x4 --goal cost --out results/plan

Latency is that of the phase: a whole request (prefill, then all steps), a prefill, or one decode step. Cost is in
chip-seconds per token: per generated token of a request or a step, per prompt token of a prefill. Touches no device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.planner import GOALS, Plan, pareto, search
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
    refused = Table(title="Refused", title_justify="left", title_style="bold")
    for name, kind in (("points", "right"), ("reason", "left"), ("for example", "left"), ("rule", "left")):
        refused.add_column(name, justify=kind, overflow="fold")  # pyright: ignore[reportArgumentType]
    for r in plan.rejected:
        example = ", ".join(str(v) for v in r.example.values())
        refused.add_row(f"{r.count:,}", r.reason, escape(example), escape(r.why))
    if plan.rejected:
        console.print(refused)
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


def draw(plan: Plan, front: Sequence[int], chosen: int | None):
    """Cost against latency, as Figure 1 of Pope et al. 2022: all options, a line per slice, the front in black."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    latency, cost = plan.columns["latency_s"], plan.columns["cost_chip_s_per_token"] * 1e3
    used = plan.columns["decode" if plan.job.phase != "prefill" else "prefill"]
    sample = np.random.default_rng(0).permutation(len(plan))[:20000]
    panel.scatter(latency[sample], cost[sample], s=2, color="0.85", label="all options", rasterized=True)
    names = list(dict.fromkeys(s.asked for s in plan.structures))
    of = np.array([names.index(s.asked) for s in plan.structures])[used]
    shown = [i for i in range(len(names)) if np.any(of == i)]
    for at, i in enumerate(shown):
        mine = np.flatnonzero(of == i)
        mine = mine[pareto(latency[mine], cost[mine])]
        mine = mine[np.argsort(latency[mine])]
        panel.plot(latency[mine], cost[mine], color=colormaps["viridis"](at / max(1, len(shown))), lw=2, label=names[i])
    panel.plot(latency[list(front)], cost[list(front)], "k--", lw=1, marker=".", ms=4, label="Pareto front")
    for wanted in np.geomspace(latency[front[0]], latency[front[-1]], 6):
        i = front[int(np.argmin(np.abs(np.log(latency[list(front)] / wanted))))]
        names_ = [plan.structures[plan.columns[p][i]].label for p in plan.job.phases]
        text = ", ".join(names_) + f"\nB={plan.columns['batch'][i]} {plan.space.weights[plan.columns['weights'][i]]}"
        panel.annotate(text, (latency[i], cost[i]), textcoords="offset points", xytext=(-4, -20), fontsize=6)
    if chosen is not None:
        panel.plot(latency[chosen], cost[chosen], "r*", ms=12, label="chosen")
    per = "prompt" if plan.job.phase == "prefill" else "generated"
    panel.margins(0.08)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel=f"latency of the {plan.job.phase} (s)",
        ylabel=f"cost (chip-milliseconds per {per} token)",
        title=f"{plan.space.model}: {plan.job.prompt} tokens of prompt, {plan.job.output} of output",
    )
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize="small", ncols=2 if len(shown) > 12 else 1)
    return figure


def speed(repeats: int = 5) -> list[dict[str, Any]]:
    """Points a second of the planner and of a plain loop of the same cost model, interleaved in one run.

    A point of the planner counts if it went through the cost model; all of `search` is timed, refusals and pairs too.
    Seconds are of this process on its one core, so that neighbours do not count; caches are warm.
    The loop's points are drawn from the planner's and are made outside the clock.
    """
    everything = tuple(range(1, 1025))
    grids = {
        "planner, batches 1..1024, decode": (everything, Job(phase="decode", prompt=2047)),
        "planner, the default batches, decode": (BATCHES, Job(phase="decode", prompt=2047)),
        "planner, the default batches, request": (BATCHES, Job(prompt=1984, output=64)),
    }
    spaces = {k: (Space(model="palm-540b-h64", slices=("v4:4x4x4",), batches=b), w) for k, (b, w) in grids.items()}
    plan = search(*next(iter(spaces.values())))
    drawn = np.random.default_rng(0).choice(len(plan), 1000, replace=False)
    points = [plan.points(int(i))["decode"] for i in drawn]
    rates: dict[str, list[float]] = {}
    counts = {"plain loop of cost.estimate": len(points)}
    for repeat in range(repeats + 1):
        for name, (space, job) in spaces.items():
            started = time.process_time()
            counts[name] = search(space, job).n_priced
            rates.setdefault(name, []).append(counts[name] / (time.process_time() - started))
        started = time.process_time()
        for point in points:
            estimate(point)
        rates.setdefault("plain loop of cost.estimate", []).append(len(points) / (time.process_time() - started))
        if not repeat:  # the first round warms the caches
            rates.clear()
    loop = statistics.median(rates["plain loop of cost.estimate"])
    return [
        {
            "benchmark": name,
            "points": counts[name],
            "points_per_s": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "times_the_loop": statistics.median(found) / loop,
        }
        for name, found in rates.items()
    ]


def _show_speed(found: Sequence[dict[str, Any]]) -> None:
    table = Table(
        title="Points a second of CPU time, median of 5 interleaved runs", title_justify="left", title_style="bold"
    )
    for name in ("", "points", "points/s", "lowest..highest", "x the loop"):
        table.add_column(name, justify="right" if name else "left")
    for r in found:
        spread = f"{r['lowest']:,.0f}..{r['highest']:,.0f}"
        table.add_row(
            r["benchmark"], f"{r['points']:,}", f"{r['points_per_s']:,.0f}", spread, f"{r['times_the_loop']:.0f}"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


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


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="toruslab plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", default="palm-540b-h64")
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
    p.add_argument("--goal", default="cost", help=", ".join(GOALS) + " (default: cost)")
    p.add_argument("--max-latency", type=float, metavar="S", help="seconds of the phase: request, prefill or one step")
    p.add_argument("--max-step", type=float, metavar="S", help="seconds of one decode step, also within a request")
    p.add_argument("--batches", help="such as 1,2,4 or 1..64 (default: to 1024, sixteen to a doubling)")
    p.add_argument("--weights", default="bf16,int8", help="(default: bf16,int8)")
    p.add_argument("--cache", choices=CACHES, help="of the KV cache (default: the activations' dtype)")
    p.add_argument("--layouts", default=",".join(PLANNED), help=f"(default: {','.join(PLANNED)})")
    p.add_argument("--attention", default="heads,batch", help="(default: heads,batch; also batch-x, batch-xy...)")
    p.add_argument("--top", type=int, default=10, help="lines of the ranking (default: 10)")
    p.add_argument("--out", type=Path, help="folder for plan.svg, plan.png and plan.jsonl")
    p.add_argument("--json", action="store_true", help="one JSON object a line: ranking, front, refused, summary")
    p.add_argument("--speed", action="store_true", help="only time the planner against a plain loop of the same model")
    return p


def _read(options: argparse.Namespace) -> tuple[Space, Job]:
    """The search that the options ask for."""
    if options.goal not in GOALS:
        raise InputError(f"goal={options.goal!r} must be one of {', '.join(GOALS)}")
    for name in ("max_latency", "max_step"):
        limit = getattr(options, name)
        if limit is not None and not 0 < limit < float("inf"):
            raise InputError(f"{name}={limit} must be a positive number of seconds")
    if options.max_step is not None and options.phase == "prefill":
        raise InputError("max_step bounds decode steps, and phase='prefill' has none; use --max-latency")
    if options.top < 1:
        raise InputError(f"top={options.top} must be at least 1")
    prompt, output = options.prompt, options.output
    if options.context is not None:
        if options.phase != "decode":
            raise InputError(f"context={options.context} is for phase='decode'; give --prompt and --output instead")
        if options.context < 1:
            raise InputError(f"context={options.context} must be at least 1: it counts the step's own token")
        prompt, output = options.context - 1, 1

    def listed(text: str) -> tuple[str, ...]:
        return tuple(filter(None, (part.strip() for part in text.split(","))))

    try:
        job = Job(phase=options.phase, prompt=prompt, output=1 if options.phase == "prefill" else output)
        space = Space(
            model=options.model,
            slices=read_slices(options.slices, options.max_chips),
            batches=BATCHES if options.batches is None else _batches(options.batches),
            weights=listed(options.weights),
            layouts=listed(options.layouts),
            attentions=listed(options.attention),
            cache=options.cache,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if options.out is not None:
        run_folder.writable(options.out)
    return space, job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(argv)
    if options.speed:
        found = speed()
        if options.json:
            print("\n".join(map(json.dumps, found)))
        else:
            _show_speed(found)
        return 0
    space, job = _read(options)
    try:
        plan = search(space, job)
    except ValueError as error:
        raise InputError(str(error)) from None
    allowed = plan.allowed(options.max_latency, options.max_step)
    ranking = plan.ranking(options.goal, allowed)[: options.top]
    on_front = plan.front()
    front = front_of(plan)
    ranked = [
        {"rank": rank, "chosen": rank == 1, "goal": options.goal, "pareto": bool(on_front[i]), **row(plan, i)}
        for rank, i in enumerate(ranking, 1)
    ]
    on_it = [{"pareto": True, **row(plan, i)} for i in front]
    objects = [
        *({"kind": "ranking", **r} for r in ranked),
        *({"kind": "front", **r} for r in on_it),
        *({"kind": "rejected", **vars(r)} for r in plan.rejected),
        {"kind": "summary"}
        | {k: getattr(plan, k) for k in ("n_points", "n_considered", "n_priced", "n_pairs_refused", "seconds")}
        | {"n_options": len(plan), "n_within_limits": int(allowed.sum())},
    ]
    if options.out is not None:
        for path in write(plan, objects, front, ranking, options.out):
            print(path, file=sys.stderr)
    if options.json:
        for each in objects:
            print(json.dumps(each))
    else:
        show(plan, ranked, on_it, options.goal, Console(width=None if sys.stdout.isatty() else 150))
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


def write(
    plan: Plan, objects: Sequence[dict], front: Sequence[int], ranking: Sequence[int], folder: Path
) -> list[Path]:
    """Writes the rows and, where there is an option at all, the picture; returns their paths."""
    figures = {"plan": draw(plan, front, ranking[0] if ranking else None)} if front else {}
    return run_folder.save(folder, "plan", objects, figures)


if __name__ == "__main__":
    sys.exit(guarded(main))
