"""A batch: what one iteration of the model computes, and for which requests.

The engine and the simulator get batches and nothing else from the scheduler.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

from toruslab.serving.scheduling.request import Request


class Work(NamedTuple):
    """One request's part of an iteration.

    It is a named tuple because one is made for every token, and a dataclass costs more.

    Attributes:
        request: its id.
        start: position of the first token. The request's cache holds that many tokens already.
        length: tokens of the request. Their K and V stay in its cache.
        padded: tokens computed for the request: `length` and padding. The cache keeps nothing of the padding.
        emits: whether the request gets a token, sampled at position start + length - 1.
        dead: whether the request has ended and its batch still carries it; then `length` is 0 and `padded` 1.
    """

    request: int
    start: int
    length: int
    padded: int
    emits: bool
    dead: bool

    @classmethod
    def decode(cls, request: Request) -> Self:
        """A decode step: computes the request's last token and emits the next one."""
        return cls(request.id, request.cached, 1, 1, True, False)

    @classmethod
    def prompt(cls, request: Request, length: int, padded: int | None = None) -> Self:
        """The next `length` tokens of a request's prompt, padded to `padded` tokens. Emits if it ends the prompt.

        Example:
            >>> Work.prompt(Request(id=0, arrival_s=0.0, prompt=9, max_output=1), 4)
            Work(request=0, start=0, length=4, padded=4, emits=False, dead=False)
        """
        start = request.cached
        return cls(request.id, start, length, padded or length, start + length >= request.prompt, False)

    @classmethod
    def carried(cls, request: Request) -> Self:
        """The dead place of a request that has ended."""
        return cls(request.id, request.cached, 0, 1, False, True)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One iteration of the model.

    Args:
        number: 0, 1, ... Batches are made in this order and return in this order.
        made_s: when the batch was made, seconds.
        work: one entry for each request in the batch.
        released: requests that gave up their places since the previous batch. No batch in flight has work for them.
        reserved: reserved slots, including this batch's.
        used: slots that hold a token, including this batch's.
    """

    number: int
    made_s: float
    work: tuple[Work, ...]
    released: tuple[int, ...] = ()
    reserved: int = 0
    used: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of requests, without padding."""
        return sum([work.length for work in self.work])

    @property
    def computed(self) -> int:
        """Tokens that the iteration computes: those of requests, padding, and one for each dead place."""
        return sum([work.padded for work in self.work])

    @property
    def dead(self) -> int:
        """Places of requests that have ended. Each computes one token that nobody needs."""
        return sum([work.dead for work in self.work])

    @property
    def padding(self) -> int:
        """Tokens computed to pad prompts."""
        return self.computed - self.tokens - self.dead
