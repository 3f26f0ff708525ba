"""The sizes of many passes of one layout as arrays, under the letters of the dataflow: what prices are worked out over.

Touches no device.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.partitioning.plan.plan import model_letters
from toruslab.partitioning.plan.point import WEIGHTS, Point


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """The sizes of many points that share a layout, as arrays of one length (or single numbers): letters of `dataflow`.

    `first` is the position of the first new token, of several steps in a call their mean; `act` and `weight` are bytes
    per element; `steps` are those of one call; `int8_cache`: whether K and V are cached
    as int8.
    """

    size: Mapping[str, Any]
    length: Any
    first: Any
    act: Any
    weight: Any
    n_layers: Any
    n_params: Any
    tied: Any
    steps: Any = 1.0
    int8_cache: Any = False

    def cached_bytes(self, width: Any) -> Any:
        """Bytes of one position of one KV head in K, or in V, of `width` numbers: with its scale, where it has one."""
        return np.where(self.int8_cache, width + self.act, width * self.act)

    @classmethod
    def of(cls, points: Sequence[Point]) -> "PassSizes":
        """From points."""
        rows = [_model_row(p.config) for p in points]
        model = {k: np.array([r[k] for r in rows], float) for k in rows[0]}
        batch = np.array([p.batch for p in points], float)
        length = np.array([p.length for p in points], float)
        weight = np.array([WEIGHTS[p.weights] for p in points], float)
        steps = np.array([p.steps_per_call for p in points], float)
        return cls.join(
            model,
            batch=batch,
            length=length,
            first=np.array([p.start for p in points], float) + (steps - 1) / 2,
            capacity=np.array([p.capacity for p in points], float),
            weight=weight,
            steps=steps,
            int8_cache=np.array([p.cache == "int8" for p in points]),
        )

    @classmethod
    def join(
        cls,
        model: Mapping[str, Any],
        *,
        batch,
        length,
        first,
        capacity,
        weight,
        steps: Any = 1.0,
        int8_cache: Any = False,
    ) -> "PassSizes":
        """From a model's row (`model_sizes`) and the sizes of the passes, which broadcast."""
        letters = ("E", "C", "G", "C_mlp", "G_mlp", "D", "K", "H", "Q", "V")
        size = {k: model[k] for k in letters} | {"B": batch, "T": batch * length, "R": batch, "S": capacity, "2": 2}
        return cls(
            size=size,
            length=length,
            first=first,
            act=np.where(weight == 4, 4.0, 2.0),
            weight=weight,
            n_layers=model["n_layers"],
            n_params=model["n_params"],
            tied=model["tied"],
            steps=steps,
            int8_cache=int8_cache,
        )


def model_sizes(config: ModelConfig) -> dict[str, float]:
    """A model's sizes under the letters of the dataflow."""
    return dict(_model_row(config))


@functools.lru_cache(maxsize=1024)
def _model_row(config: ModelConfig) -> dict[str, float]:
    counts = {"n_layers": config.n_layers, "n_params": config.n_params, "tied": config.tied}
    return {**model_letters(config), **counts}


def matmuls(block: str) -> tuple[tuple[str, str, str, str], ...]:
    """Of one layer: inner and outer dimension, the weight, and the ladder of its rows."""
    found = [("E", "D", "w_kv", "x_kv")]
    for s in ("",) if block == "parallel" else ("", "_mlp"):
        found += [("E", "C" + s, "w_in", "x"), ("G" + s, "E", "w_out", "g")]
    return tuple(found)
