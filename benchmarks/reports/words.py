"""The report's numbers, verdicts and sentences as text, the same in the terminal, in Markdown and on the page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from toruslab.benchmarks.reports.cells import COMPARATORS, Result, number
from toruslab.benchmarks.reports.quality import Quality, Target, crossover_sentences
from toruslab.benchmarks.runs.rows import Row

READING = (
    "planned: from the layout alone.",
    "compiled: read from XLA's program.",
    "predicted: the chip file's constants applied to the plan; for auto, which has none, to the compiled collectives.",
    "measured: median of the step, and between which times half of all repetitions lie.",
    "Bytes are what one chip must receive in a pass.",
)
SOURCES = ("analytic", "compiled", "measured")


def milliseconds(seconds: float | None) -> str:
    """A time in ms; empty where it is not known."""
    if seconds is None:
        return ""
    if seconds >= 0.1:
        return f"{seconds * 1e3:,.0f}"
    return f"{seconds * 1e3:.2f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"


def percent(share: float | None, *, signed: bool = False) -> str:
    """A share in percent; empty where it is not known."""
    if share is None:
        return ""
    return f"{share:+.0%}" if signed else f"{share:.1%}" if abs(share) < 0.1 else f"{share:.0%}"


def measured(line: Result) -> str:
    """The measured median and its quartiles, in ms."""
    spread = line.quartiles_s
    return milliseconds(line.measured_s) + (
        f" ({milliseconds(spread[0])}..{milliseconds(spread[1])})" if spread and line.measured_s else ""
    )


def predicted(line: Result) -> str:
    """The prediction in ms and its error."""
    error = line.relative_error
    return milliseconds(line.predicted_s) + (f" ({percent(error, signed=True)})" if error is not None else "")


def volume(line: Result, source: str) -> str:
    """Number of collectives and kB a chip. Brackets mark the plan of ws2d, with which `auto` is compared."""
    total, n = line.number(source, "collective_bytes"), line.number(source, "n_collectives")
    if total is None:
        return ""
    text = ("" if n is None else f"{n:,.0f}, ") + f"{total / 1e3:,.1f}"
    return f"({text})" if line.is_auto and source == "analytic" else text


def verdict(line: Result) -> str:
    """Whether the program follows the plan; for `auto`, its bytes as a multiple of the plan of ws2d."""
    compiled, plan = line.row("compiled"), line.number("analytic", "collective_bytes")
    if line.error:
        return "failed"
    if line.is_auto:
        moved = line.number("compiled", "collective_bytes")
        return "" if moved is None else f"{moved / plan:.1f} x bytes" if plan else "no plan"
    found = compiled.get("collectives")
    verdicts = [c.get("verdict") for c in found if isinstance(c, dict)] if isinstance(found, list) else None
    if verdicts is None or None in verdicts:
        return ""
    unexplained = line.number("compiled", "unexplained")
    if unexplained is None:
        unexplained = sum(v in ("extra", "missing") for v in verdicts)
    exact = all(v == "as planned" for v in verdicts)
    return "yes" if exact else f"{unexplained:.0f} unexplained" if unexplained else "merged"


def kind(line: Result) -> str:
    """Whether weights move, by the plan."""
    return {True: "weight-gathered", False: "weight-stationary", None: ""}[line.is_gathered]


def fastest(lines: Iterable[Result]) -> float | None:
    """The best measured time, seconds."""
    return min((x.measured_s for x in lines if x.measured_s), default=None)


def cell_sentence(name: str, lines: Sequence[Result]) -> str | None:
    """The fastest of the paper's layouts, and the times of the comparators."""
    timed = sorted((x for x in lines if x.measured_s), key=lambda x: x.measured_s or 0)
    own = [x for x in timed if x.point.get("layout") not in COMPARATORS]
    if not own:
        return None
    best = own[0]
    others = [f"{x.label} {milliseconds(x.measured_s)}" for x in timed if x not in own]
    said = f" ({kind(best)})" if kind(best) else ""
    return (
        f"{best.tokens} tokens, {name.split(',')[0]}: fastest is {best.label}{said}, "
        f"{milliseconds(best.measured_s)} ms" + (f"; comparators: {', '.join(others)} ms" if others else "")
    )


def cell_sentences(cells: Mapping[str, Sequence[Result]]) -> list[str]:
    """One sentence per cell."""
    return [s for name, lines in cells.items() if (s := cell_sentence(name, lines))]


def quality_sentences(found: Quality) -> list[str]:
    """How good the predictions are, then which targets they miss. Empty where nothing was measured."""
    if not found.n_measured:
        return []
    if not found.n_points:
        return [f"Prediction: none of the {found.n_measured} measured points has one."]
    parts = [f"median error {percent(found.median_error)}, 90th percentile {percent(found.p90_error)}"]
    parts.append(f"worst {percent(found.worst_error)} ({found.worst_point})")
    if found.spearman is not None:
        parts.append(f"Spearman {found.spearman:.3f}")
    if found.mean_regret is not None:
        parts.append(f"mean regret {percent(found.mean_regret)}, worst {percent(found.worst_regret)}")
    of = "" if found.n_points == found.n_measured else f" of {found.n_measured} measured"
    missed = [target(t) for t in found.targets if t.met is False]
    unknown = [t.words for t in found.targets if t.met is None]
    verdicts = f"Targets missed: {'; '.join(missed)}." if missed else "" if unknown else "All targets are met."
    if unknown:
        verdicts += f"{' ' if verdicts else ''}Not known: {', '.join(unknown)}."
    return [f"Prediction, {found.n_points} points{of}: {'; '.join(parts)}.", verdicts]


def target(t: Target) -> str:
    """A target and the number that was reached."""
    return f"{t.words} {amount(t, t.value)}, wanted {bound(t)}"


def bound(t: Target) -> str:
    """The target's limit with its side."""
    return f"{'at most' if t.side == '<=' else 'at least'} {amount(t, t.limit)}"


def amount(t: Target, value: float | None) -> str:
    """A target's number: rank correlations as such, all others in percent."""
    if value is None:
        return "not known"
    return f"{value:.3f}" if t.name == "spearman" else percent(value)


def met(t: Target) -> str:
    """Whether the target is met, in words."""
    return {True: "met", False: "missed", None: "not known"}[t.met]


def sentences(cells: Mapping[str, Sequence[Result]], found: Quality) -> list[str]:
    """All sentences of a run: cell by cell, the crossover, the prediction."""
    return [*cell_sentences(cells), *crossover_sentences(cells), *quality_sentences(found)]


def environments(rows: Iterable[Row]) -> list[Row]:
    """The environments of the rows, each once. Those that differ in load and date only are one; the last counts."""
    found: dict[str, Row] = {}
    for row in rows:
        e = row.get("environment")
        if isinstance(e, dict) and e:
            found[repr(sorted((k, repr(v)) for k, v in e.items() if k not in ("load_1m", "date")))] = e
    return list(found.values())


def where(e: Row) -> str:
    """An environment in one sentence, without the facts that it lacks."""

    def known(*parts: tuple[str, Any]) -> str:
        return ", ".join(text.format(value) for text, value in parts if value is not None)

    kind_ = f" ({e['device_kind']})" if e.get("device_kind") else ""
    devices = f"{e.get('n_devices', '?')} {e.get('platform', '')} devices{kind_}"
    processes = f" in {e['n_processes']} process(es)" if e.get("n_processes") is not None else ""
    machine = known(("{} cores", e.get("cores")), ("load {}", e.get("load_1m")))
    versions = known(("JAX {}", e.get("jax")), ("Flax {}", e.get("flax")), ("Python {}", e.get("python")))
    rest = known(("commit {}", e.get("commit")), ("{}", e.get("date")), ("seed {}", e.get("seed")))
    return "; ".join(filter(None, (devices + processes + (f" on {machine}" if machine else ""), versions, rest))) + "."


def loads(rows: Iterable[Row]) -> str:
    """The lowest and the highest load while points were timed; empty where no row has it."""
    found = [x for r in rows if r.get("source") == "measured" and (x := number(r.get("load_1m"))) is not None]
    return f"{min(found):g} to {max(found):g}" if found else ""


def chips(rows: Iterable[Row]) -> list[str]:
    """Names of the chip files that predictions come from."""
    return list(dict.fromkeys(str(r["chip"]) for r in rows if r.get("chip") and "latency_s" in r))
