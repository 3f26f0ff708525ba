"""A request: what was asked, how far it is, and when each thing happened.

Decides the states of a request and which may follow which. Leaves when they change to the scheduler.
"""

from dataclasses import dataclass, field
from typing import Literal

State = Literal["initiation", "running", "increment", "finished", "returned", "cancelled", "refused"]

NEXT: dict[State, tuple[State, ...]] = {
    "initiation": ("running", "cancelled", "refused"),
    "running": ("increment", "finished", "cancelled"),
    "increment": ("running", "cancelled"),
    "finished": ("returned", "cancelled"),
    "returned": (),
    "cancelled": (),
    "refused": (),
}
"""Orca's states, and what may follow: `initiation` has never run, `running` is in flight, `increment` waits between two
iterations. A batch may carry a `finished` request on; to its client it goes when it is `returned`."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One prompt and the tokens wanted for it.

    Args:
        id: its name, unlike that of any other request that a scheduler holds.
        arrival_s: when it came, seconds.
        prompt: tokens of the prompt.
        max_output: tokens after which it is stopped, as its sender declared.
        output: tokens that it will produce, where a trace says so; None: until a stop token, or `max_output`.

    Raises:
        ValueError: field, value and rule.

    Example:
        >>> request = Request(id=0, arrival_s=0.0, prompt=7, max_output=3)
        >>> request.run(1.0, 7)
        >>> request.emit(2.0)
        >>> request.state, request.cached, request.scheduled_s, request.token_s
        ('running', 7, 1.0, [2.0])
    """

    id: int
    arrival_s: float
    prompt: int
    max_output: int
    output: int | None = None
    state: State = field(default="initiation", init=False)
    order: int = field(default=-1, init=False)
    """Its number in the order of arrival; the scheduler gives it."""
    slots: int = field(default=0, init=False)
    """Slots that it reserves from its first iteration until its row is given back."""
    cached: int = field(default=0, init=False)
    """Tokens whose K and V its cache holds, those of an iteration in flight included. Not 0 before its first iteration
    where they came from elsewhere (`serving.simulation.disaggregated`)."""
    scheduled_s: float | None = field(default=None, init=False)
    token_s: list[float] = field(default_factory=list, init=False)
    finished_s: float | None = field(default=None, init=False)
    returned_s: float | None = field(default=None, init=False)

    def __post_init__(self):
        if self.prompt < 1:
            raise ValueError(f"prompt={self.prompt} must be at least 1 token")
        if self.max_output < 1:
            raise ValueError(f"max_output={self.max_output} must be at least 1 token")
        if self.output is not None and not 1 <= self.output <= self.max_output:
            raise ValueError(f"output={self.output} must be 1 to max_output={self.max_output} tokens")

    @property
    def target(self) -> int:
        """Tokens after which it ends without a stop token."""
        return self.max_output if self.output is None else self.output

    @property
    def n_tokens(self) -> int:
        """Tokens that have come out."""
        return len(self.token_s)

    @property
    def ended(self) -> bool:
        """No further token will come out."""
        return self.state not in ("initiation", "running", "increment")

    def move(self, state: State) -> None:
        """Changes the state.

        Raises:
            ValueError: the state may not follow the present one.
        """
        if state not in NEXT[self.state]:
            follows = ", ".join(NEXT[self.state]) or "nothing"
            raise ValueError(f"request {self.id} is {self.state}: {state} may not follow, only {follows}")
        self.state = state

    def run(self, now_s: float, length: int) -> None:
        """An iteration with `length` tokens of it was scheduled."""
        self.move("running")
        self.cached += length
        if self.scheduled_s is None:
            self.scheduled_s = now_s

    def emit(self, now_s: float) -> None:
        """A token came out.

        Raises:
            ValueError: it is not running, or has had its last token.
        """
        if self.state != "running":
            raise ValueError(f"request {self.id} is {self.state}: only one that is running emits a token")
        if len(self.token_s) >= self.target:
            raise ValueError(f"request {self.id} has emitted all of its {self.target} tokens")
        self.token_s.append(now_s)

    def finish(self, now_s: float) -> None:
        """Its last token is out."""
        self.move("finished")
        self.finished_s = now_s

    def give_back(self, now_s: float) -> None:
        """It goes back to its client."""
        self.move("returned")
        self.returned_s = now_s
