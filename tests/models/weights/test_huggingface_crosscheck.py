"""A folder that `transformers` wrote: the decoder's logits equal those of `transformers`.

`transformers` and `torch` are the extra `crosscheck`. Where they are missing, these tests skip.
"""

import pytest

from tests import battery
from tests.models.weights.test_huggingface import CONFIGS, LAYOUTS, described, run
from toruslab.models.weights.huggingface import open_folder

# Deprecations inside transformers and torch are not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "llama-tied", "gemma"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_logits_equal_those_of_transformers(tmp_path, config, sharded, monkeypatch):
    """A random model that `save_pretrained` wrote. `transformers` computes in float64, the decoder in float32."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="needs torch, the extra `crosscheck`")
    hf = pytest.importorskip("transformers", reason="needs transformers, the extra `crosscheck`")
    torch.manual_seed(0)
    sizes = described(config) | {"max_position_embeddings": 64, "attn_implementation": "eager", "pad_token_id": None}
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    del sizes["model_type"]
    family = {"llama": (hf.LlamaConfig, hf.LlamaForCausalLM), "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM)}
    make_config, make_model = family[config.name]
    model = make_model(make_config(**sizes, initializer_range=0.3)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.5, 0.5).add_(float(config.name == "llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 if sharded else (tmp_path / "model.safetensors").is_file()
    checkpoint = open_folder(tmp_path)
    for where in LAYOUTS[: 1 if sharded else None]:
        ids, got = run(checkpoint, *where)
        with torch.no_grad():
            expected = model.double()(torch.tensor(ids, dtype=torch.long), use_cache=False).logits.numpy()
        battery.assert_close(got, expected)
