"""The analytic model beside published numbers: errors, MFU, the fit of its constants, pictures. Touches no device.

    toruslab published
    toruslab published --fit
    toruslab published --points mine.jsonl --json

The numbers are in `partitioning/published/data/`, each with its table or figure of Pope et al. 2022. The layers of
Tables 2 and 3 and Figure B.1 are what the chip's constants were fitted on; everything else is predicted. A file of your
own holds a row a line (or a JSON array): {"source": "where it is from", "point": {...}, "stack_s": 0.1}, with
"published_s" for the whole pass, "stack_s" for the layers alone (the one that is compared where both are given), and
"mfu" as a fraction if you like.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from toruslab.benchmarks.reports import figures as pictures
from toruslab.benchmarks.reports.style import sheets
from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row
from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.forward import constants_of
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published.fit import fit, leave_one_out
from toruslab.partitioning.published.papers import (
    CALIBRATION,
    Published,
    answer,
    calibration,
    closed_form_rows,
    figures,
    parse,
)
from toruslab.partitioning.torus.chip import chip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a row of the user's file was refused."""
    p = Parser("toruslab published", __doc__)
    p.add_argument("--points", metavar="FILE", help="published numbers of your own (- for standard input)")
    p.add_argument("--fit", action="store_true", help="fit the constants afresh, use them, and leave each row out once")
    p.add_argument(
        "--out", type=Path, help="folder of the rows and pictures (default: results/published; with --json none)"
    )
    p.add_argument("--json", action="store_true", help="one JSON object a published number on standard output")
    options = p.parse_args(argv)
    own, refused = read(options.points) if options.points else ([], {})
    name = _name(options.points) if options.points else None
    folder = options.out or (None if options.json else Path("results/published"))
    if folder:
        run_folder.writable(folder)
    with progress("toruslab published", what="fitting" if options.fit else "pricing") as work:
        constants = fit(calibration()) if options.fit else None
        rows = [answer(published, constants) for published in (*calibration(), *figures(), *own)]
        if constants:
            work.begin("fitting without each row in turn")
            for row, error in zip(rows, leave_one_out(calibration(), constants), strict=False):
                row["loo_error"] = error
        rows += closed_form_rows()
    if options.json:
        if constants:
            shipped = constants_of(chip("v4"))
            n = len(calibration())
            output.print_rows([{"source": "fitted", "n": n, "fitted": constants, "chip_file": shipped}])
        output.print_rows(rows)
    else:
        console = output.console(160)
        show(rows, statistics(rows, name), console)
        if constants:
            _show_constants(constants, console)
    if folder:
        output.written(run_folder.save(folder, "rows", rows, sheets(*pictures.published(rows, constants))))
    for line, reason in refused.items():
        print(f"error: {name}, line {line}: {reason}", file=sys.stderr)
    return 1 if refused else 0


def read(where: str) -> tuple[list[Published], dict[int, str]]:
    """A user's file: its numbers, and why its other lines (or entries of an array) were refused, by their number.

    Raises:
        InputError: no such file, no text, or nothing in it.
    """
    try:
        text = sys.stdin.read() if where == "-" else Path(where).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(f"points={where!r}: {reason}") from None
    entries: list[tuple[int, Any]] = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    is_array = False
    if text.lstrip().startswith("["):
        try:
            entries, is_array = [*enumerate(json.loads(text), 1)], True
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):  # more than one value: lines, the first of them an array
                raise InputError(f"points={where!r}: not a JSON array: {error}") from None
    if not entries:
        raise InputError(f"points={where!r} holds no rows")
    found, refused = [], {}
    for number, entry in entries:
        try:
            fields = _json(entry) if isinstance(entry, str) and not is_array else entry
            published = parse(fields, line=number, of=f"{_name(where)}: ")
            estimate(published.point)
            found.append(published)
        except (ValueError, OSError) as error:
            refused[number] = str(error)
    return found, refused


def _name(where: str) -> str:
    return "standard input" if where == "-" else Path(where).name


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def statistics(rows: Sequence[Row], own: str | None = None) -> list[Row]:
    """Median, 90th percentile and largest error of every set, and of all that is fitted and all that is predicted.

    Args:
        rows: of `answer` and `closed_form_rows`.
        own: the name of the user's file, whose rows are those with a line.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["set"], []).append(row)
        if "pass_error" in row:
            also = {"error": row["pass_error"], "calibrated": False}
            groups.setdefault(f"{row['set']}, whole pass", []).append(also)
    ours = [r for r in rows if r["point"] and "line" not in r]
    groups["all that is fitted"] = [r for r in ours if r["set"] in CALIBRATION]
    groups["Figures 6, 7 without points of the fit"] = [r for r in ours if not r["calibrated"]]
    if own and (mine := [r for r in rows if "line" in r]):
        groups[f"all of {own}"] = mine
    found = []
    for name, members in groups.items():
        row = {"set": name, "n": len(members), "n_calibrated": sum(r["calibrated"] for r in members)}
        row |= _spread("", [r["error"] for r in members])
        found.append(row | _spread("loo_", [r["loo_error"] for r in members if "loo_error" in r]))
    return found


def _spread(prefix: str, errors: Sequence[float]) -> dict[str, float]:
    if not errors:
        return {}
    sizes = np.abs(errors)
    found = {"median": np.median(sizes), "p90": np.quantile(sizes, 0.9), "max": np.max(sizes)}
    return {prefix + k: float(v) for k, v in found.items()}


def orderings(rows: Sequence[Row]) -> list[str]:
    """What Figures 6 and 7 are there to show: ratios of two layouts, published and by the model."""
    sentences = []
    for name, layouts, what in (
        ("Figure 6", ("ws1d", "ws2d"), "1D over 2D weight-stationary, time at {} chips"),
        ("Figure 7", ("ws2d", "wgxyz"), "2D weight-stationary over weight-gathered, time at {} tokens"),
    ):
        over, under = ([r for r in rows if r["set"] == name and r["point"]["layout"] == x] for x in layouts)
        points = [Point.from_json(r["point"]) for r in over]
        at = [f"{p.n_chips if p.phase == 'decode' else p.tokens:,}" for p in points]
        pairs = list(zip(over, under, strict=True))
        numbers = [" / ".join(f"{a[k] / b[k]:.2f}" for a, b in pairs) for k in ("analytic_s", "stack_s")]
        sentences.append(f"{name}: {what.format(' / '.join(at))}: {numbers[0]} (published {numbers[1]})")
    return sentences


def show(rows: Sequence[Row], summary: Sequence[Row], console: Console) -> None:
    """Prints every point, then the errors of the sets and the ratios of the figures."""
    loo = ["left out"] if any("loo_error" in r for r in rows) else []
    table = output.table((), title="Analytic beside published", title_style="bold")
    for heading in ("point", "layout", "published ms", "analytic ms", "error", *loo):
        table.add_column(heading, justify="left" if heading in ("point", "layout") else "right", no_wrap=True)
    for source in ("published", "analytic"):
        table.add_column(f"MFU %\n{source}", justify="right")
    last = None
    for row in (r for r in rows if r["point"]):
        if row["set"] != last:
            last = row["set"]
            table.add_section()
            table.add_row(Text(last, style="bold"))
        p = row["point"]
        sizes = f"{p['batch']}" + (f" x {p['length']}" if p["phase"] == "prefill" else "")
        context = f", context {p['context']}" if p["context"] else ""
        cells = [f"{p['model']} {p['weights']}, {p['slice']}, {p['phase']} {sizes}{context}"]
        cells += [f"{p['layout']}/{p['attention']}"]
        cells += [f"{row[k] * 1e3:,.4g}" for k in (row["compared"], "analytic_s")]
        cells += [f"{row['error']:+.1%}"]
        cells += [f"{row['loo_error']:+.1%}" if "loo_error" in row else ""] if loo else []
        table.add_row(*cells, *(f"{row[k]:.1%}"[:-1] if k in row else "" for k in ("mfu", "analytic_mfu")))
    console.print(table)
    names = {"median": "median", "p90": "90th", "max": "max"}
    names |= {"loo_median": "left out:\nmedian", "loo_p90": "90th", "loo_max": "max"} if loo else {}
    errors = output.table(("set", "n", "in the fit", *names.values()), title="Errors", title_style="bold")
    for row in summary:
        shown = [f"{row[k]:.2%}" if k in row else "" for k in names]
        errors.add_row(Text(row["set"]), str(row["n"]), str(row["n_calibrated"] or "none"), *shown)
    console.print(errors)
    for sentence in orderings(rows):
        console.print(sentence)


def _show_constants(constants: Mapping[str, float], console: Console) -> None:
    headings = ("constant", "fitted now", "chip file")
    table = output.table(headings, title="Constants of TPU v4", title_style="bold")
    for name, shipped in constants_of(chip("v4")).items():
        table.add_row(name, f"{constants[name]:.4g}", f"{shipped:.4g}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
