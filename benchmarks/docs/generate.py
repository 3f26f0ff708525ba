"""The generated parts of README and docs: written from code and data, checked so that they cannot go stale.

python -m benchmarks.docs.generate README.md docs/*.md  writes them anew (variants.md has none)
python -m benchmarks.docs.generate --check ...  exits with 1, says which is stale
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from toruslab.benchmarks.cli import COMMANDS
from toruslab.benchmarks.docs import compiled_page, loops_page, training_page
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.models.presets import SUFFIXES
from toruslab.partitioning.cost.explain import steps
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.point import Point


def commands() -> str:
    """The commands and what they do."""
    return "\n".join(["| command | does |", "|---|---|", *(f"| `toruslab {n}` | {w} |" for n, w in COMMANDS.items())])


WIDTH = 100
"""Columns of the help texts, whatever terminal they are made in."""


def command_help() -> str:
    """The `--help` of every command, each under a heading of its own."""
    return "\n\n".join(f"### toruslab {name}\n\n```text\n{_help(name)}\n```" for name in COMMANDS)


def _help(command: str) -> str:
    """What `toruslab COMMAND --help` prints, at a fixed width."""
    main = importlib.import_module(f"toruslab.benchmarks.{command.replace('-', '_')}").main
    printed, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def layouts() -> str:
    """Every layout's ladder through one layer, for PaLM 540B on 64 chips: the collectives and what a chip receives."""
    out = [
        "| layout/attention | one layer: collective(axes) on the tensor that it makes; + shares the one before "
        "| number | MB a chip a layer |",
        "|---|---|---|---|",
    ]
    for name in (*LAYOUTS, "ws1d+lean", "ws2d+lean"):
        for attention in ("heads", "batch"):
            try:
                if not layout(name, attention, (4, 4, 4), 1).explicit:
                    continue
            except ValueError:
                continue
            point = Point(
                model="palm-540b-h64",
                slice="v4:4x4x4",
                phase="decode",
                batch=512,
                context=2048,
                layout=name,
                attention=attention,
            )
            moved = [s for s in steps(point) if s["scope"].startswith("layer/") and s["kind"] not in (None, "slice")]
            ladder = "; ".join(f"{'+ ' * s['rides']}{s['kind']}({''.join(s['axes'])}) {s['to']}" for s in moved)
            n = sum(not s["rides"] for s in moved)
            out.append(
                f"| {name}/{attention} | {ladder or 'none'} | {n} | {sum(s['bytes'] for s in moved) / 1e6:,.2f} |"
            )
    return "\n".join(out)


def suffixes() -> str:
    """What may follow a model's name."""
    return "\n".join(
        ["| suffix | makes of it |", "|---|---|", *(f"| `{n}` | {what} |" for n, what in SUFFIXES.items())]
    )


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"commands": commands, "layouts": layouts, "suffixes": suffixes},
    "commands.md": {"commands": commands, "help": command_help},
    "layouts.md": {"layouts": layouts},
    "models.md": {"suffixes": suffixes},
    "tpu_compiler.md": compiled_page.PARTS,
    "loops.md": loops_page.PARTS,
    "training.md": training_page.PARTS,
}
"""The parts that a file of this name must have."""


def renewed(path: Path) -> str:
    """The text of a file with every generated part written anew.

    Raises:
        InputError: a file that is not known, or without one of its parts.
    """
    if path.name not in PARTS:
        raise InputError(f"{path} has no generated parts; those that have: {', '.join(PARTS)}")
    text = path.read_text()
    for name, make in PARTS[path.name].items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"{path} has no part '<!-- generated: {name} -->' ... '<!-- end -->'")
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks."""
    p = Parser(
        prog="python -m benchmarks.docs.generate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    p.add_argument("files", type=Path, nargs="+", metavar="file")
    options = p.parse_args(argv)
    stale = False
    for file in options.files:
        new = renewed(file)
        if not options.check:
            file.write_text(new)
        elif new != file.read_text():
            stale = True
            print(f"{file} is stale: run python -m benchmarks.docs.generate {file}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
