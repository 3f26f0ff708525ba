"""What `toruslab simulate` is asked for: its options, and the scenarios and traces that they spell."""

import argparse
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.benchmarks.runs.options import InputError, Parser, path, read_lines
from toruslab.partitioning.cost.forward import constants_of
from toruslab.partitioning.plan.point import CACHES, WEIGHTS
from toruslab.partitioning.torus.chip import FITTED, chip
from toruslab.partitioning.torus.mesh import Slice
from toruslab.serving.results.metrics import Limits
from toruslab.serving.scheduling.policies import POLICIES, Policy, policy
from toruslab.serving.scheduling.reservation import RESERVATIONS, reservation
from toruslab.serving.simulation.measured_times import StageTable
from toruslab.serving.simulation.pricing import Pipeline, Pricing
from toruslab.serving.simulation.scenario import Scenario
from toruslab.serving.simulation.simulator import Server, StageTimes
from toruslab.serving.traffic import lengths
from toruslab.serving.traffic.arrivals import Arrivals
from toruslab.serving.traffic.traces import ARRIVALS, Pattern, arrivals
from toruslab.serving.traffic.workload import Workload

TRACES = {
    "orca": (lengths.ORCA_PROMPT, lengths.ORCA_OUTPUT),
    "azure-conversation": (lengths.AZURE_CONVERSATION_PROMPT, lengths.AZURE_CONVERSATION_OUTPUT),
    "azure-code": (lengths.AZURE_CODE_PROMPT, lengths.AZURE_CODE_OUTPUT),
}
FIGURES = ("orca-10b",)
OF_A_FIGURE = ("figure", "requests", "seed", "out", "json")
"""What may be chosen of it; everything else is the paper's."""
NOT_OF_A_TABLE = ("mesh", "cache", "constants")
"""What measured stage times have settled."""
OF_PREFILL = ("prefill_layout", "prefill_attention", "prefill_max_bs")
LOADS = (0.25, 0.5, 0.75, 0.9)
"""Shares of the peak that are run where no rates are given."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of the scenarios of a sweep; `fields` are those of its rows."""

    fields: Mapping[str, Any]
    scenario: Scenario


MOST = 10**9
"""Of whatever is counted."""


def parser(doc: str | None) -> Parser:
    """The options."""
    p = Parser(prog="toruslab simulate", description=doc, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", default="llama-3-70b", help="preset or config.json (default: %(default)s)")
    p.add_argument("--slices", "--slice", default="v5e:4x4", help="of one stage, CHIP:DIMS,... (default: %(default)s)")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--stages", type=int, default=1, help="of the pipeline (default: %(default)s)")
    p.add_argument("--layouts", "--layout", default="ws2d", help="one or more (default: %(default)s)")
    p.add_argument("--attention", default="batch", help="heads, batch, batch-x... (default: %(default)s)")
    p.add_argument("--weights", default="bf16", help=f"{', '.join(WEIGHTS)} (default: %(default)s)")
    p.add_argument("--cache", help=f"{', '.join(CACHES)}; default: a KV cache of the activations' dtype")
    names = f"{', '.join(POLICIES)}, chunked-N"
    p.add_argument("--policies", "--policy", default="orca", help=f"one or more of {names} (default: %(default)s)")
    p.add_argument("--reservation", default="own", help=f"{', '.join(RESERVATIONS)} (default: %(default)s)")
    p.add_argument("--max-bs", type=int, default=32, help="requests in a batch (default: %(default)s)")
    p.add_argument("--slots", type=int, help="tokens of the KV cache (default: what fits beside weights)")
    p.add_argument("--in-flight", type=int, help="batches in the pipeline (default: one for each stage)")
    p.add_argument("--host-us", type=float, default=0.0, help="host's microseconds for a batch (default: %(default)s)")
    p.add_argument("--disaggregate", metavar="SLICE", help="prompts run on a slice of their own; K and V are sent")
    p.add_argument("--prefill-layout", help="there (default: the other's)")
    p.add_argument("--prefill-attention", help="there (default: the other's)")
    p.add_argument("--prefill-max-bs", type=int, default=4, help="there (default: %(default)s)")
    p.add_argument("--constants", help=f"JSON object; of the chip's {', '.join(FITTED)} those to change")
    p.add_argument("--stage-times", metavar="FILE", help="measured seconds, one JSON row a line, in place of the model")
    p.add_argument("--trace", default="orca", help=f"lengths: {', '.join(TRACES)} (default: %(default)s)")
    p.add_argument("--prompt", help="tokens, N or LOW..HIGH, in place of the trace's")
    p.add_argument("--output", help="tokens, N or LOW..HIGH, in place of the trace's")
    p.add_argument("--max-output", type=int, help="what every request declares (default: what it will produce)")
    p.add_argument("--arrivals", default="poisson", metavar="WHEN", help=f"{ARRIVALS} (default: %(default)s)")
    p.add_argument(
        "--rates", "--rate", help="requests per second (default: shares of the peak, 0.25 to 0.9, or a file's own)"
    )
    p.add_argument("--requests", type=int, default=1000, help="of each run (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--warm-up", type=float, default=0.2, help="share of the arrivals left out (default: %(default)s)")
    p.add_argument("--limits", metavar="TTFT:TPOT", help="seconds that a request's first token, and further ones, take")
    p.add_argument("--capacity", action="store_true", help="the highest rate at which 90%% keep within --limits")
    p.add_argument("--figure", choices=FIGURES, help="instead: Orca's Figure 10(b), beside the paper's points")
    p.add_argument("--timeline", type=path, metavar="FILE", help="of a single run, for ui.perfetto.dev")
    p.add_argument("--out", type=path, help="folder for rows and pictures")
    p.add_argument("--json", action="store_true", help="one JSON object a line on standard output")
    return p


def check(options: argparse.Namespace, given: Mapping[str, str]) -> None:
    """Refuses options that make no sense by themselves, or beside each other.

    Args:
        options: all of them.
        given: those that stand in the command line, see `Parser.given`.

    Raises:
        InputError: field, value and rule.
    """
    for field in given:
        if getattr(options, field) == "":
            raise InputError(f"{field}='' must not be empty")
    if options.figure:
        _beside("--figure", given.keys() - set(OF_A_FIGURE), given, "the paper has settled it")
    if options.stage_times:
        _beside("--stage-times", given.keys() & set(NOT_OF_A_TABLE), given, "the measured pipeline has settled it")
    for field, least in (("requests", 1), ("seed", 0), ("max_bs", 1), ("prefill_max_bs", 1), ("slots", 1)):
        value = getattr(options, field)
        if value is not None and value < least:
            raise InputError(f"{field}={value} must be at least {least}")
        if value is not None and value > MOST:
            raise InputError(f"{field}={value} must be at most {MOST}")
    for field in ("in_flight", "stages", "max_output"):
        value = getattr(options, field)
        if value is not None and value < 1:
            raise InputError(f"{field}={value} must be at least 1")
    if not 0 <= options.warm_up < 1:
        raise InputError(f"warm_up={options.warm_up} must be a share of the time, 0 <= warm_up < 1")
    if not 0 <= options.host_us <= MOST:
        raise InputError(f"host_us={options.host_us} must be a number that is not negative, and at most {MOST}")
    if options.timeline and (options.timeline.is_dir() or not options.timeline.parent.is_dir()):
        raise InputError(f"timeline={str(options.timeline)!r} must be a file in a folder that exists")
    if options.capacity and not options.limits:
        raise InputError("capacity needs --limits TTFT:TPOT")
    if options.capacity and options.rates:
        raise InputError(f"rates={options.rates!r} stands beside --capacity, which looks for the rate; give one")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(f"out={str(options.out)!r} is a file, not a folder")
    for field in OF_PREFILL:
        if field in given and not options.disaggregate:
            raise InputError(f"{field}={getattr(options, field)!r} needs --disaggregate SLICE")
    if options.stage_times and options.disaggregate:
        raise InputError("stage_times are of one pipeline, and disaggregate asks for two; give one of them")
    if options.stage_times and options.slots is None:
        raise InputError("stage_times need --slots: without the model it is not known how many fit")


def _beside(option: str, others: Collection[str], given: Mapping[str, str], why: str) -> None:
    for field in sorted(others):
        raise InputError(f"{given[field]} stands beside {option}: {why}; leave one of them out")


def listed(field: str, text: str) -> list[str]:
    """The parts of a list with commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(set(parts)) < len(parts):
        raise InputError(f"{field}={text!r} must name one or more, each once, with commas between them")
    return parts


def pattern(options: argparse.Namespace) -> Pattern:
    """When requests come."""
    try:
        return arrivals(options.arrivals, options.requests)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def rates(options: argparse.Namespace, when: Pattern) -> list[float] | None:
    """Requests per second; None: to be chosen by the peak."""
    if options.rates is None:
        return [when.rate] if when.rate else None
    try:
        found = [float(part) for part in listed("rates", options.rates)]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        found = [math.nan]
    if any(not 1e-6 <= rate <= MOST for rate in found):
        raise InputError(f"rates={options.rates!r} must be numbers of requests per second, from 1e-6 to {MOST}")
    return sorted(found)


def limits(options: argparse.Namespace) -> Limits | None:
    """What the clients accept."""
    if options.limits is None:
        return None
    try:
        ttft_s, tpot_s = map(float, options.limits.split(":"))
    except ValueError:
        ttft_s = tpot_s = math.nan
    if not (0 < ttft_s < math.inf and 0 < tpot_s < math.inf):
        raise InputError(f"limits={options.limits!r} must be TTFT:TPOT, two positive numbers of seconds, such as 2:0.1")
    return Limits(ttft_s=ttft_s, tpot_s=tpot_s)


def workload(options: argparse.Namespace, when: Arrivals) -> Workload:
    """The trace with its arrivals."""
    prompt, output = _lengths(options)
    try:
        return Workload(
            n=options.requests,
            arrivals=when,
            prompt=prompt,
            output=output,
            max_output=options.max_output,
            seed=options.seed,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _lengths(options: argparse.Namespace) -> tuple[lengths.Lengths, lengths.Lengths]:
    if options.trace not in TRACES:
        raise InputError(f"trace={options.trace!r} must be one of {', '.join(TRACES)}")
    prompt, output = TRACES[options.trace]
    return _length("prompt", options.prompt) or prompt, _length("output", options.output) or output


def _length(field: str, text: str | None) -> lengths.Lengths | None:
    if text is None:
        return None
    low, dots, high = text.partition("..")
    try:
        if not 1 <= int(low) <= int(high or low) <= MOST:
            raise ValueError
        return lengths.Uniform(low=int(low), high=int(high)) if dots else lengths.Fixed(tokens=int(low))
    except ValueError:
        raise InputError(f"{field}={text!r} must be N or LOW..HIGH tokens, 1 <= LOW <= HIGH <= {MOST}") from None


def longest(lengths_: lengths.Lengths) -> int:
    """The longest that a distribution gives."""
    if isinstance(lengths_, lengths.Quantiles):
        return math.ceil(float(lengths_.at(np.array([1.0]))[0]))
    return lengths_.high if isinstance(lengths_, lengths.Uniform) else lengths_.tokens  # type: ignore[attr-defined]


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination of slices, layouts and policies.

    Raises:
        InputError: what any of them refuses.
    """
    try:
        return list(_cases(options))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    table = _table(options.stage_times)
    if table and options.stages not in (1, table.n_stages):
        raise InputError(f"stages={options.stages} must be the {table.n_stages} of stage_times, or be left out")
    chosen = [policy(name) for name in listed("policies", options.policies)]
    if len({one.name for one in chosen}) < len(chosen):
        raise InputError(f"policies={options.policies!r} must be different ones")
    slices, layouts = listed("slices", options.slices), listed("layouts", options.layouts)
    prompt = longest(_lengths(options)[0])
    for slice_, layout, chosen_policy in itertools.product(slices, layouts, chosen):
        fields = {"model": options.model, "slice": slice_, "stages": options.stages, "layout": layout}
        fields |= {"attention": options.attention, "weights": options.weights, "policy": chosen_policy.name}
        if table:
            n_chips = table.n_stages * Slice.parse(slice_).n_chips
            server = _server(options, table, table.n_stages, n_chips, options.max_bs, options.slots, chosen_policy)
            fields |= {"stages": table.n_stages, "source": "measured stage times"}
            yield _case(fields, Scenario(server=server))
            continue
        pipeline = _pipeline(options, slice_, options.stages, layout, options.attention)
        server = _priced(options, pipeline, options.max_bs, prompt, chosen_policy, options.slots)
        fields |= {"source": "analytic stage times"}
        if not options.disaggregate:
            yield _case(fields, Scenario(server=server))
            continue
        attention = options.prefill_attention or options.attention
        first = _pipeline(options, options.disaggregate, 1, options.prefill_layout or layout, attention)
        prefill = _priced(options, first, options.prefill_max_bs, prompt, policy("orca"), None)
        links = [p.n_chips / p.stages * p.chip.link_bytes_per_s for p in (pipeline, first)]
        apart = {"prefill_slice": first.slice, "prefill_layout": first.layout, "prefill_chips": prefill.n_chips}
        both = Scenario(
            server=server,
            prefill=prefill,
            kv_bytes=pipeline.kv_bytes,
            kv_bytes_per_s=min(links),
            kv_start_s=pipeline.chip.hop_s,
        )
        yield _case(fields | apart, both)


def _case(fields: Mapping[str, Any], scenario: Scenario) -> Case:
    """`chips` are all that there are; of two slices, those of prompts included."""
    server = scenario.server
    sizes = {"chips": scenario.n_chips, "max_bs": server.max_bs, "slots": server.slots}
    return Case(fields={**fields, **sizes}, scenario=scenario)


def _pipeline(options: argparse.Namespace, slice_: str, stages: int, layout: str, attention: str) -> Pipeline:
    return Pipeline(
        model=options.model,
        slice=slice_,
        stages=stages,
        layout=layout,
        attention=attention,
        weights=options.weights,
        mesh=options.mesh,
        cache=options.cache,
    )


def _priced(
    options: argparse.Namespace, pipeline: Pipeline, max_bs: int, prompt: int, chosen: Policy, slots: int | None
) -> Server:
    most = min(max_bs * prompt, chosen.token_budget or max_bs * prompt)
    fitting = pipeline.slots(most, max_bs)
    if slots is not None and slots > fitting:
        raise InputError(f"slots={slots} are more than the {fitting} that fit a chip of slice={pipeline.slice!r}")
    changed = {**constants_of(chip(Slice.parse(pipeline.slice).chip)), **_constants(options.constants)}
    times = Pricing(pipeline, changed)
    return _server(options, times, pipeline.stages, pipeline.n_chips, max_bs, slots or fitting, chosen)


def _server(
    options: argparse.Namespace,
    times: StageTimes,
    n_stages: int,
    n_chips: int,
    max_bs: int,
    slots: int,
    chosen: Policy,
) -> Server:
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
    try:
        return StageTable.parse(lines)
    except ValueError as error:
        raise InputError(f"stage_times={file!r}: {error}") from None


def columns(found: Sequence[Case]) -> list[str]:
    """The fields in which the cases differ."""
    fields = [k for k in found[0].fields if k not in ("chips", "slots")]
    return [k for k in fields if len({c.fields.get(k) for c in found}) > 1]
