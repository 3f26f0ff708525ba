"""The options that serve-bench and simulate share: model, batches and memory, traffic, limits."""

import argparse
import math
from collections.abc import Mapping

from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, one_of, refused, share
from toruslab.partitioning.plan.point import WEIGHTS
from toruslab.serving.results.metrics import Limits
from toruslab.serving.scheduling.reservation import RESERVATIONS
from toruslab.serving.traffic.traces import ARRIVALS, TRACES, Pattern, arrivals


def add(p: Parser, *, model: str, attention: str, weights: str, max_bs: int, most_bs: int) -> None:
    """Adds the options with a command's own defaults; `most_bs` is the largest `--max-bs`."""
    p.add_argument("--model", default=model, help="preset or config.json")
    p.add_argument("--stages", type=at_least(1), default=1, help="of the pipeline, of equal layers (default: 1)")
    p.add_argument("--attention", default=attention, help="heads, batch, batch-x...")
    p.add_argument("--weights", type=one_of(WEIGHTS), default=weights, help=f"{', '.join(WEIGHTS)}")
    p.add_argument("--reservation", default="own", help=f"{', '.join(RESERVATIONS)}")
    p.add_argument("--max-bs", type=at_least(1, most_bs), default=max_bs, help="requests in a batch")
    p.add_argument("--trace", default="orca", help=f"{', '.join(TRACES)}, or fixed:P:O")
    p.add_argument("--arrivals", default="poisson", metavar="WHEN", help=f"{ARRIVALS}")
    p.add_argument("--warm-up", type=share, default=0.2, metavar="SHARE", help="of the arrivals, left out")
    p.add_argument("--limits", metavar="TTFT:TPOT", help="seconds that 90%% of requests must meet: adds goodput")
    p.add_argument("--json", action="store_true", help="one JSON row a line on standard output instead of a table")


def refuse_empty(options: argparse.Namespace, given: Mapping[str, str]) -> None:
    """Refuses an empty value of an option that the command line gives.

    Raises:
        InputError: names the first.
    """
    for field in given:
        if getattr(options, field) == "":
            raise InputError(f"{field}='' must not be empty")


def pattern(options: argparse.Namespace) -> Pattern:
    """When requests come.

    Raises:
        InputError: see `serving.traffic.traces.arrivals`.
    """
    with refused():
        return arrivals(options.arrivals, options.requests)


def rates(options: argparse.Namespace, when: Pattern, least: float, most: float, rule: str) -> tuple[float, ...] | None:
    """Requests per second, ascending: those of `--rates`, or the one that the arrivals have themselves.

    Args:
        options: of the command.
        when: of `pattern`.
        least, most: the bounds.
        rule: what the refusal says of rates that are out of bounds, or given twice.

    Returns:
        The rates, or None where neither gives one.

    Raises:
        InputError: something else than numbers, out of bounds, or given twice.
    """
    text = options.rates
    if text is None:
        return (when.rate,) if when.rate else None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"rates={text!r} must be numbers of requests per second, such as 2,4,8") from None
    if not all(least <= rate <= most for rate in found) or len(set(found)) < len(found):
        raise InputError(f"rates={text!r} must be {rule}")
    return tuple(sorted(found))


def limits(options: argparse.Namespace) -> Limits | None:
    """The times that clients accept, from `--limits`.

    Raises:
        InputError: something else than two positive numbers.
    """
    text = options.limits
    if text is None:
        return None
    try:
        ttft_s, tpot_s = map(float, text.split(":"))
    except ValueError:
        ttft_s = tpot_s = math.nan
    if not (0 < ttft_s < math.inf and 0 < tpot_s < math.inf):
        raise InputError(f"limits={text!r} must be TTFT:TPOT in seconds, both positive, such as 0.5:0.05")
    return Limits(ttft_s=ttft_s, tpot_s=tpot_s)
