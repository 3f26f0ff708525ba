"""Prices a mixed batch on every stage of a pipeline, by the analytic model. Uses no device.

A batch holds whole prompts, pieces of prompts and single tokens of many requests, each with its own context. T, the
batch's tokens, prices matmuls, vector work and collectives. Each request's tokens and context price attention:

    layer = hypot(matmuls(T) + vector work(T) + attention, overlapped gathers) + exposed collectives(T)
    attention = sum over requests of max(multiply-adds ~ tokens x mean context, cache read ~ context)

The seconds for each T come from `partitioning.cost.forward` and are tabulated once, so that a batch of equal requests
costs the same as in `estimate`. [assumed]:

- T is padded to a multiple that the layout can divide.
- If attention is split over the batch, the fullest chip decides.
- Every chip sends its part of the residual stream to the next stage over one link, and the stage waits for it.
- The first stage has the embedding's collectives, the last stage the unembedding.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.partitioning.cost.forward import Constants, price
from toruslab.partitioning.cost.limits import batch_step
from toruslab.partitioning.cost.sizes import PassSizes, model_sizes
from toruslab.partitioning.cost.traffic import coefficients
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.point import WEIGHTS, Point
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.mesh import Shape, Slice, mesh_shape
from toruslab.serving.scheduling.batch import Batch

MOST_TOKENS = 2**20
"""Most tokens of a batch, padding included."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A model cut into stages with the same number of layers, each on its own slice.

    Args:
        model: a preset or a path to a Hugging Face `config.json`.
        slice: of one stage, `CHIP:DIMS`.
        stages: number of stages.
        layout, attention, weights, mesh, cache: see `partitioning.plan.point.Point`.

    Raises:
        ValueError: field, value and rule.

    Example:
        >>> Pipeline(model="orca-175b", slice="a100-40:8", stages=2, layout="ws1d", attention="heads").n_chips
        16
    """

    model: str
    slice: str
    stages: int = 1
    layout: str = "ws1d"
    attention: str = "heads"
    weights: str = "bf16"
    mesh: str | None = None
    cache: str | None = None

    def __post_init__(self):
        n_layers = self.config.n_layers
        if self.stages < 1 or n_layers % self.stages:
            raise ValueError(f"stages={self.stages} must divide the {n_layers} layers of {self.model}")
        point = self.decode(1, 1)
        point.check_chip()
        if not point.layout_value.explicit:
            raise ValueError("layout='auto' has no plan to price")
        if self.chip.machine:
            raise ValueError(
                f"slice={self.slice!r}: mixed batches are priced from data sheets; of a measured chip give stage times"
            )

    @property
    def config(self) -> ModelConfig:
        return model(self.model)

    @property
    def chip(self) -> Chip:
        return chip(Slice.parse(self.slice).chip)

    @property
    def shape(self) -> Shape:
        return mesh_shape(Slice.parse(self.slice), self.mesh)

    @property
    def made(self) -> Layout:
        return layout(self.layout, self.attention, self.shape, self.config.n_kv_heads)

    @property
    def step(self) -> int:
        """The tokens of a batch are padded to a multiple of this number."""
        return batch_step(self.made, self.config.block, self.shape)

    @property
    def n_chips(self) -> int:
        return self.stages * Slice.parse(self.slice).n_chips

    def decode(self, sequences: int, context: int) -> Point:
        """A decode step of all layers on one stage's slice, with the sequences padded to a multiple of `step`."""
        return Point(
            model=self.model,
            slice=self.slice,
            phase="decode",
            batch=-(-sequences // self.step) * self.step,
            context=context,
            layout=self.layout,
            attention=self.attention,
            weights=self.weights,
            mesh=self.mesh,
            cache=self.cache,
        )

    def numbers(self, tokens: Any, *, capacity: Any = 1.0, rows: Any = None) -> PassSizes:
        """Sizes of passes of one stage's layers over single tokens, all of them at position 0."""
        row = model_sizes(self.config) | {"n_layers": self.config.n_layers // self.stages}
        if self.stages > 1:
            row["tied"] = 1  # a stage has one table at most: the embedding in the first, the unembedding in the last
        found = PassSizes.join(
            row,
            batch=np.asarray(tokens, float),
            length=1.0,
            first=0.0,
            capacity=np.asarray(capacity, float),
            weight=float(WEIGHTS[self.weights]),
            int8_cache=self.cache == "int8",
        )
        return found if rows is None else dataclasses.replace(found, size={**found.size, "R": rows})

    def cost(
        self, numbers: PassSizes, constants: Constants | None = None, *, overlap: bool = True, detail: bool = False
    ):
        """`partitioning.cost.forward.price` of the passes that `numbers` describes."""
        slice_ = Slice.parse(self.slice)
        options = {"overlap": overlap, "detail": detail}
        return price(self.made, self.config.block, slice_, self.shape, numbers, constants, **options)

    def slots(self, most_tokens: int, rows: int) -> int:
        """Tokens whose K and V fit into a chip's memory beside the weights and a batch's activations.

        Args:
            most_tokens: most tokens of a batch.
            rows: most requests of a batch.

        Raises:
            ValueError: the weights and activations alone do not fit.
        """
        tokens = -(-most_tokens // self.step) * self.step
        held = self.cost(self.numbers(tokens, capacity=0.0, rows=-(-rows // self.step) * self.step))
        free = held.hbm_bytes - float(np.ravel(held.hbm_bytes_per_chip)[0])
        if free < 0:
            raise ValueError(
                f"slice={self.slice!r}, stages={self.stages}: weights and the activations of {most_tokens} tokens of "
                f"{self.model} take {(held.hbm_bytes - free) / 1e9:.1f} GB a chip, which has {held.hbm_bytes / 1e9:.1f}"
            )
        return int(free / self.slot_bytes)

    @property
    def slot_bytes(self) -> float:
        """Bytes per chip of one token's K and V on a stage, padding of tiles included."""
        far, near = (self.cost(self.numbers(self.step, capacity=2.0**n)).hbm_bytes_per_chip for n in (21, 20))
        return float(np.ravel(far - near)[0]) / (self.step * 2**20)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V in all layers as they are sent, without padding of tiles."""
        config = self.config
        width = config.d_head + 2 if self.cache == "int8" else config.d_head * (4 if self.weights == "f32" else 2)
        return 2 * config.n_layers * config.n_kv_heads * width


class Pricing:
    """`serving.simulation.simulator.StageTimes` of a pipeline.

    Args:
        pipeline: the pipeline to price.
        constants: fitted constants of the chip (`partitioning.torus.chip.FITTED`); None: the chip's own.
        overlap: see `partitioning.cost.estimate.estimate`.
        slowdown: factor on all seconds, for an engine slower than the model.
        send: whether stages wait for the residual stream to be sent.

    Example: a batch of 32 single tokens, each after 300 tokens, and one prompt of 272 tokens.
        >>> from toruslab.serving.scheduling.batch import Work
        >>> work = [Work(i, 300, 1, 1, True, False) for i in range(32)] + [Work(32, 0, 272, 272, True, False)]
        >>> orca = Pricing(Pipeline(model="orca-175b", slice="a100-40:8", stages=2, layout="ws1d", attention="heads"))
        >>> [round(s * 1e3) for s in orca(Batch(number=0, made_s=0.0, work=tuple(work)))]
        [37, 37]
    """

    def __init__(
        self,
        pipeline: Pipeline,
        constants: Constants | None = None,
        *,
        overlap: bool = True,
        slowdown: float = 1.0,
        send: bool = True,
    ):
        self.pipeline = pipeline
        self._constants, self._overlap, self._slowdown = constants, overlap, slowdown
        self._step = pipeline.step
        self._n_layers = pipeline.config.n_layers // pipeline.stages
        made, chip_ = pipeline.made, pipeline.chip
        plan = coefficients(made, pipeline.config.block, Slice.parse(pipeline.slice), pipeline.shape, overlap)
        self._parts = plan.splits["cache", -1][0]
        unit = self._cost(np.array([1.0])).parts
        # seconds of one layer for one token and one position: multiply-adds, and reading (or converting) the position
        self._product_s, self._position_s = (float(np.ravel(unit[k])[0]) for k in ("attention_s", "cache_s"))
        self._position_s = max(self._position_s, float(np.ravel(unit["converted_s"])[0]))
        heads = self._cost(np.array([0.0, 1.0])).parts
        compute, memory = heads["head_compute_s"], heads["head_memory_s"]
        self._head_row_s = float(np.ravel(compute)[-1])
        self._head_s, self._embed_s = float(memory[0]), float(memory[1] - memory[0])
        sent = pipeline.config.d_model * (4 if pipeline.weights == "f32" else 2) / math.prod(pipeline.shape)
        self._send_s = (sent / chip_.link_bytes_per_s if send else 0.0, chip_.hop_s if send else 0.0)
        self._body: list[float] = []  # seconds by T / step, like the next three
        self._open: list[float] = []
        self._first: list[float] = []
        self._last: list[float] = []
        self._hidden = 0.0
        self._grow(64)

    def __call__(self, batch: Batch) -> tuple[float, ...]:
        tokens = singles = context = n_long = 0
        long_s = 0.0
        product_s, position_s = self._product_s, self._position_s
        for _, start, _, padded, _, _ in batch.work:
            if padded == 1:
                singles += 1
                context += start
            else:
                tokens += padded
                n_long += 1
                a = padded * (start + (padded + 1) / 2) * product_s
                b = (start + padded) * position_s
                long_s += a if a > b else b
        tokens += singles
        attention = (context + singles) * (product_s if product_s > position_s else position_s)
        if (parts := self._parts) > 1:  # the fullest chip decides
            attention *= -(-singles // parts) * parts / singles if singles else 0
            long_s *= -(-n_long // parts) * parts / n_long if n_long else 0
        return self._stages(tokens, len(batch.work), attention + long_s)

    def _stages(self, tokens: int, rows: int, attention: float) -> tuple[float, ...]:
        at, row = -(-tokens // self._step), -(-rows // self._step)
        if at >= len(self._body):
            self._grow(2 * at)
        busy = self._body[at] + attention
        layer = (math.hypot(busy, self._hidden) if self._hidden else busy) + self._open[at]
        middle, n = self._n_layers * layer, self.pipeline.stages
        r, t = row * self._step, at * self._step
        head = ((r * self._head_row_s) ** 4 + (self._head_s + t * self._embed_s) ** 4) ** 0.25
        first, last = self._first[at], head + self._last[row]
        slow = self._slowdown
        if n == 1:
            return (slow * (first + middle + last),)
        sent = tokens * self._send_s[0] + self._send_s[1]
        return (slow * (first + middle + sent), *[slow * (middle + sent)] * (n - 2), slow * (middle + last))

    def _grow(self, to: int) -> None:
        if to * self._step > 2 * MOST_TOKENS:
            raise ValueError(f"a batch of more than {MOST_TOKENS} tokens is not priced")
        at = np.arange(to + 1) * float(self._step)
        cost = self._cost(at, detail=True)
        parts = {k: np.broadcast_to(cost.parts[k], at.shape) for k in ("body_s", "open_s", "hidden_s")}
        self._body, self._open = parts["body_s"].tolist(), parts["open_s"].tolist()
        self._hidden = float(parts["hidden_s"][0])
        ends = {True: np.zeros_like(at), False: np.zeros_like(at)}
        for c in cost.collectives:
            if not c.in_layer:
                ends[c.scope.startswith("embed")] += c.seconds
        self._first, self._last = ends[True].tolist(), ends[False].tolist()

    def _cost(self, tokens: Any, *, detail: bool = False):
        numbers = self.pipeline.numbers(tokens)
        return self.pipeline.cost(numbers, self._constants, overlap=self._overlap, detail=detail)
