"""Policies: which requests run next, and how many tokens of each prompt. Orca, its baselines, chunked prompts.

A policy is a value. It makes a line-up, which holds the started requests that are not in flight and picks the next
batch from them. The scheduler keeps the queue, the slots, the clock and the order of batches.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal, Protocol

from toruslab.serving.scheduling.batch import Work
from toruslab.serving.scheduling.request import Request

Admit = Callable[[], Request | None]
"""Takes the first request of the queue and reserves its slots. None if the queue is empty or the first does not fit."""

_ORDER = attrgetter("order")


class LineUp(Protocol):
    """The requests that have started and are not in flight."""

    def pick(self, admit: Admit) -> list[Work]:
        """The work of the next batch, or [] if nothing can run. The requests leave the line-up."""
        ...

    def settle(self, members: list[Request]) -> list[Request]:
        """Takes back a returned batch's requests, in the order of its work. Returns those that give up their places."""
        ...

    def drop(self, request: Request) -> list[Request]:
        """Drops a cancelled request. Returns the requests that give up their places."""
        ...


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way to make batches.

    Args:
        name: as a command line spells it.
        line_up: called with `max_bs` and `n_workers`; returns an empty line-up.
        early_return: whether a request returns to its client as soon as it ends, before it gives up its place.
        token_budget: most tokens in one batch; None: limited by `max_bs` alone.
    """

    name: str
    line_up: Callable[[int, int], LineUp]
    early_return: bool = True
    token_budget: int | None = None


class WholePrompts:
    """Orca's selection (its Algorithm 1): requests in order of arrival, each prompt in one piece."""

    def __init__(self, max_bs: int, n_workers: int):
        self._max_bs = max_bs
        # At most max_bs * n_workers: a request starts only in a batch that has room left after all of these.
        self._ready: list[Request] = []

    def pick(self, admit: Admit) -> list[Work]:
        ready, max_bs = self._ready, self._max_bs
        ready.sort(key=_ORDER)
        work = [Work.decode(request) for request in ready[:max_bs]]
        del ready[:max_bs]
        while len(work) < max_bs and (new := admit()) is not None:
            work.append(Work.prompt(new, new.prompt - new.cached))
        return work

    def settle(self, members: list[Request]) -> list[Request]:
        self._ready += [request for request in members if request.state == "increment"]
        return [request for request in members if request.state != "increment"]

    def drop(self, request: Request) -> list[Request]:
        self._ready.remove(request)
        return [request]


class ChunkedPrompts(WholePrompts):
    """Fills a budget of tokens: first with decodes, then with chunks of started prompts, then with new prompts."""

    def __init__(self, max_bs: int, n_workers: int, *, budget: int):
        super().__init__(max_bs, n_workers)
        self._budget = budget

    def pick(self, admit: Admit) -> list[Work]:
        ready, left, rows = self._ready, self._budget, self._max_bs
        ready.sort(key=_ORDER)
        decodes = [request for request in ready if request.cached >= request.prompt][: min(left, rows)]
        work = [Work.decode(request) for request in decodes]
        left, rows = left - len(decodes), rows - len(decodes)
        begun = [request for request in ready if request.cached < request.prompt]
        taken = set(decodes)
        while left and rows and (request := begun.pop(0) if begun else admit()) is not None:
            chunk = min(left, request.prompt - request.cached)
            work.append(Work.prompt(request, chunk))
            left, rows = left - chunk, rows - 1
            taken.add(request)
        self._ready = [request for request in ready if request not in taken]
        return work


class Together:
    """Request-level selection: a batch keeps its requests until all have ended. At most n_workers batches live."""

    def __init__(self, max_bs: int, n_workers: int, *, prompts: Literal["padded", "shortest"]):
        self._max_bs, self._places, self._prompts = max_bs, n_workers, prompts
        self._ready: deque[list[Request]] = deque()

    def pick(self, admit: Admit) -> list[Work]:
        if self._ready:
            return [self._step(request) for request in self._ready.popleft()]
        members: list[Request] = []
        while self._places and len(members) < self._max_bs and (new := admit()) is not None:
            members.append(new)
        if not members:
            return []
        self._places -= 1
        if self._prompts == "padded":
            padded = max([request.prompt for request in members])
            return [Work.prompt(request, request.prompt, padded) for request in members]
        length = min([request.prompt for request in members])
        return [Work.prompt(request, length) for request in members]

    @staticmethod
    def _step(request: Request) -> Work:
        if request.ended:
            return Work.carried(request)
        return Work.prompt(request, 1) if request.cached < request.prompt else Work.decode(request)

    def settle(self, members: list[Request]) -> list[Request]:
        if any(request.state == "increment" for request in members):
            self._ready.append(members)
            return []
        self._places += 1
        return members

    def drop(self, request: Request) -> list[Request]:
        return []  # its batch still carries it; `settle` frees the batch when all of its requests have ended


def chunked(token_budget: int) -> Policy:
    """The modern policy, for comparison: each iteration has a budget of tokens.

    Raises:
        ValueError: the budget is below one token.

    Example:
        >>> chunked(256).name
        'chunked-256'
    """
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} must be at least 1 token")
    return Policy(
        name=f"chunked-{token_budget}",
        line_up=partial(ChunkedPrompts, budget=token_budget),
        token_budget=token_budget,
    )


ORCA = Policy(name="orca", line_up=WholePrompts)
_padded, _shortest = partial(Together, prompts="padded"), partial(Together, prompts="shortest")
REQUEST_LEVEL = Policy(name="request-level", line_up=_padded, early_return=False)
REQUEST_LEVEL_EARLY = Policy(name="request-level-early", line_up=_padded)
SHORTEST_PROMPT = Policy(name="shortest-prompt", line_up=_shortest, early_return=False)
SHORTEST_PROMPT_EARLY = Policy(name="shortest-prompt-early", line_up=_shortest)
"""The paper's baseline. The first iteration takes as many tokens of each prompt as the batch's shortest prompt has.
Longer prompts continue with one token an iteration, and emit nothing until they end."""

POLICIES = {
    policy.name: policy for policy in (SHORTEST_PROMPT, SHORTEST_PROMPT_EARLY, REQUEST_LEVEL, REQUEST_LEVEL_EARLY, ORCA)
}


def policy(name: str) -> Policy:
    """The policy with this name. `chunked-N` has a budget of N tokens.

    Raises:
        ValueError: no policy has the name.

    Example:
        >>> policy("orca").early_return, policy("chunked-64").token_budget
        (True, 64)
    """
    kind, _, budget = name.rpartition("-")
    if kind == "chunked" and budget.isdecimal() and len(budget) <= 12:
        if not int(budget):
            raise ValueError(f"policy={name!r} must have a budget of at least 1 token")
        return chunked(int(budget))
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} must be one of {', '.join(POLICIES)}, or chunked-N with N tokens a batch")
    return POLICIES[name]
