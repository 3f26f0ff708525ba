"""A command's folder of rows and pictures: refused before the work where it cannot be written, filled after it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toruslab.benchmarks.runs.options import InputError
from toruslab.benchmarks.runs.rows import line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check(folder: Path) -> None:
    """Makes the folder, and refuses one that nothing can be written to.

    Raises:
        InputError: why.
    """
    probe = folder / ".part"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"out={str(folder)!r} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from None


def write(folder: Path, name: str, rows: Iterable[Mapping[str, Any]], figures: "Mapping[str, Figure]") -> list[Path]:
    """Writes the rows as NAME.jsonl and every figure as SVG and PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.jsonl"]
    paths[0].write_text("".join(line(row) + "\n" for row in rows))
    for called, figure in figures.items():
        for suffix in ("svg", "png"):
            paths.append(folder / f"{called}.{suffix}")
            figure.savefig(paths[-1], dpi=150)
    return paths
