"""A decoder trained on text, byte by byte, under any layout.

    toruslab train
    toruslab train --text FILE --model toy --slice cpu:2x2x2 --layout wgxyz --attention batch
    toruslab train --resume
    toruslab train --resume --slice cpu:2x2x2 --layout ws2d
    toruslab generate --checkpoint results/train --prompt "The with statement"

The last tenth of the text is held out. Every step and evaluation is a row of OUT/rows.jsonl, the curve is OUT/loss.svg,
checkpoints are in OUT/checkpoints. Ctrl-C or SIGTERM saves before it ends; --resume goes on from the latest checkpoint
and gives what the run would have given, bit by bit under the same layout and mesh, to rounding under others.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.folder import claim, put_aside
from toruslab.benchmarks.runs.options import InputError, Parser, guarded, path
from toruslab.benchmarks.runs.rows import Row, line
from toruslab.benchmarks.runs.training_options import DTYPES, Texts, TrainingSetting, resumed
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.torus.mesh import Slice

if TYPE_CHECKING:
    from toruslab.benchmarks.measure.training_run import Signals, TrainingRun


def parser() -> Parser:
    """The options."""
    p = Parser(prog="toruslab train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's own manual, half a megabyte)")
    p.add_argument("--model", default="toy-text", help="preset or config.json (default: %(default)s)")
    p.add_argument("--slice", default="cpu:2", help="CHIP:DIMS (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--layout", default="wgx", help=f"{', '.join(LAYOUTS)}; with variants (default: %(default)s)")
    p.add_argument("--attention", default="batch", help="default: %(default)s")
    p.add_argument("--weights", default="f32", help=f"{', '.join(DTYPES)}, with float32 masters (default: %(default)s)")
    p.add_argument("--batch", type=int, default=8, help="windows of text in a step (default: %(default)s)")
    p.add_argument("--length", type=int, default=128, help="bytes of a window (default: %(default)s)")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="a step's batch in N parts (default: 1)")
    p.add_argument(
        "--remat",
        default="none",
        help=f"what is worked out again for gradients, to save memory: {', '.join(REMAT)}\n(default: %(default)s)",
    )
    p.add_argument("--steps", type=int, default=900, help="default: %(default)s")
    p.add_argument("--learning-rate", type=float, default=3e-3, help="its highest (default: %(default)s)")
    p.add_argument("--warm-up", type=int, help="steps of it; a cosine follows (default: 50, or a tenth of the steps)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="default: %(default)s")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of weights and windows (default: %(default)s)")
    p.add_argument("--evaluate-every", type=int, default=100, metavar="N", help="steps; 0: at the end (default: 100)")
    p.add_argument("--checkpoint-every", type=int, default=250, metavar="N", help="steps; 0: at the end (default: 250)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, as it was started")
    p.add_argument("--out", type=path, default=Path("results/train"), help="folder (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of a summary")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 when the last state could not be saved, 128 + the signal when it was interrupted."""
    options = parser().parse_args(argv)
    try:
        setting, digest = _setting(options, _given(argv))
        texts = Texts.of(setting)
        _recipe(setting)
        if digest is not None and digest != texts.digest:
            raise ValueError(
                f"text={setting.text!r} is not the text that the run in out={str(options.out)!r} began with"
            )
        slice_ = Slice.parse(setting.slice)
        processes.join(processes.platform_of(slice_, None), slice_.n_chips, 1)
        _attached(setting)
        run_folder.writable(options.out)
        claimed = contextlib.ExitStack()
        claimed.enter_context(_claimed(options.out, options.resume))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    with claimed:
        return _Command(options, setting, texts).run()


def _given(argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that stand on the command line."""
    options = parser().parse_args(argv)
    return {name: getattr(options, name) for name in parser().given(sys.argv[1:] if argv is None else argv)}


def _setting(options: argparse.Namespace, given: dict[str, Any]) -> tuple[TrainingSetting, str | None]:
    """What is to be trained; of a run that goes on with the sum of its text."""
    for name in ("evaluate_every", "checkpoint_every"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 0")
    if not options.resume:
        if options.warm_up is None:
            options.warm_up = min(50, options.steps // 10)
        return TrainingSetting.of(options), None
    from toruslab.benchmarks.measure.training_run import CHECKPOINTS
    from toruslab.models.programs import checkpoint_folder

    folder = options.out / CHECKPOINTS
    if not checkpoint_folder.steps(folder):
        raise ValueError(f"out={str(options.out)!r} has no checkpoint to go on from; start it without --resume")
    facts = checkpoint_folder.read(folder).facts
    if not isinstance(facts.get("training"), dict):
        raise ValueError(f"out={str(options.out)!r} has checkpoints that `toruslab train` did not write")
    return resumed(facts["training"], given), facts["text"]


def _recipe(setting: TrainingSetting) -> None:
    """Refuses what the optimiser does."""
    from toruslab.models.programs.training import Recipe

    Recipe(**setting.recipe)


def _attached(setting: TrainingSetting) -> None:
    """Refuses a slice that is not here."""
    from toruslab.partitioning.torus.mesh import attach

    try:
        attach(setting.shape, chip=Slice.parse(setting.slice).chip, explicit=setting.layout_value.explicit)
    except RuntimeError as error:
        raise ValueError(f"slice={setting.slice}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Keeps other runs out of the folder; a run that does not go on there puts an earlier one aside, under a number."""
    import jax

    if jax.process_index() != 0:
        yield
        return
    if not resume:
        with claim(folder):
            put_aside(folder)
    with claim(folder):
        yield


class _Command:
    """A run with its progress bar, its rows and what it says at its end."""

    def __init__(self, options: argparse.Namespace, setting: TrainingSetting, texts: Texts):
        self.options, self.setting, self.texts = options, setting, texts
        self.console = Console(stderr=True)
        self.loss = self.held_out = ""

    def run(self) -> int:
        from toruslab.benchmarks.measure.training_run import Signals, TrainingRun

        signals = Signals()
        try:
            run = TrainingRun(
                setting=self.setting,
                texts=self.texts,
                folder=self.options.out,
                evaluate_every=self.options.evaluate_every,
                checkpoint_every=self.options.checkpoint_every,
                said=self._said,
                warn=lambda said: self.console.print(f"warning: {said}", markup=False, highlight=False, soft_wrap=True),
            )
            run.begin()
        except ValueError as error:
            raise InputError(str(error)) from None
        try:
            with signals.heard():
                self._train(run, signals)
        except FloatingPointError as error:
            run.saved.close()
            kept = run.saved.latest()
            said = "no checkpoint was saved" if kept is None else f"the latest checkpoint is that of step {kept}"
            self.console.print(f"error: {error}; {said}", markup=False, highlight=False, soft_wrap=True)
            return 1
        latest = run.saved.latest() or 0
        if run.step < self.setting.steps:
            run.saved.close()
            self._interrupted(run.step, latest)
            return 128 + signals.seen
        final = run.conclude()
        run.saved.close()
        if run.speaks and not self.options.json:
            self._conclude(final)
        return 0 if latest == run.step else 1

    def _train(self, run: "TrainingRun", signals: "Signals") -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        clocks = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *clocks, console=self.console, transient=True, disable=not run.speaks) as self.bar:
            self.task = self.bar.add_task("compiling", total=self.setting.steps, completed=run.first, rate="")
            self.rate = lambda: run.tokens_per_s
            run.train(signals)

    def _said(self, row: Row) -> None:
        if self.options.json:
            print(line(row), flush=True)
        if "loss_nats_per_byte" in row:
            self.loss = f"loss {row['loss_nats_per_byte']:.3f}"
            self.bar.update(self.task, completed=row["step"], rate=f"{self.rate():,.0f} tokens/s")
        if "held_out_nats_per_byte" in row:
            self.held_out = f", held out {row['held_out_nats_per_byte']:.3f}"
        if "step" in row:
            self.bar.update(self.task, description=self.loss + self.held_out)

    def _interrupted(self, step: int, latest: int) -> None:
        command = f"toruslab train --resume --out {self.options.out}"
        said = f"interrupted after step {step} of {self.setting.steps}"
        if latest:
            said += f", saved at step {latest}; it goes on with: {command}"
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _conclude(self, final: Row) -> None:
        from toruslab.benchmarks.measure.training_run import rows
        from toruslab.benchmarks.reports import figures, style

        out = Console(width=None if sys.stdout.isatty() else 120)
        rate = final["tokens_per_s"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        out.print(
            f"held-out text: [bold]{final['held_out_nats_per_byte']:.3f}[/bold] nats per byte after {final['step']} "
            f"steps of {self.setting.batch} x {self.setting.length} bytes{speed}; byte frequencies alone: "
            f"{final['unigram_nats_per_byte']:.3f}",
            highlight=False,
        )
        for written in final["written"]:
            out.print(f"\n[dim]{escape(written['prompt'])}[/dim]{escape(written['text'])}", highlight=False)
        print()
        try:
            for drawn in style.save(figures.loss(rows(self.options.out)), self.options.out):
                print(drawn)
        except OSError as error:
            self.console.print(f"warning: the picture cannot be written: {error}", markup=False, highlight=False)
        print(f"toruslab generate --checkpoint {self.options.out} --prompt TEXT")


if __name__ == "__main__":
    sys.exit(guarded(main))
