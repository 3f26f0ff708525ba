"""A batch: what one iteration computes, for whom. Engine and simulator need to know nothing else."""

from dataclasses import dataclass
from typing import NamedTuple, Self

from toruslab.serving.scheduling.request import Request


class Work(NamedTuple):
    """One request's part of an iteration. A named tuple: one is made for every token, and a dataclass costs more.

    Attributes:
        request: id.
        start: position of its first token, which is the number of tokens that its cache held before.
        length: tokens of the request that are really computed; their K and V stay in its cache.
        padded: tokens that have to be computed for it, `length` and padding; nothing of the padding is kept.
        emits: whether a token comes out, from position start + length - 1.
        dead: the request has ended and its batch carries it on: `length` 0, `padded` 1.
    """

    request: int
    start: int
    length: int
    padded: int
    emits: bool
    dead: bool

    @classmethod
    def decode(cls, request: Request) -> Self:
        """The last token of a request goes in, the next one comes out."""
        return cls(request.id, request.cached, 1, 1, True, False)

    @classmethod
    def prompt(cls, request: Request, length: int, padded: int | None = None) -> Self:
        """The next `length` tokens of a request's prompt, padded to `padded`; None: not at all. With the prompt's last
        token one comes out.

        Example:
            >>> Work.prompt(Request(id=0, arrival_s=0.0, prompt=9, max_output=1), 4)
            Work(request=0, start=0, length=4, padded=4, emits=False, dead=False)
        """
        start = request.cached
        return cls(request.id, start, length, padded or length, start + length >= request.prompt, False)

    @classmethod
    def carried(cls, request: Request) -> Self:
        """The dead row of a request that has ended."""
        return cls(request.id, request.cached, 0, 1, False, True)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One iteration of the model.

    Args:
        number: 0, 1, ... in the order in which batches were made, and in which they return.
        made_s: when it was made, seconds.
        work: one entry for each request, each request once.
        released: requests whose rows came free since the batch before was made; no batch in flight has work for them.
        reserved: slots that are reserved, this batch's included.
        used: slots that hold a token, this batch's included.
    """

    number: int
    made_s: float
    work: tuple[Work, ...]
    released: tuple[int, ...] = ()
    reserved: int = 0
    used: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of requests."""
        return sum([work.length for work in self.work])

    @property
    def computed(self) -> int:
        """Tokens that have to be computed: of requests, of padding, and of dead rows."""
        return sum([work.padded for work in self.work])

    @property
    def dead(self) -> int:
        """Rows of requests that have ended; each is a token computed for nothing."""
        return sum([work.dead for work in self.work])

    @property
    def padding(self) -> int:
        """Tokens computed to fill up prompts."""
        return self.computed - self.tokens - self.dead
