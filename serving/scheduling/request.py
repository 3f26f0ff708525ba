"""A request: what its client asked for, its state, and the times of its events.

Defines the states and their order. The scheduler decides when a state changes.
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
"""Orca's states, and which ones may follow each.

- `initiation`: has never run.
- `running`: is in a batch in flight.
- `increment`: waits between two iterations.
- `finished`: has its last token; a request-level batch may still carry it.
- `returned`: went back to its client.
"""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A prompt and the tokens that its client wants for it.

    Args:
        id: unique among the requests that a scheduler holds.
        arrival_s: when it arrived, seconds.
        prompt: tokens of the prompt.
        max_output: most output tokens, declared by the client.
        output: output tokens, if a trace gives them; None: until a stop token or `max_output`.

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
    """Its number in the order of arrival, set by the scheduler."""
    slots: int = field(default=0, init=False)
    """Slots that it reserves from its first iteration until it gives up its place."""
    cached: int = field(default=0, init=False)
    """Tokens whose K and V are in its cache, including those of an iteration in flight. Above 0 at the start if another
    slice ran the prompt (`serving.simulation.disaggregated`)."""
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
        """Output tokens after which it ends if no stop token comes earlier."""
        return self.max_output if self.output is None else self.output

    @property
    def n_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_s)

    @property
    def ended(self) -> bool:
        """Whether it will get no further token."""
        return self.state not in ("initiation", "running", "increment")

    def move(self, state: State) -> None:
        """Changes the state.

        Raises:
            ValueError: the state may not follow the current one.
        """
        if state not in NEXT[self.state]:
            follows = ", ".join(NEXT[self.state]) or "nothing"
            raise ValueError(f"request {self.id} is {self.state}: {state} may not follow, only {follows}")
        self.state = state

    def run(self, now_s: float, length: int) -> None:
        """Notes that an iteration with `length` of its tokens was scheduled at `now_s`."""
        self.move("running")
        self.cached += length
        if self.scheduled_s is None:
            self.scheduled_s = now_s

    def emit(self, now_s: float) -> None:
        """Notes an output token.

        Raises:
            ValueError: the request is not running, or has its last token already.
        """
        if self.state != "running":
            raise ValueError(f"request {self.id} is {self.state}: only one that is running emits a token")
        if len(self.token_s) >= self.target:
            raise ValueError(f"request {self.id} has emitted all of its {self.target} tokens")
        self.token_s.append(now_s)

    def finish(self, now_s: float) -> None:
        """Notes that it has its last token."""
        self.move("finished")
        self.finished_s = now_s

    def give_back(self, now_s: float) -> None:
        """Notes that it returned to its client."""
        self.move("returned")
        self.returned_s = now_s
