"""Scopes: the names under which the decoder and the training step run each operation (`jax.named_scope`).

They join the plan with the compiled program: a planned collective has the scope of its tensor, and XLA keeps the scope
inside each instruction's `op_name`, which this file takes apart. A scope is a path, such as `layer/h`: the block, then
the ladder of the layout.
"""

import re

IN_LAYERS = ("layer", "attention", "mlp")
"""Blocks, which run once in every layer: a parallel layer, or the two blocks of a serial one."""
_IN_BLOCKS = ("x", "norm", "w_in", "h", "w_kv", "kv", "q", "attend", "o", "g", "w_out", "out")
_AROUND_LAYERS = ("embed", "table", "rows", "final_norm", "unembed", "logits", "sample")
_TRAINING = ("loss", "gradients", "clip", "update")
SCOPES = frozenset((*IN_LAYERS, *_IN_BLOCKS, *_AROUND_LAYERS, *_TRAINING))
"""All parts of a scope's path. The other parts of an `op_name` are JAX's."""

TRANSFORMED = re.compile(r"(?:\w+\()+([^()]*)\)+")
"""A part of an `op_name` inside JAX's transformations: `transpose(jvp(embed))`."""


def scope_of(op_name: str) -> str:
    """The scope in an `op_name`; empty if it has none.

    Example:
        >>> scope_of("jit(run)/while/body/closed_call/layer/h/shard_map/unreduced_reduce_scatter")
        'layer/h'
        >>> scope_of("jit(step)/transpose(jvp(embed))/all_gather")
        'embed'

    Operations that are recomputed for a gradient have the same scope twice; it counts once:
        >>> scope_of("jit(step)/while/body/layer/rematted_computation/layer/w_in/all_gather")
        'layer/w_in'
    """
    found: list[str] = []
    for part in op_name.split("/"):
        part = TRANSFORMED.sub(r"\1", part)
        if part in found:
            del found[found.index(part) :]
        if part in SCOPES:
            found.append(part)
    return "/".join(found)


def of_a_layer(scope: str) -> bool:
    """Whether operations of this scope run once in every layer."""
    return "/" in scope and scope.split("/")[0] in IN_LAYERS


def is_stack(op_name: str) -> bool:
    """Whether the operation cuts one layer's parameters out of the arrays that hold the parameters of all layers."""
    return "while/body" in op_name and "dynamic_slice" in op_name and not scope_of(op_name)
