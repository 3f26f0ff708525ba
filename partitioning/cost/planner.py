"""Which layouts, mesh, slice, batch and weights are best for a goal: prices a whole space, and says what was refused.

- Prefill and decode may have different layouts where a switch moves no weights: all but `ws1d` and `replicated` can
  follow each other on most meshes. The KV cache is moved if it must be, and the move is charged
  (`partitioning.cost.cache_move`).
- The cost model is asked for whole arrays of batches and weight types at once (`partitioning.cost.forward.price`).

What is searched is in `partitioning.cost.space`. Touches no device.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from toruslab.partitioning.cost.cache_move import cache_move_s, same_weights
from toruslab.partitioning.cost.forward import Constants, constants_of, price
from toruslab.partitioning.cost.limits import batch_step
from toruslab.partitioning.cost.sizes import PassSizes, model_sizes
from toruslab.partitioning.cost.space import Job, Space, Structure, placements, read_slices
from toruslab.partitioning.layouts.layout import Layout, NoAxisLeft
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import check
from toruslab.partitioning.plan.point import WEIGHTS, Point
from toruslab.partitioning.torus.chip import Chip, chip
from toruslab.partitioning.torus.links import segments
from toruslab.partitioning.torus.mesh import AXES, Shape, Slice, mesh_shape

Goal = Literal["latency", "cost", "batch"]
GOALS: tuple[Goal, ...] = ("latency", "cost", "batch")
COLUMNS = ("prefill", "decode", "weights", "batch", "latency_s", "cost_chip_s_per_token", "prefill_s", "step_s")
COLUMNS += ("handoff_s", "hbm_bytes_per_chip")


@dataclass(kw_only=True)
class Rejected:
    """Points refused for one reason: their number, one of them (as a point's JSON fields), and the rule it breaks."""

    reason: str
    count: int = 0
    example: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All options that remain, as columns, and what was refused.

    Args:
        space, job: what was searched, and for what.
        structures: what the columns `prefill` and `decode` index (-1: no such phase).
        columns: one array per name in `COLUMNS`; `weights` indexes `space.weights`. `latency_s` is that of the request,
            the pass or the step. `cost_chip_s_per_token` = chips x latency / (batch x `job.tokens`). `handoff_s` is
            the move of the cache between prefill and decode.
        rejected: what was refused, most frequent reason first.
        n_points: all (phase, slice, mesh, layout, attention, weights, batch) that were looked at.
        n_priced: those that went through the cost model.
        n_considered: those that can run; with the rejected they are all.
        n_pairs_refused: pairs of layouts that would have to move the weights.
        seconds: that the search took.
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

        On some meshes layouts differ in name only (on 1x1xZ most are `ws1d`). The first name then represents all.
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
        return {
            phase: Point(
                model=self.space.model,
                phase=phase,
                batch=int(self.columns["batch"][i]),
                weights=self.space.weights[self.columns["weights"][i]],
                cache=self.space.cache,
                **self.job.sizes(phase),
                **self.structures[self.columns[phase][i]].fields(),
            )
            for phase in self.job.phases
        }


def pareto(latency: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Which points no other dominates (is at most equal in both and less in one); equal points are in or out together.

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


def search(space: Space, job: Job, constants: Constants | None = None) -> Plan:
    """Prices the whole space.

    Args:
        space: what is searched.
        job: what is to be done.
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


def plan(
    model: str,
    slices: str | Sequence[str],
    *,
    prompt: int,
    output: int = 1,
    phase: str = "request",
    max_chips: int = 64,
    constants: Constants | None = None,
    **space: Any,
) -> Plan:
    """Prices a search space given in words; the same as `search`.

    Args:
        model: a preset or the path of a `config.json`.
        slices: chips or slices, `v5e:4x4`; a chip alone (`v5e`) stands for its slices of up to `max_chips` chips.
        prompt, output: tokens of one sequence.
        phase: `request` (a prefill, then `output` decode steps), `prefill` or `decode`.
        max_chips: of the slices of a chip.
        constants: fitted ones for the cost model; the chips' own by default.
        space: further fields of `Space`: `batches`, `weights`, `layouts`, `attentions`, `cache`.

    Returns:
        Every option that can run, as columns, and what was refused. `Plan.ranking(goal)` orders the options by
        `latency`, `cost` or `batch`; `Plan.points(i)` gives an option's points.

    Raises:
        ValueError: field, value and rule.

    Example: PaLM 540B in bfloat16 for single prompts of 2048 tokens on 64 TPU v4 chips.
        >>> found = plan("palm-540b-h64", "v4:4x4x4", phase="prefill", prompt=2048, batches=(1,), weights=("bf16",))
        >>> point = found.points(found.ranking("latency")[0])["prefill"]
        >>> point.layout, point.attention
        ('ws2d', 'heads')
    """
    text = slices if isinstance(slices, str) else ",".join(slices)
    asked = Space(model=model, slices=read_slices(text, max_chips), **space)
    return search(asked, Job(phase=phase, prompt=prompt, output=output), constants)


@dataclass(kw_only=True)
class _Priced:
    """A structure in one phase: seconds and bytes by [weights, batch]; infinite seconds where it cannot run."""

    index: int
    structure: Structure
    seconds: np.ndarray
    held: np.ndarray


class _Search:
    """One run of `search`: the tallies and the blocks of options found so far."""

    def __init__(self, space: Space, job: Job, constants: Constants | None):
        self.space, self.job, self.constants = space, job, constants
        self.config = space.config
        self.model = model_sizes(self.config)
        self.batches = np.array(space.batches, np.int64)
        self.structures: list[Structure] = []
        self.blocks: list[dict[str, Any]] = []
        self.rejected: dict[str, Rejected] = {}
        self.passes: dict[int, tuple[np.ndarray, PassSizes]] = {}
        self.n_points = self.n_priced = self.n_considered = self.n_pairs_refused = 0
        self.n_per_structure = len(space.weights) * len(self.batches) * len(job.phases)
        self.n_per_mesh = len(space.layouts) * len(space.attentions) * self.n_per_structure

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
                n = len(placements(slice_)) * self.n_per_mesh
                self.n_points += n
                self._reject("the slice is impossible", n, {"slice": text}, str(error))
                continue
            for turned, mesh in placements(slice_):
                self._search_mesh(text, turned, mesh, chip_)
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

    def _reject(self, reason: str, n: int, example: Mapping[str, Any], why: str) -> None:
        self.rejected.setdefault(reason, Rejected(reason=reason, example=example, why=why)).count += n

    def _search_mesh(self, asked: str, slice_: Slice, mesh: Shape, chip_: Chip) -> None:
        """All layouts on one mesh."""
        self.n_points += self.n_per_mesh
        where = {"slice": str(slice_), "mesh": "x".join(map(str, mesh))}
        try:
            if chip_.wrap != "switch":
                segments(AXES, mesh, chip_, mesh_shape(slice_))
        except ValueError as error:
            self._reject("the mesh cannot be laid over the slice", self.n_per_mesh, where, str(error))
            return
        priced: dict[str, list[_Priced]] = {phase: [] for phase in self.job.phases}
        for name, attention in itertools.product(self.space.layouts, self.space.attentions):
            example = {**where, "layout": name, "attention": attention}
            try:
                made = layout(name, attention, mesh, self.config.n_kv_heads)
                step = self._step(made, mesh)
            except ValueError as error:
                field = str(error).split("=")[0]
                reason = "no axis is left for heads" if isinstance(error, NoAxisLeft) else f"{field} does not divide"
                self._reject(reason, self.n_per_structure, example, str(error))
                continue
            self.structures.append(Structure(asked=asked, slice_=slice_, mesh=mesh, layout=made))
            for phase, found in self._price(self.structures[-1], step, chip_, example):
                priced[phase].append(found)
        if self.job.phase == "request":
            self._join_phases(priced["prefill"], priced["decode"], slice_, mesh, chip_)
            return
        for p in priced[self.job.phase]:
            none = np.zeros_like(p.seconds)
            decode = self.job.phase == "decode"
            indices = {"prefill": -1 if decode else p.index, "decode": p.index if decode else -1}
            first, step = (none, p.seconds) if decode else (p.seconds, none)
            self._keep(indices, p.seconds, first, step, none, p.held, slice_)

    def _step(self, made: Layout, mesh: Shape) -> int:
        """What the batch must be a multiple of; ValueError where the model's own sizes do not divide."""
        step = batch_step(made, self.config.block, mesh)
        check(made, self.config, Pass(batch=step, length=1, capacity=1), mesh)
        return step

    def _price(self, s: Structure, step: int, chip_: Chip, example: Mapping) -> Iterator[tuple[str, _Priced]]:
        """All phases, weights and batches of a structure in one call of the cost model."""
        phases, weights = self.job.phases, self.space.weights
        columns, passes = self._passes(step)
        left_out = len(self.batches) - len(columns)
        if left_out:
            batch = int(self.batches[np.flatnonzero(self.batches % step)[0]])
            why = f"batch={batch} is not divisible by {step}, the parts that layout {s.label} splits it into"
            n = left_out * len(weights) * len(phases)
            self._reject("batch does not divide", n, {**example, "batch": batch}, why)
        if not len(columns):
            return
        cost = price(s.layout, self.config.block, s.slice_, s.mesh, passes, self.constants)
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

    def _passes(self, step: int) -> tuple[np.ndarray, PassSizes]:
        """Which batches a step divides, and all passes with them as [phase, weights, batch]."""
        if step not in self.passes:
            columns = np.flatnonzero(self.batches % step == 0)
            phases = [(self.job.sizes(phase), phase) for phase in self.job.phases]
            self.passes[step] = (
                columns,
                PassSizes.join(
                    self.model,
                    batch=self.batches[columns].astype(float),
                    length=np.array([[[sizes["length"]]] for sizes, _ in phases], float),
                    first=np.array([[[sizes["context"] - (phase == "decode")]] for sizes, phase in phases], float),
                    capacity=float(self.job.capacity),
                    weight=np.array([[WEIGHTS[w]] for w in self.space.weights], float),
                    int8_cache=self.space.cache == "int8",
                ),
            )
        return self.passes[step]

    def _join_phases(
        self, prefill: Sequence[_Priced], decode: Sequence[_Priced], slice_: Slice, mesh: Shape, chip_: Chip
    ) -> None:
        """The fastest prefill for every decode, weights and batch."""
        weight = np.array([[WEIGHTS[w]] for w in self.space.weights])
        c = constants_of(chip_) if self.constants is None else self.constants
        for d in decode:
            able = [p for p in prefill if same_weights(p.structure.layout, d.structure.layout)]
            self.n_pairs_refused += len(prefill) - len(able)
            if not able:
                continue
            moves = [
                cache_move_s(
                    p.structure.layout,
                    d.structure.layout,
                    slice_,
                    mesh,
                    self.config,
                    batch=self.batches,
                    filled=self.job.prompt,
                    weight=weight,
                    constants=c,
                    int8_cache=self.space.cache == "int8",
                )
                for p in able
            ]
            seconds, held = np.stack([p.seconds for p in able]), np.stack([p.held for p in able])
            moved = np.stack([np.broadcast_to(move, d.seconds.shape) for move in moves])
            best = np.argmin(seconds + moved, axis=0)[None]
            first, moved, held = (np.take_along_axis(each, best, axis=0)[0] for each in (seconds, moved, held))
            indices = {"prefill": np.array([p.index for p in able])[best[0]], "decode": d.index}
            total = first + moved + self.job.output * d.seconds
            self._keep(indices, total, first, d.seconds, moved, np.maximum(held, d.held), slice_)

    def _keep(self, indices: Mapping, total, first, step, moved, held, slice_: Slice) -> None:
        """Adds the options with a finite `total`."""
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
