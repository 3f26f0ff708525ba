"""A clock for tests of `serving.engine.play`: no time passes but that of batches."""

from toruslab.serving.engine.engine import Flight


class Virtual:
    """For tests: every batch takes `batch_s` seconds from when it is first waited for, whatever it really takes."""

    def __init__(self, batch_s: float = 1.0):
        self.batch_s, self._now_s = batch_s, 0.0
        self._awaited: tuple[Flight, float] | None = None  # and when it ends

    def now_s(self) -> float:
        """Seconds that have been waited for."""
        return self._now_s

    def wait(self, until_s: float, flight: Flight | None) -> bool:
        """See `Clock`."""
        if flight is None:
            self._now_s = until_s
            return False
        if self._awaited is None or self._awaited[0] is not flight:
            self._awaited = (flight, self._now_s + self.batch_s)
        self._now_s = min(self._awaited[1], until_s)
        return self._awaited[1] < until_s
