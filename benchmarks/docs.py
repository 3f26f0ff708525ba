"""The generated parts of the README: written from the code, checked so that they cannot go stale.

python -m benchmarks.docs README.md           writes them anew
python -m benchmarks.docs --check README.md   exits with 1 and says which one is stale
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cli import COMMANDS, InputError, Parser, guarded
from benchmarks.explain import steps
from partitioning.layouts import LAYOUTS, layout
from partitioning.point import Point


def commands() -> str:
    """The commands and what they do."""
    return "\n".join(
        ["| command | does |", "|---|---|", *(f"| `toruslab {n}` | {w} |" for n, (_, w) in COMMANDS.items())]
    )


def layouts() -> str:
    """Every layout's ladder through one layer, for PaLM 540B on 64 chips: the collectives and what a chip receives."""
    out = [
        "| layout/attention | one layer: collective(axes) on the tensor that it makes | MB a chip a layer |",
        "|---|---|---|",
    ]
    for name in LAYOUTS:
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
            ladder = "; ".join(f"{s['kind']}({''.join(s['axes'])}) {s['to']}" for s in moved)
            out.append(f"| {name}/{attention} | {ladder or 'none'} | {sum(s['bytes'] for s in moved) / 1e6:,.2f} |")
    return "\n".join(out)


PARTS: dict[str, Callable[[], str]] = {"commands": commands, "layouts": layouts}


def renewed(text: str) -> str:
    """The text with every generated part written anew.

    Raises:
        InputError: a part that the text does not have, or that is not closed.
    """
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"the file has no part '<!-- generated: {name} -->' ... '<!-- end -->'")
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks."""
    p = Parser(prog="python -m benchmarks.docs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--check", action="store_true")
    p.add_argument("file", type=Path)
    options = p.parse_args(argv)
    text = options.file.read_text()
    new = renewed(text)
    if not options.check:
        options.file.write_text(new)
    elif new != text:
        print(f"{options.file} is stale: run python -m benchmarks.docs {options.file}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
