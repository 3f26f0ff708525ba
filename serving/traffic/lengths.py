"""Distributions of prompt and output lengths: uniform, fixed, mixed, or by the quantiles of a public trace."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Lengths(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, generator: np.random.Generator, n: int) -> Ints:
        """Draws [n] lengths, each at least 1."""
        ...

    @property
    def longest(self) -> int:
        """The longest length that can be drawn."""
        ...

    def scaled(self, factor: float) -> "Lengths":
        """The distribution with lengths times `factor`, for a smaller model. No length falls below 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Each integer from `low` to `high`, both included, equally often.

    Raises:
        ValueError: not 1 <= low <= high.

    Example:
        >>> Uniform(low=32, high=512).scaled(1 / 8)
        Uniform(low=4, high=64)
    """

    low: int
    high: int

    def __post_init__(self):
        if not 1 <= self.low <= self.high:
            raise ValueError(f"low={self.low}, high={self.high} must be 1 <= low <= high")

    def draw(self, generator: np.random.Generator, n: int) -> Ints:
        return generator.integers(self.low, self.high + 1, n)

    @property
    def longest(self) -> int:
        return self.high

    def scaled(self, factor: float) -> "Uniform":
        return Uniform(low=_tokens(self.low, factor), high=_tokens(self.high, factor))


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Always the same length.

    Raises:
        ValueError: the length is below 1.
    """

    tokens: int

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")

    def draw(self, generator: np.random.Generator, n: int) -> Ints:
        return np.full(n, self.tokens, np.int64)

    @property
    def longest(self) -> int:
        return self.tokens

    def scaled(self, factor: float) -> "Fixed":
        return Fixed(tokens=_tokens(self.tokens, factor))


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Published quantiles with linear interpolation between them (a piecewise-linear inverse distribution function).

    The tails are not published. The first and the last segment are extended to 0 and 100%, but not below one token. The
    real trace has requests longer than the longest here.

    Args:
        shares: of requests, ascending, between 0 and 1, both excluded.
        tokens: of the quantile of each share, ascending, at least 1.

    Raises:
        ValueError: field, value and rule.

    Example:
        >>> Quantiles(shares=(0.1, 0.5, 0.9), tokens=(7, 13, 55)).at(np.array([0.0, 0.5, 0.7, 1.0])).tolist()
        [5.5, 13.0, 34.0, 65.5]
    """

    shares: tuple[float, ...]
    tokens: tuple[float, ...]

    def __post_init__(self):
        if len(self.shares) != len(self.tokens) or len(self.shares) < 2:
            raise ValueError(f"{len(self.shares)} shares and {len(self.tokens)} tokens must be as many, at least 2")
        if any(a >= b for a, b in zip((0.0, *self.shares), (*self.shares, 1.0), strict=True)):
            raise ValueError(f"shares={self.shares} must rise between 0 and 1, both excluded")
        if self.tokens[0] <= 0 or any(a > b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ValueError(f"tokens={self.tokens} must be positive and not fall")

    def at(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n] quantiles of these shares [n], in tokens, not rounded."""
        p, v = self.shares, self.tokens
        first = max(min(1.0, v[0]), v[0] - p[0] * (v[1] - v[0]) / (p[1] - p[0]))
        last = v[-1] + (1 - p[-1]) * (v[-1] - v[-2]) / (p[-1] - p[-2])
        return np.interp(shares, (0.0, *p, 1.0), (first, *v, last))

    def draw(self, generator: np.random.Generator, n: int) -> Ints:
        return np.maximum(1, np.rint(self.at(generator.random(n)))).astype(np.int64)

    @property
    def longest(self) -> int:
        return max(1, round(float(self.at(np.ones(1))[0])))

    def scaled(self, factor: float) -> "Quantiles":
        return Quantiles(shares=self.shares, tokens=tuple(value * factor for value in self.tokens))


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A mixture of two distributions.

    Args:
        often: distribution of most requests.
        seldom: distribution of the others.
        share: of the requests that draw from `seldom`.

    Raises:
        ValueError: the share is outside [0, 1].

    Example:
        >>> mixed = Mixed(often=Fixed(tokens=8), seldom=Fixed(tokens=400), share=0.1)
        >>> mixed.draw(np.random.default_rng(0), 8).tolist(), mixed.longest
        ([8, 8, 400, 400, 8, 8, 8, 8], 400)
    """

    often: Lengths
    seldom: Lengths
    share: float

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be 0 to 1")

    def draw(self, generator: np.random.Generator, n: int) -> Ints:
        is_seldom = generator.random(n) < self.share
        return np.where(is_seldom, self.seldom.draw(generator, n), self.often.draw(generator, n))

    @property
    def longest(self) -> int:
        return max(self.often.longest, self.seldom.longest)

    def scaled(self, factor: float) -> "Mixed":
        return Mixed(often=self.often.scaled(factor), seldom=self.seldom.scaled(factor), share=self.share)


def _tokens(tokens: int, factor: float) -> int:
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor} must be positive")
    return max(1, round(tokens * factor))


ORCA_PROMPT, ORCA_OUTPUT = Uniform(low=32, high=512), Uniform(low=1, high=128)
"""Yu et al., OSDI 2022, section 6.1. A request never stops before its maximum."""

_DECILES = tuple(round(0.1 * i, 1) for i in range(1, 10))
AZURE_CONVERSATION_PROMPT = Quantiles(shares=_DECILES, tokens=(207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734))
AZURE_CONVERSATION_OUTPUT = Quantiles(shares=_DECILES, tokens=(54, 77, 91, 103, 129, 177, 384, 400, 424))
"""Deciles of the public Azure LLM inference trace of 2023, conversation."""

AZURE_CODE_PROMPT = Quantiles(shares=(0.1, 0.5, 0.9), tokens=(147, 1469, 5187))
AZURE_CODE_OUTPUT = Quantiles(shares=(0.1, 0.5, 0.9), tokens=(7, 13, 55))
"""Three quantiles of the public Azure LLM inference trace of 2023, code."""
