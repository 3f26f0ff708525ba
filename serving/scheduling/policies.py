"""Who runs next, and how much of each prompt: Orca, the request-level baselines, chunked prompts.

A policy is a value; what it decides with is its line-up, which holds the requests that have started and are not in
flight. Queue, slots, clock and the order of batches are the scheduler's.
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
"""The next waiting request, its slots now reserved; None where none waits, or the first does not fit."""

_ORDER = attrgetter("order")


class LineUp(Protocol):
    """Requests that have started and are not in flight."""

    def pick(self, admit: Admit) -> list[Work]:
        """Work of the next batch, and these requests leave the line-up. Empty: nothing to run."""
        ...

    def settle(self, members: list[Request]) -> list[Request]:
        """Takes back the requests of a returned batch, in the order of its work; answers those whose rows are free."""
        ...

    def drop(self, request: Request) -> list[Request]:
        """A request in the line-up was cancelled; answers those whose rows are free now."""
        ...


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way to make batches.

    Args:
        name: for people.
        line_up: from `max_bs` and `n_workers`, an empty line-up.
        early_return: whether a request that has ended goes back at once, not when its row is free.
        token_budget: tokens in one batch at most; None: no limit but `max_bs` prompts.
    """

    name: str
    line_up: Callable[[int, int], LineUp]
    early_return: bool = True
    token_budget: int | None = None


class WholePrompts:
    """Orca's selection (its Algorithm 1): in order of arrival, prompts whole."""

    def __init__(self, max_bs: int, n_workers: int):
        self._max_bs = max_bs
        self._ready: list[Request] = []  # at most max_bs * n_workers: a new one starts only where all of these go along

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
    """Decodes first, then prompts in chunks, begun ones before new ones, as far as a budget of tokens goes."""

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
    """Request-level: a batch keeps its requests until all have ended; up to n_workers such batches live at a time."""

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
        return []  # its batch carries it on, and notices when it returns that nobody is left


def chunked(token_budget: int) -> Policy:
    """The modern control: a budget of tokens for each iteration.

    Raises:
        ValueError: a budget below one token.

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
"""The rule of the paper's baseline: an initiation takes of each prompt as many tokens as the batch's shortest prompt
has; what is left of the longer ones goes in one token an iteration, and nothing comes out of those meanwhile."""

POLICIES = {
    policy.name: policy for policy in (SHORTEST_PROMPT, SHORTEST_PROMPT_EARLY, REQUEST_LEVEL, REQUEST_LEVEL_EARLY, ORCA)
}


def policy(name: str) -> Policy:
    """The policy of this name; `chunked-N` has a budget of N tokens.

    Raises:
        ValueError: there is none.

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
