"""The report of `toruslab serve-bench`: its table, and pictures of latency against throughput and of who ran when.

Colours are those of `style`: warm for request-level batches, cool for the others.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from toruslab.benchmarks.reports.serving_curves import Findings, OverSeeds, SchemeResult, curves, findings
from toruslab.benchmarks.reports.style import Panel, Picture, log_axes, save
from toruslab.benchmarks.reports.tables import Column, DataTable
from toruslab.benchmarks.runs.rows import Row

WARM, COOL = ("#E69F00", "#D55E00", "#CC79A7", "#882255", "#999933"), ("#0072B2", "#009E73", "#56B4E9", "#000000")
PARTS = {"waits": "#C8C8C8", "prompt": "#D55E00", "decodes": "#0072B2", "done, not returned": "#F0E442"}
"""Parts of a request's life in a timeline, and their colours."""


def table(rows: Sequence[Row], found: Findings) -> DataTable:
    """A row for each scheme; Orca and the strongest request-level scheme are marked.

    Goodput has a column where limits were given, refused requests where there are any.
    """

    def over_seeds(field: str, times: float = 1.0):
        return lambda x: _number(getattr(x, field), times)

    columns = [
        Column("rung", lambda x: x.name, numeric=False),
        Column("saturation\nrequests/s", over_seeds("saturation_per_s")),
        Column("low load\nms/token", over_seeds("low_load_s", 1e3)),
        Column("same latency\nrequests/s", lambda x: _number(x.at_latency_per_s, 1, x.bound)),
        Column("ITL p99\nms", over_seeds("itl_p99_s", 1e3)),
        Column("TTFT p90\nms", over_seeds("ttft_p90_s", 1e3)),
        Column("wasted\n%", over_seeds("wasted_share", 100)),
        Column("host\n%", over_seeds("host_share", 100)),
        Column("iteration\nms", over_seeds("iteration_s", 1e3)),
    ]
    if found.lines[0].goodput_per_s:
        columns.append(Column("goodput\nrequests/s", over_seeds("goodput_per_s")))
    if any(x.refused for x in found.lines):
        columns.append(Column("refused\nrequests", lambda x: str(x.refused)))
    return DataTable(
        title=title(rows),
        columns=columns,
        records=found.lines,
        marked=lambda x: x.name in ("orca", found.strongest),
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table and its sentences."""
    found = findings(rows)
    if found is None:
        console.print("no run has succeeded")
        return
    console.print(
        table(rows, found).rich(lambda text: text.replace(" (", "\n").replace(" to ", "–").rstrip(")"), style="bold")
    )
    for sentence in sentences(found):
        console.print(escape(sentence), highlight=False)


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
    """How to read the table, and Orca's throughput over that of the strongest request-level scheme."""
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
    """The report as text: where it ran, the table, its sentences, a link to the picture."""
    found = findings(rows)
    if found is None:
        return "no run has succeeded\n"
    e = rows[-1]["environment"]
    loads = " to ".join(f"{pick(row['load_1m'] for row in rows if 'load_1m' in row):g}" for pick in (min, max))
    where = f"{e['n_devices']} {e['device_kind']} devices, {e['cores']} cores; load {loads}; commit {e['commit']}."
    lines = table(rows, found).markdown()
    return "\n".join(
        [f"# {title(rows)}", "", where, "", *lines, "", *sentences(found), "", "![latency](latency.svg)", ""]
    )


def write(rows: Sequence[Row], timelines: Mapping[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Writes serve.md, summary.json and the pictures; returns their paths.

    Args:
        rows: of the run.
        timelines: Chrome traces by the scheme's name.
        folder: of the run.
    """
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
    """Median normalised latency against throughput, a curve for each scheme: the paper's Figure 10."""
    return Picture(
        name="latency",
        heading="Latency against throughput",
        says="Medians over the seeds, bars from lowest to highest; dotted: the common latency.",
        panels=[
            Panel(
                title=title(rows),
                draw=lambda axes: _latency(axes, rows, found),
                height_in=5.0,
            )
        ],
    )


def _latency(axes: Any, rows: Sequence[Row], found: Findings) -> None:
    schemes = {x.name: x for x in found.lines}
    shades = _shades(found.lines)
    for name, seeds in curves(rows).items():
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for rate, per_s, latency_s in (point for curve in seeds.values() for point in curve.points):
            by_rate.setdefault(rate, []).append((per_s, 1e3 * latency_s))
        mids = []
        for _, points in sorted(by_rate.items()):
            across, up = [sorted(values) for values in zip(*points, strict=True)]
            x, y = across[len(across) // 2], up[len(up) // 2]
            mids.append((x, y))
            axes.plot([x, x], [up[0], up[-1]], color=shades[name], linewidth=0.8)
            axes.plot([across[0], across[-1]], [y, y], color=shades[name], linewidth=0.8)
        style: dict[str, Any] = {"color": shades[name], "markersize": 4, "linewidth": 1.4, "label": name}
        style |= {"linestyle": "--", "marker": "s"} if schemes[name].request_level else {"marker": "o"}
        axes.plot(*zip(*mids, strict=True), **style)
    axes.axhline(1e3 * found.latency_s, color="#555555", linewidth=0.8, linestyle=":")
    axes.set(xlabel="throughput, requests/s", ylabel="median normalised latency, ms/token")
    axes.set_xlim(left=0)
    log_axes(axes, "y")


def _shades(schemes: Sequence[SchemeResult]) -> dict[str, str]:
    left = {True: list(WARM), False: list(COOL)}
    return {x.name: left[x.request_level].pop(0) if left[x.request_level] else "#8C8C8C" for x in schemes}


def timeline(traces: Mapping[str, dict[str, Any]]) -> Picture:
    """Requests over time, a panel for each scheme, drawn from its Chrome trace."""
    spans = {name: _spans(trace) for name, trace in traces.items()}
    until_s = max(((e["ts"] + e["dur"]) / 1e6 for events in spans.values() for e in events), default=1.0)
    *_, last = traces
    return Picture(
        name="timeline",
        heading="Who ran when",
        says="A line is a place that one request after another takes.",
        columns=1,
        panels=[
            Panel(
                title=name,
                draw=lambda axes, events=events, name=name: _requests(axes, events, until_s, name == last),
                height_in=2.2 + 0.4 * (name == last),
            )
            for name, events in spans.items()
        ],
    )


def _spans(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of requests: their names are a number and a part."""
    events = (event for event in trace["traceEvents"] if event["ph"] == "X")
    return [event for event in events if event["name"].partition(" ")[2] in PARTS]


def _requests(axes: Any, events: Sequence[Mapping[str, Any]], until_s: float, is_last: bool) -> None:
    """Only the last panel has a legend and a label under its axis."""
    for part, colour in PARTS.items():
        mine = [event for event in events if event["name"].partition(" ")[2] == part]
        places, starts = [event["tid"] for event in mine], [event["ts"] / 1e6 for event in mine]
        label = {"label": part} if is_last else {}
        axes.barh(places, [event["dur"] / 1e6 for event in mine], left=starts, height=0.8, color=colour, **label)
    axes.set(xlim=(0, until_s), ylabel="place", xlabel="seconds" if is_last else "")
    axes.invert_yaxis()


def _number(of: OverSeeds | None, times: float = 1.0, bound: str = "") -> str:
    """The median times a unit, with the lowest and highest where seeds differ."""
    if of is None:
        return "-"
    middle, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (value * times for value in of))
    return f"{bound}{middle}" if low == high else f"{bound}{middle} ({low} to {high})"
