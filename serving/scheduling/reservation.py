"""Rules for the number of slots that a request reserves before its first iteration.

A slot holds the K and V of one token. The rules:

- `own` (Orca): the prompt and the maximum that the request declares.
- `oracle`: the prompt and the output that the request will really have.
- `pow2`: the same, with the output rounded up to a power of two.
- `model-max`: the model's maximum, for every request. Re-implementations of Orca weaker than the paper's do this.
"""

from collections.abc import Callable
from dataclasses import dataclass

from toruslab.serving.scheduling.request import Request


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A rule.

    Args:
        name: as a command line spells it.
        slots: called with a request and the model's maximum in positions; returns the number of slots.
    """

    name: str
    slots: Callable[[Request, int], int]


def _output(request: Request) -> int:
    if request.output is None:
        raise ValueError(f"request {request.id} has output=None; oracle and pow2 must know what it will produce")
    return request.output


OWN = Reservation(name="own", slots=lambda request, _: request.prompt + request.max_output)
ORACLE = Reservation(name="oracle", slots=lambda request, _: request.prompt + _output(request))
POW2 = Reservation(
    name="pow2",
    slots=lambda request, maximum: min(maximum, request.prompt + (1 << (_output(request) - 1).bit_length())),
)
MODEL_MAX = Reservation(name="model-max", slots=lambda _, maximum: maximum)

RESERVATIONS = {rule.name: rule for rule in (OWN, ORACLE, POW2, MODEL_MAX)}


def reservation(name: str) -> Reservation:
    """The rule with this name.

    Raises:
        ValueError: no rule has the name.

    Example:
        >>> request = Request(id=0, arrival_s=0.0, prompt=100, max_output=128, output=25)
        >>> [rule.slots(request, 640) for rule in RESERVATIONS.values()]
        [228, 125, 132, 640]
    """
    if name not in RESERVATIONS:
        raise ValueError(f"reservation={name!r} must be one of {', '.join(RESERVATIONS)}")
    return RESERVATIONS[name]
