"""Counts what XLA compiles, so that a measurement can show that it compiled nothing."""

import jax

EVENT = "/jax/core/compile/backend_compile_duration"
_n = 0


def _heard(event: str, duration_secs: float, **details: str | int) -> None:
    global _n
    _n += event == EVENT


jax.monitoring.register_event_duration_secs_listener(_heard)


class Compilations:
    """Compilations of this process since it was made."""

    def __init__(self):
        self._before = _n

    @property
    def n(self) -> int:
        """How many there were."""
        return _n - self._before
