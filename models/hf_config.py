"""The reader of Hugging Face `config.json` files: the `ModelConfig` with the same sizes, or a refusal.

Tensors are read by `models.weights.huggingface`. Imports no JAX.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toruslab.models.config import ModelConfig

_TANH_GELU = "gelu_pytorch_tanh"
# defaults of each model type's own configuration class, for fields that the file leaves out
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 128},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": _TANH_GELU},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": _TANH_GELU},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": _TANH_GELU},
}
_LEFT_OUT = {
    "qwen2": "biases on Q, K and V",
    "qwen3": "norms on Q and K",
    "gemma2": "norms after each block and capped logits",
    "gemma3_text": "norms after each block, norms on Q and K and a second rotary base",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


def from_hugging_face(path: Path, *, exact: bool = False) -> ModelConfig:
    """The decoder that has the sizes of a Hugging Face `config.json`.

    Args:
        path: the file, or a folder with a `config.json`.
        exact: require that the decoder computes what the original does. Otherwise it only has to cost about the same.

    Returns:
        A serial, gated decoder, named by the path. Features that the decoder lacks (biases, norms on Q and K, windows,
        rescaled rotary frequencies) are left out with a warning. They change the logits but hardly the cost.

    Raises:
        ValueError: no such file, not JSON, a missing or wrong field, or a model that this decoder cannot represent;
            with `exact`, also a model with a feature that would be left out.
    """
    data = read_fields(path)
    try:
        config, left_out = _from_fields(str(path), data)
        if left_out and exact:
            raise ValueError(
                f"model_type={data['model_type']!r} with {'; '.join(left_out)} cannot be loaded: this decoder leaves "
                "that out, and its logits would be others"
            )
    except ValueError as error:
        raise ValueError(f"model={str(path)!r}: {error}") from error
    if left_out:
        warnings.warn(f"{path}: left out of a {data['model_type']} model: {'; '.join(left_out)}", stacklevel=3)
    return config


def read_fields(path: Path) -> dict[str, Any]:
    """The JSON object of a `config.json`; `path` is the file, or a folder with one.

    Raises:
        ValueError: no such file, or not one JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model={str(path)!r}: there is no file {str(file)!r}")
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model={str(path)!r}: {file.name} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"model={str(path)!r}: {file.name} must hold one JSON object")
    return data


def _from_fields(name: str, data: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The decoder, and the features of the original that it leaves out."""
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"model_type={kind!r} is not a decoder that this one can stand for: {', '.join(_TYPES)}")
    for field in _EXPERTS:
        if data.get(field):
            raise ValueError(f"{field}={data[field]!r}: this decoder has no mixture of experts")
    n_heads = _whole(data, "num_attention_heads")
    d_model = _whole(data, "hidden_size")
    kv_rule = {"num_key_value_heads": n_heads} if kind in ("llama", "mistral") else {}
    head_rule = {} if d_model % n_heads else {"head_dim": d_model // n_heads}
    known = {**head_rule, **kv_rule, "rms_norm_eps": 1e-5 if kind == "mistral" else 1e-6, **_TYPES[kind]}
    known |= {key: value for key, value in data.items() if value is not None}
    act = known.get("hidden_activation") or known.get("hidden_act") or "silu"
    if act not in ("silu", "swish", "gelu", _TANH_GELU):
        raise ValueError(f"hidden_act={act!r} must be silu, swish, gelu or gelu_pytorch_tanh")
    rope = known.get("rope_parameters") or known.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r} must be an object")
    left_out = [_LEFT_OUT[kind]] if kind in _LEFT_OUT else []
    gemma = kind.startswith("gemma")
    if act == "gelu" and not gemma:  # Gemma's first files say "gelu" and mean the tanh form
        left_out.append("hidden_act='gelu' (the erf form; the tanh form here)")
    for field in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        left_out += [f"{field}=true"] if known.get(field) is True else []
    if known.get("sliding_window") and known.get("use_sliding_window", kind != "qwen2" and kind != "qwen3"):
        left_out.append(f"sliding_window={known['sliding_window']} (all of the context is read here)")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        left_out.append(f"rope_type={rope_type!r} (rotary frequencies are not rescaled here)")
    if (share := rope.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0))) != 1.0:
        left_out.append(f"partial_rotary_factor={share!r} (all of a head is turned here)")
    config = ModelConfig(
        name=name,
        n_layers=_whole(known, "num_hidden_layers"),
        d_model=d_model,
        d_ff=_whole(known, "intermediate_size"),
        n_heads=n_heads,
        d_head=_whole(known, "head_dim"),
        n_kv_heads=_whole(known, "num_key_value_heads"),
        vocab=_whole(known, "vocab_size"),
        block="serial",
        mlp="geglu" if act.startswith("gelu") else "swiglu",
        tied=_flag(known, "tie_word_embeddings"),
        scaled_embed=gemma,
        rope_theta=_positive(rope if "rope_theta" in rope else {"rope_theta": 10000.0, **known}, "rope_theta"),
        norm_eps=_positive(known, "rms_norm_eps"),
    )
    return config, left_out


def _whole(data: Mapping[str, Any], field: str) -> int:
    if data.get(field) is None:
        raise ValueError(f"field {field!r} is missing")
    value = data[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}={value!r} must be a positive integer")
    return value


def _positive(data: Mapping[str, Any], field: str) -> float:
    value = data[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{field}={value!r} must be a positive number")
    return float(value)


def _flag(data: Mapping[str, Any], field: str) -> bool:
    if not isinstance(data[field], bool):
        raise ValueError(f"{field}={data[field]!r} must be true or false")
    return data[field]
