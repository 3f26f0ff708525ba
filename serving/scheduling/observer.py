"""What engine and simulator tell while they run. Metrics and timeline listen; neither can change what happens."""

from typing import Protocol

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.request import Request


class Observer(Protocol):
    """Listens to a run; told in order of time, but for stages, whose end may be known in advance. What a class that
    derives from it leaves out, it does not listen to."""

    def arrived(self, request: Request) -> None:
        """At request.arrival_s; its state is `refused` where the scheduler would not have it."""

    def cancelled(self, request: Request, now_s: float) -> None:
        """A request that had arrived was cancelled; it is in no list of returned ones."""

    def made(self, batch: Batch) -> None:
        """At batch.made_s."""

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        """A pipeline stage computed a batch from start_s to end_s."""

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        """A batch returned, and with it these requests; slots as they are afterwards."""
