"""`Point`: one question to the toolkit, and the key that analytic, compiled, measured and published numbers share.

A point holds the names and sizes that a user gives, and refuses those that make no sense together. Its properties turn
them into values: the model's config, the mesh, the layout, the pass. The answers are in `partitioning.cost`,
`models.programs` and `benchmarks`.
"""

import dataclasses
import difflib
import functools
import json
from dataclasses import dataclass
from typing import Any

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass, Training
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.torus.chip import PLATFORMS, chip
from toruslab.partitioning.torus.links import rate, segments
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape

PHASES = ("prefill", "decode", "train")
WEIGHTS = {"f32": 4, "bf16": 2, "int8": 1}
"""Dtype of the weights -> bytes of one element."""
CACHES = ("int8",)
"""Dtypes of the KV cache, besides that of the activations."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Model, slice, phase, sizes, layout and weights.

    Args:
        model: a preset of `models.presets`, or a path to a Hugging Face `config.json`.
        slice: `CHIP:DIMS` in mesh order, such as `v4:4x4x4`.
        phase: `prefill`; `decode`; or `train`, which is forward, backward and AdamW's update of one batch.
        batch: sequences.
        length: new tokens of each sequence in this pass; 1 in decode.
        context: tokens in the cache that attention reads. In decode this includes the pass's own token; in prefill it
            is the tokens before this pass.
        layout: a name of `partitioning.layouts.catalogue`, with variants: `ws2d`, `wgx+ring`.
        attention: one of `partitioning.layouts.layout.ATTENTIONS`.
        weights: `bf16`, `int8` or `f32`. Activations are float32 with `f32` weights, else bfloat16.
        mesh: extents such as `4x2x1`, if they differ from the slice's.
        steps_per_call: decode steps in one call of the program. The first has `context`, each later one a token more.
            All answers (seconds, bytes, counts) are of one step, the mean over the call.
        cache: `int8`, with a scale for each position, if the KV cache is not of the activations' dtype.
        accumulate: parts of a training step's batch, which run one after the other.
        remat: what a training step recomputes for its gradient, one of `partitioning.plan.passes.REMAT`.

    Raises:
        ValueError: field, value and rule.

    Example:
        >>> point = Point(model="palm-8b", slice="v4:4x2x1", phase="decode", batch=64, context=2048, layout="ws2d",
        ...               attention="batch")
        >>> point.mesh_shape, point.n_chips, point.pass_.capacity
        ((4, 2, 1), 8, 2048)
    """

    model: str
    slice: str
    phase: str
    batch: int
    length: int = 1
    context: int = 0
    layout: str
    attention: str
    weights: str = "bf16"
    mesh: str | None = None
    steps_per_call: int = 1
    cache: str | None = None
    accumulate: int = 1
    remat: str = "layer"

    def __post_init__(self):
        for field in ("model", "slice", "phase", "layout", "attention", "weights"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field}={getattr(self, field)!r} must be text")
        for field in ("batch", "length", "context", "steps_per_call", "accumulate"):
            value, least = getattr(self, field), 0 if field == "context" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 2**40:
                raise ValueError(f"{field}={value!r} must be an integer of at least {least}, and at most {2**40}")
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r} must be one of {', '.join(PHASES)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} must be one of {', '.join(WEIGHTS)}")
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(
                f"cache={self.cache!r} must be {', '.join(CACHES)}, or left out for the activations' dtype"
            )
        if self.phase == "decode" and self.length != 1:
            raise ValueError(f"length={self.length} must be 1 in decode")
        if self.phase == "decode" and self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1 in decode: it counts this pass's token")
        if self.phase != "decode" and self.steps_per_call != 1:
            raise ValueError(f"steps_per_call={self.steps_per_call} must be 1 in {self.phase}")
        self._check_training()
        if isinstance(self.mesh, list | tuple):
            object.__setattr__(self, "mesh", "x".join(map(str, self.mesh)))
        if not isinstance(self.mesh, str | None):
            raise ValueError(f"mesh={self.mesh!r} must be text such as 4x2x1, or a list of extents")
        if self.chip not in PLATFORMS:
            try:
                chip(self.chip).check_slice(Slice.parse(self.slice).dims)
            except ValueError as error:
                raise ValueError(f"slice={self.slice!r}: {error}") from None
        check(self.layout_value, self.config, self.pass_, self.mesh_shape)

    def _check_training(self) -> None:
        if self.phase != "train":
            for field, default in (("accumulate", 1), ("remat", "layer")):
                if getattr(self, field) != default:
                    raise ValueError(f"{field}={getattr(self, field)!r} is for phase='train' only")
            return
        if self.context:
            raise ValueError(f"context={self.context} must be 0 in train: nothing is cached")
        if self.cache is not None:
            raise ValueError(f"cache={self.cache!r} must be left out in train: nothing is cached")
        if self.weights == "int8":
            raise ValueError("weights='int8' must be f32, or bf16 with a float32 copy, in train")
        if self.config.n_padding_heads:
            raise ValueError(f"model={self.model!r} has padding heads, of which training would make real ones")

    @property
    def config(self) -> ModelConfig:
        return _config(self.model)

    @property
    def mesh_shape(self) -> Shape:
        return _mesh_shape(self.slice, self.mesh)

    @property
    def chip(self) -> str:
        return Slice.parse(self.slice).chip

    @property
    def n_chips(self) -> int:
        return Slice.parse(self.slice).n_chips

    @property
    def tokens(self) -> int:
        """B*L, the new tokens of the pass."""
        return self.batch * self.length

    @property
    def layout_value(self) -> Layout:
        return layout(self.layout, self.attention, self.mesh_shape, self.config.n_kv_heads)

    @property
    def capacity(self) -> int:
        """Positions of the cache that this pass needs; with several steps, that the last one needs."""
        return self.context + (self.steps_per_call - 1 if self.phase == "decode" else self.length)

    @property
    def start(self) -> int:
        """Position of the first new token."""
        return self.context - (self.length if self.phase == "decode" else 0)

    @property
    def pass_(self) -> Pass:
        return Pass(
            batch=self.batch,
            length=self.length,
            capacity=self.capacity,
            itemsize=4 if self.weights == "f32" else 2,
            weight_itemsize=WEIGHTS[self.weights],
            steps=self.steps_per_call,
            int8_cache=self.cache == "int8",
            all_logits=self.phase == "train",
            training=Training(accumulate=self.accumulate, remat=self.remat) if self.phase == "train" else None,
        )

    def check_chip(self) -> None:
        """Refuses a slice that cannot be priced: a chip without a data sheet, a mesh that does not fit its torus, a
        group larger than its switch joins, or weights for which a calibrated chip has no figures.

        Raises:
            ValueError: the rule that is broken.
        """
        described = chip(self.chip)
        if described.machine:
            described.machine.of("matmul", self.weights)
        if described.wrap == "switch":
            rate("all-gather", AXES, self.mesh_shape, described)
        else:
            segments(AXES, self.mesh_shape, described, mesh_shape(Slice.parse(self.slice)))

    def to_json(self) -> dict[str, Any]:
        """The point as JSON fields. `mesh`, `cache`, `steps_per_call`, `accumulate` and `remat` are there only if they
        differ from their defaults."""
        left_out = {"mesh": None, "cache": None, "steps_per_call": 1, "accumulate": 1, "remat": "layer"}
        return {k: v for k, v in vars(self).items() if k not in left_out or v != left_out[k]}

    @classmethod
    def from_json(cls, fields: object) -> "Point":
        """A point from a JSON object, or from its text.

        Raises:
            ValueError: malformed JSON, an unknown or missing field, or anything that the constructor refuses.

        Example:
            >>> Point.from_json('{"model":"palm-8b","slice":"v4:2x2x2","phase":"decode","batch":64,"context":2048,'
            ...                 '"layout":"ws2d","attention":"batch"}').mesh_shape
            (2, 2, 2)
        """
        if isinstance(fields, str):
            try:
                fields = json.loads(fields)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"a point is a JSON object, not {type(fields).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"unknown field {name!r}{hint}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in fields]
        if missing:
            raise ValueError(f"missing field {', '.join(map(repr, missing))}")
        return cls(**fields)


_config = functools.lru_cache(maxsize=1024)(model)


@functools.lru_cache(maxsize=1024)
def _mesh_shape(slice_: str, mesh: str | None) -> Shape:
    return mesh_shape(Slice.parse(slice_), mesh)
