"""What `toruslab serve-bench` measures: schemes, rates and seeds, and the engine that all of them share.

Also the default sizes of the engine and the order of the runs. Touches no device.
"""

import argparse
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from toruslab.benchmarks.runs import serving_options
from toruslab.benchmarks.runs.weights_option import chosen
from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.models.weights import byte_ids
from toruslab.partitioning.layouts.layout import Layout, axes_of, entries
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.plan.point import WEIGHTS
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape
from toruslab.serving.engine.pages import Held, n_pages
from toruslab.serving.results.metrics import Limits
from toruslab.serving.scheduling.policies import Policy, policy
from toruslab.serving.scheduling.reservation import Reservation, reservation
from toruslab.serving.traffic.traces import Pattern, Trace, trace

PIECE, PAGE = 16, 32
"""Tokens in a piece of a prompt; positions in a page of the cache."""
PIECES_TOKENS = 512
"""The largest pass has about so many tokens of prompts."""
MOST = {"requests": 1_000_000, "seeds": 1000, "max_bs": 4096, "slots": 10**9}
LEAST_RATE, MOST_RATE = 1e-3, 1e6
MOST_FACTOR = 1000.0
SHARES = (0.25, 0.4, 0.6, 0.85, 1.2, 1.8)
"""The default rates, as shares of the capacity that a closed burst shows."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A batching scheme: a policy, and the largest number of batches in flight. Rows call it `rung`."""

    policy: Policy
    n_workers: int
    name: str

    @property
    def is_request_level(self) -> bool:
        return self.policy.name.startswith(("request-level", "shortest-prompt"))

    @classmethod
    def parse(cls, text_: str, stages: int) -> "Scheme":
        """Reads `orca` or `request-level@2`. Without a number there is a batch in flight for each stage.

        Raises:
            ValueError: an unknown policy, or a number that is out of bounds.
        """
        name, at, workers = text_.partition("@")
        if at and not (workers.isdecimal() and 1 <= int(workers) <= 64):
            raise ValueError(f"policies: {text_!r} must be POLICY or POLICY@N with 1 to 64 batches in flight")
        made = policy(name)
        n = int(workers) if at else stages
        return cls(policy=made, n_workers=n, name=f"{made.name}@{n}" if at else made.name)


@dataclass(frozen=True, kw_only=True)
class ServingSetting:
    """One engine and its traffic.

    Args:
        shape: extents of one stage's mesh.
        scale: of prompts, of outputs.
        n_slots: of the KV cache, for every scheme.
        warm_up: share of the arrivals' time that is not measured.
        limits: of a request, for goodput.
        checkpoint: a folder with the weights; None: random ones.
    """

    model: str
    slice: Slice
    shape: Shape
    stages: int
    layout: str
    attention: str
    weights: str
    schemes: tuple[Scheme, ...]
    reservation: Reservation
    held: Held
    max_bs: int
    n_slots: int
    trace: Trace
    arrivals: Pattern
    scale: tuple[float, float]
    requests: int
    seeds: int
    warm_up: float
    limits: Limits | None
    checkpoint: str | None = None

    @property
    def config(self) -> ModelConfig:
        return _config(self.model, self.checkpoint)

    @property
    def made(self) -> Layout:
        return layout(self.layout, self.attention, self.shape, self.config.n_kv_heads)

    @property
    def rows(self) -> int:
        """The most requests that hold a row at once, over all schemes."""
        return self.max_bs * max(scheme.n_workers for scheme in self.schemes)

    @property
    def least_bytes(self) -> int:
        """Bytes of weights and KV cache on all chips together, if no weight is stored twice."""
        config, sizes = self.config, {"n_slots": self.n_slots, "page": PAGE, "longest": self.trace.longest}
        positions = PAGE * n_pages(rows=self.rows, held=self.held, **sizes)
        split = {axis for entry in entries(self.made.cache) for axis in axes_of(entry)}
        repeats = math.prod(n for axis, n in zip(AXES, self.shape, strict=True) if axis not in split)
        held = repeats * positions * config.n_layers * 2 * config.n_kv_heads * config.d_head
        return int(config.n_params * WEIGHTS[self.weights] + held * (4 if self.weights == "f32" else 2))

    def to_json(self) -> dict[str, Any]:
        """As rows hold it."""
        return {
            "model": self.model,
            "slice": str(self.slice),
            "stages": self.stages,
            "mesh": "x".join(map(str, self.shape)),
            **{k: getattr(self, k) for k in ("layout", "attention", "weights", "held", "max_bs", "n_slots")},
            "reservation": self.reservation.name,
            "rows": self.rows,
            "trace": self.trace.name,
            "scale": list(self.scale),
            "longest": self.trace.longest,
            **self.arrivals.to_json(),
            **{k: getattr(self, k) for k in ("requests", "seeds", "warm_up")},
            "limits": dataclasses.asdict(self.limits) if self.limits else None,
            **({"checkpoint": self.checkpoint} if self.checkpoint else {}),
        }


@functools.lru_cache(maxsize=64)
def _config(name: str, checkpoint: str | None) -> ModelConfig:
    return chosen(None, checkpoint, 0).config if checkpoint else model(name)


def read(options: argparse.Namespace) -> ServingSetting:
    """The setting that was asked for.

    Raises:
        ValueError: field, value and rule.
    """
    config = _config(options.model, options.checkpoint)
    if config.vocab < byte_ids.VOCAB:
        raise ValueError(f"vocab={config.vocab} of {config.name} is smaller than the tokenizer's {byte_ids.VOCAB}")
    slice_, stages = Slice.parse(options.slice), options.stages
    if config.n_layers % stages:
        raise ValueError(f"stages={stages} does not divide the {config.n_layers} layers of {config.name}")
    shape = _stage_shape(slice_, options.mesh, stages)
    made = layout(options.layout, options.attention, shape, config.n_kv_heads)
    check(made, config, Pass(batch=math.prod(shape), length=1, capacity=1), shape)
    scale = _scale(options.scale)
    asked = trace(options.trace).scaled(*scale)
    n_slots = options.max_bs * asked.longest if options.slots is None else options.slots
    if n_slots < asked.longest:
        raise ValueError(f"slots={n_slots} must be at least {asked.longest}, what the longest request needs")
    if options.held not in ("rows", "pages"):
        raise ValueError(f"held={options.held!r} must be rows or pages")
    as_given = ("stages", "layout", "attention", "weights", "max_bs", "requests", "seeds", "warm_up", "checkpoint")
    return ServingSetting(
        model=config.name,
        slice=slice_,
        shape=shape,
        schemes=_schemes(options.policies, stages, options.max_bs),
        reservation=reservation(options.reservation),
        held=cast(Held, options.held),
        n_slots=n_slots,
        trace=asked,
        arrivals=serving_options.pattern(options),
        scale=scale,
        limits=serving_options.limits(options),
        **{name: getattr(options, name) for name in as_given},
    )


def rates(options: argparse.Namespace, setting: ServingSetting) -> tuple[float, ...] | None:
    """The rates that were asked for, in requests per second, or None: they are measured then."""
    rule = f"positive, {LEAST_RATE:g} to {MOST_RATE:g}, and each different"
    return serving_options.rates(options, setting.arrivals, LEAST_RATE, MOST_RATE, rule)


def rates_around(capacity: float) -> tuple[float, ...]:
    """Rates from far below a capacity to beyond it, in requests per second, with three digits each."""
    return tuple(float(f"{share * capacity:.3g}") for share in SHARES)


def runs(setting: ServingSetting, of_rates: Sequence[float]) -> Iterator[tuple[Scheme, float, int]]:
    """Scheme, rate and seed of every run. All schemes run at one rate before the next, each time in another order."""
    for seed in range(setting.seeds):
        for i, rate in enumerate(of_rates):
            schemes = list(setting.schemes)
            random.Random(seed * len(of_rates) + i).shuffle(schemes)
            for scheme in schemes:
                yield scheme, rate, seed


def sizes_of_passes(max_bs: int, parts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of single tokens and of pieces for which passes are compiled, per part of the batch.

    They are few, and a batch of decodes fits into one pass.

    Example:
        >>> sizes_of_passes(32, 1)
        ((8, 32), (0, 1, 2, 4, 8, 16, 32))
        >>> sizes_of_passes(32, 8)
        ((1, 4), (0, 1, 2, 4))
    """
    most = -(-max_bs // parts)
    pieces = [0, 1]
    while pieces[-1] * parts * PIECE < PIECES_TOKENS:
        pieces.append(2 * pieces[-1])
    return tuple(sorted({-(-most // 4), most})), tuple(pieces)


def _stage_shape(slice_: Slice, mesh: str | None, stages: int) -> Shape:
    n_chips = slice_.n_chips
    if n_chips % stages:
        raise ValueError(f"stages={stages} does not divide the {n_chips} chips of slice={slice_}")
    if mesh is not None:
        return mesh_shape(Slice(slice_.chip, (n_chips // stages,)), mesh)
    dims = list(mesh_shape(slice_))
    at = next((i for i, extent in enumerate(dims) if extent % stages == 0), None)
    if at is None:
        raise ValueError(f"stages={stages} divides no extent of slice={slice_}: give the mesh of one stage, --mesh")
    dims[at] //= stages
    return (dims[0], dims[1], dims[2])


def _schemes(text_: str | None, stages: int, max_bs: int) -> tuple[Scheme, ...]:
    default = f"shortest-prompt,request-level,request-level-early,request-level-early@{stages + 1},orca"
    names = f"{default},chunked-{2 * max_bs}" if text_ is None else text_
    found = tuple(Scheme.parse(name, stages) for name in names.split(","))
    if len({(scheme.policy.name, scheme.n_workers) for scheme in found}) < len(found):
        raise ValueError(f"policies={text_!r} must be different ones; without @N there are stages={stages} in flight")
    return found


def _scale(text_: str) -> tuple[float, float]:
    try:
        parts = [_fraction(part) for part in text_.split(":")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if not 1 <= len(parts) <= 2 or not all(0 < part <= MOST_FACTOR for part in parts):
        raise ValueError(
            f"scale={text_!r} must be a positive factor of all lengths, or PROMPT:OUTPUT, such as 1/8:1/4, at most "
            f"{MOST_FACTOR:g}"
        )
    return parts[0], parts[-1]


def _fraction(text_: str) -> float:
    above, slash, below = text_.partition("/")
    return float(above) / float(below) if slash else float(above)
