"""Pictures of `toruslab comparisons`: the ratio of the blocks, and attention over context as the paper's Figure 8."""

from collections.abc import Sequence
from pathlib import Path

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs.rows import Row

COLOURS = {
    "multihead over heads": "#0072B2",
    "multiquery over heads": "#56B4E9",
    "multiquery over batch": "#D55E00",
}


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the rows and the pictures (SVG and PNG); returns their paths."""
    return run_folder.save(folder, "rows", rows, {"block": draw_block(rows), "attention": draw_attention(rows)})


def draw_block(rows: Sequence[Row]):
    """Time of the serial block as a multiple of the parallel one's, by source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    panel = figure.subplots()
    found = [r for r in rows if r["comparison"] == "block" and "ratio" in r]
    names = [f"{r['source']}: {r['point']['model'].replace('-serial', '')}" for r in found]
    bars = panel.barh(names, [r["ratio"] for r in found])
    panel.bar_label(bars, fmt="%.2f", padding=3)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xlabel="decode step, serial / parallel block", xlim=(0, 1.25 * max(r["ratio"] for r in found)))
    panel.invert_yaxis()
    return figure


def draw_attention(rows: Sequence[Row]):
    """Decode latency over context, a panel a source; dotted where it does not fit, vertical lines where the whole model
    runs out of memory by the rule of Table 1."""
    from matplotlib.figure import Figure

    members = [r for r in rows if r["comparison"] == "attention" and "latency_s" in r]
    sources = list(dict.fromkeys(r["source"] for r in members))
    figure = Figure(figsize=(6.4, 4.2 * len(sources)), layout="constrained")
    for panel, source in zip(figure.subplots(len(sources), 1, squeeze=False)[:, 0], sources, strict=True):
        for kind, color in COLOURS.items():
            line = [r for r in members if (r["source"], r["kind"]) == (source, kind)]
            panel.plot(*_points(line), ":", color=color)
            fits = [r for r in line if r.get("fits", True)]
            panel.plot(*_points(fits), "-o", color=color, markersize=4, label=kind)
        if source == "analytic":
            for r in (r for r in rows if r["comparison"] == "memory"):
                panel.axvline(r["max_context_by_rule"], color=COLOURS[r["kind"]], linewidth=0.8, linestyle="--")
        p = next(r["point"] for r in members if r["source"] == source)
        model = p["model"].replace("-mha", "")
        panel.set(xlabel="context, tokens", ylabel="ms per decode step")
        panel.set_title(f"{source}: {model} on {p['slice']}, batch {p['batch']}")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.25)
        note = "dashed: whole model, 30% of memory\ndotted: does not fit" if source == "analytic" else None
        panel.legend(title=note, loc="upper left", fontsize="small", title_fontsize="small")
    return figure


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [r["point"]["context"] for r in rows], [r["latency_s"] * 1e3 for r in rows]
