"""The command `toruslab`: finds a command's module, runs it, and turns bad input into one sentence and exit code 2.

Every command is a module `benchmarks.NAME` with `main(argv) -> int`, which also runs as `python -m benchmarks.NAME`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

import toruslab
from toruslab.benchmarks.runs.parser import guarded

COMMANDS = {
    "bench": "planned, compiled and measured: every layout and phase side by side",
    "report": "a run's page, tables and pictures drawn again; several runs compared",
    "calibrate": "measures this machine and writes it down as a chip",
    "estimate": "analytic cost of one point, or of many, without any device",
    "compile": "what XLA makes of a point's step, against the plan; also for TPUs not here",
    "profile": "where a step's time goes: matmuls, attention, each collective, weights, the rest",
    "explain": "one layer's ladder in the paper's notation, with bytes at every step",
    "plan": "ranks layouts, meshes and slices for a goal; names the refused and why",
    "published": "the model beside published numbers, with errors and pictures",
    "simulate": "what load a slice carries: Orca's scheduler over analytic iteration times",
    "train": "a decoder trained on text under any layout, with checkpoints that fit any other",
    "generate": "prefill and decode text, each under a layout of its own",
    "serve-bench": "requests served: request-level batching, Orca and chunked prompts on one engine, the same traces",
}
"""The commands, each with one line about it. Its module is `benchmarks.NAME`, with _ for -."""
STUDIES = ("comparisons", "quantisation")
"""Commands that have become studies: `python -m benchmarks.studies.NAME`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the entry point of `toruslab`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("toruslab COMMAND [options]; toruslab COMMAND --help; toruslab --version\n")
        for name, what in COMMANDS.items():
            print(f"  {name:12} {what}")
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        print(f"toruslab {toruslab.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return 2
    return guarded(importlib.import_module(f"toruslab.benchmarks.{name.replace('-', '_')}").main, rest)


def _unknown(name: str) -> str:
    if name in STUDIES:
        return f"{name!r} is a study, not a command: run python -m benchmarks.studies.{name}"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown command {name!r}{hint} Known: {', '.join(COMMANDS)}"


if __name__ == "__main__":
    from toruslab.benchmarks.cli import main as imported  # else InputError would exist twice, as two classes

    sys.exit(imported())
