"""Compiled evidence of a point: its step as XLA compiles it, for devices that are here or for described TPUs.

The step is compiled from shapes (`models.programs.program`), its text is read (`partitioning.hlo.collectives`) and
compared with the plan (`partitioning.hlo.compare`). This file decides which figures come from the compiler and what
counts as a finding. Nothing is allocated.

`compute_s` adds up XLA:TPU's own estimate, in core clocks, of every instruction that is not a collective, times the
number of its runs, at the chip's clock. Matmuls (with the memory traffic that they wait for), attention, norms, copies
and relayouts are in it. Collectives, dispatch and the overhead between fusions are not. The estimates are meant for
XLA's scheduler; they are not measurements.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from toruslab.models.attention_blocks import n_turns
from toruslab.models.config import ModelConfig
from toruslab.models.decoder.cache import cache_shape, cache_spec
from toruslab.models.programs.program import Compiled, Program
from toruslab.models.programs.training import Trainer
from toruslab.partitioning.cost.estimate import Estimate, estimate
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.compare import Matched, compare
from toruslab.partitioning.hlo.cycles import Cycles, copies, cycles_meanwhile, estimated_cycles
from toruslab.partitioning.hlo.text import Module, parse
from toruslab.partitioning.layouts.layout import axes_of, entries
from toruslab.partitioning.plan.plan import Planned, plan
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.plan.scopes import IN_LAYERS, is_stack, of_a_layer, scope_of
from toruslab.partitioning.plan.tensors import letters
from toruslab.partitioning.torus.chip import PLATFORMS, chip
from toruslab.partitioning.torus.described import TPUS, target
from toruslab.partitioning.torus.mesh import AXES, Slice

FEW_LAYERS = 4
"""Layers of the program that is compiled if the whole model does not fit. With 2 layers the compiler keeps more on the
chip than with all layers, and estimates up to a fifth too few clocks. With 4 layers the error is 1 in 1000."""
RELAYOUT_SHARE = 0.1
"""Copies and relayouts of a weight that take more than this share of its matmul's clocks are a finding."""
UNNAMED_SHARE = 0.2
"""More compute than this share without one of the decoder's scopes is a finding: the compiler added it."""
MATMULS = {"w_in": "h", "w_kv": "kv", "w_out": "out"}
"""The scope of each weight's matmul."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the compiled step of a point. Without a program, the defaults say that nothing is known.

    Args:
        n_layers: layers of the program. Fewer than the model's if the whole model does not fit; counts and seconds are
            still for all layers. 0 if not even a few layers fit: then there is no program.
        compile_s: seconds to lower and compile.
        argument_bytes, temporary_bytes, peak_bytes_per_chip: memory per chip, with the compiler's padding; None if the
            compiler refused the model and gave no number.
        fits: whether the compiler accepted the model; None if it does not know the memory (fake CPU devices).
        analytic: the cost model's answer to the same point; None for `auto` and for chips without a data sheet.
        collectives: the program's collectives against the plan's.
        compute_s, stack_compute_s: the compiler's estimate (see above) of the pass, and of the layers alone; None if
            there is none (CPU, GPU).
        n_unestimated: instructions without a usable estimate, counted as zero. Most are steps of asynchronous
            collectives.
        compute_by_scope: `compute_s` by scope of the decoder.
        hidden_s: line of an asynchronous collective in the text -> seconds of compute while it is under way.
        cache_copies, weight_copies: copies of the KV cache and of a layer's weights, per call of the program. All
            other figures are per step: the mean, if a call has several steps.
        relayouts: weight -> clocks of its copies and relayouts as a share of its matmul's clocks. `stack` -> clocks of
            slicing a layer's weights out of the stacked array, as a share of all matmuls. Empty if an estimate is
            missing.
        rematerialisations: warnings of the partitioner about a full rematerialisation.
        refused: the compiler's own words, if it refused the whole model.
    """

    point: Point
    n_layers: int = 0
    compile_s: float = 0.0
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes_per_chip: int | None
    fits: bool | None
    analytic: Estimate | None
    collectives: tuple[Matched, ...] = ()
    compute_s: float | None = None
    stack_compute_s: float | None = None
    n_unestimated: int = 0
    compute_by_scope: Mapping[str, float] = field(default_factory=dict)
    hidden_s: Mapping[int, float] = field(default_factory=dict)
    cache_copies: int = 0
    weight_copies: int = 0
    relayouts: Mapping[str, float] = field(default_factory=dict)
    rematerialisations: int = 0
    refused: str | None

    @property
    def unexplained(self) -> int:
        """Number of collectives without a plan, and of planned collectives that are missing."""
        return sum(not m.explained for m in self.collectives)

    @property
    def extra_bytes(self) -> int | float:
        """Bytes that one chip receives in the pass beyond the planned ones."""
        return sum(((m.bytes or 0) - (m.planned_bytes or 0)) * m.count for m in self.collectives)

    @functools.cached_property
    def exposed(self) -> Estimate | None:
        """The cost model's answer if weights are gathered before their matmuls, without overlap."""
        return self.analytic and estimate(self.point, overlap=False)

    @property
    def latency_s(self) -> float | None:
        """Seconds of the whole pass: the compiler's compute plus the cost model's collectives, without overlap."""
        if self.compute_s is None or self.exposed is None:
            return None
        return self.compute_s + self.exposed.collective_s

    @property
    def stack_latency_s(self) -> float | None:
        """The same for the layers alone."""
        if self.stack_compute_s is None or self.exposed is None:
            return None
        in_layers = [c for c in self.exposed.collectives if of_a_layer(c.scope)]
        return self.stack_compute_s + math.fsum(c.seconds * c.count for c in in_layers)

    @property
    def overlapped(self) -> float | None:
        """The share of the collectives' analytic seconds that compute hides; None without collectives."""
        total = math.fsum(seconds * m.count for m, seconds, _ in self._priced)
        return math.fsum(hidden * m.count for m, _, hidden in self._priced) / total if total else None

    @property
    def exposed_s(self) -> float | None:
        """The collectives' analytic seconds in the pass that no compute hides."""
        if self.exposed is None:
            return None
        return math.fsum((seconds - hidden) * m.count for m, seconds, hidden in self._priced)

    @property
    def _priced(self) -> list[tuple[Matched, float, float]]:
        """(collective, its analytic seconds, those of them that compute hides) for every collective.

        The two collective-permutes of a two-way ring run at once. Each hides under half of the compute meanwhile.
        """
        price = {(c.scope, c.kind, c.bytes): c.seconds for c in self.exposed.collectives} if self.exposed else {}
        found = []
        for m in self.collectives:
            seconds = price.get((m.scope, m.planned_kind or "", m.planned_bytes or 0), 0.0)
            share = 0.5 if m.kind == "collective-permute" and self.point.layout_value.rings == 2 else 1.0
            found.append((m, seconds, min(seconds, share * self.hidden_s.get(m.line or 0, 0.0))))
        return found

    @property
    def findings(self) -> tuple[str, ...]:
        """The program's faults in words; empty for a good program."""
        counts = {
            "collectives that no plan explains": self.unexplained,
            "copies of the KV cache": self.cache_copies,
            "copies of a layer's weights": self.weight_copies,
        }
        found = [f"{n} {what}" for what, n in counts.items() if n]
        unnamed = self.compute_by_scope.get("other", 0.0) / (self.compute_s or 1.0)
        if unnamed > UNNAMED_SHARE:
            found.append(f"{unnamed:.0%} of the compute carries no name of ours: copies and conversions, most likely")
        for name, share in self.relayouts.items():
            if share > RELAYOUT_SHARE:
                found.append(f"moving {name} about costs {share:.0%} of its matmul")
        if self.rematerialisations:
            found.append(f"{self.rematerialisations} full rematerialisations")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """The fields of `toruslab compile`."""
        names = ("compute_s", "memory_s", "collective_s", "latency_s", "stack_latency_s", "hbm_bytes_per_chip", "fits")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "point": self.point.to_json(),
            "source": "compiled",
            **{k: v for k, v in plain.items() if k not in ("point", "collectives", "analytic", "hidden_s")},
            "analytic": self.analytic and {name: getattr(self.analytic, name) for name in names},
            "collectives": [
                dataclasses.asdict(m)
                | {"axes": list(m.axes), "hidden_s": self.hidden_s.get(m.line or 0), "analytic_s": seconds}
                for m, seconds, _ in self._priced
            ],
            "unexplained": self.unexplained,
            "extra_bytes": self.extra_bytes,
            "latency_s": self.latency_s,
            "stack_latency_s": self.stack_latency_s,
            "overlapped": self.overlapped,
            "exposed_s": self.exposed_s,
            "findings": list(self.findings),
        }


def evidence(point: Point, *, attached: bool = False, keep: Path | None = None) -> Evidence:
    """Compiles the step of a point and reads the program.

    Args:
        point: any point of a chip that `partitioning.torus.described` knows.
        attached: compile for the TPUs that are here, instead of described ones.
        keep: a file to write the program's text to.

    Raises:
        ValueError: a target that does not exist.
        HloError: a program whose text cannot be read.
        jax.errors.JaxRuntimeError: a failure of the compiler other than a lack of memory.
    """
    config, mesh, refused = point.config, _target(point, attached), ""
    for n in sorted({config.n_layers, min(FEW_LAYERS, config.n_layers)}, reverse=True):
        try:
            compiled = program(point, dataclasses.replace(config, n_layers=n), mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            if not _no_memory(error):
                raise
            refused = refused or str(error).splitlines()[0]
            continue
        if keep:
            keep.write_text(compiled.text)
        return _evidence(point, compiled, n, refused)
    analytic = _analytic(point)
    return Evidence(point=point, peak_bytes_per_chip=_wanted(refused), fits=False, analytic=analytic, refused=refused)


def program(point: Point, config: ModelConfig, mesh: Mesh) -> Program | Trainer:
    """The program of a point's step. `config` may have fewer layers than the point's model."""
    make = Trainer if point.phase == "train" else Program
    return make(config=config, layout=point.layout_value, mesh=mesh, pass_=point.pass_)


def fits(point: Point, *, attached: bool = False) -> bool:
    """Whether the compiler accepts the step of a point.

    Raises:
        ValueError, jax.errors.JaxRuntimeError: see `evidence`.
    """
    try:
        program(point, point.config, _target(point, attached)).compile(text=False)
    except jax.errors.JaxRuntimeError as error:
        if not _no_memory(error):
            raise
        return False
    return True


def planned(point: Point, n_layers: int | None = None) -> list[Planned]:
    """The plan of a point. `auto` has none and is compared with the plan of `ws2d`."""
    counterpart = point if point.layout_value.explicit else dataclasses.replace(point, layout="ws2d")
    config = dataclasses.replace(point.config, n_layers=n_layers or point.config.n_layers)
    return plan(counterpart.layout_value, config, point.pass_, point.mesh_shape)


def _target(point: Point, attached: bool) -> Mesh:
    explicit = point.layout_value.explicit
    return target(Slice.parse(point.slice), point.mesh_shape, explicit=explicit, attached=attached)


def _analytic(point: Point) -> Estimate | None:
    return estimate(point) if point.chip not in PLATFORMS and point.layout_value.explicit else None


def _evidence(point: Point, compiled: Compiled, n: int, refused: str) -> Evidence:
    """The evidence of a program with `n` layers; `refused` has the compiler's words if the whole model does not fit."""
    module = parse(compiled.text)
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    steps = point.steps_per_call
    trips = n_turns(point.start + (steps - 1) // 2, point.length)
    found = compare(planned(point, n), read(module, sizes, unknown_trips=trips, partial_axes=True), steps=steps)
    times = point.config.n_layers // n if point.config.n_layers % n == 0 else point.config.n_layers / n
    scaled = [dataclasses.replace(m, count=int(m.count * times)) if of_a_layer(m.scope) else m for m in found]
    described = None if point.chip in PLATFORMS else chip(point.chip)
    clock = described.clock_hz if described and point.chip in TPUS else None
    cycles = estimated_cycles(module, unknown_trips=trips, outer_loops=int(steps > 1)) if clock else None
    by_scope, in_layers = _seconds(cycles, times, clock * steps) if cycles and clock else ({}, None)
    copied = _copies(point, module, trips, n)
    return Evidence(
        point=point,
        n_layers=n,
        compile_s=compiled.compile_s,
        argument_bytes=None if refused else compiled.argument_bytes,
        temporary_bytes=None if refused else compiled.temporary_bytes,
        peak_bytes_per_chip=_wanted(refused) if refused else compiled.peak_bytes,
        fits=None if described is None else not refused,
        analytic=_analytic(point),
        collectives=tuple(scaled if n < point.config.n_layers else found),
        compute_s=math.fsum(by_scope.values()) if by_scope else None,
        stack_compute_s=in_layers,
        n_unestimated=cycles.n_unknown if cycles else 0,
        compute_by_scope=_summed(by_scope),
        hidden_s={line: c / clock for line, c in cycles_meanwhile(module).items()} if clock else {},
        cache_copies=copied[0],
        weight_copies=copied[1],
        relayouts={} if cycles and cycles.n_unknown else _relayouts(by_scope),
        rematerialisations=len(compiled.warnings),
        refused=refused or None,
    )


def _seconds(cycles: Cycles, times: float, clock: float) -> tuple[dict[str, float], float]:
    """Seconds by op_name, and seconds of all layers.

    The loop over layers counts `times`, because the program may have fewer layers than the model. The layers' seconds
    include instructions outside the loop that have a layer's scope, as a single layer is no loop.
    """
    inside = {name: n * times / clock for name, n in cycles.in_loops.items()}
    outside = {name: (n - cycles.in_loops.get(name, 0)) / clock for name, n in cycles.by_scope.items()}
    of_layers = [s for name, s in outside.items() if scope_of(name).split("/")[0] in IN_LAYERS]
    everything = {name: s + inside.get(name, 0.0) for name, s in outside.items()}
    return everything, math.fsum([*inside.values(), *of_layers])


def _no_memory(error: Exception) -> bool:
    """Whether the compiler says that the program does not fit the chip's memory."""
    return "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).splitlines()[0].lower()


def _wanted(refused: str) -> int | None:
    """The bytes that the program would need, by the compiler's message."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", refused)
    return found and round(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])


def _summed(by_scope: Mapping[str, float]) -> dict[str, float]:
    """Seconds by scope of the decoder; `other` has instructions without a scope."""
    found: dict[str, float] = {}
    for name, seconds in by_scope.items():
        scope = scope_of(name) or ("stack" if is_stack(name) else "other")
        found[scope] = found.get(scope, 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _relayouts(by_scope: Mapping[str, float]) -> dict[str, float]:
    """See `Evidence.relayouts`."""
    found, matmuls = {}, 0.0
    for weight, at in MATMULS.items():
        multiplied = math.fsum(s for n, s in by_scope.items() if _ends(n, at) and "dot_general" in n)
        moved = math.fsum(s for n, s in by_scope.items() if _ends(n, weight))
        matmuls += multiplied
        if multiplied:
            found[weight] = moved / multiplied
    stack = math.fsum(s for n, s in by_scope.items() if is_stack(n))
    return found | ({"stack": stack / matmuls} if matmuls else {})


def _ends(op_name: str, scope: str) -> bool:
    return scope_of(op_name).rsplit("/", 1)[-1] == scope


def _copies(point: Point, module: Module, trips: int, n: int) -> tuple[int, int]:
    """Number of copies of the cache (whole or one layer), and of a layer's weights at any step of their ladders."""
    config, layout, pass_ = point.config, point.layout_value, point.pass_
    sizes = dict(zip(AXES, point.mesh_shape, strict=True))
    if pass_.training:
        return 0, 0
    shape = cache_shape(config, pass_.batch, pass_.capacity, tiled=point.chip in TPUS, int8=pass_.int8_cache)
    cache = _shard(shape, entries(cache_spec(layout)), sizes)
    cached = {_long((n, *cache[1:]))}
    if pass_.length < pass_.capacity:  # else a layer's cache has the shape of the new keys
        cached.add(_long(cache[1:]))
    size = letters(config, pass_, layout, point.mesh_shape)
    suffixes = ("",) if config.block == "parallel" else ("", "_mlp")
    weights = {
        _long(_shard([size[d] for d in dims], entries(spec), sizes))
        for s in suffixes
        for ladder, dims in ((layout.w_in, ("E", "C" + s)), (layout.w_kv, ("E", "D")), (layout.w_out, ("G" + s, "E")))
        for spec in ladder
    }
    itemsize = min(pass_.weight_itemsize, pass_.itemsize)
    cache_itemsize = 1 if pass_.int8_cache else pass_.itemsize
    least = min([math.prod(w) * itemsize for w in weights] + [math.prod(c) * cache_itemsize for c in cached])
    found = [0, 0]
    for c in copies(module, least, unknown_trips=trips):
        if c.from_space == c.to_space and not c.fused:
            scope = scope_of(c.scope).rsplit("/", 1)[-1]
            found[0] += c.trips * (_long(c.dims) in cached)
            found[1] += c.trips * (_long(c.dims) in weights and scope in ("", *MATMULS))
    return found[0], found[1]


def _shard(shape: Sequence[int], spec: Sequence[Any], sizes: Mapping[str, int]) -> list[int]:
    return [d // math.prod(sizes[a] for a in axes_of(e)) for d, e in zip(shape, spec, strict=True)]


def _long(dims: Sequence[int]) -> tuple[int, ...]:
    """The dimensions longer than 1."""
    return tuple(d for d in dims if d > 1)
