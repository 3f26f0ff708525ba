"""The page of one run, `report.html`: self-contained, opens from disk without a network.

Decides what stands where: what was run where, what came out in sentences, the targets, the pictures over all cells,
then cell by cell a table, its pictures and all repetitions, and the torus last. Words are of `report_words`, pieces of
HTML of `html_page`, pictures of `report_style`.
"""

from collections.abc import Mapping, Sequence

from toruslab.benchmarks.reports.cells import Result, groups, number, traced
from toruslab.benchmarks.reports.html_page import Cell, Markup, anchor, bullets, element, facts, figure, page, table
from toruslab.benchmarks.reports.quality import Quality, crossover_sentences, quality
from toruslab.benchmarks.reports.style import Picture, svg
from toruslab.benchmarks.reports.words import (
    READING,
    amount,
    bound,
    cell_sentences,
    chips,
    environments,
    fastest,
    loads,
    met,
    milliseconds,
    percent,
    quality_sentences,
    verdict,
)
from toruslab.benchmarks.runs.rows import Row

Cells = Mapping[str, Sequence[Result]]


def report(rows: Sequence[Row], pictures: Sequence[Picture], name: str) -> str:
    """The whole page of a run.

    Args:
        rows: of the run.
        pictures: those whose panels are named as cells stand with their cell, `torus` last, all others before.
        name: of the run.
    """
    cells, found = groups(rows), quality(rows)
    by_name = {p.name: p for p in pictures if p.panels}
    of_cells = [p for p in by_name.values() if p.name in ("terms", "bytes")]
    over_all = [p for p in by_name.values() if p not in of_cells and p.name != "torus"]
    sections = [("summary", "Summary", _summary(cells, found))]
    sections += [(p.name, p.heading, [*_cards(p)]) for p in over_all]
    sections += [("cells", "Cell by cell", _cells(cells, found, of_cells))]
    if "torus" in by_name:
        sections += [("torus", by_name["torus"].heading, [*_cards(by_name["torus"], "cards small")])]
    sections += [("where", "What was run where", where(rows)), ("reading", "How to read this", _reading(of_cells))]
    return page(f"toruslab bench: {name}", [*_head(rows, name, sections), *(_section(*s) for s in sections)])


def _head(rows: Sequence[Row], name: str, sections: Sequence[tuple]) -> list[Markup]:
    e = (environments(rows) or [{}])[-1]
    parts = [
        f"{e['n_devices']} {e.get('platform', '')} devices" if e.get("n_devices") else "",
        f"{e['cores']} cores" if e.get("cores") else "",
        f"JAX {e['jax']}" if e.get("jax") else "",
        f"commit {e['commit']}" if e.get("commit") else "",
        str(e.get("date") or ""),
    ]
    links = [element("li", element("a", heading, href=f"#{id_}")) for id_, heading, _ in sections]
    return [
        element("h1", f"toruslab bench: {name}"),
        element("p", " · ".join(filter(None, parts)), class_="soft"),
        element("nav", element("ul", *links), **{"aria-label": "Contents"}),
    ]


def _section(id_: str, heading: str, parts: Sequence[str]) -> Markup:
    return element("section", element("h2", heading, id=id_), *parts)


def _summary(cells: Cells, found: Quality) -> list[Markup]:
    failed = [f"{x.label}, {name}: {x.error}" for name, lines in cells.items() for x in lines if x.error]
    crossed = crossover_sentences({n: list(x) for n, x in cells.items()})
    parts: list[Markup] = []
    if said := list(filter(None, quality_sentences(found))):
        parts.append(bullets(said))
    if found.n_points:
        parts += [targets(found), _overview(cells, found)]
    if said := [*crossed, *cell_sentences(cells)]:
        parts.append(bullets(said))
    if not parts:
        parts.append(element("p", "Nothing was measured."))
    if failed:
        parts += [element("p", f"{len(failed)} point(s) failed:", class_="bad"), bullets(failed)]
    return parts


def targets(found: Quality) -> Markup:
    """What a prediction should reach, what was reached, and whether that is enough, in words."""
    rows = [
        [
            Cell(text=t.words),
            Cell(text=met(t), style={True: "good", False: "bad", None: ""}[t.met]),
            Cell(text=amount(t, t.value), value=t.value),
            Cell(text=bound(t), value=t.limit),
        ]
        for t in found.targets
    ]
    columns = [("prediction", False), ("target", False), ("reached", True), ("wanted", True)]
    return table(columns, rows, label="Targets of the prediction")


def _overview(cells: Cells, found: Quality) -> Markup:
    columns = [("cell", False), ("tokens", True), ("points", True), ("median\n|error|", True), ("Spearman", True)]
    columns += [("best measured", False), ("picked", False), ("regret", True)]
    rows = []
    for name, lines in cells.items():
        c = found.cells[name]
        best = min((x for x in lines if x.measured_s), key=lambda x: x.measured_s or 0, default=None)
        rows.append(
            [
                Cell(text=element("a", name, href=f"#{_id(name)}")),
                Cell(text=f"{lines[0].tokens:,}", value=lines[0].tokens),
                Cell(text=f"{c.n_points}", value=c.n_points),
                Cell(text=percent(c.median_error), value=c.median_error),
                Cell(text="" if c.spearman is None else f"{c.spearman:.3f}", value=c.spearman),
                Cell(text=best.label if best else ""),
                Cell(text=c.regret.picked if c.regret else ""),
                Cell(text=percent(c.regret.value) if c.regret else "", value=c.regret.value if c.regret else None),
            ]
        )
    return table(columns, rows, label="Quality of the prediction by cell")


def _cards(picture: Picture, class_: str = "cards") -> list[Markup]:
    drawn = [figure(svg(p, f"{picture.name}-{i}"), p.title) for i, p in enumerate(picture.panels)]
    return [element("p", picture.says, class_="soft"), element("div", *drawn, class_=class_)]


def _id(name: str) -> str:
    return f"cell-{anchor(name)}"


def _cells(cells: Cells, found: Quality, pictures: Sequence[Picture]) -> list[Markup]:
    parts = []
    ids: set[str] = set()
    for name, lines in cells.items():
        id_ = _id(name)
        parts.append(element("h3", name, id=id_ if id_ not in ids else f"{id_}-{len(ids)}"))
        ids.add(id_)
        of = found.cells[name]
        if of.n_points:
            said = [f"median |error| {percent(of.median_error)} over {of.n_points} points"]
            said += [f"Spearman {of.spearman:.3f}"] if of.spearman is not None else []
            if of.regret:
                said.append(f"the model picks {of.regret.picked}, the best is {of.regret.best}: ")
                said[-1] += f"regret {percent(of.regret.value)}"
            parts.append(element("p", "Prediction: " + "; ".join(said) + ".", class_="soft"))
        parts.append(_table(name, lines))
        parts += [element("p", f"{x.label} failed, {x.error}", class_="bad") for x in lines if x.error]
        drawn = [
            figure(svg(panel, f"{p.name}-{anchor(name)}"), p.heading)
            for p in pictures
            for panel in p.panels
            if panel.title == name
        ]
        if drawn:
            parts.append(element("div", *drawn, class_="cards"))
        if any(x.row("measured") for x in lines):
            parts.append(
                element(
                    "details",
                    element("summary", "all repetitions, outliers, load, time to compile"),
                    _times(name, lines),
                )
            )
        for x in lines:
            profile = x.row("measured").get("profile")
            if isinstance(profile, dict) and profile.get("rows"):
                summary = element("summary", f"where the time of {x.label} goes, and each collective's price")
                parts.append(element("details", summary, _traced(x, profile)))
    return parts


def _traced(x: Result, profile: Row) -> Markup:
    columns = [("scope", False), ("work", False), ("times", True), ("priced\nms", True), ("device\nms", True)]
    columns += [("of these\nwaiting ms", True), ("of the cores\nms", True)]
    rows = [
        [
            Cell(text=t.scope),
            Cell(text=t.what),
            Cell(text="" if t.count is None else f"{t.count:,.0f}", value=t.count),
            *(Cell(text=milliseconds(s), value=s) for s in (t.predicted_s, t.device_s, t.wait_s, t.work_s)),
        ]
        for t in traced(profile, x.row("analytic").get("collectives") or ())
    ]
    return table(columns, rows, label=f"where the time of {x.label} goes")


def _table(name: str, lines: Sequence[Result]) -> Markup:
    columns = [("layout", False), ("predicted\nms", True), ("measured\nms", True), ("quartiles\nms", True)]
    columns += [
        ("error", True),
        ("x best", True),
        ("outliers", True),
        ("planned\nn", True),
        ("planned\nkB a chip", True),
    ]
    columns += [("compiled\nn", True), ("compiled\nkB a chip", True), ("as planned", False)]
    columns += [("peak MB\na chip", True)]
    least = fastest(lines)
    rows = [[Cell(text=x.label), *_numbers(x, least)] for x in lines]
    return table(columns, rows, best=[x.measured_s is not None and x.measured_s == least for x in lines], label=name)


def _numbers(x: Result, least: float | None) -> list[Cell]:
    def plain(value: float | None, form: str, scale: float = 1.0, bracket: bool = False) -> Cell:
        text = "" if value is None else form.format(value / scale)
        return Cell(text=f"({text})" if text and bracket else text, value=value)

    low, high = x.quartiles_s or (None, None)
    said = verdict(x)
    return [
        Cell(text=milliseconds(x.predicted_s), value=x.predicted_s),
        Cell(text=milliseconds(x.measured_s), value=x.measured_s),
        Cell(text="" if low is None else f"{milliseconds(low)} to {milliseconds(high)}", value=low),
        Cell(text=percent(x.relative_error, signed=True), value=x.relative_error),
        plain(x.measured_s / least if x.measured_s and least else None, "{:.2f}"),
        plain(x.number("measured", "outliers"), "{:.0f}"),
        plain(x.number("analytic", "n_collectives"), "{:,.0f}", bracket=x.is_auto),
        plain(x.number("analytic", "collective_bytes"), "{:,.1f}", 1e3, bracket=x.is_auto),
        plain(x.number("compiled", "n_collectives"), "{:,.0f}"),
        plain(x.number("compiled", "collective_bytes"), "{:,.1f}", 1e3),
        Cell(text=said, style={"yes": "good", "failed": "bad"}.get(said, "")),
        plain(x.number("compiled", "peak_bytes_per_chip"), "{:,.1f}", 1e6),
    ]


def _times(name: str, lines: Sequence[Result]) -> Markup:
    columns = [
        ("layout", False),
        ("in a strip", False),
        ("times", True),
        ("lowest\nms", True),
        ("highest\nms", True),
        ("outliers", True),
    ]
    columns += [("load", True), ("compile\ns", True), ("all times, ms", False)]
    times = {x.label: _all(x) for x in lines}
    longest = max((t for each in times.values() for t in each), default=0.0)
    rows = []
    for x in lines:
        low, high, load = (x.number("measured", k) for k in ("min_s", "max_s", "load_1m"))
        n, odd, compiling = (
            *(x.number("measured", k) for k in ("repeats", "outliers")),
            x.number("compiled", "compile_s"),
        )
        rows.append(
            [
                Cell(text=x.label),
                Cell(text=_strip(times[x.label], longest)),
                Cell(text="" if n is None else f"{n:.0f}", value=n),
                Cell(text=milliseconds(low), value=low),
                Cell(text=milliseconds(high), value=high),
                Cell(text="" if odd is None else f"{odd:.0f}", value=odd),
                Cell(text="" if load is None else f"{load:.2f}", value=load),
                Cell(text="" if compiling is None else f"{compiling:.2f}", value=compiling),
                Cell(text=", ".join(map(milliseconds, times[x.label])), style="w"),
            ]
        )
    return table(columns, rows, label=f"all repetitions, {name}")


def _all(line: Result) -> list[float]:
    found = line.row("measured").get("times_s")
    return [t for t in map(number, found if isinstance(found, list) else []) if t is not None and t >= 0]


def _strip(times: Sequence[float], longest: float) -> Markup:
    """All times as marks on one line, from zero to the longest of the cell."""
    marks = "".join(f'<circle cx="{4 + 152 * t / longest:.1f}" cy="8" r="3"/>' for t in times if longest > 0)
    style = 'width="160" height="16" viewBox="0 0 160 16" fill="currentColor" fill-opacity="0.35" aria-hidden="true"'
    return Markup(f"<svg {style}>{marks}</svg>" if marks else "")


def where(rows: Sequence[Row]) -> list[Markup]:
    """Every environment that rows were taken in, the load meanwhile, and the chip files."""
    parts = []
    for e in environments(rows):
        first = ["date", "commit", "platform", "device_kind", "n_devices", "n_processes", "cores", "load_1m"]
        named = [k for k in first if k in e] + [k for k in e if k not in first]
        parts.append(facts((k.replace("_", " "), "" if e[k] is None else str(e[k])) for k in named))
    more = [("load while timed", loads(rows)), ("chip file", ", ".join(chips(rows)))]
    if any(text for _, text in more):
        parts.append(facts(more))
    return parts or [element("p", "The rows do not say.")]


def _reading(pictures: Sequence[Picture]) -> list[Markup]:
    items = [
        *READING,
        "In brackets: the plan of ws2d, which auto is held against; it has none of its own.",
        "error: predicted / measured - 1. Spearman: the correlation of the ranks.",
        "regret: the measured time of the layout that the model picks, over that of the best measured one, - 1; of "
        "equal predictions the slowest counts.",
        *(f"{p.heading}: {p.says}" for p in pictures),
    ]
    return [bullets(items)]
