"""Which layouts, mesh, slice, batch and weights for a goal: prices all of them, says what was refused and why.

Decides what is searched, which prefill and decode layouts go together, and what a token costs. What a pass costs is
`partitioning.cost.forward`'s, which is asked for whole arrays of batches and weight types at once. Touches no device.

- **Placements.** Every ordered mesh (X, Y, Z) that can be laid over the slice as it is given, and the slice turned
  (4x4x8 as 8x4x4) with the mesh axis by axis.
- **One batch.** A request's batch is prefilled together and decoded together, on one slice and mesh.
- **Two layouts.** Prefill and decode may differ where the weights rest in the same places (equal first rungs of
  `w_in`, `w_kv`, `w_out` and equal `table`), so that switching moves none: all but `ws1d` and `replicated` do so on
  most meshes. The rule compares the specs, not the names. The KV cache is moved if it must be, and charged; a mere
  change in the order of the sequences is free.
- **Steps.** All decode steps are charged as the middle one; the memory is that of the last.
"""

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.partitioning.cost.cache_move import cache_move_s, same_weights
from toruslab.partitioning.cost.forward import Constants, constants_of, price
from toruslab.partitioning.cost.limits import MOST, batch_step
from toruslab.partitioning.cost.sizes import PassSizes, model_sizes
from toruslab.partitioning.layouts.layout import ATTENTIONS, LAYOUTS, Layout, NoAxisLeft
from toruslab.partitioning.layouts.variants import layout, parts_of
from toruslab.partitioning.plan.plan import Pass, check
from toruslab.partitioning.plan.point import CACHES, WEIGHTS, Point
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.links import segments
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape

Goal = Literal["latency", "cost", "batch"]
PHASES = ("request", "prefill", "decode")
GOALS: tuple[Goal, ...] = ("latency", "cost", "batch")
PLANNED = tuple(name for name in LAYOUTS if name != "auto")
BATCHES = tuple(sorted({2**k * step // 16 for k in range(11) for step in range(16, 32) if 2**k * step % 16 == 0} - {0}))
BATCHES = tuple(batch for batch in BATCHES if batch <= 1024)
"""Batches to 1024, sixteen to a doubling where whole numbers allow it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be served: `output` tokens for a prompt of `prompt`.

    Args:
        phase: `request` (prefill, then `output` decode steps), or `prefill` or `decode` alone.
        prompt, output: tokens of one sequence. A decode step over a context of C is prompt=C-1, output=1.
    """

    phase: str = "request"
    prompt: int
    output: int = 1

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ValueError(f"phase={self.phase!r} must be one of {', '.join(PHASES)}")
        for name, least in (("prompt", 0 if self.phase == "decode" else 1), ("output", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}, and at most {MOST}")

    @property
    def phases(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.phase == "request" else (self.phase,)

    @property
    def capacity(self) -> int:
        """Positions of the cache that the job comes to need."""
        return self.prompt + (0 if self.phase == "prefill" else self.output)

    def sizes(self, phase: str) -> dict[str, int]:
        """`length` and `context` of a pass as a point has them; decode's is the middle step."""
        if phase == "prefill":
            return {"length": self.prompt, "context": 0}
        return {"length": 1, "context": self.prompt + (self.output + 1) // 2}

    @property
    def tokens(self) -> int:
        """Divides the cost, per sequence: the prompt in prefill, 1 in a step, the generated ones in a request."""
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
            if not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= MOST:
                raise ValueError(f"batch={batch!r} must be an integer of at least 1, and at most {MOST}")
        for text in self.slices:
            chip(Slice.parse(text).chip)
        _ = self.config

    @property
    def config(self) -> ModelConfig:
        return model(self.model)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What one call of the cost model shares: a layout on a mesh on a slice. `asked` is the slice as it was given."""

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


@dataclass(kw_only=True)
class Rejected:
    """Points refused for one reason: how many, one of them (as a point's JSON fields), and the rule that it breaks."""

    reason: str
    count: int = 0
    example: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


COLUMNS = ("prefill", "decode", "weights", "batch", "latency_s", "cost_chip_s_per_token", "prefill_s", "step_s")
COLUMNS += ("handoff_s", "hbm_bytes_per_chip")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All options that remain, as columns, and what was refused.

    Args:
        structures: what the columns `prefill` and `decode` index (-1: no such phase).
        columns: one array per name in `COLUMNS`; `weights` indexes `space.weights`. `latency_s` is the request, the
            pass or the step; `cost_chip_s_per_token` = chips x latency / (batch x `job.tokens`).
        n_points: all (phase, slice, mesh, layout, attention, weights, batch) that were looked at.
        n_priced: those that went through the cost model.
        n_considered: those that can run; with the rejected they are all.
        n_pairs_refused: pairs of layouts that would have to move the weights.
    """

    space: Space
    job: Job
    structures: Sequence[Structure]
    columns: Mapping[str, np.ndarray]
    rejected: Sequence[Rejected]
    n_points: int
    n_priced: int
    n_considered: int
    n_pairs_refused: int
    seconds: float

    def __len__(self) -> int:
        return len(self.columns["batch"])

    def allowed(self, max_latency_s: float | None = None, max_step_s: float | None = None) -> np.ndarray:
        """Which options keep within the limits: of `latency_s`, and of one decode step."""
        found = np.ones(len(self), bool)
        for name, limit in (("latency_s", max_latency_s), ("step_s", max_step_s)):
            if limit is not None:
                found &= ~(self.columns[name] > limit)
        return found

    def order(self, goal: Goal, allowed: np.ndarray | None = None) -> np.ndarray:
        """Indices of the options, best first; ties go to the other number, then to the first found."""
        latency, cost = self.columns["latency_s"], self.columns["cost_chip_s_per_token"]
        keys = {"latency": (cost, latency), "cost": (latency, cost), "batch": (cost, -self.columns["batch"])}[goal]
        best_first: np.ndarray = np.lexsort(keys)
        return best_first if allowed is None else best_first[allowed[best_first]]

    def ranking(self, goal: Goal, allowed: np.ndarray | None = None) -> list[int]:
        """The best option of each slice and choice of layouts, best first: mesh, batch and weights are the best.

        On some meshes layouts differ in name only (on 1x1xZ most are `ws1d`); the first name then stands for all.
        """
        order = self.order(goal, allowed)
        kinds: dict[tuple[str, str], int] = {}
        kind = np.array([kinds.setdefault((s.asked, s.label), len(kinds)) for s in self.structures] + [-1])
        both = kind[self.columns["prefill"][order]] * (len(kinds) + 1) + kind[self.columns["decode"][order]]
        found: dict[tuple, int] = {}
        for i in order[np.sort(np.unique(both, return_index=True)[1])].tolist():
            numbers = [f"{self.columns[c][i]:.9g}" for c in ("batch", "weights", "latency_s", "hbm_bytes_per_chip")]
            used = self.structures[int(max(self.columns["prefill"][i], self.columns["decode"][i]))]
            found.setdefault((used.asked, *numbers), i)
        return list(found.values())

    def front(self) -> np.ndarray:
        """Which options are Pareto optimal in latency and cost."""
        return pareto(self.columns["latency_s"], self.columns["cost_chip_s_per_token"])

    def points(self, i: int) -> dict[str, Point]:
        """An option's points, by phase."""
        found = {}
        for phase in self.job.phases:
            structure = self.structures[self.columns[phase][i]]
            found[phase] = Point(
                model=self.space.model,
                phase=phase,
                batch=int(self.columns["batch"][i]),
                weights=self.space.weights[self.columns["weights"][i]],
                cache=self.space.cache,
                **self.job.sizes(phase),
                **structure.fields(),
            )
        return found


def pareto(latency: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Which points no other dominates (is at most equal in both and less in one); equal points stand or fall together.

    Example:
        >>> pareto(np.array([1, 2, 3, 1, 2]), np.array([5, 3, 4, 5, 4])).tolist()
        [True, True, False, True, False]
    """
    order = np.lexsort((cost, latency))
    sorted_latency, sorted_cost = latency[order], cost[order]
    first = np.searchsorted(sorted_latency, sorted_latency, "left")
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_cost)])[first]
    found = np.empty(len(order), bool)
    found[order] = (sorted_cost < before) & (sorted_cost == sorted_cost[first])
    return found


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


@functools.lru_cache(maxsize=1024)
def placements(slice_: Slice) -> tuple[tuple[Slice, Shape], ...]:
    """Slices and meshes to try: all ordered meshes over the slice as given, its own first, then the slice turned."""
    n, own = slice_.n_chips, mesh_shape(slice_)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    meshes = [(x, y, n // x // y) for x in divisors for y in divisors if n // x % y == 0]
    turned = [Slice(slice_.chip, d) for d in sorted(set(itertools.permutations(slice_.dims)) - {slice_.dims})]
    found = [(slice_, mesh) for mesh in sorted(meshes, key=lambda mesh: mesh != own)]
    return (*found, *((each, mesh_shape(each)) for each in turned))


def search(space: Space, job: Job, constants: Constants | None = None) -> Plan:
    """Prices the whole space.

    Args:
        space: what is searched.
        job: what is to be served.
        constants: fitted ones for the cost model; the chips' own by default.

    Raises:
        ValueError: none of the slices is possible.

    Example: a decode step of PaLM 540B at 512 sequences: two-dimensional weights and attention over the batch.
        >>> plan = search(Space(model="palm-540b-h64", slices=("v4:4x4x4",), batches=(512,)),
        ...               Job(phase="decode", prompt=2047))
        >>> point = plan.points(plan.order("cost")[0])["decode"]
        >>> point.layout, point.attention
        ('ws2d', 'batch')
    """
    return _Search(space, job, constants).run()


@dataclass(kw_only=True)
class _Priced:
    """A structure in one phase: seconds and bytes by [weights, batch]; infinite where it cannot run."""

    index: int
    structure: Structure
    seconds: np.ndarray
    held: np.ndarray


class _Search:
    """One run of `search`: the tallies and the blocks of options found so far."""

    def __init__(self, space: Space, job: Job, constants: Constants | None):
        self.space, self.job, self.constants = space, job, constants
        self.config = space.config
        self.model_row = model_sizes(self.config)
        self.batches = np.array(space.batches, np.int64)
        self.structures: list[Structure] = []
        self.blocks: list[dict[str, Any]] = []
        self.rejected: dict[str, Rejected] = {}
        self.numbers: dict[int, tuple[np.ndarray, PassSizes]] = {}
        self.n_points = self.n_priced = self.n_considered = self.n_pairs_refused = 0

    def run(self) -> Plan:
        started = time.perf_counter()
        impossible = []
        for text in self.space.slices:
            slice_ = Slice.parse(text)
            chip_ = chip(slice_.chip)
            try:
                chip_.check_slice(slice_.dims)
            except ValueError as error:
                impossible.append(f"slice={text!r}: {error}")
                n = len(placements(slice_)) * self._per_phase * len(self.job.phases)
                self.n_points += n
                self._reject("the slice is impossible", n, {"slice": text}, str(error))
                continue
            for turned, mesh in placements(slice_):
                self._on(text, turned, mesh, chip_)
        if len(impossible) == len(self.space.slices):
            raise ValueError(impossible[0])
        join = {c: np.concatenate([np.asarray(b[c]) for b in self.blocks] or [np.empty(0)]) for c in COLUMNS}
        return Plan(
            space=self.space,
            job=self.job,
            structures=self.structures,
            columns=join | {c: join[c].astype(np.int64) for c in ("prefill", "decode", "weights", "batch")},
            rejected=sorted(self.rejected.values(), key=lambda r: -r.count),
            n_points=self.n_points,
            n_priced=self.n_priced,
            n_considered=self.n_considered,
            n_pairs_refused=self.n_pairs_refused,
            seconds=time.perf_counter() - started,
        )

    @property
    def _per_structure(self) -> int:
        return len(self.space.weights) * len(self.batches)

    @property
    def _per_phase(self) -> int:
        """Points of one mesh and phase."""
        return len(self.space.layouts) * len(self.space.attentions) * self._per_structure

    def _reject(self, reason: str, n: int, example: Mapping[str, Any], why: str) -> None:
        found = self.rejected.setdefault(reason, Rejected(reason=reason, example=example, why=why))
        found.count += n

    def _on(self, asked: str, slice_: Slice, mesh: Shape, chip_: Chip) -> None:
        phases = self.job.phases
        self.n_points += self._per_phase * len(phases)
        where = {"slice": str(slice_), "mesh": "x".join(map(str, mesh))}
        try:
            if chip_.wrap != "switch":
                segments(AXES, mesh, chip_, mesh_shape(slice_))
        except ValueError as error:
            self._reject("the mesh cannot be laid over the slice", self._per_phase * len(phases), where, str(error))
            return
        priced: dict[str, list[_Priced]] = {phase: [] for phase in phases}
        for name, attention in itertools.product(self.space.layouts, self.space.attentions):
            example = {**where, "layout": name, "attention": attention}
            try:
                made = layout(name, attention, mesh, self.config.n_kv_heads)
                step = self._step(made, mesh)
            except NoAxisLeft as error:
                self._reject("no axis is left for heads", self._per_structure * len(phases), example, str(error))
                continue
            except ValueError as error:
                sized = str(error).split("=")[0]
                self._reject(f"{sized} does not divide", self._per_structure * len(phases), example, str(error))
                continue
            structure = Structure(asked=asked, slice_=slice_, mesh=mesh, layout=made)
            self.structures.append(structure)
            for phase, found in self._price(structure, step, chip_, example):
                priced[phase].append(found)
        self._combine(priced, slice_, mesh, chip_)

    def _step(self, made: Layout, mesh: Shape) -> int:
        """What the batch must be a multiple of; ValueError where the model's own sizes do not divide."""
        step = batch_step(made, self.config.block, mesh)
        check(made, self.config, Pass(batch=step, length=1, capacity=1), mesh)
        return step

    def _price(self, s: Structure, step: int, chip_: Chip, example: Mapping) -> Iterator[tuple[str, _Priced]]:
        """All phases, weights and batches of a structure in one call of the cost model."""
        phases, weights = self.job.phases, self.space.weights
        columns, numbers = self._numbers(step)
        left_out = len(self.batches) - len(columns)
        if left_out:
            batch = int(self.batches[np.flatnonzero(self.batches % step)[0]])
            why = f"batch={batch} is not divisible by {step}, the parts that layout {s.label} splits it into"
            n = left_out * len(weights) * len(phases)
            self._reject("batch does not divide", n, {**example, "batch": batch}, why)
        if not len(columns):
            return
        cost = price(s.layout, self.config.block, s.slice_, s.mesh, numbers, self.constants)
        shape = (len(phases), len(weights), len(columns))
        held = np.broadcast_to(np.floor(cost.hbm_bytes_per_chip), shape)
        fits = held <= chip_.hbm_bytes
        n_fit = int(np.count_nonzero(fits))
        self.n_priced += held.size
        self.n_considered += n_fit
        if n_fit < held.size:
            p, w, b = (int(i[0]) for i in np.nonzero(~fits))
            at = {"phase": phases[p], "batch": int(self.batches[columns[b]]), "weights": weights[w]}
            needs, has = held[p, w, b] / 2**30, chip_.hbm_bytes / 2**30
            why = f"needs {needs:,.1f} GiB of HBM a chip, {chip_.name} has {has:,.1f} GiB"
            self._reject("does not fit", held.size - n_fit, {**example, **at}, why)
        if not n_fit:
            return
        seconds = np.full((len(phases), len(weights), len(self.batches)), np.inf)
        bytes_ = np.zeros(seconds.shape)
        seconds[:, :, columns] = np.where(fits, cost.latency_s, np.inf)
        bytes_[:, :, columns] = held
        for i, phase in enumerate(phases):
            if fits[i].any():
                yield phase, _Priced(index=len(self.structures) - 1, structure=s, seconds=seconds[i], held=bytes_[i])

    def _numbers(self, step: int) -> tuple[np.ndarray, PassSizes]:
        """Which batches a step divides, and all passes with them as [phase, weights, batch]."""
        if step not in self.numbers:
            columns = np.flatnonzero(self.batches % step == 0)
            phases = [(self.job.sizes(phase), phase) for phase in self.job.phases]
            self.numbers[step] = (
                columns,
                PassSizes.join(
                    self.model_row,
                    batch=self.batches[columns].astype(float),
                    length=np.array([[[sizes["length"]]] for sizes, _ in phases], float),
                    first=np.array([[[sizes["context"] - (phase == "decode")]] for sizes, phase in phases], float),
                    capacity=float(self.job.capacity),
                    weight=np.array([[WEIGHTS[w]] for w in self.space.weights], float),
                    int8_cache=self.space.cache == "int8",
                ),
            )
        return self.numbers[step]

    def _combine(self, priced: Mapping[str, list[_Priced]], slice_: Slice, mesh: Shape, chip_: Chip) -> None:
        if self.job.phase != "request":
            for p in priced[self.job.phase]:
                nothing = np.zeros_like(p.seconds)
                decode = self.job.phase == "decode"
                alone = {"prefill": -1 if decode else p.index, "decode": p.index if decode else -1}
                first, step = (nothing, p.seconds) if decode else (p.seconds, nothing)
                self._keep(alone, p.seconds, first, step, nothing, p.held, slice_)
            return
        weight, int8 = np.array([[WEIGHTS[w]] for w in self.space.weights]), self.space.cache == "int8"
        c = constants_of(chip_) if self.constants is None else self.constants
        for d in priced["decode"]:
            best = None
            for p in priced["prefill"]:
                if not same_weights(p.structure.layout, d.structure.layout):
                    self.n_pairs_refused += 1
                    continue
                moved = cache_move_s(
                    p.structure.layout,
                    d.structure.layout,
                    slice_,
                    mesh,
                    self.config,
                    batch=self.batches,
                    filled=self.job.prompt,
                    weight=weight,
                    constants=c,
                    int8_cache=int8,
                )
                if best is None:
                    best = [
                        np.full_like(d.seconds, np.inf),
                        np.zeros(d.seconds.shape, int),
                        *np.zeros((2, *d.held.shape)),
                    ]
                better = p.seconds + moved < best[0] + best[2]
                news = (p.seconds, p.index, moved, p.held)
                best = [np.where(better, new, old) for new, old in zip(news, best, strict=True)]
            if best is not None:
                first, index, moved, held = best
                total = first + moved + self.job.output * d.seconds
                both = {"prefill": index, "decode": d.index}
                self._keep(both, total, first, d.seconds, moved, np.maximum(held, d.held), slice_)

    def _keep(self, indices: Mapping, total, first, step, moved, held, slice_: Slice) -> None:
        ok = np.isfinite(total)
        if not ok.any():
            return
        w, b = np.nonzero(ok)
        batch = self.batches[b]
        self.blocks.append(
            {k: np.broadcast_to(v, total.shape)[ok] for k, v in indices.items()}
            | {"weights": w, "batch": batch, "latency_s": total[ok]}
            | {"cost_chip_s_per_token": slice_.n_chips * total[ok] / (batch * self.job.tokens)}
            | {"prefill_s": first[ok], "step_s": step[ok], "handoff_s": moved[ok], "hbm_bytes_per_chip": held[ok]}
        )


def read_slices(text: str, max_chips: int) -> tuple[str, ...]:
    """Slices from `v4:4x4x4,v5e:4x8`; a chip's name (or file) alone means `slices_of` it.

    Raises:
        ValueError: malformed slices, unknown chips.
    """
    return tuple(_read_slices(text, max_chips))


def _read_slices(text: str, max_chips: int) -> Iterator[str]:
    for part in filter(None, (p.strip() for p in text.split(","))):
        if ":" in part:
            yield str(Slice.parse(part))
        else:
            made = chip(part)
            yield from (f"{part}:{s.rpartition(':')[2]}" for s in slices_of(made, max_chips))
