"""The record of a decoder: its sizes, its variants, and the rules that every model must keep.

How a model is split over chips is in `partitioning.layouts.layout`, what it computes in `models.decoder.decoder`.
Imports no JAX.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

BlockKind = Literal["parallel", "serial"]
Mlp = Literal["swiglu", "geglu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer decoder: RMS norm, RoPE, no biases.

    Letters of Pope et al. 2022, section 2: E = `d_model`, F = `d_ff`, H = `n_heads`, Q = `d_head`;
    K = `n_kv_heads` (1: multiquery, H: multihead, between: grouped-query), V = `vocab`.

    Args:
        name: the preset's name; it appears in rows and messages.
        n_layers: number of layers.
        d_model, d_ff, n_heads, d_head, n_kv_heads, vocab: the sizes above.
        block: `parallel` runs attention and MLP from one norm; `serial` runs them in turn, with a norm each.
        mlp: `swiglu` and `geglu` have three matrices (gate, up, down) and apply SiLU or GELU to the gate. `gelu` has
            two (up, down).
        tied: the unembedding is the embedding table.
        scaled_embed: embeddings are multiplied by sqrt(E) when they are looked up, as in Gemma.
        n_padding_heads: number of heads among `n_heads` that are padding. They hold zeros and contribute nothing.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square before the root.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not fit each other. The message names the
            field, its value and the rule.
    """

    name: str = "custom"
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    d_head: int
    n_kv_heads: int = 1
    vocab: int
    block: BlockKind = "parallel"
    mlp: Mlp = "swiglu"
    tied: bool = True
    scaled_embed: bool = False
    n_padding_heads: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for field in ("n_layers", "d_model", "d_ff", "n_heads", "d_head", "n_kv_heads", "vocab"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**40:
                raise ValueError(f"{field}={str(value)[:40]} must be a positive integer, at most {2**40}")
        if self.block not in ("parallel", "serial"):
            raise ValueError(f"block={self.block!r} must be 'parallel' or 'serial'")
        if self.mlp not in ("swiglu", "geglu", "gelu"):
            raise ValueError(f"mlp={self.mlp!r} must be 'swiglu', 'geglu' or 'gelu'")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} must be even: RoPE turns pairs")
        if not 0 <= self.n_padding_heads < self.n_heads:
            raise ValueError(f"n_padding_heads={self.n_padding_heads} must be in 0..{self.n_heads - 1}")
        if self.n_padding_heads and self.n_kv_heads not in (1, self.n_heads):
            raise ValueError(
                f"n_padding_heads={self.n_padding_heads} with n_kv_heads={self.n_kv_heads}: heads can be padded "
                "for multiquery and multihead attention only, or the groups would change"
            )
        if self.block == "parallel" and self.d_ff % self.n_heads:
            raise ValueError(
                f"d_ff={self.d_ff} is not divisible by n_heads={self.n_heads}: "
                "a parallel block fuses Q with gate and up head by head"
            )

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: `vocab`, padded so that the table can be split over many chips.

        A large table is padded to a multiple of 8192, which is one tile of 128 rows on each of 64 chips. With parts of
        other sizes, TPUs pad the reduce-scatter of the logits and shift data between neighbours.
        """
        multiple = 128 if self.vocab < 16384 else 1024 if self.vocab < 65536 else 8192
        return -(-self.vocab // multiple) * multiple

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, and so three matrices instead of two."""
        return self.mlp != "gelu"

    @property
    def embed_scale(self) -> float:
        """The factor of an embedding when it is looked up. The unembedding has no factor."""
        return math.sqrt(self.d_model) if self.scaled_embed else 1.0

    @property
    def mlp_groups(self) -> int:
        """Number of groups in which the MLP's columns are stored. Each group holds its part of gate and up.

        A chip's share of a fused matrix must hold matching columns of Q, gate and up on every mesh. The columns are
        therefore interleaved by group: one group per head if the heads divide F, else the largest power of two up to
        256 that divides F.
        """
        return self.n_heads if self.d_ff % self.n_heads == 0 else math.gcd(self.d_ff, 256)

    @property
    def n_params(self) -> int:
        """Number of weights without padding heads and norms, as the literature counts them."""
        heads = self.n_heads - self.n_padding_heads
        kv_heads = self.n_kv_heads if self.n_kv_heads != self.n_heads else heads
        mlp = (3 if self.gated else 2) * self.d_model * self.d_ff
        attention = 2 * self.d_model * heads * self.d_head + 2 * self.d_model * kv_heads * self.d_head
        embeddings = (1 if self.tied else 2) * self.vocab * self.d_model
        return self.n_layers * (mlp + attention) + embeddings

    def serial(self) -> "ModelConfig":
        """The same sizes with attention and MLP in turn, a norm each. The number of parameters is the same.

        Raises:
            ValueError: the model is serial already.
        """
        if self.block == "serial":
            raise ValueError(f"block='serial' already in {self.name}")
        return dataclasses.replace(self, block="serial")

    def multihead(self) -> "ModelConfig":
        """The multihead counterpart of a multiquery model: K = H heads of half the width (Pope et al. 2022, Table 1).

        In multihead attention K and V are as large as Q and O. With the width halved, all four together have
        4 E H Q/2 = 2 E H Q weights, as Q and O had before. That is 1/(H + 1) less than multiquery attention, whose
        single K and V add 2 E Q.

        Raises:
            ValueError: the model is not multiquery, or half the width is odd.
        """
        if self.n_kv_heads != 1 or self.n_heads == 1:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} of {self.name} must be 1 (multiquery) to become multihead")
        if self.d_head % 4:
            raise ValueError(f"d_head={self.d_head} of {self.name} cannot be halved: RoPE turns pairs")
        return dataclasses.replace(self, n_kv_heads=self.n_heads, d_head=self.d_head // 2)

    def padded(self, n_heads: int) -> "ModelConfig":
        """The same model with its heads padded to `n_heads`; in multihead attention the KV heads are padded too.

        Raises:
            ValueError: `n_heads` is less than the real heads, or the attention is grouped-query.
        """
        real = self.n_heads - self.n_padding_heads
        if n_heads < real:
            raise ValueError(f"n_heads={n_heads} is less than the {real} heads of {self.name}")
        kv_heads = n_heads if self.n_kv_heads == self.n_heads > 1 else self.n_kv_heads
        return dataclasses.replace(self, n_heads=n_heads, n_kv_heads=kv_heads, n_padding_heads=n_heads - real)
