"""A workload: requests with arrival times and lengths drawn from a seed, and the text of their prompts.

Requests are made one by one, so that a million need no list. The first requests do not depend on how many follow.
Arrivals, prompts and outputs have separate random streams, so that every rate gets the same lengths.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from toruslab.models.weights import byte_ids, corpus
from toruslab.serving.scheduling.request import Request
from toruslab.serving.traffic.arrivals import Arrivals, GivenTimes
from toruslab.serving.traffic.lengths import Lengths

_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run's requests, as a value.

    Args:
        n: number of requests.
        arrivals: the arrival process.
        prompt: lengths of prompts, tokens.
        output: lengths of outputs, tokens.
        max_output: maximum that every request declares, and at which longer outputs are cut; None: each request
            declares its own output, as in Orca's trace.
        seed: of all random streams.

    Raises:
        ValueError: field, value and rule.

    Example:
        >>> from toruslab.serving.traffic.arrivals import GivenTimes
        >>> from toruslab.serving.traffic.lengths import Fixed
        >>> times = GivenTimes(times_s=(0.0, 1.5))
        >>> two = Workload(n=2, arrivals=times, prompt=Fixed(tokens=8), output=Fixed(tokens=3))
        >>> [(request.id, request.arrival_s, request.prompt, request.output) for request in two.requests()]
        [(0, 0.0, 8, 3), (1, 1.5, 8, 3)]
    """

    n: int
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    max_output: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1 request")
        if self.max_output is not None and self.max_output < 1:
            raise ValueError(f"max_output={self.max_output} must be at least 1 token")
        if isinstance(self.arrivals, GivenTimes) and self.n > len(self.arrivals.times_s):
            raise ValueError(f"n={self.n} must be at most the number of times, {len(self.arrivals.times_s)}")

    def requests(self) -> Iterator[Request]:
        """Yields the requests in order of arrival, with ids 0, 1, ... Every call yields the same."""
        arrivals, prompts, outputs = self._streams()
        times = self.arrivals.times(arrivals)
        for start in range(0, self.n, _BLOCK):
            # Whole blocks, so that a request does not depend on n.
            prompt = self.prompt.draw(prompts, _BLOCK).tolist()
            output = self.output.draw(outputs, _BLOCK).tolist()
            for i in range(min(_BLOCK, self.n - start)):
                declared = output[i] if self.max_output is None else self.max_output
                yield Request(
                    id=start + i,
                    arrival_s=next(times),
                    prompt=prompt[i],
                    max_output=declared,
                    output=min(output[i], declared),
                )

    def last_arrival_s(self) -> float:
        """When the last request arrives, seconds."""
        return next(islice(self.arrivals.times(self._streams()[0]), self.n - 1, None))

    def window_s(self, warm_up: float = 0.2) -> tuple[float, float]:
        """The steady window (start, end) in seconds. It ends at the last arrival, so that it excludes the drain.

        Args:
            warm_up: share of the time until the last arrival that comes before the window.

        Raises:
            ValueError: the share is outside [0, 1).
        """
        if not 0 <= warm_up < 1:
            raise ValueError(f"warm_up={warm_up} must be a share of the time, 0 <= warm_up < 1")
        last_s = self.last_arrival_s()
        return warm_up * last_s, last_s

    def _streams(self) -> list[np.random.Generator]:
        return [np.random.default_rng(seed) for seed in np.random.SeedSequence(self.seed).spawn(3)]


def prompt_ids(request: Request, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[prompt] int32: the ids of a request's prompt, a window of English text.

    The text depends on the seed and the request's id only. Ids are bytes (`models.weights.byte_ids`). A prompt longer
    than the corpus wraps around.

    Example:
        >>> ids = prompt_ids(Request(id=3, arrival_s=0.0, prompt=5, max_output=1))
        >>> ids.shape, bool((ids == prompt_ids(Request(id=3, arrival_s=9.0, prompt=5, max_output=8))).all())
        ((5,), True)
    """
    text = _corpus()
    start = int(np.random.default_rng((seed, request.id)).integers(text.size))
    return text.take(np.arange(start, start + request.prompt), mode="wrap")


@functools.cache
def _corpus() -> np.ndarray[Any, np.dtype[np.int32]]:
    return byte_ids.encode(corpus.read(), bos=False)
