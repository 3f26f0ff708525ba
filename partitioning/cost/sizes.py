"""The sizes of passes as arrays, under the letters of the plan: what prices are computed from. Touches no device."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.partitioning.plan.point import WEIGHTS, Point
from toruslab.partitioning.plan.tensors import model_letters


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """The sizes of passes that share a layout. Every field is one number, or arrays that broadcast.

    Args:
        size: by letter of `partitioning.plan.plan.letters`, all but N and n.
        length: new tokens of a sequence.
        first: position of the first new token; with several steps in a call their mean.
        act, weight: bytes per element of activations and weights.
        n_layers, n_params: of the model.
        tied: whether embedding and unembedding share one table.
        steps: decode steps in a call.
        int8_cache: whether K and V are cached as int8.
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
        """Bytes in K, or in V, of one position of a KV head of `width` numbers, with its scale where it has one."""
        return np.where(self.int8_cache, width + self.act, width * self.act)

    @classmethod
    def of(cls, points: Sequence[Point]) -> "PassSizes":
        """The sizes of points, as arrays of their number."""
        rows = [_model_row(p.config) for p in points]
        steps = np.array([p.steps_per_call for p in points], float)
        return cls.join(
            {k: np.array([r[k] for r in rows], float) for k in rows[0]},
            batch=np.array([p.batch for p in points], float),
            length=np.array([p.length for p in points], float),
            first=np.array([p.start for p in points], float) + (steps - 1) / 2,
            capacity=np.array([p.capacity for p in points], float),
            weight=np.array([WEIGHTS[p.weights] for p in points], float),
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
        """The sizes of a model (`model_sizes`) and of passes, which broadcast; `capacity`: positions of the cache."""
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
    """A model's sizes: its letters, `n_layers`, `n_params`, and `tied` as 0 or 1."""
    return dict(_model_row(config))


@functools.lru_cache(maxsize=1024)
def _model_row(config: ModelConfig) -> dict[str, float]:
    return {
        **model_letters(config),
        "n_layers": config.n_layers,
        "n_params": config.n_params,
        "tied": config.tied,
    }


def matmuls(block: str) -> tuple[tuple[str, str, str, str], ...]:
    """The matmuls of one layer: inner and outer dimension, the weight, and the ladder of the rows."""
    found = [("E", "D", "w_kv", "x_kv")]
    for s in ("",) if block == "parallel" else ("", "_mlp"):
        found += [("E", "C" + s, "w_in", "x"), ("G" + s, "E", "w_out", "g")]
    return tuple(found)
