"""Decoders by name: the presets, the suffixes that change them, and `model`, which takes a name or a path.

A `config.json` is read by `models.hf_config`. Presets hold sizes only; no weights are fetched or read. Imports no JAX.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toruslab.models.config import ModelConfig
from toruslab.models.hf_config import from_hugging_face

_SIZES = ("n_layers", "d_model", "d_ff", "n_heads", "d_head", "n_kv_heads", "vocab")


def _sized(name: str, *sizes: int, **variants: Any) -> ModelConfig:
    """A model with the sizes in the order of `_SIZES`."""
    fields: dict[str, Any] = dict(zip(_SIZES, sizes, strict=True))
    return ModelConfig(name=name, **fields, **variants)


def _palm(name: str, n_layers: int, d_model: int, n_heads: int) -> ModelConfig:
    """Pope et al. 2022, section 4, and Chowdhery et al. 2022, Table 1: F = 4E, multiquery, parallel, tied."""
    return _sized(name, n_layers, d_model, 4 * d_model, n_heads, 256, 1, 256128)


def _gpt(name: str, n_layers: int, d_model: int, n_heads: int, vocab: int) -> ModelConfig:
    """GPT style: serial, GELU, F = 4E, multihead with H Q = E, tied. Learned positions and biases are left out."""
    heads = (n_heads, d_model // n_heads, n_heads)
    return _sized(name, n_layers, d_model, 4 * d_model, *heads, vocab, block="serial", mlp="gelu")


def _gated(name: str, *sizes: int, d_head: int = 128, **variants: Any) -> ModelConfig:
    """Llama style: serial, gated MLP, untied. `sizes` are those of the model's published `config.json`: `_SIZES`
    without `d_head`."""
    *before, n_kv_heads, vocab = sizes
    variants = {"block": "serial", "tied": False, "norm_eps": 1e-5} | variants
    return _sized(name, *before, d_head, n_kv_heads, vocab, **variants)


def _gemma(name: str, *sizes: int, d_head: int = 256) -> ModelConfig:
    """GeGLU and scaled embeddings. Gemma 2 also has three features that cost little and are left out: norms after each
    block, capped logits, and a window of 4096 tokens in every second layer (here all layers attend to everything)."""
    variants = {"tied": True, "norm_eps": 1e-6, "mlp": "geglu", "scaled_embed": True}
    return _gated(name, *sizes, 256000, d_head=d_head, **variants)


def _qwen(name: str, *sizes: int, d_head: int = 128, tied: bool = False) -> ModelConfig:
    """Qwen 2.5 also has biases on Q, K and V, which this decoder leaves out."""
    return _gated(name, *sizes, d_head=d_head, tied=tied, rope_theta=1e6, norm_eps=1e-6)


_ALL = (
    # the decoder of `toruslab bench`: small enough to run anywhere, large enough to split over 8 chips
    ModelConfig(name="toy", n_layers=4, d_model=512, d_ff=2048, n_heads=16, d_head=64, vocab=258),
    # the second size of `toruslab bench`, an eighth of the first
    ModelConfig(name="toy-s", n_layers=2, d_model=256, d_ff=1024, n_heads=8, d_head=64, vocab=258),
    # the model of `toruslab train`: as many parameters as toy-s, in twice as many layers, which learn more from a text
    ModelConfig(name="toy-text", n_layers=4, d_model=192, d_ff=768, n_heads=8, d_head=32, vocab=258),
    # Pope et al. 2022; the paper ran `palm-540b-h64`
    _palm("palm-8b", 32, 4096, 16),
    _palm("palm-62b", 64, 8192, 32),
    _palm("palm-540b", 118, 18432, 48),
    # Smith et al. 2022
    _gpt("mt-nlg-530b", 105, 20480, 128, 51200),
    # Brown et al. 2020, Table 2.1
    _gpt("gpt3-175b", 96, 12288, 96, 50257),
    # Orca, Yu et al. 2022, Table 1: layers and E; [derived] heads of 128, vocabulary of GPT-2 padded to 51200
    _gpt("orca-13b", 40, 5120, 40, 51200),
    _gpt("orca-101b", 80, 10240, 80, 51200),
    _gpt("orca-175b", 96, 12288, 96, 51200),
    _gpt("orca-341b", 120, 15360, 120, 51200),
    # Touvron et al. 2023
    _gated("llama-2-7b", 32, 4096, 11008, 32, 32, 32000),
    _gated("llama-2-13b", 40, 5120, 13824, 40, 40, 32000),
    _gated("llama-2-70b", 80, 8192, 28672, 64, 8, 32000),
    # Grattafiori et al. 2024; releases from 3.1 on (405b is one) rescale the rotary frequencies, which is left out
    _gated("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, rope_theta=5e5),
    _gated("llama-3-70b", 80, 8192, 28672, 64, 8, 128256, rope_theta=5e5),
    _gated("llama-3-405b", 126, 16384, 53248, 128, 8, 128256, rope_theta=5e5),
    _gemma("gemma-2b", 18, 2048, 16384, 8, 1),
    _gemma("gemma-7b", 28, 3072, 24576, 16, 16),
    _gemma("gemma-2-2b", 26, 2304, 9216, 8, 4),
    _gemma("gemma-2-9b", 42, 3584, 14336, 16, 8),
    _gemma("gemma-2-27b", 46, 4608, 36864, 32, 16, d_head=128),
    # Jiang et al. 2023, first release; its window of 4096 tokens is left out
    _gated("mistral-7b", 32, 4096, 14336, 32, 8, 32000),
    _qwen("qwen-2.5-0.5b", 24, 896, 4864, 14, 2, 151936, d_head=64, tied=True),
    _qwen("qwen-2.5-1.5b", 28, 1536, 8960, 12, 2, 151936, tied=True),
    _qwen("qwen-2.5-3b", 36, 2048, 11008, 16, 2, 151936, tied=True),
    _qwen("qwen-2.5-7b", 28, 3584, 18944, 28, 4, 152064),
    _qwen("qwen-2.5-14b", 48, 5120, 13824, 40, 8, 152064),
    _qwen("qwen-2.5-32b", 64, 5120, 27648, 40, 8, 152064),
    _qwen("qwen-2.5-72b", 80, 8192, 29568, 64, 8, 152064),
)
PRESETS: dict[str, ModelConfig] = {config.name: config for config in _ALL}
SUFFIXES = {
    "-hN": "the heads padded to N",
    "-Nl": "the first N layers",
    "-serial": "attention and MLP one after the other, not in parallel",
    "-mha": "multihead for multiquery: as many KV heads as heads, of half the width",
    "-vN": "a vocabulary of N tokens",
}
"""The suffixes that a preset's name may have, each at most once and in any order."""
_KINDS = {"-hN": re.compile(r"h(\d+)"), "-Nl": re.compile(r"(\d+)l"), "-vN": re.compile(r"v(\d+)")}
_KINDS |= {"-serial": re.compile("(serial)"), "-mha": re.compile("(mha)")}


def model(name_or_path: str | Path) -> ModelConfig:
    """The decoder with this name, or the decoder that a Hugging Face `config.json` describes.

    Args:
        name_or_path: a key of `PRESETS` with any of `SUFFIXES`; or a path to a `config.json` or to a folder with one.

    Returns:
        The configuration; its name is `name_or_path`.

    Raises:
        ValueError: an unknown name (the message has the nearest known one), suffixes that do not apply, or a
            `config.json` of a model that this decoder cannot represent.

    Example:
        >>> small = model("palm-540b-h64-8l")
        >>> small.n_heads, small.n_padding_heads, small.n_layers
        (64, 16, 8)
    """
    text = str(name_or_path)
    base, suffixes = _parts(text)
    path = Path(text)
    is_path = (text and len(text) < 256 and path.exists()) or text.endswith(".json") or "/" in text
    if base and (not is_path or all(any(k.fullmatch(s) for k in _KINDS.values()) for s in suffixes)):
        try:
            return dataclasses.replace(_changed(PRESETS[base], suffixes), name=text)
        except ValueError as error:
            raise ValueError(f"model={text!r}: {error}") from None
    if is_path:
        return from_hugging_face(path)
    bare = re.sub("|".join(f"(-{k.pattern})" for k in _KINDS.values()), "", text.lower())
    near = difflib.get_close_matches(bare, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"model={text!r} is not known: {hint}known are {', '.join(PRESETS)}, or a path to a config.json")


def suffixed(name: str, *suffixes: str) -> str:
    """The preset's name with these suffixes added. Each replaces a suffix of the same kind.

    Raises:
        ValueError: `name` is not a preset's; a path has no suffixes.

    Example:
        >>> suffixed("palm-540b-h64-118l", "-8l", "-mha")
        'palm-540b-h64-8l-mha'
    """
    base, had = _parts(name)
    if base is None:
        raise ValueError(f"model={name!r} must be a preset's name: it is changed by suffixes, which a path has not")
    new = [suffix.removeprefix("-") for suffix in suffixes]
    kept = [s for s in had if not any(k.fullmatch(s) and k.fullmatch(n) for k in _KINDS.values() for n in new)]
    return "-".join([base, *kept, *new])


def _parts(text: str) -> tuple[str | None, list[str]]:
    """The longest preset that the name begins with, and the suffixes after it."""
    base = max((name for name in PRESETS if f"{text}-".startswith(f"{name}-")), key=len, default=None)
    return base, text[len(base) :].split("-")[1:] if base else []


def _changed(config: ModelConfig, suffixes: Sequence[str]) -> ModelConfig:
    """The decoder, changed by the suffixes."""
    asked: dict[str, str] = {}
    for suffix in suffixes:
        kind = next((name for name, pattern in _KINDS.items() if pattern.fullmatch(suffix)), None)
        if kind is None:
            raise ValueError(f"suffix '-{suffix}' is not known; known are {', '.join(SUFFIXES)}")
        if kind in asked:
            raise ValueError(f"suffix {kind} stands there twice: -{asked[kind]} and -{suffix}")
        asked[kind] = suffix
    if "-mha" in asked:
        config = config.multihead()
    if "-hN" in asked:
        config = config.padded(int(asked["-hN"][1:]))
    if "-serial" in asked:
        config = config.serial()
    if "-Nl" in asked:
        n_layers = int(asked["-Nl"][:-1])
        if not 1 <= n_layers <= config.n_layers:
            raise ValueError(f"n_layers={n_layers} must be in 1..{config.n_layers}")
        config = dataclasses.replace(config, n_layers=n_layers)
    if "-vN" in asked:
        config = dataclasses.replace(config, vocab=int(asked["-vN"][1:]))
    return config
