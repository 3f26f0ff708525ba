"""What `toruslab simulate` is asked for: the scenarios, traces and rates that its options spell."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.benchmarks.runs import serving_options
from toruslab.benchmarks.runs.parser import InputError, read_lines, refused
from toruslab.partitioning.cost.forward import constants_of
from toruslab.partitioning.torus.chip import FITTED
from toruslab.partitioning.torus.mesh import Slice
from toruslab.serving.scheduling.policies import Policy, policy
from toruslab.serving.scheduling.reservation import reservation
from toruslab.serving.simulation.measured_times import StageTable
from toruslab.serving.simulation.pricing import Pipeline, Pricing
from toruslab.serving.simulation.scenario import Scenario
from toruslab.serving.simulation.simulator import Server, StageTimes
from toruslab.serving.traffic.lengths import Fixed, Lengths, Quantiles, Uniform
from toruslab.serving.traffic.traces import Pattern, Trace, trace
from toruslab.serving.traffic.workload import Workload

NOT_OF_A_TABLE = ("mesh", "cache", "constants")
"""Options that measured stage times have settled."""
OF_PREFILL = ("prefill_layout", "prefill_attention", "prefill_max_bs")
"""Options that say something with --disaggregate only."""
LOADS = (0.25, 0.5, 0.75, 0.9)
"""Shares of the peak that are run where no rates are given."""
MOST = 10**9
"""The largest value of whatever is counted."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of the scenarios of a sweep; `fields` are those of its rows."""

    fields: Mapping[str, Any]
    scenario: Scenario


def check(options: argparse.Namespace, given: Mapping[str, str]) -> None:
    """Refuses options that make no sense beside each other.

    Args:
        options: all of them.
        given: those of the command line, see `Parser.given`.

    Raises:
        InputError: field, value and rule.
    """
    serving_options.refuse_empty(options, given)
    if options.stage_times:
        for field in sorted(given.keys() & set(NOT_OF_A_TABLE)):
            why = "the measured pipeline has settled it; leave one of them out"
            raise InputError(f"{given[field]} stands beside --stage-times: {why}")
    if options.timeline and (options.timeline.is_dir() or not options.timeline.parent.is_dir()):
        raise InputError(f"timeline={str(options.timeline)!r} must be a file in a folder that exists")
    if options.capacity and not options.limits:
        raise InputError("capacity needs --limits TTFT:TPOT")
    if options.capacity and options.rates:
        raise InputError(f"rates={options.rates!r} stands beside --capacity, which looks for the rate; give one")
    for field in OF_PREFILL:
        if field in given and not options.disaggregate:
            raise InputError(f"{field}={getattr(options, field)!r} needs --disaggregate SLICE")
    if options.stage_times and options.disaggregate:
        raise InputError("stage_times are of one pipeline, and disaggregate asks for two; give one of them")
    if options.stage_times and options.slots is None:
        raise InputError("stage_times need --slots: without the model it is not known how many fit")


def rates(options: argparse.Namespace, when: Pattern) -> tuple[float, ...] | None:
    """Requests per second; None: shares of the peak, see `LOADS`."""
    rule = f"numbers of requests per second, from 1e-6 to {MOST}, each once"
    return serving_options.rates(options, when, 1e-6, MOST, rule)


def workload(options: argparse.Namespace, when: Pattern, rate: float = 1.0, n: int | None = None) -> Workload:
    """The trace with its arrivals.

    Args:
        options: of the command.
        when: of `serving_options.pattern`.
        rate: requests per second.
        n: requests, if not those of the options.
    """
    asked = lengths(options)
    with refused():
        return Workload(
            n=options.requests if n is None else n,
            arrivals=when.at(rate),
            prompt=asked.prompt,
            output=asked.output,
            max_output=options.max_output,
            seed=options.seed,
        )


def lengths(options: argparse.Namespace) -> Trace:
    """Lengths of the trace, or those that `--prompt` and `--output` give in their place."""
    with refused():
        asked = trace(options.trace)
    given = {field: _length(field, text) for field in ("prompt", "output") if (text := getattr(options, field))}
    return dataclasses.replace(asked, **given)


def _length(field: str, text: str) -> Lengths:
    low, dots, high = text.partition("..")
    try:
        if not 1 <= int(low) <= int(high or low) <= MOST:
            raise ValueError
        return Uniform(low=int(low), high=int(high)) if dots else Fixed(tokens=int(low))
    except ValueError:
        raise InputError(f"{field}={text!r} must be N or LOW..HIGH tokens, 1 <= LOW <= HIGH <= {MOST}") from None


def _longest(prompt: Lengths) -> int:
    """The tokens that slots are kept for: those of the longest prompt, rounded up."""
    return math.ceil(float(prompt.at(np.ones(1))[0])) if isinstance(prompt, Quantiles) else prompt.longest


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination of slices, layouts and policies.

    Raises:
        InputError: a combination that cannot be priced or scheduled.
    """
    with refused():
        return list(_cases(options))


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    table = _table(options.stage_times)
    if table and options.stages not in (1, table.n_stages):
        raise InputError(f"stages={options.stages} must be the {table.n_stages} of stage_times, or be left out")
    policies = [policy(name) for name in _listed("policies", options.policies)]
    if len({one.name for one in policies}) < len(policies):
        raise InputError(f"policies={options.policies!r} must be different ones")
    slices, layouts = _listed("slices", options.slices), _listed("layouts", options.layouts)

    def scheduled(times: StageTimes, n_stages: int, n_chips: int, max_bs: int, slots: int, chosen: Policy) -> Server:
        return Server(
            times=times,
            n_stages=n_stages,
            n_chips=n_chips,
            max_bs=max_bs,
            slots=slots,
            policy=chosen,
            reservation=reservation(options.reservation),
            in_flight=options.in_flight,
            host_s=options.host_us * 1e-6,
        )

    common = {"model": options.model, "attention": options.attention, "weights": options.weights}
    made = functools.partial(Pipeline, **common | {"mesh": options.mesh, "cache": options.cache})
    longest, constants = _longest(lengths(options).prompt), _constants(options.constants)

    def priced(pipeline: Pipeline, max_bs: int, slots: int | None, chosen: Policy) -> Server:
        most = min(max_bs * longest, chosen.token_budget or max_bs * longest)
        fitting = pipeline.slots(most, max_bs)
        if slots is not None and slots > fitting:
            raise InputError(f"slots={slots} are more than the {fitting} that fit a chip of slice={pipeline.slice!r}")
        times = Pricing(pipeline, {**constants_of(pipeline.chip), **constants})
        return scheduled(times, pipeline.stages, pipeline.n_chips, max_bs, slots or fitting, chosen)

    for slice_, layout, chosen in itertools.product(slices, layouts, policies):
        fields = {"model": options.model, "slice": slice_, "stages": options.stages, "layout": layout}
        fields |= {"attention": options.attention, "weights": options.weights, "policy": chosen.name}
        if table:
            fields |= {"stages": table.n_stages, "source": "measured stage times"}
            n_chips = table.n_stages * Slice.parse(slice_).n_chips
            server = scheduled(table, table.n_stages, n_chips, options.max_bs, options.slots, chosen)
            yield _case(fields, Scenario(server=server))
            continue
        pipeline = made(slice=slice_, stages=options.stages, layout=layout)
        server = priced(pipeline, options.max_bs, options.slots, chosen)
        fields |= {"source": "analytic stage times"}
        if not options.disaggregate:
            yield _case(fields, Scenario(server=server))
            continue
        attention = options.prefill_attention or options.attention
        first = made(slice=options.disaggregate, layout=options.prefill_layout or layout, attention=attention)
        prefill = priced(first, options.prefill_max_bs, None, policy("orca"))
        links = [p.n_chips / p.stages * p.chip.link_bytes_per_s for p in (pipeline, first)]
        fields |= {"prefill_slice": first.slice, "prefill_layout": first.layout, "prefill_chips": prefill.n_chips}
        kv = {"kv_bytes": pipeline.kv_bytes, "kv_bytes_per_s": min(links), "kv_start_s": pipeline.chip.hop_s}
        yield _case(fields, Scenario(server=server, prefill=prefill, **kv))


def _case(fields: Mapping[str, Any], scenario: Scenario) -> Case:
    """`chips` are all that there are; of two slices, those of prompts included."""
    server = scenario.server
    sizes = {"chips": scenario.n_chips, "max_bs": server.max_bs, "slots": server.slots}
    return Case(fields={**fields, **sizes}, scenario=scenario)


def _listed(field: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(set(parts)) < len(parts):
        raise InputError(f"{field}={text!r} must name one or more, each once, with commas between them")
    return parts


def _constants(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not found or not set(found) <= set(FITTED):
        raise InputError(f"constants={text!r} must be a JSON object with any of {', '.join(FITTED)}")
    for name, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        least, most = (0, 1) if name.endswith("_s") else (1e-3, 1)
        if not is_number or not least <= value <= most:
            raise InputError(f"constants: {name}={str(value)[:20]} must be a number from {least} to {most}")
    return found


def _table(file: str | None) -> StageTable | None:
    if file is None:
        return None
    lines: list[str] = []
    for number, line in read_lines("stage_times", file):
        if isinstance(line, ValueError):
            raise InputError(f"stage_times={file!r}, line {number}: {line}")
        lines.append(line)
    with refused(f"stage_times={file!r}: {{}}"):
        return StageTable.parse(lines)


def columns(found: Sequence[Case]) -> list[str]:
    """The fields in which the cases differ."""
    fields = [k for k in found[0].fields if k not in ("chips", "slots")]
    return [k for k in fields if len({c.fields.get(k) for c in found}) > 1]
