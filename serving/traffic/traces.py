"""Traces (lengths of requests) and patterns (arrivals of requests) by the names that a command line takes."""

import functools
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toruslab.serving.traffic.arrivals import LEAST_CV, MOST_CV, Arrivals, Gamma, GivenTimes, Poisson
from toruslab.serving.traffic.lengths import (
    AZURE_CODE_OUTPUT,
    AZURE_CODE_PROMPT,
    AZURE_CONVERSATION_OUTPUT,
    AZURE_CONVERSATION_PROMPT,
    ORCA_OUTPUT,
    ORCA_PROMPT,
    Fixed,
    Lengths,
    Mixed,
    Uniform,
)

ARRIVALS = """poisson, gamma:CV, or a file with a time in seconds on each line, the first
of them for --requests: as they are, or stretched to --rates if given"""
LEAST_RATE, MOST_RATE = 1e-6, 1e9
"""Bounds of a file's requests per second."""
_LONGEST_LINE = 1000


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Distributions of prompt and output lengths, drawn independently of each other."""

    name: str
    prompt: Lengths
    output: Lengths

    @property
    def longest(self) -> int:
        """Most positions that a request may need."""
        return self.prompt.longest + self.output.longest

    def scaled(self, prompt: float, output: float) -> "Trace":
        """The trace with prompt and output lengths times these factors."""
        return Trace(name=self.name, prompt=self.prompt.scaled(prompt), output=self.output.scaled(output))


TRACES = {
    trace.name: trace
    for trace in (
        Trace(name="orca", prompt=ORCA_PROMPT, output=ORCA_OUTPUT),
        Trace(name="azure-conversation", prompt=AZURE_CONVERSATION_PROMPT, output=AZURE_CONVERSATION_OUTPUT),
        Trace(name="azure-code", prompt=AZURE_CODE_PROMPT, output=AZURE_CODE_OUTPUT),
        # made up: a long prompt in one piece holds up every request that decodes
        Trace(
            name="long-mix",
            prompt=Mixed(often=Uniform(low=32, high=128), seldom=Uniform(low=1536, high=2048), share=0.1),
            output=Uniform(low=64, high=256),
        ),
    )
}


def trace(name: str) -> Trace:
    """The trace with this name. `fixed:P:O` has prompts of P tokens and outputs of O tokens.

    Raises:
        ValueError: no trace has the name.

    Example:
        >>> trace("fixed:8:3").longest, trace("orca").scaled(1 / 4, 1 / 2).longest
        (11, 192)
    """
    match = re.fullmatch(r"fixed:(\d{1,6}):(\d{1,6})", name, re.ASCII)
    if match:
        return Trace(name=name, prompt=Fixed(tokens=int(match[1])), output=Fixed(tokens=int(match[2])))
    if name not in TRACES:
        raise ValueError(f"trace={name!r} must be one of {', '.join(TRACES)}, or fixed:P:O, prompt and output tokens")
    return TRACES[name]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A family of arrival processes, one for each rate.

    Args:
        name: as a command line spells it.
        at: called with a rate in requests per second; returns the arrivals.
        rate: of a file's own times, in requests per second; None: no file.
        digest: hash of a file's times, since a file may change under its name.
    """

    name: str
    at: Callable[[float], Arrivals]
    rate: float | None = None
    digest: str | None = None

    def to_json(self) -> dict[str, str]:
        """The fields of a row of results."""
        return {"arrivals": self.name} | ({"arrivals_digest": self.digest} if self.digest else {})


def arrivals(name: str, n: int) -> Pattern:
    """The pattern with this name: `poisson`, `gamma:CV` (or `gamma-CV`), or a file.

    A file has one time per line, in seconds from 0 on; the first `n` are read. Its own rate is n over its n-th time. At
    another rate all times are stretched by the same factor.

    Raises:
        ValueError: the name is unknown, the CV is out of bounds, the file has fewer times, or its times are not finite,
            negative, out of order, or all 0.

    Example:
        >>> arrivals("gamma:13", 100).at(2.0)
        Gamma(rate=2.0, cv=13.0)
    """
    if name == "poisson":
        return Pattern(name=name, at=lambda rate: Poisson(rate=rate))
    if match := re.fullmatch("gamma[:-](.*)", name):
        try:
            cv = float(match[1])
        except ValueError:
            cv = math.nan
        if LEAST_CV <= cv <= MOST_CV:
            return Pattern(name=f"gamma:{match[1]}", at=lambda rate: Gamma(rate=rate, cv=cv))
    elif name and "\0" not in name and Path(name).is_file():
        times_s = _times(name, n)
        rate = n / times_s[-1] if times_s[-1] else math.inf
        if not LEAST_RATE <= rate <= MOST_RATE:
            raise ValueError(
                f"arrivals={name!r} has {n} requests until {times_s[-1]} s; there must be {LEAST_RATE:g} to "
                f"{MOST_RATE:g} a second"
            )
        digest = hashlib.sha256(repr(times_s).encode()).hexdigest()[:16]
        return Pattern(name=name, at=functools.partial(_stretched, times_s, rate), rate=rate, digest=digest)
    raise ValueError(
        f"arrivals={name!r} must be poisson, gamma:CV with a CV from {LEAST_CV} to {MOST_CV}, or a file with a time in "
        "seconds on each line"
    )


def _stretched(times_s: tuple[float, ...], rate: float, wanted: float) -> GivenTimes:
    return GivenTimes(times_s=tuple(time_s * (rate / wanted) for time_s in times_s))


def _times(name: str, n: int) -> tuple[float, ...]:
    """The first n times of a file. The rest is not read."""
    found: list[float] = []
    number = 0
    with open(name, encoding="utf-8-sig", errors="replace") as file:
        while len(found) < n and (line := file.readline(_LONGEST_LINE)):
            number += 1
            if not line.strip():
                continue
            try:
                time_s = float(line)
            except ValueError:
                time_s = math.nan
            before_s = found[-1] if found else 0.0
            if not before_s <= time_s < math.inf:
                raise ValueError(
                    f"arrivals={name!r}, line {number}: {line.strip()[:40]!r} must be a time in seconds, finite, "
                    f"and at least {before_s}, {'the one before' if found else 'where a run begins'}"
                )
            found.append(time_s)
    if len(found) < n:
        raise ValueError(f"arrivals={name!r} has {len(found)} times, fewer than requests={n}")
    return tuple(found)
