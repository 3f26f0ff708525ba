"""What `toruslab train` trains: model, text, layout and recipe as one record, checked before any device is touched.

Also which options may change when a run goes on: where and how it is computed, not what.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.models.weights import byte_ids, corpus
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass, Training
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.torus.mesh import Shape, Slice, mesh_shape

DTYPES = {"f32": 4, "bf16": 2}
"""Bytes per element of weights and activations. Moments, and the master copies of bf16 weights, are float32."""
FREE = ("slice", "mesh", "layout", "attention", "accumulate", "remat")
"""Options that may change when a run goes on. Results then differ by rounding only."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetting:
    """A training run. The fields are the command's options.

    Raises:
        ValueError: field, value and rule.
    """

    model: str
    text: str | None
    slice: str
    mesh: str | None
    layout: str
    attention: str
    weights: str
    batch: int
    length: int
    accumulate: int
    remat: str
    steps: int
    learning_rate: float
    warm_up: int
    weight_decay: float
    clip: float
    seed: int

    def __post_init__(self):
        if self.weights not in DTYPES:
            raise ValueError(f"weights={self.weights!r} must be one of {', '.join(DTYPES)}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        config = self.config
        if config.vocab < byte_ids.VOCAB:
            raise ValueError(f"vocab={config.vocab} of {config.name} is smaller than the tokenizer's {byte_ids.VOCAB}")
        if config.n_padding_heads:
            raise ValueError(f"n_padding_heads={config.n_padding_heads} must be 0 to train: they would become real")
        check(self.layout_value, config, self.pass_, self.shape)

    @classmethod
    def of(cls, options: argparse.Namespace | Mapping[str, Any]) -> "TrainingSetting":
        """The setting of a command's options, or of those that were kept."""
        given = vars(options) if isinstance(options, argparse.Namespace) else options
        return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls)})

    @property
    def config(self) -> ModelConfig:
        return model(self.model)

    @property
    def shape(self) -> Shape:
        return mesh_shape(Slice.parse(self.slice), self.mesh)

    @property
    def layout_value(self) -> Layout:
        return layout(self.layout, self.attention, self.shape, self.config.n_kv_heads)

    @property
    def pass_(self) -> Pass:
        return Pass(
            batch=self.batch,
            length=self.length,
            capacity=self.length,
            itemsize=DTYPES[self.weights],
            weight_itemsize=DTYPES[self.weights],
            all_logits=True,
            training=Training(accumulate=self.accumulate, remat=self.remat),
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of `models.programs.training.Recipe`."""
        names = ("steps", "learning_rate", "warm_up", "weight_decay", "clip")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The text of a run, as ids.

    Args:
        train: [n] ids to train on.
        held_out: [groups, rows, L + 1] ids that are never trained on; one call evaluates one group.
        digest: of the whole text.
        unigram: loss of byte frequencies alone on the held-out part, in nats a byte.
    """

    train: byte_ids.TokenIds
    held_out: byte_ids.TokenIds
    digest: str
    unigram: float

    @classmethod
    def of(cls, setting: TrainingSetting) -> "Texts":
        """Reads the text.

        Raises:
            ValueError, OSError: a file that cannot be read, or is too short.
        """
        whole = byte_ids.encode(corpus.read(setting.text), bos=False)
        train, rest = corpus.split(whole)
        held_out = corpus.in_order(rest, setting.length, setting.pass_.sequences)
        digest = hashlib.sha256(whole.astype("uint8").tobytes()).hexdigest()[:16]
        return cls(
            train=train,
            held_out=held_out,
            digest=digest,
            unigram=corpus.unigram_loss(train, held_out[:, :, 1:].ravel()),
        )


def resumed(kept: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingSetting:
    """The setting of a run that goes on: the kept one, with the options of `FREE` that are given now.

    Args:
        kept: `to_json` of the run.
        given: the options that were given now.

    Raises:
        ValueError: an option that cannot change, or that the setting refuses.
    """
    for name, value in given.items():
        if name in kept and name not in FREE and value != kept[name]:
            raise ValueError(f"{name}={value!r} cannot change in a run that goes on, which has {kept[name]!r}")
    if "slice" in given and "mesh" not in given:
        kept = {**kept, "mesh": None}
    return TrainingSetting.of({**kept, **{name: value for name, value in given.items() if name in kept}})
