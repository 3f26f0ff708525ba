"""The picture of `toruslab plan`: cost against latency, as Figure 1 of Pope et al. 2022."""

from collections.abc import Sequence

import numpy as np

from toruslab.partitioning.cost.planner import Plan, pareto


def draw(plan: Plan, front: Sequence[int], chosen: int | None):
    """All options, one line per slice, and the Pareto front in black.

    Args:
        plan: of `partitioning.cost.planner.search`.
        front: the options on its Pareto front, by latency.
        chosen: the first of the ranking, if there is one.

    Returns:
        A figure of matplotlib.
    """
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
