"""The events that the engine and the simulator report while they run.

Metrics and timeline listen to them. An observer cannot change the run.
"""

from typing import Protocol

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.request import Request


class Observer(Protocol):
    """Listens to a run. Derived classes override the events that they need.

    Events come in order of time, except `stage`: a simulator knows a stage's end in advance.
    """

    def arrived(self, request: Request) -> None:
        """A request arrived, at request.arrival_s. Its state is `refused` if the scheduler refused it."""

    def cancelled(self, request: Request, now_s: float) -> None:
        """A request was cancelled. No `completed` event lists it."""

    def made(self, batch: Batch) -> None:
        """The scheduler made a batch, at batch.made_s."""

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        """A pipeline stage computes a batch from start_s to end_s."""

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        """A batch returned, and the requests `back` with it. `reserved` and `used` slots are those afterwards."""
