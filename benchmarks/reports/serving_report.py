"""The table of `toruslab serve-bench`, and its pictures: latency against throughput, and who ran when.

Colours are Okabe and Ito's, warm for request-level batches; see `benchmarks.reports.style`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toruslab.benchmarks.reports.serving_curves import Findings, OverSeeds, SchemeResult, curves, findings
from toruslab.benchmarks.reports.style import Panel, Picture, log_axis, save
from toruslab.benchmarks.runs.rows import Row

HEADS = (
    "rung",
    "saturation\nrequests/s",
    "low load\nms/token",
    "same latency\nrequests/s",
    "ITL p99\nms",
    "TTFT p90\nms",
    "wasted\n%",
    "host\n%",
    "iteration\nms",
)
WARM, COOL = ("#E69F00", "#D55E00", "#CC79A7", "#882255", "#999933"), ("#0072B2", "#009E73", "#56B4E9", "#000000")
PARTS = {"waits": "#C8C8C8", "prompt": "#D55E00", "decodes": "#0072B2", "done, not returned": "#F0E442"}


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table and its sentences."""
    found = findings(rows)
    if found is None:
        console.print("no run has succeeded")
        return
    drawn = Table(title=escape(title(rows)), title_justify="left", title_style="bold")
    for head in _heads(found):
        drawn.add_column(head, justify="left" if head == "rung" else "right", no_wrap=True)
    for line in found.lines:
        cells = (cell.replace(" (", "\n").replace(" to ", "–").rstrip(")") for cell in _cells(line, found))
        drawn.add_row(*map(escape, cells), style="bold" if line.name in ("orca", found.strongest) else None)
    console.print(drawn)
    for sentence in sentences(found):
        console.print(escape(sentence), highlight=False)


def _heads(found: Findings) -> tuple[str, ...]:
    """Of the table; goodput where limits were given, refused requests where there are any."""
    goodput = ("goodput\nrequests/s",) if found.lines[0].goodput_per_s else ()
    return HEADS + goodput + (("refused\nrequests",) if any(line.refused for line in found.lines) else ())


def title(rows: Sequence[Row]) -> str:
    """What was served, by what."""
    s = rows[0]["serving"]
    scale = ":".join(f"{factor:g}" for factor in dict.fromkeys(s["scale"]))
    stages = f"{s['stages']} stages of {s['mesh']}, " if s["stages"] > 1 else ""
    seeds = len({row["seed"] for row in rows})
    return (
        f"{s['model']} on {s['slice']}, {stages}{s['layout']}/{s['attention']}, {s['weights']}; "
        f"{s['trace']} x {scale}, {s['arrivals']}, {s['requests']} requests, "
        f"{seeds} seed{'s' * (seeds > 1)}; batches of {s['max_bs']}, {s['n_slots']} slots"
    )


def sentences(found: Findings) -> list[str]:
    """How the table is to be read, and the ratio."""
    said = [
        f"Same latency: a median normalised latency of {1e3 * found.latency_s:.3g} ms a token, 3.3 times the lowest at "
        f"low load (the paper's 190 ms over its 58). ITL, TTFT and shares at {found.reference_per_s:g} requests/s; "
        "host: of the time in which stages compute. Medians over the seeds, with them the lowest and the highest.",
    ]
    if found.ratio and found.saturation_ratio:
        said.append(
            f"Orca over the strongest request-level rung of each seed (mostly {found.strongest}): throughput at the "
            f"same latency {_number(found.ratio, 1, found.ratio_bound)} times, at saturation "
            f"{_number(found.saturation_ratio)}."
        )
    return said


def markdown(rows: Sequence[Row]) -> str:
    """The table as text."""
    found = findings(rows)
    if found is None:
        return "no run has succeeded\n"
    e = rows[-1]["environment"]
    loads = " to ".join(f"{pick(row['load_1m'] for row in rows if 'load_1m' in row):g}" for pick in (min, max))
    names = [head.replace("\n", ", ") for head in _heads(found)]
    out = [
        f"# {title(rows)}",
        "",
        f"{e['n_devices']} {e['device_kind']} devices, {e['cores']} cores; load {loads}; commit {e['commit']}.",
    ]
    out += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    out += [f"| {' | '.join(_cells(line, found))} |" for line in found.lines]
    return "\n".join([*out, "", *sentences(found), "", "![latency](latency.svg)", ""])


def write(rows: Sequence[Row], timelines: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Writes serve.md, summary.json and the pictures; returns their paths."""
    found = findings(rows)
    if found is None:
        return []
    paths = [folder / "serve.md", folder / "summary.json"]
    paths[0].write_text(markdown(rows), encoding="utf-8")
    paths[1].write_text(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False), encoding="utf-8")
    paths += save(latency(rows, found), folder)
    if timelines:
        paths += save(timeline(timelines), folder)
    return paths


def latency(rows: Sequence[Row], found: Findings) -> Picture:
    """Median normalised latency against throughput, a curve for each rung: the paper's Figure 10."""
    return Picture(
        name="latency",
        heading="Latency against throughput",
        says="Medians over the seeds, bars from lowest to highest; dotted: the common latency.",
        panels=[
            Panel(
                title=title(rows),
                draw=lambda axes: _latency(axes, rows, found),
                height_in=4.6,
                alt="Median normalised latency against throughput, a curve for each rung",
            )
        ],
    )


def _latency(axes: Any, rows: Sequence[Row], found: Findings) -> None:
    of = curves(rows)
    shades = _shades({line.name: line.request_level for line in found.lines})
    for name, seeds in of.items():
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for curve in seeds.values():
            for rate, per_s, latency_s in curve.points:
                by_rate.setdefault(rate, []).append((per_s, 1e3 * latency_s))
        mids = []
        for _, points in sorted(by_rate.items()):
            across, up = [sorted(values) for values in zip(*points, strict=True)]
            x, y = across[len(across) // 2], up[len(up) // 2]
            mids.append((x, y))
            axes.plot([x, x], [up[0], up[-1]], color=shades[name], linewidth=0.8)
            axes.plot([across[0], across[-1]], [y, y], color=shades[name], linewidth=0.8)
        is_request_level = next(line.request_level for line in found.lines if line.name == name)
        style: dict[str, Any] = {"linestyle": "--", "marker": "s"} if is_request_level else {"marker": "o"}
        axes.plot(*zip(*mids, strict=True), color=shades[name], markersize=4, linewidth=1.4, label=name, **style)
    axes.axhline(1e3 * found.latency_s, color="#555555", linewidth=0.8, linestyle=":")
    axes.set(xlabel="throughput, requests/s", ylabel="median normalised latency, ms/token", yscale="log")
    axes.set_xlim(left=0)
    log_axis(axes.yaxis)
    axes.grid(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def timeline(traces: Mapping[str, dict[str, Any]]) -> Picture:
    """Requests over time, a panel for each rung, drawn from its Chrome trace."""
    until_s = max((_end_s(event) for trace in traces.values() for event in _spans(trace)), default=1.0)
    return Picture(
        name="timeline",
        heading="Who ran when",
        says="A line is a place that one request after another takes.",
        columns=1,
        panels=[
            Panel(
                title=name,
                draw=lambda axes, trace=trace, is_last=is_last: _requests(axes, trace, until_s, is_last),
                height_in=2.2 + 0.4 * is_last,
                alt=f"Requests over time under {name}",
            )
            for name, trace in traces.items()
            for is_last in (name == list(traces)[-1],)
        ],
    )


def _spans(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of requests: their names are a number and a part."""
    events = (event for event in trace["traceEvents"] if event["ph"] == "X")
    return [event for event in events if event["name"].partition(" ")[2] in PARTS]


def _end_s(event: Mapping[str, Any]) -> float:
    return (event["ts"] + event["dur"]) / 1e6


def _requests(axes: Any, trace: Mapping[str, Any], until_s: float, is_last: bool) -> None:
    from matplotlib.patches import Patch

    for part, colour in PARTS.items():
        mine = [event for event in _spans(trace) if event["name"].partition(" ")[2] == part]
        axes.barh(
            [event["tid"] for event in mine],
            [event["dur"] / 1e6 for event in mine],
            left=[event["ts"] / 1e6 for event in mine],
            height=0.8,
            color=colour,
        )
    axes.set(xlim=(0, until_s), ylabel="place")
    axes.invert_yaxis()
    if is_last:
        axes.set_xlabel("seconds")
        handles = [Patch(color=colour, label=part) for part, colour in PARTS.items()]
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=4, columnspacing=1)


def _shades(names: Mapping[str, bool]) -> dict[str, str]:
    left = {True: list(WARM), False: list(COOL)}
    return {name: left[is_warm].pop(0) if left[is_warm] else "#8C8C8C" for name, is_warm in names.items()}


def _cells(line: SchemeResult, found: Findings) -> tuple[str, ...]:
    cells = (
        line.name,
        _number(line.saturation_per_s),
        _number(line.low_load_s, 1e3),
        _number(line.at_latency_per_s, 1, line.bound),
        _number(line.itl_p99_s, 1e3),
        _number(line.ttft_p90_s, 1e3),
        _number(line.wasted_share, 100),
        _number(line.host_share, 100),
        _number(line.iteration_s, 1e3),
    )
    goodput = (_number(line.goodput_per_s),) if line.goodput_per_s else ()
    return cells + goodput + ((str(line.refused),) if any(one.refused for one in found.lines) else ())


def _number(of: OverSeeds | None, times: float = 1.0, bound: str = "") -> str:
    if of is None:
        return "-"
    middle, low, high = (_three(value * times) for value in of)
    return f"{bound}{middle}" if low == high else f"{bound}{middle} ({low} to {high})"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
