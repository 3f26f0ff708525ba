"""Counts what XLA compiles, so that a measurement can show that it compiled nothing."""

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Compilations of this process since it was made."""

    def __init__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **details: str | int) -> None:
        self.n += event == EVENT
