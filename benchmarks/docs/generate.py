"""The generated parts of docs: written from code and data, and checked so that they cannot go stale.

    python -m benchmarks.docs.generate            writes them anew; or those of the pages that are named
    python -m benchmarks.docs.generate --check    exits with 1 and names the stale pages

A part is the text between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from toruslab.benchmarks.docs import compiled_page, loops_page, reference, training_page
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded

DOCS = Path(__file__).resolve().parents[2] / "docs"
PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "commands.md": {"commands": reference.commands, "help": reference.command_help},
    "layouts.md": {"layouts": reference.layouts},
    "models.md": {"suffixes": reference.suffixes},
    "tpu_compiler.md": compiled_page.PARTS,
    "loops.md": loops_page.PARTS,
    "training.md": training_page.PARTS,
}
"""The parts that a file of this name must have, and the function that writes each."""


def renewed(path: Path) -> str:
    """The text of a file with every generated part written anew.

    Raises:
        InputError: a file that lacks one of its parts, or has one that is not known.
    """
    text = path.read_text()
    parts = PARTS.get(path.name, {})
    for name, make in parts.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"{path} has no part '<!-- generated: {name} -->' ... '<!-- end -->'")
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    unknown = sorted(set(re.findall(r"<!-- generated: (\w+) -->", text)) - parts.keys())
    if unknown:
        raise InputError(f"{path} has parts that nothing writes: {', '.join(unknown)}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks; returns 1 when a file is stale."""
    p = Parser("python -m benchmarks.docs.generate", __doc__)
    p.add_argument("--check", action="store_true", help="write nothing")
    p.add_argument("files", type=Path, nargs="*", default=[DOCS / name for name in PARTS], metavar="file")
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
