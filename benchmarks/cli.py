"""The command `toruslab`: finds the command's module, runs it, and turns bad input into one sentence and exit code 2.

Every command is a module with `main(argv) -> int` that can also be run as `python -m benchmarks.NAME`.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from toruslab.benchmarks.runs.options import guarded

COMMANDS = {
    "bench": ("toruslab.benchmarks.bench", "planned, compiled and measured: every layout and phase side by side"),
    "report": ("toruslab.benchmarks.report", "a run's page, tables and pictures drawn again; several runs compared"),
    "calibrate": ("toruslab.benchmarks.calibrate", "measures this machine and writes it down as a chip"),
    "estimate": ("toruslab.benchmarks.estimate", "analytic cost of one point, or of many, without any device"),
    "compile": (
        "toruslab.benchmarks.compile",
        "what XLA makes of a point's step, against the plan; also for TPUs not here",
    ),
    "profile": (
        "toruslab.benchmarks.profile",
        "where a step's time goes: matmuls, attention, each collective, weights, the rest",
    ),
    "explain": ("toruslab.benchmarks.explain", "one layer's ladder in the paper's notation, with bytes at every step"),
    "plan": ("toruslab.benchmarks.plan", "ranks layouts, meshes and slices for a goal; names the refused and why"),
    "published": ("toruslab.benchmarks.published", "the model beside published numbers, with errors and pictures"),
    "comparisons": (
        "toruslab.benchmarks.studies.comparisons",
        "serial against parallel blocks, kinds of attention over context",
    ),
    "quantisation": (
        "toruslab.benchmarks.studies.quantisation",
        "the error of int8 weights and cache, by layer, on logits and on text",
    ),
    "simulate": (
        "toruslab.benchmarks.simulate",
        "what load a slice carries: Orca's scheduler over analytic iteration times",
    ),
    "train": (
        "toruslab.benchmarks.train",
        "a decoder trained on text under any layout, with checkpoints that fit any other",
    ),
    "generate": ("toruslab.benchmarks.generate", "prefill and decode text, each under a layout of its own"),
    "serve-bench": (
        "toruslab.benchmarks.serve_bench",
        "requests served: request-level batching, Orca and chunked prompts on one engine, the same traces",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the entry point of `toruslab`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("toruslab COMMAND [options]; toruslab COMMAND --help\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:12} {what}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        print(f"error: unknown command {name!r}{hint} Known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(importlib.import_module(COMMANDS[name][0]).main, rest)


if __name__ == "__main__":
    from toruslab.benchmarks.cli import (
        main as command,  # not this module's second self: its InputError would be another
    )

    sys.exit(command())
