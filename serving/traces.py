"""Traces by name, as a command line spells them: how long requests are, and when they come."""

import math
import re
from dataclasses import dataclass

from serving.arrivals import Arrivals, Gamma, Poisson
from serving.lengths import (
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


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Lengths of prompts and outputs, drawn independently of each other."""

    name: str
    prompt: Lengths
    output: Lengths

    @property
    def longest(self) -> int:
        """Positions that a request may need."""
        return self.prompt.longest + self.output.longest

    def scaled(self, prompt: float, output: float) -> "Trace":
        """Lengths times these factors."""
        return Trace(name=self.name, prompt=self.prompt.scaled(prompt), output=self.output.scaled(output))


TRACES = {
    trace.name: trace
    for trace in (
        Trace(name="orca", prompt=ORCA_PROMPT, output=ORCA_OUTPUT),
        Trace(name="azure-conversation", prompt=AZURE_CONVERSATION_PROMPT, output=AZURE_CONVERSATION_OUTPUT),
        Trace(name="azure-code", prompt=AZURE_CODE_PROMPT, output=AZURE_CODE_OUTPUT),
        # made up: whoever decodes is held up whenever one of the long prompts runs whole
        Trace(
            name="long-mix",
            prompt=Mixed(often=Uniform(low=32, high=128), seldom=Uniform(low=1536, high=2048), share=0.1),
            output=Uniform(low=64, high=256),
        ),
    )
}


def trace(name: str) -> Trace:
    """The trace of this name; `fixed:P:O` has prompts of P tokens and outputs of O.

    Raises:
        ValueError: there is none.

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


def arrivals(name: str, rate: float) -> Arrivals:
    """`poisson` or `gamma:CV`, at `rate` requests per second.

    Raises:
        ValueError: another name, or a rate or CV that is not positive.

    Example:
        >>> arrivals("gamma:13", 2.0)
        Gamma(rate=2.0, cv=13.0)
    """
    kind, colon, value = name.partition(":")
    if kind == "poisson" and not colon:
        return Poisson(rate=rate)
    if kind == "gamma" and colon:
        try:
            cv = float(value)
        except ValueError:
            cv = math.nan
        if 0 < cv < math.inf:
            return Gamma(rate=rate, cv=cv)
    raise ValueError(f"arrivals={name!r} must be poisson, or gamma:CV with a positive CV")
