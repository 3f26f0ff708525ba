"""The command `toruslab`: finds the command's module, runs it, and turns bad input into one sentence and exit code 2.

Every command is a module with `main(argv) -> int` that can also be run as `python -m benchmarks.NAME`.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "bench": ("benchmarks.step_latency", "planned, compiled and measured: every layout and phase side by side"),
    "report": ("benchmarks.report", "a run's page, tables and pictures drawn again; several runs compared"),
    "calibrate": ("benchmarks.calibrate", "measures this machine and writes it down as a chip"),
    "estimate": ("benchmarks.estimate", "analytic cost of one point, or of many, without any device"),
    "compile": ("benchmarks.compile", "what XLA makes of a point's step, against the plan; also for TPUs not here"),
    "profile": (
        "benchmarks.profile",
        "where a step's time goes: matmuls, attention, each collective, weights, the rest",
    ),
    "explain": ("benchmarks.explain", "one layer's ladder in the paper's notation, with bytes at every step"),
    "plan": ("benchmarks.plan", "ranks layouts, meshes and slices for a goal; names the refused and why"),
    "published": ("benchmarks.published", "the model beside published numbers, with errors and pictures"),
    "comparisons": ("benchmarks.comparisons", "serial against parallel blocks, kinds of attention over context"),
    "quantisation": ("benchmarks.quantisation", "the error of int8 weights and cache, by layer, on logits and on text"),
    "simulate": ("benchmarks.simulate", "what load a slice carries: Orca's scheduler over analytic iteration times"),
    "train": ("benchmarks.train", "a decoder trained on text under any layout, with checkpoints that fit any other"),
    "generate": ("benchmarks.generate", "prefill and decode text, each under a layout of its own"),
    "serve-bench": (
        "benchmarks.serve_bench",
        "requests served: request-level batching, Orca and chunked prompts on one engine, the same traces",
    ),
}


class InputError(ValueError):
    """Input that a command refuses; its text is the whole message."""


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


def guarded(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main`; refused input becomes one sentence on standard error."""
    try:
        return command(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a closed descriptor: what was written stays
        print(f"error: {error}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """Options whose errors are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuses."""
        raise InputError(f"{message} ({self.prog} --help)")

    def given(self, argv: Sequence[str]) -> dict[str, str]:
        """The options that stand in a command line, whatever their values: their names in the code, and as they are
        written. Of a parser that is used for nothing else."""
        names = {a.dest: a.option_strings[0] for a in self._actions if a.option_strings}
        nothing = object()
        self.set_defaults(**dict.fromkeys(names, nothing))
        found = vars(self.parse_args(argv))
        return {dest: name for dest, name in names.items() if found.get(dest, nothing) is not nothing}


def path(text: str) -> Path:
    """A path that is not empty: an option's type."""
    if not text:
        raise argparse.ArgumentTypeError("'' must be a path")
    return Path(text)


if __name__ == "__main__":
    from benchmarks.cli import main as command  # not this module's second self: its InputError would be another

    sys.exit(command())
