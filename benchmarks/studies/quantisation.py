"""What int8 costs in accuracy: weights and KV cache against float, by layer and matrix, on logits, on held-out text.

    python -m benchmarks.studies.quantisation
    python -m benchmarks.studies.quantisation --model toy-s --windows 16 --length 256 --json

A layer's output is what it adds to the residual stream. Its error is that of one matrix as int8 (or of the cache, or of
all matrices), with everything else and its input as float. Loss is nats per byte on held-out text: the end of the
built-in English, or of --text. The weights are random, so that loss is near ln(vocabulary); agreement of the likeliest
tokens says more. Runs on one device.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from toruslab.benchmarks.reports.tables import Column, DataTable
from toruslab.benchmarks.runs import output, processes
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.progress import progress
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.studies import ratios
from toruslab.models.config import ModelConfig
from toruslab.models.presets import model
from toruslab.models.weights import byte_ids, corpus

if TYPE_CHECKING:
    import jax
    from flax import nnx

VARIANTS = {"float": (False, False), "int8 weights": (True, False), "int8 cache": (False, True), "both": (True, True)}
"""Whether weights and cache are int8."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser("python -m benchmarks.studies.quantisation", __doc__)
    p.add_argument("--model", default="toy", help="preset or config.json (default: %(default)s)")
    p.add_argument("--platform", default="cpu", choices=["cpu", "gpu", "tpu"], help="default: %(default)s")
    p.add_argument("--dtype", default="f32", choices=["f32", "bf16"], help="of what is float (default: %(default)s)")
    p.add_argument("--windows", type=int, default=8, metavar="N", help="of held-out text (default: %(default)s)")
    p.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    p.add_argument("--text", metavar="FILE", help="English text (default: Python's own manual); its last tenth counts")
    p.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="one JSON object a line: layers, variants, summary")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    options = parser().parse_args(argv)
    try:
        ratios.at_least(options, windows=1, length=2, seed=0)
        config = model(options.model)
        if config.vocab < byte_ids.VOCAB:
            raise ValueError(f"vocab={config.vocab} of {config.name} is smaller than the tokenizer's {byte_ids.VOCAB}")
        ids = held_out(options.windows, options.length, corpus.read(options.text))
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    processes.join(options.platform, 1, 1)
    import jax.numpy as jnp

    from toruslab.models.decoder.parameters import initial

    dtype = jnp.float32 if options.dtype == "f32" else jnp.bfloat16
    try:
        layout, mesh = _alone(config, options.platform)
    except ValueError as error:
        raise InputError(f"platform={options.platform!r}: {error}") from None
    params = initial(config, layout, mesh, seed=options.seed, dtype=dtype)
    summary = {
        "kind": "summary",
        "model": options.model,
        "weights": "random",
        "seed": options.seed,
        "dtype": options.dtype,
        "windows": options.windows,
        "length": options.length,
        "ln_vocab": math.log(config.vocab),
    }
    with progress("quantisation", what="layer by layer, then the whole model"):
        of_layers = list(layers(config, params, ids, options.platform))
        rows = [*of_layers, *variants(config, params, ids, options.platform), summary]
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows, output.console())
    return 0


def held_out(n: int, length: int, text: str) -> np.ndarray:
    """[n, length + 1] ids: windows of the held-out end of a text, evenly spaced; each begins where a target ends.

    Raises:
        ValueError: a text whose end is shorter than the windows.
    """
    _, rest = corpus.split(byte_ids.encode(text, bos=False))
    if rest.size < length + 1:
        raise ValueError(f"length={length} is more than the {rest.size} held-out bytes of the text; give a longer text")
    if n * length > rest.size:
        raise ValueError(f"windows={n} of length={length} are more than the {rest.size} held-out bytes of the text")
    starts = np.linspace(0, rest.size - length - 1, n).astype(int)
    return rest[starts[:, None] + np.arange(length + 1)]


def layers(config: ModelConfig, params: "nnx.State", ids: np.ndarray, platform: str = "cpu") -> Iterator[Row]:
    """Relative RMS errors by layer: of each matrix and the layer's output with it, then of all matrices and the cache.

    Computed in float32, so that int8 alone causes them.

    Args:
        config, params: the float model, whole on one device of `platform`.
        ids: [n, length + 1]; the last of each is not read.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from toruslab.models.decoder.quantise import dequantise, quantise
    from toruslab.partitioning.layouts.layout import WEIGHTS

    def wide(nested: dict) -> dict:
        return jax.tree.map(lambda a: a if a.dtype == jnp.int8 else a.astype(jnp.float32), nested)

    nested = wide(nnx.to_pure_dict(params))
    table = nested["table"]
    back = dequantise(wide(quantise(nested, jax.tree.leaves(params)[0].dtype)))
    blocks = ("layer",) if config.block == "parallel" else ("attention", "mlp")
    run = _layer(config, platform, ids.shape[0])
    x = table[ids[:, :-1].reshape(-1)]

    def at(i: int, of: dict, only: tuple[str, str] | None = None) -> dict:
        """The parameters of layer i: `only` one matrix, or all, of `of`, the rest float."""
        return {
            block: {name: (of if only in (None, (block, name)) else nested)[block][name][i] for name in nested[block]}
            for block in blocks
        }

    for i in range(config.n_layers):
        y = run(at(i, nested), x, False)

        def error(found: jax.Array, x=x, y=y) -> float:
            return relative_rms(np.asarray(found, float), np.asarray(y, float), np.asarray(x, float))

        for block in blocks:
            for name in (n for n in WEIGHTS if n in nested[block]):
                exact, seen = (np.asarray(source[block][name][i], float) for source in (nested, back))
                yield {
                    "kind": "matrix",
                    "layer": i,
                    "block": block,
                    "matrix": name,
                    "weight_error": relative_rms(seen, exact),
                    "output_error": error(run(at(i, back, (block, name)), x, False)),
                }
        yield {"kind": "layer", "layer": i, "of": "int8 weights", "output_error": error(run(at(i, back), x, False))}
        yield {"kind": "layer", "layer": i, "of": "int8 cache", "output_error": error(run(at(i, nested), x, True))}
        x = y


def relative_rms(found: np.ndarray, exact: np.ndarray, without: np.ndarray | float = 0.0) -> float:
    """RMS of found - exact over that of exact - without.

    Example:
        >>> relative_rms(np.array([1.0, 2.2]), np.array([1.0, 2.0]), np.array([0.0, 0.0])).__round__(4)
        0.0894
    """
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean((exact - without) ** 2)))


def _layer(config: ModelConfig, platform: str, batch: int) -> Callable[[dict, "jax.Array", bool], "jax.Array"]:
    """(parameters of one layer, the residual stream [T, E], whether its cache is int8) -> the stream after it."""
    import dataclasses
    import functools

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from toruslab.models.decoder.cache import empty_cache
    from toruslab.models.decoder.parameters import abstract
    from toruslab.models.decoder.sequences import Aligned

    layout, mesh = _alone(config, platform)
    one = dataclasses.replace(config, n_layers=1)
    graph, like = abstract(one)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params: dict, x: jax.Array, int8_cache: bool) -> jax.Array:
        length = x.shape[0] // batch
        cache = empty_cache(one, batch, length, layout, mesh, int8=int8_cache)
        rows = Aligned.of(jnp.zeros(batch, jnp.int32), length, config, layout)
        decoder = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like))
        for name, values in params.items():
            block = getattr(decoder, name)
            for key, value in values.items():
                getattr(block, key).set_value(value)
            x, cache = block(x, cache, jnp.int32(0), rows, layout)
        return x

    def on_mesh(params: dict, x: jax.Array, int8_cache: bool) -> jax.Array:
        with jax.set_mesh(mesh):
            return run(params, x, int8_cache)

    return on_mesh


def variants(config: ModelConfig, params: "nnx.State", ids: np.ndarray, platform: str = "cpu") -> Iterator[Row]:
    """For each of `VARIANTS`: errors of the logits, agreement of the likeliest tokens, loss in nats per byte.

    Errors are differences from float over the largest logit.

    Args:
        config, params, ids: see `layers`; loss is of every token but the first of each row.
    """
    import jax
    import jax.numpy as jnp

    from toruslab.models.decoder.cache import empty_cache
    from toruslab.models.decoder.decoder import Tokens
    from toruslab.models.decoder.parameters import as_int8, everywhere
    from toruslab.models.programs.program import Program
    from toruslab.partitioning.plan.passes import Pass

    layout, mesh = _alone(config, platform)
    dtype = jax.tree.leaves(params)[0].dtype
    n, length = ids.shape[0], ids.shape[1] - 1
    given = [ids[:, :-1], np.zeros(n), np.full(n, length)]
    tokens = Tokens(*[everywhere(mesh, np.asarray(a, np.int32)) for a in given])
    requests = everywhere(mesh, np.arange(n, dtype=np.int32))
    exact = None
    for name, (int8, int8_cache) in VARIANTS.items():
        itemsize = jnp.dtype(dtype).itemsize
        pass_ = Pass(
            batch=n,
            length=length,
            capacity=length,
            itemsize=itemsize,
            weight_itemsize=1 if int8 else itemsize,
            all_logits=True,
            int8_cache=int8_cache,
        )
        program = Program(config=config, layout=layout, mesh=mesh, pass_=pass_)
        with jax.set_mesh(mesh):
            weights = jax.jit(lambda p: as_int8(config, p, dtype))(params) if int8 else params
        cache = empty_cache(config, n, length, layout, mesh, program.dtype, int8_cache)
        found, _ = program(weights, tokens, cache, requests)
        logits = np.asarray(found, float)[:, : config.vocab]  # [T, V]
        exact = logits if exact is None else exact
        largest = np.abs(exact).max()
        yield {
            "kind": "variant",
            "variant": name,
            "largest_error": float(np.abs(logits - exact).max() / largest),
            "rms_error": float(np.sqrt(np.mean((logits - exact) ** 2)) / largest),
            "greedy_agreement": float(np.mean(logits.argmax(-1) == exact.argmax(-1))),
            "loss_nats_per_byte": loss(logits, ids[:, 1:].reshape(-1)),
        }


def loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -ln softmax(logits)[target].

    Example:
        >>> round(loss(np.zeros((2, 258)), np.array([3, 7])), 4)  # ln(258)
        5.553
    """
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return float(np.mean(total - logits[np.arange(len(targets)), targets]))


def _alone(config: ModelConfig, platform: str):
    """A layout and a mesh of one device."""
    from toruslab.partitioning.layouts.variants import layout
    from toruslab.partitioning.torus.mesh import attach

    return layout("replicated", "batch", (1, 1, 1), config.n_kv_heads), attach((1, 1, 1), chip=platform)


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints both tables and what they can say."""
    summary = rows[-1]
    console.print(
        f"[bold]{summary['model']}[/], {summary['weights']} weights of seed {summary['seed']}, {summary['dtype']}; "
        f"{summary['windows']} windows of {summary['length']} tokens of held-out text"
    )

    def what(r: Row) -> str:
        named = {"int8 weights": "all matrices", "int8 cache": "the cache"}
        return f"{r['block']}/{r['matrix']}" if r["kind"] == "matrix" else named[r["of"]]

    by_layer = DataTable(
        title="relative RMS error of int8, by layer",
        records=[r for r in rows if r["kind"] in ("matrix", "layer")],
        columns=[
            Column("layer", lambda r: str(r["layer"]), numeric=False),
            Column("what is int8", what, numeric=False),
            Column("of the weight", lambda r: f"{r['weight_error']:.3%}" if "weight_error" in r else ""),
            Column("of the layer's output", lambda r: f"{r['output_error']:.3%}"),
        ],
    )
    whole = DataTable(
        title="the whole model; logits against float, relative to the largest",
        records=[r for r in rows if r["kind"] == "variant"],
        columns=[
            Column("", lambda r: r["variant"], numeric=False),
            Column("largest error", lambda r: f"{r['largest_error']:.3%}"),
            Column("RMS error", lambda r: f"{r['rms_error']:.3%}"),
            Column("same likeliest token", lambda r: f"{r['greedy_agreement']:.2%}"),
            Column("loss, nats per byte", lambda r: f"{r['loss_nats_per_byte']:.5f}"),
        ],
    )
    for table in (by_layer, whole):
        console.print(table.rich())
    console.print(
        f"The weights are random, so that a loss near ln(vocabulary) = {summary['ln_vocab']:.3f} is all there can be, "
        "and likeliest tokens are nearly tied: what int8 costs in text shows with trained weights only."
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
