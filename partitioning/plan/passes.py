"""One pass of the decoder: how many sequences, tokens and cache positions, and how it trains if it does.

A pass knows no model and no layout. The sizes of tensors follow from all three (`partitioning.plan.tensors`).
"""

from dataclasses import dataclass

REMAT = ("layer", "weights", "none")
"""What a training step recomputes for the gradient of a layer:

- `layer`: the whole layer, of which only the input is kept;
- `weights`: only the gathering of its weights; everything else is kept;
- `none`: nothing.
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a pass trains.

    Args:
        accumulate: parts of the batch, which run one after the other; their gradients are added.
        remat: one of `REMAT`.
    """

    accumulate: int = 1
    remat: str = "layer"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The sizes of one pass.

    Args:
        batch: sequences.
        length: new tokens of each sequence.
        capacity: positions of the KV cache, new tokens included.
        itemsize: bytes of one element of the activations.
        weight_itemsize: bytes of one element of the weights.
        all_logits: logits for every token (scoring), else for the last token of each sequence, which are sampled from.
        steps: decode steps in one call of the program, each on the token that the one before sampled. The sizes, the
            plan and the bytes are those of one step; the cache has room for the last.
        int8_cache: K and V are cached as int8 with scales.
        mixed: (tokens, rows of logits) of a pass over tokens of many requests. `batch` is then that of the cache, its
            pages, and `length` is 1.
        training: the pass is a training step: forward, backward and update, with `all_logits` and without a cache.

    Raises:
        ValueError: field, value and rule.
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
    def sequences(self) -> int:
        """B; in training, the sequences of one part of the batch."""
        return self.batch // self.training.accumulate if self.training else self.batch

    @property
    def tokens(self) -> int:
        """T; in training, the tokens of one part of the batch."""
        return self.mixed[0] if self.mixed else self.sequences * self.length

    @property
    def logits_rows(self) -> int:
        """R."""
        return self.mixed[1] if self.mixed else self.tokens if self.all_logits else self.batch
