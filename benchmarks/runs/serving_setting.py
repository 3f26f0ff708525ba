"""What `toruslab serve-bench` measures: schemes, rates and seeds, and the engine that all of them share.

Decides which sizes an engine has by default, and in which order runs are made. Touches no device.
"""

import argparse
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
from toruslab.serving.traffic.traces import Pattern, Trace, arrivals, trace

PIECE, PAGE = 16, 32
"""Tokens in a piece of a prompt, positions in a page of the cache."""
PIECES_TOKENS = 512
"""About so many tokens of prompts go into one pass."""
MOST = {"requests": 1_000_000, "seeds": 1000, "max_bs": 4096, "slots": 10**9}
LEAST_RATE, MOST_RATE = 1e-3, 1e6
MOST_FACTOR = 1000.0
SHARES = (0.25, 0.4, 0.6, 0.85, 1.2, 1.8)
"""Of the capacity that a closed burst shows: the rates, where none are given."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to make batches, and how many of them are in flight at most."""

    policy: Policy
    n_workers: int
    name: str

    @property
    def is_request_level(self) -> bool:
        return self.policy.name.startswith(("request-level", "shortest-prompt"))

    @classmethod
    def parse(cls, text_: str, stages: int) -> "Scheme":
        """Reads `orca` or `request-level@2`; without a number, a batch for each stage.

        Raises:
            ValueError: an unknown policy, or no such number.
        """
        name, at, workers = text_.partition("@")
        if at and not (workers.isdecimal() and 1 <= int(workers) <= 64):
            raise ValueError(f"policies: {text_!r} must be POLICY or POLICY@N with 1 to 64 batches in flight")
        made = policy(name)
        n = int(workers) if at else stages
        return cls(policy=made, n_workers=n, name=f"{made.name}@{n}" if at else made.name)


@dataclass(frozen=True, kw_only=True)
class ServingSetting:
    """One engine, and the traffic that it gets.

    Args:
        shape: extents of one stage's mesh.
        scale: of prompts, of outputs.
        n_slots: of the KV cache, for every scheme.
        warm_up: share of the time of arrivals that is left out.
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
        """Requests that may hold a row at once, whatever the scheme."""
        return self.max_bs * max(scheme.n_workers for scheme in self.schemes)

    @property
    def least_bytes(self) -> int:
        """What weights, none repeated, and KV cache take, of all chips together."""
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
    if options.weights not in WEIGHTS:
        raise ValueError(f"weights={options.weights!r} must be one of {', '.join(WEIGHTS)}")
    for field, least in (("stages", 1), ("max_bs", 1), ("requests", 2), ("seeds", 1)):
        if getattr(options, field) < least:
            raise ValueError(f"{field}={getattr(options, field)} must be at least {least}")
    for field, most in MOST.items():
        value = getattr(options, field)
        if value is not None and value > most:
            raise ValueError(f"{field}={value} must be at most {most}")
    if not 0 <= options.warm_up < 1:
        raise ValueError(f"warm_up={options.warm_up} must be a share of the time, 0 <= warm_up < 1")
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
    return ServingSetting(
        model=config.name,
        slice=slice_,
        shape=shape,
        stages=stages,
        layout=options.layout,
        attention=options.attention,
        weights=options.weights,
        schemes=_schemes(options.policies, stages, options.max_bs),
        reservation=reservation(options.reservation),
        held=cast(Held, options.held),
        max_bs=options.max_bs,
        n_slots=n_slots,
        trace=asked,
        arrivals=arrivals(options.arrivals, options.requests),
        scale=scale,
        requests=options.requests,
        seeds=options.seeds,
        warm_up=options.warm_up,
        limits=_limits(options.limits),
        checkpoint=options.checkpoint,
    )


def rates(text_: str) -> tuple[float, ...]:
    """Requests per second, ascending.

    Raises:
        ValueError: what is no number, out of bounds, or stands there twice.
    """
    try:
        found = [float(part) for part in text_.split(",")]
    except ValueError:
        raise ValueError(f"rates={text_!r} must be numbers of requests per second, such as 2,4,8") from None
    if not all(LEAST_RATE <= rate <= MOST_RATE for rate in found) or len(set(found)) < len(found):
        raise ValueError(f"rates={text_!r} must be positive, {LEAST_RATE:g} to {MOST_RATE:g}, and each different")
    return tuple(sorted(found))


def rates_around(capacity: float) -> tuple[float, ...]:
    """A ladder of rates up to beyond a capacity, both in requests per second; three digits each."""
    return tuple(float(f"{share * capacity:.3g}") for share in SHARES)


def runs(setting: ServingSetting, of_rates: Sequence[float]) -> Iterator[tuple[Scheme, float, int]]:
    """Scheme, rate and seed of every run: all schemes one after another, each time in another order."""
    for seed in range(setting.seeds):
        for i, rate in enumerate(of_rates):
            schemes = list(setting.schemes)
            random.Random(seed * len(of_rates) + i).shuffle(schemes)
            for scheme in schemes:
                yield scheme, rate, seed


def sizes_of_passes(max_bs: int, parts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Singles and pieces of one part, such that the programs are few: a batch of decodes fits into one pass.

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


def _limits(text_: str | None) -> Limits | None:
    if text_ is None:
        return None
    try:
        ttft_s, tpot_s = map(float, text_.split(":"))
    except ValueError:
        ttft_s = tpot_s = 0.0
    if not (0 < ttft_s < math.inf and 0 < tpot_s < math.inf):
        raise ValueError(f"limits={text_!r} must be TTFT:TPOT in seconds, both positive, such as 0.5:0.05")
    return Limits(ttft_s=ttft_s, tpot_s=tpot_s)
