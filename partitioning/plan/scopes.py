"""Scopes: the names under which the decoder writes each operation, read back from a compiled program's op names."""

import re

SCOPES = frozenset(
    [
        "embed",
        "layer",
        "attention",
        "mlp",
        "x",
        "norm",
        "w_in",
        "h",
        "kv",
        "w_kv",
        "q",
        "attend",
        "o",
        "g",
        "w_out",
        "out",
        "rows",
        "logits",
        "sample",
        "loss",
        "gradients",
        "clip",
        "update",
        "table",
        "unembed",
        "final_norm",
    ]
)


TRANSFORMED = re.compile(r"(?:\w+\()+([^()]*)\)+")
"""A scope under JAX's transformations, as these write it: `transpose(jvp(embed))`."""


IN_LAYERS = ("layer", "attention", "mlp")
"""The scopes of what is in every layer."""


def scope_of(op_name: str) -> str:
    """The decoder's own scopes out of an op's full name.

    Example:
        >>> scope_of("jit(run)/while/body/closed_call/layer/h/shard_map/unreduced_reduce_scatter")
        'layer/h'
        >>> scope_of("jit(step)/transpose(jvp(embed))/all_gather")
        'embed'

    What is run again for a gradient has the scopes around it twice:
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
    """Whether a collective of this scope is one of a layer's."""
    return "/" in scope and scope.split("/")[0] in IN_LAYERS


def is_stack(op_name: str) -> bool:
    """Whether it cuts a layer's parameters out of the array that holds those of all layers."""
    return "while/body" in op_name and "dynamic_slice" in op_name and not scope_of(op_name)
