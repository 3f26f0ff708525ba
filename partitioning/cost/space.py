"""What the planner searches: a job, and the slices, meshes, layouts, batches and weights that may do it.

- A job's batch is prefilled together and decoded together, on one slice and one mesh.
- Meshes: every ordered (X, Y, Z) that can be laid over the slice as it is given, and the slice turned (4x4x8 as 8x4x4)
  with the mesh axis by axis.
- All decode steps are charged as the middle one; the memory is that of the last.

How the search goes and what it finds is in `partitioning.cost.planner`.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.partitioning.cost.limits import MOST
from toruslab.partitioning.layouts.catalogue import LAYOUTS
from toruslab.partitioning.layouts.layout import ATTENTIONS, Layout
from toruslab.partitioning.layouts.variants import parts_of
from toruslab.partitioning.plan.point import CACHES, WEIGHTS
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.mesh import Shape, Slice, mesh_shape

PHASES = ("request", "prefill", "decode")
PLANNED = tuple(name for name in LAYOUTS if name != "auto")
BATCHES = tuple(b for b in sorted({2**k * step // 16 for k in range(11) for step in range(16, 32)}) if b <= 1024)
"""Batches to 1024, sixteen to a doubling where whole numbers allow it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done for every sequence: `output` tokens for a prompt of `prompt`.

    Args:
        phase: `request` (prefill, then `output` decode steps), or `prefill` or `decode` alone.
        prompt, output: tokens of one sequence. A decode step over a context of C is prompt=C-1, output=1.

    Raises:
        ValueError: an unknown phase, or numbers of tokens that are not positive integers.
    """

    phase: str = "request"
    prompt: int
    output: int = 1

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r} must be one of {', '.join(PHASES)}")
        for name, least in (("prompt", 0 if self.phase == "decode" else 1), ("output", 1)):
            _check_integer(name, getattr(self, name), least)

    @property
    def phases(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.phase == "request" else (self.phase,)

    @property
    def capacity(self) -> int:
        """Positions that the cache needs at the end."""
        return self.prompt + (0 if self.phase == "prefill" else self.output)

    def sizes(self, phase: str) -> dict[str, int]:
        """`length` and `context` of a pass as a point has them; decode's is the middle step."""
        if phase == "prefill":
            return {"length": self.prompt, "context": 0}
        return {"length": 1, "context": self.prompt + (self.output + 1) // 2}

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that the cost is divided by: the prompt in prefill, 1 in a decode step, the generated
        ones in a request."""
        return {"prefill": self.prompt, "decode": 1, "request": self.output}[self.phase]


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched. `cache` is the same for all of it, as a point has it.

    Raises:
        ValueError: an empty list, an unknown name, or a batch that is not a positive integer.
    """

    model: str
    slices: tuple[str, ...]
    batches: tuple[int, ...] = BATCHES
    weights: tuple[str, ...] = ("bf16", "int8")
    layouts: tuple[str, ...] = PLANNED
    attentions: tuple[str, ...] = ("heads", "batch")
    cache: str | None = None

    def __post_init__(self):
        known = {"weights": tuple(WEIGHTS), "layouts": PLANNED, "attentions": ATTENTIONS}
        for name in ("slices", "batches", *known):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values:
                raise ValueError(f"{name} is empty: give at least one")
            object.__setattr__(self, name, values)
            for value in values if name in known else ():
                base = value.split("+")[0] if name == "layouts" else value
                if base not in known[name]:
                    rest = " (it has no plan: XLA decides)" if value == "auto" else ""
                    raise ValueError(f"{name}={value!r} must be of {', '.join(known[name])}{rest}")
                if base != value:
                    parts_of(value)
        if self.cache is not None and self.cache not in CACHES:
            raise ValueError(
                f"cache={self.cache!r} must be {', '.join(CACHES)}, or left out for the activations' dtype"
            )
        for batch in self.batches:
            _check_integer("batch", batch, 1)
        for text in self.slices:
            chip(Slice.parse(text).chip)
        _ = self.config

    @property
    def config(self) -> ModelConfig:
        return model(self.model)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A layout on a mesh on a slice: what one call of the cost model shares. `asked` is the slice as it was given."""

    asked: str
    slice_: Slice
    mesh: Shape
    layout: Layout

    @property
    def label(self) -> str:
        return f"{self.layout.name}/{self.layout.attention}"

    def fields(self) -> dict[str, Any]:
        """Its part of a point."""
        found = {"slice": str(self.slice_), "layout": self.layout.name, "attention": self.layout.attention}
        return found if self.mesh == mesh_shape(self.slice_) else found | {"mesh": "x".join(map(str, self.mesh))}


@functools.lru_cache(maxsize=1024)
def placements(slice_: Slice) -> tuple[tuple[Slice, Shape], ...]:
    """Slices and meshes to try: all ordered meshes over the slice as given, its own first, then the slice turned."""
    n, own = slice_.n_chips, mesh_shape(slice_)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    meshes = [(x, y, n // x // y) for x in divisors for y in divisors if n // x % y == 0]
    turned = [Slice(slice_.chip, d) for d in sorted(set(itertools.permutations(slice_.dims)) - {slice_.dims})]
    found = [(slice_, mesh) for mesh in sorted(meshes, key=lambda mesh: mesh != own)]
    return (*found, *((each, mesh_shape(each)) for each in turned))


def slices_of(chip_: Chip, max_chips: int) -> list[str]:
    """All legal slices of a chip with power-of-two extents, the longest axis last, up to `max_chips`.

    Example:
        >>> slices_of(chip("v5e"), 8)
        ['v5e:1x1', 'v5e:1x2', 'v5e:1x4', 'v5e:2x2', 'v5e:1x8', 'v5e:2x4']
    """
    if max_chips < 1:
        raise ValueError(f"max_chips={max_chips} must be at least 1")
    most = min(max_chips, chip_.max_chips)
    extents = [2**i for i in range(most.bit_length())]
    found = []
    for dims in itertools.combinations_with_replacement(extents, chip_.torus_axes or 1):
        try:
            chip_.check_slice(dims)
        except ValueError:
            continue
        if math.prod(dims) <= most:
            found.append(dims)
    return [f"{chip_.name}:{'x'.join(map(str, d))}" for d in sorted(found, key=lambda d: (math.prod(d), d))]


def read_slices(text: str, max_chips: int) -> tuple[str, ...]:
    """Slices from `v4:4x4x4,v5e:4x8`; a chip's name (or file) alone means `slices_of` it.

    Raises:
        ValueError: malformed slices, unknown chips.
    """

    def each() -> Iterator[str]:
        for part in filter(None, (p.strip() for p in text.split(","))):
            if ":" in part:
                yield str(Slice.parse(part))
            else:
                yield from (f"{part}:{s.rpartition(':')[2]}" for s in slices_of(chip(part), max_chips))

    return tuple(each())


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}, and at most {MOST}")
