"""A pass."""

from dataclasses import dataclass

REMAT = ("layer", "weights", "none")
"""What is worked out again for the gradient of a layer: all of it, from its input, which alone is kept; its gathered
weights, which are gathered again, while all else is kept; or nothing."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a pass trains: its batch in `accumulate` parts, one after the other, whose gradients are added; and what is
    worked out again for a layer's gradient, one of `REMAT`."""

    accumulate: int = 1
    remat: str = "layer"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The sizes of one pass: B = `batch` sequences of L = `length` new tokens over a cache of `capacity` positions.

    `all_logits`: logits for every token (scoring), else for the last of each sequence (generation, with sampling).
    `itemsize` is the activations' bytes per element; `int8_cache`: K and V are cached as int8, with scales.
    `steps`: decode steps in one call of the program, each over the token that the one before sampled. Sizes, plan and
    bytes are those of one step; the cache has room for the last.
    `training`: the pass is a training step, forward, backward and update; it has no cache, and `all_logits`.
    `mixed`: of a pass over tokens of many requests, how many tokens and rows of logits it has; `batch` is then that of
    the cache, its pages, and `length` 1.
    """

    batch: int
    length: int
    capacity: int
    itemsize: int = 4
    weight_itemsize: int = 4
    all_logits: bool = False
    steps: int = 1
    int8_cache: bool = False
    mixed: tuple[int, int] | None = None
    training: Training | None = None

    def __post_init__(self):
        for field in ("batch", "length", "capacity", "steps"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}={value!r} must be a positive integer")
        if self.length > self.capacity:
            raise ValueError(f"length={self.length} does not fit a cache of capacity={self.capacity}")
        if self.steps > 1 and (self.length > 1 or self.all_logits):
            raise ValueError(f"steps={self.steps} must be 1 unless each takes one token and samples the next")
        if self.steps > self.capacity:
            raise ValueError(f"steps={self.steps} do not fit a cache of capacity={self.capacity}")
        if self.training and (self.training.accumulate < 1 or self.batch % self.training.accumulate):
            raise ValueError(f"accumulate={self.training.accumulate} must divide batch={self.batch}")

    @property
    def tokens(self) -> int:
        """T; of a training step those of one part of the batch."""
        return self.mixed[0] if self.mixed else self.rows * self.length

    @property
    def rows(self) -> int:
        """B; of a training step those of one part of the batch."""
        return self.batch // self.training.accumulate if self.training else self.batch

    @property
    def logits_rows(self) -> int:
        """R."""
        return self.mixed[1] if self.mixed else self.tokens if self.all_logits else self.batch
