"""The generated parts of the reference: commands, their help, layouts, suffixes of a model's name."""

import contextlib
import importlib
import io
import os
from collections.abc import Iterator

from toruslab.benchmarks.cli import COMMANDS
from toruslab.benchmarks.reports.tables import markdown_table
from toruslab.models.presets import SUFFIXES
from toruslab.partitioning.cost.explain import steps
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.layouts.layout import NoAxisLeft
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.point import Point

WIDTH = 100
"""Columns of the help texts, whatever terminal they are made in."""


def commands() -> str:
    """The commands, each with one line about it."""
    return "\n".join(markdown_table(("command", "does"), [(f"`toruslab {n}`", what) for n, what in COMMANDS.items()]))


def command_help() -> str:
    """The `--help` of every command, each under a heading of its own."""
    return "\n\n".join(f"### toruslab {name}\n\n```text\n{_help(name)}\n```" for name in COMMANDS)


def _help(command: str) -> str:
    """The text that `toruslab COMMAND --help` prints on a terminal of `WIDTH` columns."""
    main = importlib.import_module(f"toruslab.benchmarks.{command.replace('-', '_')}").main
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def layouts() -> str:
    """Every layout's collectives in one layer of PaLM 540B on 64 chips, and the bytes that a chip receives."""
    headings = (
        "layout/attention",
        "one layer: collective(axes) on the tensor that it makes; + shares the one before",
        "number",
        "MB a chip a layer",
    )
    rows = []
    for point in _points():
        moved = [s for s in steps(point) if s["scope"].startswith("layer/") and s["kind"] not in (None, "slice")]
        ladder = "; ".join(f"{'+ ' * s['rides']}{s['kind']}({''.join(s['axes'])}) {s['to']}" for s in moved)
        n_collectives = sum(not s["rides"] for s in moved)
        megabytes = sum(s["bytes"] for s in moved) / 1e6
        name = f"{point.layout}/{point.attention}"
        rows.append((name, ladder or "none", str(n_collectives), f"{megabytes:,.2f}"))
    return "\n".join(markdown_table(headings, rows))


def _points() -> Iterator[Point]:
    """A decode step under every layout that has a ladder, with each attention sharding that it allows."""
    for name in (*LAYOUTS, "ws1d+lean", "ws2d+lean"):
        for attention in ("heads", "batch"):
            try:
                made = layout(name, attention, (4, 4, 4), 1)
            except NoAxisLeft:
                continue
            if made.explicit:
                sizes = {"batch": 512, "context": 2048, "layout": name, "attention": attention}
                yield Point(model="palm-540b-h64", slice="v4:4x4x4", phase="decode", **sizes)


def suffixes() -> str:
    """The suffixes that a model's name may have."""
    return "\n".join(markdown_table(("suffix", "makes of it"), [(f"`{n}`", what) for n, what in SUFFIXES.items()]))
