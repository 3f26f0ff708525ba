"""A virtual clock for tests of `serving.engine.play`."""

from toruslab.serving.engine.engine import Flight


class Virtual:
    """Every batch takes `batch_s` seconds from the first wait for it, whatever it really takes."""

    def __init__(self, batch_s: float = 1.0):
        self.batch_s, self._now_s = batch_s, 0.0
        self._awaited: tuple[Flight, float] | None = None  # the flight and its end

    def now_s(self) -> float:
        """Seconds of waiting so far."""
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
