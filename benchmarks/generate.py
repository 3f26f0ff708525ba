"""Text from the decoder: prefill under one layout, decode under another.

    toruslab generate --prompt "The with statement" --prefill wgxyz/batch --decode ws2d/batch
    toruslab generate --prompt A --prompt "A longer one" --temperature 0.8 --top-p 0.9 --json
    toruslab generate --prompt "The with statement" --checkpoint FOLDER

Without a checkpoint the weights are random and the text is noise: that shows that any pair of layouts says the same.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from toruslab.benchmarks.runs import output, processes, weights_option
from toruslab.benchmarks.runs.parser import Parser, at_least, guarded, one_of, refused
from toruslab.benchmarks.runs.progress import progress
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.weights.tokenizer import Tokenizer
from toruslab.partitioning.layouts.layout import Layout
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.point import CACHES, WEIGHTS
from toruslab.partitioning.torus.mesh import Slice, mesh_shape


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab generate", __doc__)
    p.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times; - reads standard input"
    )
    weights_option.add(p)
    p.add_argument("--slice", default="cpu:2x2x2", help="CHIP:DIMS")
    p.add_argument("--mesh", help="extents of the mesh, if not the slice's own")
    p.add_argument("--prefill", default="ws2d/heads", metavar="LAYOUT/ATTENTION", help="of the prompts")
    p.add_argument("--decode", default="ws2d/batch", metavar="LAYOUT/ATTENTION", help="of the new tokens")
    p.add_argument("--max-new-tokens", type=at_least(1), default=32, help="of each prompt")
    p.add_argument(
        "--capacity", type=at_least(1), help="cached positions per sequence (default: what the prompts need)"
    )
    p.add_argument(
        "--chunk", type=at_least(1), help="prefill in chunks of so many tokens (default: the longest prompt)"
    )
    p.add_argument(
        "--steps-per-call",
        type=at_least(1),
        default=1,
        metavar="N",
        help="decode steps in one call of the program; it ends early where all have stopped",
    )
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    p.add_argument("--top-k", type=int, default=0, help="0: all (default)")
    p.add_argument("--top-p", type=float, default=1.0, help="1: all (default)")
    p.add_argument("--weights", type=one_of(WEIGHTS), default="f32", help=f"{', '.join(WEIGHTS)}")
    p.add_argument("--cache", help=f"{', '.join(CACHES)}; default: a KV cache of the activations' dtype")
    p.add_argument("--seed", type=int, default=0, help="of random weights, and of sampling")
    p.add_argument("--json", action="store_true", help="one JSON object a prompt on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; refused input is named before any device is touched."""
    options = parser().parse_args(argv)
    with refused():
        chosen = weights_option.chosen(options.model, options.checkpoint, options.seed)
        config, tokenizer = chosen.config, chosen.tokenizer
        slice_ = Slice.parse(options.slice)
        shape = mesh_shape(slice_, options.mesh)
        pair = [_layout(getattr(options, f), f, shape, config.n_kv_heads) for f in ("prefill", "decode")]
        sampler = Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
        if not options.prompt:
            raise ValueError("prompt is missing: --prompt TEXT")
        prompts = [tokenizer.encode(sys.stdin.read() if t == "-" else t) for t in options.prompt]
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        if not shortest:
            raise ValueError("prompt='' has no tokens: this model's tokenizer begins a text with none")
        if options.cache is not None and options.cache not in CACHES:
            raise ValueError(f"cache={options.cache!r} must be {', '.join(CACHES)}; its positions are --capacity")
        n_new = options.max_new_tokens
        capacity = options.capacity or longest + n_new
        if longest + n_new - 1 > capacity:
            raise ValueError(f"capacity={capacity} is too small for a prompt of {longest} tokens and {n_new} new ones")

    mesh = processes.attached(slice_, shape, explicit=pair[0].explicit)
    import jax.numpy as jnp

    from toruslab.models.programs.generate import Generator, batch_multiple

    multiple = batch_multiple(*pair, shape=shape)
    batch = -(-len(prompts) // multiple) * multiple
    rows = [prompts[i % len(prompts)] for i in range(batch)]
    took: list[tuple[float, int]] = []  # when a call ended, and its number of steps
    with progress("toruslab generate", what="placing the weights") as work:
        with refused():
            generator = Generator(
                config=config,
                prefill=pair[0],
                decode=pair[1],
                shape=shape,
                chip=slice_.chip,
                batch=batch,
                capacity=capacity,
                chunk=min(options.chunk or longest, longest),
                sampler=sampler,
                steps_per_call=options.steps_per_call,
                itemsize=4 if options.weights == "f32" else 2,
                int8=options.weights == "int8",
                int8_cache=options.cache == "int8",
            )
            dtype = jnp.float32 if options.weights == "f32" else jnp.bfloat16
            params = chosen.params(pair[0], mesh, dtype=dtype, int8=generator.int8)
        print(f"weights: {chosen.said}", file=sys.stderr)
        work.begin("compiling, then tokens of each prompt", total=n_new)

        def each(ids: np.ndarray) -> None:
            took.append((time.perf_counter(), ids.shape[1]))
            work.advance(ids.shape[1])

        stop = tokenizer.stops[0] if tokenizer.stops else None
        found = generator(params, rows, n_new, stop=stop, each=each)
    for prompt, ids in zip(prompts, found[: len(prompts)], strict=True):
        ends = np.flatnonzero(np.isin(ids, tokenizer.stops))
        _print(prompt, ids[: ends[0]] if len(ends) else ids, tokenizer, options)
    _say_speed(batch, took)
    return 0


def _say_speed(batch: int, took: Sequence[tuple[float, int]]) -> None:
    """The time of a decode step, from the calls whose program had run before, and so was compiled."""
    gaps, known = [], set()
    for (before, _), (after, steps) in pairwise(took):
        if steps in known:
            gaps.append((after - before) / steps)
        known.add(steps)
    if gaps:
        found = f"{np.median(gaps) * 1e3:.1f} ms per decode step (median of {len(gaps)} calls)"
        print(f"batch {batch}, {found}", file=sys.stderr)


def _layout(text: str, field: str, shape, n_kv_heads: int) -> Layout:
    name, slash, attention = text.partition("/")
    if not slash:
        raise ValueError(f"{field}={text!r} must be LAYOUT/ATTENTION, such as ws2d/batch")
    return layout(name, attention, shape, n_kv_heads)


def _print(prompt: np.ndarray, ids: np.ndarray, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    began, whole = tokenizer.decode(prompt), tokenizer.decode(np.concatenate([prompt, ids]))
    if options.json:
        # decoding the new ids alone would lose their first space under some tokenizers
        said = whole.removeprefix(began) if whole.startswith(began) else tokenizer.decode(ids)
        row = {"prompt": began, "text": said, "ids": ids.tolist()}
        output.print_rows([{**row, "prefill": options.prefill, "decode": options.decode, "seed": options.seed}])
    else:
        print(whole)


if __name__ == "__main__":
    sys.exit(guarded(main))
