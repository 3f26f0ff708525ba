"""A Hugging Face folder read part by part equals the whole packed, under any layout; what is wrong with one is named.

The folders are made here from the reference's random weights. Folders that `transformers` writes are in
`test_huggingface_crosscheck`.
"""

import dataclasses
import doctest
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import battery
from tests.canonical import pad_heads
from toruslab.models.config import ModelConfig
from toruslab.models.decoder import reference
from toruslab.models.decoder.parameters import load, read
from toruslab.models.weights import huggingface
from toruslab.models.weights.huggingface import Checkpoint, open_folder
from toruslab.models.weights.packing import pack
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.torus.mesh import attach

# sizes differ pairwise, H*Q too; 112 is a multiple of 16 heads, so gate and up are interleaved by head
LLAMA = ModelConfig(
    name="llama",
    n_layers=3,
    d_model=48,
    d_ff=112,
    n_heads=16,
    d_head=6,
    n_kv_heads=4,
    vocab=91,
    block="serial",
    tied=False,
    rope_theta=50.0,
    norm_eps=1e-2,
)
GEMMA = dataclasses.replace(
    LLAMA, name="gemma", d_ff=56, n_kv_heads=1, d_head=8, mlp="geglu", tied=True, scaled_embed=True
)
CONFIGS = [LLAMA, dataclasses.replace(LLAMA, tied=True, n_kv_heads=16), GEMMA]
LAYOUTS = [
    ("ws2d", "heads", (2, 2, 2)),
    ("ws1d", "batch", (4, 2, 1)),
    ("wgxyz", "batch", (1, 2, 4)),
    ("replicated", "batch", (8, 1, 1)),
    ("auto", "heads", (2, 2, 2)),
]
LAYER = {
    "norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}


def described(config: ModelConfig) -> dict:
    """The `config.json` of a model."""
    return {
        "model_type": config.name,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "vocab_size": config.vocab,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "eos_token_id": [7, 5],
    }


def theirs(config: ModelConfig, weights: reference.Weights, dtype="float32") -> dict[str, np.ndarray]:
    """Canonical weights as Hugging Face tensors."""
    offset = float(config.name == "gemma")
    found = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["final_norm"] - offset}
    if not config.tied:
        found["lm_head.weight"] = weights["unembed"]
    for name, path in LAYER.items():
        for i, w in enumerate(weights[name]):
            if name == "wo":
                w = w.reshape(-1, config.d_model).T
            elif name.startswith("w"):
                w = w.reshape(len(w), -1).T
            else:
                w = w - offset
            found[f"model.layers.{i}.{path}.weight"] = w
    return {name: np.ascontiguousarray(w).astype(dtype) for name, w in found.items()}


def write(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], n_shards: int = 1) -> Path:
    """A folder like those of `save_pretrained`, with neighbouring tensors in different shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described(config)))
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    listed = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        names = list(tensors)[shard::n_shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        listed |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def same(found, expected) -> None:
    def equal(a, b):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(equal, found, expected)


def placed(config: ModelConfig, name: str, attention: str, shape):
    made = layout(name, attention, shape, config.n_kv_heads)
    return made, attach(shape, chip="cpu", explicit=made.explicit)


def test_doctests():
    assert doctest.testmod(huggingface).failed == 0


@pytest.mark.parametrize("where", LAYOUTS, ids=lambda w: w[0])
@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "llama-tied", "gemma"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_parts_are_those_of_the_packed_whole(tmp_path, config, where, int8):
    weights = reference.init(config, 3)
    checkpoint = open_folder(write(tmp_path, config, theirs(config, weights), n_shards=3))
    assert dataclasses.replace(checkpoint.config, name=config.name) == config
    assert checkpoint.stops == (7, 5)
    offset = np.float32(checkpoint.norm_offset)  # adding 1 to w - 1 rounds twice
    weights = {n: (w - offset) + offset if n.endswith("norm") else w for n, w in weights.items()}
    where = placed(config, *where)
    same(read(checkpoint, *where, int8=int8), load(config, weights, *where, int8=int8))


@pytest.mark.parametrize("held", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path, held, wanted):
    weights = reference.init(LLAMA, 3)
    checkpoint = open_folder(write(tmp_path, LLAMA, theirs(LLAMA, weights, held)))
    rounded = {name: w.astype(held).astype(np.float32) for name, w in weights.items()}
    where = placed(LLAMA, "ws2d", "heads", (2, 2, 2))
    same(read(checkpoint, *where, dtype=wanted), load(LLAMA, rounded, *where, dtype=wanted))


@pytest.mark.parametrize("kv", [1, 6])
def test_padded_heads_are_zero(tmp_path, kv):
    config = dataclasses.replace(LLAMA, n_heads=6, n_kv_heads=kv, d_ff=96)
    weights = reference.init(config, 3)
    checkpoint = open_folder(write(tmp_path, config, theirs(config, weights))).padded(8)
    padded, more = pad_heads(config, weights, 8)
    where = placed(padded, "ws2d", "heads", (2, 2, 2))
    same(read(checkpoint, *where), load(padded, more, *where))


def test_any_part_by_itself(tmp_path):
    """Parts with odd bounds too, which cut groups of columns in two."""
    weights = reference.init(LLAMA, 3)
    checkpoint = open_folder(write(tmp_path, LLAMA, theirs(LLAMA, weights)))
    packed = pack(LLAMA, weights)
    rng = np.random.default_rng(0)
    for block, name in [(b, n) for b, found in packed.items() if isinstance(found, dict) for n in found]:
        array = packed[block][name]
        for _ in range(10):
            index = tuple(slice(*sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in array.shape)
            np.testing.assert_array_equal(checkpoint.part((block, name), index, np.float32), array[index])
    for rows in ((88, 91), (85, 128), (91, 128), (100, 101)):  # the last rows pad the vocabulary
        index = slice(*rows), slice(3, 8)
        np.testing.assert_array_equal(checkpoint.part(("table",), index, np.float32), packed["table"][index])


def run(checkpoint: Checkpoint, name: str, attention: str, shape) -> tuple[np.ndarray, np.ndarray]:
    """Ids [BATCH, TOTAL] and the decoder's logits [BATCH, TOTAL, V] with a checkpoint's weights."""
    config = checkpoint.config
    bench = battery.Bench.__new__(battery.Bench)
    bench.config, bench.name, bench.attention, bench.shape = config, name, attention, shape
    bench.int8 = bench.int8_cache = False
    bench.layout, bench.mesh = placed(config, name, attention, shape)
    bench.params, bench.compiled, bench.several = read(checkpoint, bench.layout, bench.mesh), {}, {}
    ids = np.random.default_rng(1).integers(0, config.vocab, (battery.BATCH, battery.TOTAL)).astype(np.int32)
    zeros, lengths = np.zeros(battery.BATCH), np.full(battery.BATCH, battery.TOTAL)
    got, _ = bench.run(ids, zeros, lengths, bench.cache())
    return ids, got


@pytest.mark.parametrize("config", CONFIGS, ids=["llama", "llama-tied", "gemma"])
def test_logits_equal_the_references(tmp_path, config):
    weights = reference.init(config, 3)
    ids, got = run(open_folder(write(tmp_path, config, theirs(config, weights))), "ws2d", "batch", (2, 2, 2))
    battery.assert_close(got, np.stack([reference.logits(config, weights, row) for row in ids]))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model", LLAMA, theirs(LLAMA, reference.init(LLAMA, 3)))


@pytest.fixture
def shards(tmp_path) -> Path:
    return write(tmp_path / "shards", LLAMA, theirs(LLAMA, reference.init(LLAMA, 3)), n_shards=3)


def changed(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.pop(Q_PROJ), rf"tensor '{Q_PROJ}' is missing$"),
        (lambda t: [t.pop(name) for name in list(t)[:5]], "is missing, and 4 more"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t["model.norm.weight"]}),
            "q_proj.bias' is not of",
        ),
        (lambda t: t.update({"model.layers.3.input_layernorm.weight": t["model.norm.weight"]}), "layers.3.* is not of"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :39].copy()}),
            r"q_proj.* has shape \[96, 39\]; .* makes it \[96, 48\]",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int8)}),
            "q_proj.* has dtype I8; must be one of F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, rule):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rule):
        open_folder(folder)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda data: data[:-1], "a file of .* bytes, is damaged or cut short: .*not fully covered"),
        (lambda data: data + b"\0", "is damaged or cut short"),
        (lambda data: data[:8] + b"{{" + data[10:], "is damaged or cut short: .*invalid JSON"),
        (lambda data: b"\xff" * 8 + data[8:], "is damaged or cut short: .*header"),
        (lambda data: data[:5], "a file of 5 bytes, is damaged or cut short"),
        (lambda data: b"", "a file of 0 bytes, is damaged or cut short"),
    ],
)
def test_damaged_files_are_named(shards, damage, rule):
    file = shards / "model-00002-of-00003.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"model-00002-of-00003.safetensors', {rule}" if rule[0] == "a" else rule):
        open_folder(shards)


def test_shards_that_do_not_fit_their_index_are_named(shards):
    index = shards / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]

    def refused(rule, **said):
        index.write_text(json.dumps({"weight_map": listed} | said))
        with pytest.raises(ValueError, match=rule):
            open_folder(shards)

    refused("'weight_map' must be an object", weight_map=[])
    refused(
        "'model.norm.weight' is in '../x.safetensors', which must be",
        weight_map=listed | {"model.norm.weight": "../x.safetensors"},
    )
    refused("nowhere.safetensors' is missing", weight_map=listed | {"model.norm.weight": "nowhere.safetensors"})
    refused("does not hold tensor 'more'", weight_map=listed | {"more": "model-00001-of-00003.safetensors"})
    first = {name: file for name, file in listed.items() if name != Q_PROJ}
    refused(f"holds tensor '{Q_PROJ}', for which .* says 'nothing'", weight_map=first)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index.json' must be a JSON object with a 'weight_map'"):
        open_folder(shards)
    index.unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors and no model.safetensors.index.json"):
        open_folder(shards)


def test_both_kinds_of_folder_at_once(folder, shards):
    shutil.copy(folder / "model.safetensors", shards)
    with pytest.raises(ValueError, match="holds both"):
        open_folder(shards)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (
            {"model_type": "gemma2"},
            "model_type='gemma2' with norms after each block and capped logits cannot be loaded",
        ),
        ({"model_type": "qwen2"}, "model_type='qwen2' with biases on Q, K and V cannot"),
        ({"model_type": "mixtral"}, "model_type='mixtral' is not a decoder"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": 4}, "layers.3.* is missing"),
        ({"vocab_size": 92}, r"has shape \[91, 48\]; config.json makes it \[92, 48\]"),
    ],
)
def test_models_that_would_say_something_else_are_refused(folder, fields, rule):
    changed(folder, **fields)
    with pytest.raises(ValueError, match=rule):
        open_folder(folder)


def test_what_old_files_hold_besides(folder):
    """A tied model's unembedding, if it is the embedding, and rotary frequencies."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    changed(folder, tie_word_embeddings=True)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true .* tensor 'lm_head.weight' is not 'model.embed"):
        open_folder(folder)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "model.safetensors")
    assert open_folder(folder).config.tied


LARGE = dataclasses.replace(LLAMA, n_layers=8, d_model=512, d_ff=2048, n_heads=16, d_head=32, vocab=512, tied=True)


def eighths(config: ModelConfig) -> list[tuple[tuple[str, str], tuple[slice, ...]]]:
    """The eighth of every matrix that one chip of ws1d holds."""
    layers, e, eighth = slice(0, config.n_layers), slice(0, config.d_model), lambda n: slice(0, n // 8)
    heads, kv_heads = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    columns = {("attention", "w_in"): heads, ("attention", "w_kv"): 2 * kv_heads, ("mlp", "w_in"): 2 * config.d_ff}
    rows = {("attention", "w_out"): heads, ("mlp", "w_out"): config.d_ff}
    found = [(keys, (layers, e, eighth(n))) for keys, n in columns.items()]
    return found + [(keys, (layers, eighth(n), e)) for keys, n in rows.items()]


def test_a_part_takes_hardly_more_memory_than_itself(tmp_path):
    """What Python, NumPy and safetensors allocate: the part, and pieces of one of its eight layers."""
    checkpoint = open_folder(write(tmp_path, LARGE, theirs(LARGE, reference.init(LARGE, 0))))
    for keys, index in eighths(LARGE):
        tracemalloc.start()
        part = checkpoint.part(keys, index, "float32")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.6 * part.nbytes + 20e3


PART = """
import sys
from pathlib import Path
from toruslab.models.weights.huggingface import open_folder
from tests.models.weights.test_huggingface import eighths

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

checkpoint = open_folder(sys.argv[1])
before = peak()
for keys, index in eighths(checkpoint.config):
    if keys[1] in ("w_in", "w_kv"):
        checkpoint.part(keys, index, "float32")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_an_eighth_of_a_model_leaves_the_rest_on_disk(tmp_path):
    """Pages of the files are mapped, and resident until they are wanted elsewhere; so much of them is touched.

    Of columns of theirs (w_out) each page holds some; they are left out here.
    """
    tensors = theirs(LARGE, reference.init(LARGE, 0))
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    whole = sum(t.nbytes for name, t in tensors.items() if name.split(".")[-2] in names)
    write(tmp_path, LARGE, tensors)
    command = [sys.executable, "-c", PART, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert whole > 70e6
    assert int(done.stdout) < whole / 2
