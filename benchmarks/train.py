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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output, processes
from toruslab.benchmarks.runs.parser import Parser, at_least, guarded, path, refused
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.runs.training_options import DTYPES, Texts, TrainingSetting, resumed
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.plan.passes import REMAT
from toruslab.partitioning.torus.mesh import Slice

if TYPE_CHECKING:
    from toruslab.benchmarks.measure.training_run import Signals, TrainingRun


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab train", __doc__)
    p.add_argument("--text", metavar="FILE", help="UTF-8 text (default: Python's own manual, half a megabyte)")
    p.add_argument("--model", default="toy-text", help="preset or config.json")
    p.add_argument("--slice", default="cpu:2", help="CHIP:DIMS")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--layout", default="wgx", help=f"{', '.join(LAYOUTS)}; with variants")
    p.add_argument("--attention", default="batch", help="heads, batch, batch-x...")
    p.add_argument("--weights", default="f32", help=f"{', '.join(DTYPES)}, with float32 masters")
    p.add_argument("--batch", type=int, default=8, help="windows of text in a step")
    p.add_argument("--length", type=int, default=128, help="bytes of a window")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="a step's batch in N parts (default: 1)")
    p.add_argument(
        "--remat",
        default="none",
        help=f"what is recomputed for gradients, to save memory: {', '.join(REMAT)}\n(default: %(default)s)",
    )
    p.add_argument("--steps", type=int, default=900, help="steps of the whole run")
    p.add_argument("--learning-rate", type=float, default=3e-3, help="its highest")
    p.add_argument("--warm-up", type=int, help="steps of it; a cosine follows (default: 50, or a tenth of the steps)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    p.add_argument("--seed", type=int, default=0, help="of weights and windows")
    p.add_argument(
        "--evaluate-every", type=at_least(0), default=100, metavar="N", help="steps; 0: at the end (default: 100)"
    )
    p.add_argument(
        "--checkpoint-every", type=at_least(0), default=250, metavar="N", help="steps; 0: at the end (default: 250)"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, as it was started")
    p.add_argument("--out", type=path, default=Path("results/train"), help="folder")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of a summary")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 when the last state could not be saved, 128 + the signal when it was interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    given = {name: getattr(options, name) for name in parser().given(argv)}
    with contextlib.ExitStack() as claimed:
        with refused():
            setting, digest = _setting(options, given)
            texts = Texts.of(setting)
            _check_recipe(setting)
            if digest is not None and digest != texts.digest:
                raise ValueError(
                    f"text={setting.text!r} is not the text that the run in out={str(options.out)!r} began with"
                )
            processes.attached(Slice.parse(setting.slice), setting.shape, explicit=setting.layout_value.explicit)
            run_folder.writable(options.out)
            claimed.enter_context(_claimed(options.out, options.resume))
        return _Training(options, setting, texts).run()


def _setting(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[TrainingSetting, str | None]:
    """What is to be trained. For a run that goes on, also the digest of its text."""
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


def _check_recipe(setting: TrainingSetting) -> None:
    """Refuses what the optimiser refuses."""
    from toruslab.models.programs.training import Recipe

    Recipe(**setting.recipe)


@contextlib.contextmanager
def _claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Keeps other runs out of the folder. Without `--resume` an earlier run there is put aside, under a number."""
    if not processes.speaks():
        yield
        return
    if not resume:
        with run_folder.claim(folder):
            run_folder.put_aside(folder)
    with run_folder.claim(folder):
        yield


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


class _Training:
    """A run with its progress, its rows and what it says at its end."""

    def __init__(self, options: argparse.Namespace, setting: TrainingSetting, texts: Texts):
        self.options, self.setting, self.texts = options, setting, texts
        self.loss = self.held_out = ""

    def run(self) -> int:
        from toruslab.benchmarks.measure.training_run import Signals, TrainingRun

        signals, options = Signals(), self.options
        with progress("toruslab train", speaks=processes.speaks(), what="compiling") as self.work:
            with refused():
                run = TrainingRun(
                    setting=self.setting,
                    texts=self.texts,
                    folder=options.out,
                    evaluate_every=options.evaluate_every,
                    checkpoint_every=options.checkpoint_every,
                    said=self._said,
                    warn=lambda said: _say(f"warning: {said}"),
                )
                run.begin()
            try:
                with signals.heard():
                    self._train(run, signals)
            except FloatingPointError as error:
                run.saved.close()
                kept = run.saved.latest()
                said = "no checkpoint was saved" if kept is None else f"the latest checkpoint is that of step {kept}"
                _say(f"error: {error}; {said}")
                return 1
            latest = run.saved.latest() or 0
            if run.step < self.setting.steps:
                run.saved.close()
                self._interrupted(run.step, latest)
                return 128 + signals.seen
            self.work.begin("evaluating, and writing text")
            final = run.conclude()
            run.saved.close()
        if run.speaks and not options.json:
            self._conclude(final)
        return 0 if latest == run.step else 1

    def _train(self, run: "TrainingRun", signals: "Signals") -> None:
        self.work.begin("compiling", total=self.setting.steps, done=run.first)
        self.rate = lambda: run.tokens_per_s
        run.train(signals)

    def _said(self, row: Row) -> None:
        if self.options.json:
            output.print_rows([row])
        if "loss_nats_per_byte" in row:
            self.loss = f"loss {row['loss_nats_per_byte']:.3f}, {self.rate():,.0f} tokens/s"
            self.work.reach(row["step"], self.setting.steps)
        if "held_out_nats_per_byte" in row:
            self.held_out = f", held out {row['held_out_nats_per_byte']:.3f}"
        if "step" in row:
            self.work.advance(0, self.loss + self.held_out)

    def _interrupted(self, step: int, latest: int) -> None:
        command = f"toruslab train --resume --out {self.options.out}"
        said = f"interrupted after step {step} of {self.setting.steps}"
        if latest:
            said += f", saved at step {latest}; it goes on with: {command}"
        _say(said)

    def _conclude(self, final: Row) -> None:
        from toruslab.benchmarks.measure.training_run import rows
        from toruslab.benchmarks.reports import figures, style

        console = output.console()
        rate = final["tokens_per_s"]
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        console.print(
            f"held-out text: [bold]{final['held_out_nats_per_byte']:.3f}[/bold] nats per byte after {final['step']} "
            f"steps of {self.setting.batch} x {self.setting.length} bytes{speed}; byte frequencies alone: "
            f"{final['unigram_nats_per_byte']:.3f}",
            highlight=False,
        )
        for written in final["written"]:
            console.print(f"\n[dim]{escape(written['prompt'])}[/dim]{escape(written['text'])}", highlight=False)
        print()
        try:
            picture = figures.loss(rows(self.options.out))
            output.written(style.save(picture, self.options.out), as_json=False)
        except OSError as error:
            _say(f"warning: the picture cannot be written: {error}")
        print(f"toruslab generate --checkpoint {self.options.out} --prompt TEXT")


if __name__ == "__main__":
    sys.exit(guarded(main))
