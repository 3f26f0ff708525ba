"""The report of a run, in the terminal, as Markdown, pictures and a page; several runs are compared.

    toruslab report results/bench                      draws the report of a run again
    toruslab report results/bench results/bench.1      compares runs, point by point

Reads rows and nothing else: no model, no second measurement.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toruslab.benchmarks.reports.bench_report import show, write
from toruslab.benchmarks.reports.cells import groups
from toruslab.benchmarks.reports.quality import quality
from toruslab.benchmarks.runs import output
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row, RowFile


def load(folder: Path) -> list[Row]:
    """The rows of a run's folder.

    Raises:
        InputError: a folder without rows.
    """
    path = folder / "rows.jsonl"
    if not path.is_file():
        raise InputError(f"folder={str(folder)!r} holds no rows.jsonl")
    rows = RowFile(path).rows
    if not rows:
        raise InputError(f"folder={str(folder)!r} holds no rows yet")
    return rows


def objects(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What `--json` prints of a run: every point with prediction, measurement and error, and the summary."""
    found = [
        {
            "kind": "point",
            "point": x.point,
            "predicted_s": x.predicted_s,
            "measured_s": x.measured_s,
            "relative_error": x.relative_error,
        }
        for lines in groups(rows).values()
        for x in lines
    ]
    return [*found, {"kind": "summary", **quality(rows).to_json()}]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    p = Parser("toruslab report", __doc__)
    p.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run, with its rows.jsonl")
    p.add_argument("--out", type=Path, help="folder of the comparison of several runs (default: results/compare)")
    p.add_argument("--json", action="store_true", help="one JSON object a point, then the summary, instead of tables")
    options = p.parse_args(argv)
    folders: list[Path] = options.folders
    if len(folders) == 1 and options.out is not None:
        raise InputError("out is for several folders; the report of one is written into it")
    if len({f.resolve() for f in folders}) < len(folders):
        raise InputError("the same folder is given twice; a comparison is of different runs")
    runs = [load(folder) for folder in folders]
    with progress("toruslab report", what="drawing"):
        if len(runs) > 1:
            from toruslab.benchmarks.reports import side_by_side

            out = options.out or Path("results/compare")
            return side_by_side.run(folders, runs, out, options.json, output.console())
        try:
            paths = write(runs[0], folders[0])
        except OSError as error:
            raise InputError(f"folder={str(folders[0])!r} cannot be written: {error.strerror}") from None
    if options.json:
        output.print_rows(objects(runs[0]))
    else:
        show(runs[0], output.console())
        output.written(paths, as_json=False)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
