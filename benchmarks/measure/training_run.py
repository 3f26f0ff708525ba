"""One training run in a folder: its steps, evaluations, checkpoints and rows.

Decides when a run evaluates, saves and stops, and how it resumes from a checkpoint. `models.programs.training` defines
a step, `models.programs.checkpoints` the format of a checkpoint.
"""

import json
import math
import os
import signal
import statistics
import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from toruslab.benchmarks.runs.processes import all_agree
from toruslab.benchmarks.runs.rows import Row, environment, line
from toruslab.benchmarks.runs.training_options import Texts, TrainingSetting
from toruslab.models.decoder.parameters import everywhere
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.programs.checkpoints import Checkpoints
from toruslab.models.programs.generate import Generator, batch_multiple
from toruslab.models.programs.training import Recipe, Trainer, TrainState
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.torus.mesh import Slice, attach

ROWS, CHECKPOINTS = "rows.jsonl", "checkpoints"
KEPT, GLANCE = 2, 4
PROMPTS, PROMPT_BYTES, NEW_BYTES, STEPS_PER_CALL = 2, 24, 200, 40
SAMPLER = Sampler(temperature=0.7, seed=0)


@dataclass
class Signals:
    """The signal that asked the run to stop, or 0. A second signal ends the run at once."""

    seen: int = 0

    @contextmanager
    def heard(self) -> Iterator["Signals"]:
        """Notes SIGINT and SIGTERM in `seen` while the context is open."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: object) -> None:
            self.seen = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in before:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(kw_only=True)
class TrainingRun:
    """A run from its start, or from its latest checkpoint, to its last step or a signal.

    Args:
        setting: the model, layout, batch and recipe.
        texts: to train and to evaluate on.
        folder: for rows and checkpoints. It must be writable.
        evaluate_every, checkpoint_every: steps between two of them; 0: only at the end.
        said: called with every new row.
        warn: called with a sentence when something fails and the run goes on.

    Raises:
        ValueError: the folder's checkpoints are of another model.
    """

    setting: TrainingSetting
    texts: Texts
    folder: Path
    evaluate_every: int
    checkpoint_every: int
    said: Callable[[Row], None]
    warn: Callable[[str], None]
    seconds: list[float] = field(default_factory=list)
    state: TrainState = field(init=False)
    step: int = field(init=False)

    def __post_init__(self):
        s = self.setting
        self.mesh = attach(s.shape, chip=Slice.parse(s.slice).chip, explicit=s.layout_value.explicit)
        self.trainer = Trainer(
            config=s.config, layout=s.layout_value, mesh=self.mesh, pass_=s.pass_, recipe=Recipe(**s.recipe)
        )
        self.saved = Checkpoints(self.folder / CHECKPOINTS, s.config, keep=KEPT, warn=self.warn)
        self.first = self.saved.latest() or 0
        """The step that it resumes from."""
        self.speaks = jax.process_index() == 0
        self._can_write = True
        if self.speaks:
            _keep(self.folder / ROWS, self.first)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens per second, by the median step. Excludes compilation, evaluation and saving."""
        return self.setting.batch * self.setting.length / statistics.median(self.seconds or [math.nan])

    def begin(self) -> None:
        """Makes the initial state, or restores the one to resume from.

        Raises:
            ValueError: the checkpoint is damaged, or of another form.
        """
        s = self.setting
        self.state = self.saved.restore(self.trainer.abstract()) if self.first else self.trainer.initial(s.seed)

    def train(self, signals: Signals) -> None:
        """Trains until the last step or a signal, and saves the state if it can.

        Raises:
            FloatingPointError: a loss or gradient is not finite. Earlier checkpoints stay.
        """
        s, step = self.setting, self.first
        self._say(self._head())
        while step < s.steps and not all_agree(bool(signals.seen)):
            ids = corpus.windows(self.texts.train, s.batch, s.length, s.seed, step)
            begun = time.perf_counter()
            with jax.set_mesh(self.mesh):
                self.state, report = self.trainer.step(self.state, everywhere(self.mesh, ids))
                loss, norm = float(report.loss), float(report.norm)
            took, step = time.perf_counter() - begun, step + 1
            if step > self.first + 1:  # the first step includes compilation
                self.seconds.append(took)
            if not math.isfinite(loss + norm):
                self.saved.wait()
                raise FloatingPointError(
                    f"step {step} of {s.steps} has loss={loss:g} and norm={norm:g} of the gradient, which must be "
                    "finite: try a lower learning_rate"
                )
            self._say({"step": step, "loss_nats_per_byte": loss, "norm": norm, "seconds": round(took, 6)})
            if self.evaluate_every and step % self.evaluate_every == 0 and step < s.steps:
                self._say({"step": step, "held_out_nats_per_byte": self.evaluate(GLANCE)})
            if self.checkpoint_every and step % self.checkpoint_every == 0 and step < s.steps:
                self._save(step)
        self._save(step)
        self.saved.wait()
        self.step = step

    def evaluate(self, most: int | None = None) -> float:
        """Mean loss on the held-out text, or on `most` of its groups, in nats per byte."""
        groups = self.texts.held_out
        if most is not None and most < len(groups):
            groups = groups[np.linspace(0, len(groups) - 1, most).astype(int)]
        with jax.set_mesh(self.mesh):
            params = self.state.params
            return float(np.mean([float(self.trainer.evaluate(params, everywhere(self.mesh, g))) for g in groups]))

    def conclude(self) -> Row:
        """Adds the row of a finished run: its loss on the whole held-out text, and samples of the model's text."""
        row = {
            "step": self.step,
            "held_out_nats_per_byte": self.evaluate(),
            "unigram_nats_per_byte": self.texts.unigram,
            "held_out_bytes": int(self.texts.held_out[:, :, 1:].size),
            "tokens_per_s": round(self.tokens_per_s, 1) if self.seconds else None,
            "written": self.write(),
            "final": True,
        }
        self._say(row)
        return row

    def write(self) -> list[dict[str, str]]:
        """The model's continuations of held-out prompts: the windows of text with the most letters."""
        s, made, shape = self.setting, self.setting.layout_value, self.setting.shape
        multiple = batch_multiple(made, shape=shape)
        batch = -(-PROMPTS // multiple) * multiple
        length = min(PROMPT_BYTES, s.length)
        generator = Generator(
            config=s.config,
            prefill=made,
            decode=made,
            shape=shape,
            chip=Slice.parse(s.slice).chip,
            batch=batch,
            capacity=length + NEW_BYTES,
            chunk=length,
            sampler=SAMPLER,
            itemsize=s.pass_.itemsize,
            steps_per_call=STEPS_PER_CALL,
        )
        windows = self.texts.held_out.reshape(-1, self.texts.held_out.shape[-1])
        letters = np.isin(windows[:, :length], byte_ids.encode(string.ascii_lowercase, bos=False)).sum(axis=1)
        order = np.argsort(-letters, kind="stable")
        prompts = [windows[order[i % len(order)], :length] for i in range(batch)]
        found = generator(self.state.params, prompts, NEW_BYTES, stop=byte_ids.EOS)
        pairs = zip(prompts[:PROMPTS], found, strict=False)
        return [{"prompt": byte_ids.decode(p), "text": byte_ids.decode(ids[ids < byte_ids.VOCAB])} for p, ids in pairs]

    def _save(self, step: int) -> None:
        if step > (self.saved.latest() or 0):
            self.saved.save(step, self.state, {"training": self.setting.to_json(), "text": self.texts.digest})

    def _head(self) -> Row:
        """The first row of a run or of a resumed run."""
        return {
            "training": self.setting.to_json(),
            "source": "measured",
            "from_step": self.first,
            "text": self.texts.digest,
            "train_bytes": int(self.texts.train.size),
            "unigram_nats_per_byte": self.texts.unigram,
            "environment": environment(self.setting.seed),
        }

    def _say(self, row: Row) -> None:
        self.said(row)
        if not self.speaks or not self._can_write:
            return
        try:
            with open(self.folder / ROWS, "a") as file:
                file.write(line(row) + "\n")
        except OSError as error:
            self._can_write = False  # a torn line must stay the last line
            self.warn(f"{ROWS} cannot be written any more: {error.strerror}; training goes on")


def rows(folder: Path) -> list[Row]:
    """The rows of a run. A line that an interrupted write left at the end is dropped."""
    found = []
    for written in (folder / ROWS).read_text().splitlines():
        try:
            found.append(json.loads(written))
        except ValueError:
            break
    return found


def _keep(path: Path, step: int) -> None:
    """Drops the rows after a step, since these steps are trained again."""
    if not path.exists():
        return
    kept = [row for row in rows(path.parent) if _step(row) <= step and not row.get("final")]
    part = path.with_suffix(".part")
    part.write_text("".join(line(row) + "\n" for row in kept))
    os.replace(part, path)


def _step(row: Mapping[str, Any]) -> int:
    return row["step"] if "step" in row else row["from_step"]
