"""The decoder's parameters from a Hugging Face folder of Llama or Gemma, any part of them by itself.

Their matrices are [out, in], one per layer, and their RoPE is in halves as here. A fused matrix of the decoder is thus
several of theirs, transposed and interleaved (see `models.weights.packing`). Gemma's norms multiply by 1 + weight; the
1 is added when a norm is read.

Files are read by `models.weights.tensor_files`, `config.json` by `models.hf_config`, and `models.decoder.parameters`
places the parts on devices. Imports no JAX.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toruslab.models.config import ModelConfig
from toruslab.models.hf_config import from_hugging_face, read_fields
from toruslab.models.weights.tensor_files import TensorFiles

EMBED, UNEMBED, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.{}.{}.weight"
NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
BLOCK_ELEMENTS = 2**24
"""Most elements that are held at once when two tensors are compared."""

Index = Sequence[slice]
Parts = list[tuple[str, int]]
"""The tensors that are interleaved in the columns of a fused matrix, with the number of adjacent columns of each."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder that is opened and checked. Its tensors are not read yet.

    Args:
        config: the model. Its heads may be `padded`; padding heads are zeros.
        files: its tensors.
        norm_offset: the number that its norms add to their weights.
        stops: ids that end a text; empty if `config.json` has none.
    """

    config: ModelConfig
    files: TensorFiles
    norm_offset: float
    stops: tuple[int, ...]

    def padded(self, n_heads: int) -> "Checkpoint":
        """The same folder with its heads padded, see `ModelConfig.padded`."""
        return dataclasses.replace(self, config=self.config.padded(n_heads))

    def part(self, keys: Sequence[str], index: Index, dtype) -> np.ndarray:
        """A part of one parameter, as `pack` of all weights would have it. Reads hardly more than this part.

        Args:
            keys: of the parameter in the nested dict of `pack`, such as `("attention", "w_in")`.
            index: a slice with start and stop for each dimension.
            dtype: of the result.
        """
        *block, name = keys
        if name in ("table", "unembed"):
            return self.files.read(EMBED if name == "table" else UNEMBED, *index).astype(dtype)
        if name == "final_norm":
            return self._norm(FINAL_NORM, index[0]).astype(dtype)
        out = np.empty([s.stop - s.start for s in index], dtype)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            if name == "norm":
                out[i] = self._norm(LAYER.format(layer, NORMS[block[0]]), index[1])
            else:
                out[i] = self._matrix(self._parts(keys), layer, index[1], index[2])
        return out

    def _norm(self, name: str, index: slice) -> np.ndarray:
        return self.files.read(name, index).astype(np.float32) + np.float32(self.norm_offset)

    def _matrix(self, parts: Parts, layer: int, rows: slice, columns: slice) -> np.ndarray:
        """Some rows and columns of one layer's fused matrix. Reads these rows only, but whole groups of columns."""
        group = sum(width for _, width in parts)
        first, last = columns.start // group, -(-columns.stop // group)
        read = [self.files.read(LAYER.format(layer, n), slice(first * w, last * w), rows) for n, w in parts]
        pieces = [piece.reshape(last - first, w, -1) for piece, (_, w) in zip(read, parts, strict=True)]
        joined = np.concatenate(pieces, axis=1).reshape((last - first) * group, -1)
        return joined[columns.start - first * group : columns.stop - first * group].T

    def _parts(self, keys: Sequence[str]) -> Parts:
        """The tensors of a fused matrix. A matrix of a single tensor needs no groups."""
        config = self.config
        width = config.d_ff // config.mlp_groups
        return {
            ("attention", "w_in"): [("self_attn.q_proj", 1)],
            ("attention", "w_kv"): [("self_attn.k_proj", config.d_head), ("self_attn.v_proj", config.d_head)],
            ("attention", "w_out"): [("self_attn.o_proj", 1)],
            ("mlp", "w_in"): [("mlp.gate_proj", width), ("mlp.up_proj", width)],
            ("mlp", "w_out"): [("mlp.down_proj", 1)],
        }[keys[0], keys[1]]


def open_folder(folder: str | Path) -> Checkpoint:
    """Opens a folder with `config.json` and `model.safetensors`, or with shards and their index.

    Raises:
        ValueError: a model that this decoder does not compute exactly; or tensors that are missing, unknown, of a
            wrong shape or dtype, or in damaged files. The message names the tensor or file.
    """
    folder = Path(folder)
    config, said = from_hugging_face(folder, exact=True), read_fields(folder)
    files = TensorFiles(folder)
    expected = shapes(config)
    if config.tied and UNEMBED in files.shapes:
        expected[UNEMBED] = expected[EMBED]
    # old files have the rotary frequencies too; those of config.json count
    files.check(expected, {name for name in files.shapes if name.endswith(".rotary_emb.inv_freq")})
    if config.tied and UNEMBED in expected:
        _check_same(files, config)
    stops = said.get("eos_token_id")
    return Checkpoint(
        config=config,
        files=files,
        norm_offset=1.0 if said["model_type"] == "gemma" else 0.0,
        stops=tuple(i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int)),
    )


def _check_same(files: TensorFiles, config: ModelConfig) -> None:
    """Refuses an unembedding that differs from the embedding although `config.json` says that they are tied."""
    step = max(1, BLOCK_ELEMENTS // config.d_model)
    for begin in range(0, config.vocab, step):
        index = slice(begin, min(begin + step, config.vocab)), slice(0, config.d_model)
        if not np.array_equal(files.read(EMBED, *index), files.read(UNEMBED, *index)):
            said = "tie_word_embeddings=true in config.json"
            raise ValueError(f"{str(files.folder)!r}: {said}, but tensor {UNEMBED!r} is not {EMBED!r}")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a serial, gated model without padding heads.

    Example:
        >>> tiny = ModelConfig(n_layers=1, d_model=4, d_ff=6, n_heads=2, d_head=8, vocab=9, block="serial", tied=False)
        >>> found = shapes(tiny)
        >>> found["model.layers.0.self_attn.k_proj.weight"], found["lm_head.weight"], len(found)
        ((8, 4), (9, 4), 12)
    """
    e, f = config.d_model, config.d_ff
    heads, kv_heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    layer: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(NORMS.values(), (e,)),
        "self_attn.q_proj": (heads, e),
        "self_attn.k_proj": (kv_heads, e),
        "self_attn.v_proj": (kv_heads, e),
        "self_attn.o_proj": (e, heads),
        "mlp.gate_proj": (f, e),
        "mlp.up_proj": (f, e),
        "mlp.down_proj": (e, f),
    }
    found: dict[str, tuple[int, ...]] = {EMBED: (config.vocab, e), FINAL_NORM: (e,)}
    if not config.tied:
        found[UNEMBED] = (config.vocab, e)
    return found | {LAYER.format(i, name): s for i in range(config.n_layers) for name, s in layer.items()}
