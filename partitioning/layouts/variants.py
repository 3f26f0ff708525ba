"""Variants of layouts, and a layout by its name: `ws2d`, `wgx+ring`, `ws2d+lean`.

What follows a `+` makes another layout of one: `lean` by making it anew, the others by changing the record. Decides
which names there are and what each variant changes. What a layout is, and the ones without variants, are
`partitioning.layouts.layout`'s; how a ring runs is `partitioning.layouts.rings`'.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any, Literal

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.catalogue import LAYOUTS, Maker, around_attention, kv_axes, ws1d, ws2d
from toruslab.partitioning.layouts.layout import (
    ATTENTIONS,
    WEIGHTS,
    ZY,
    Attention,
    Axes,
    Ladder,
    Layout,
    NoAxisLeft,
    axes_of,
    entries,
)
from toruslab.partitioning.torus.mesh import Shape


def ws1d_lean(attention: Attention, kv: Axes) -> Layout:
    """`ws1d` with as few collectives as it can do with: the output's sums are all-reduced, the residual stream stays
    whole. One collective in a parallel layer, and two more where attention goes to the batch.

    The lower bound: a matmul whose inner dimension is split must be summed once. The same bytes as `ws1d`, and
    elementwise work that all chips repeat: for decode steps, where the number of collectives decides.
    """
    base = ws1d(attention, kv)
    return dataclasses.replace(base, **_whole(base))


def ws2d_lean(attention: Attention, kv: Axes) -> Layout:
    """`ws2d` with as few collectives as it can do with: both matmuls' sums are all-reduced and stay whole along that
    axis; K, V and the norm's sum ride along with the hidden units. Two collectives in a parallel layer, and two more
    where attention goes to the batch. See `ws1d_lean`.
    """
    base = ws2d("heads", kv)
    hidden, kv_zy = P(None, ZY), tuple(a for a in kv if a != "x")
    around = around_attention(attention, batch=(), heads=ZY, partial=("x",), w_kv=kv_zy, kv=kv_zy, e=("x",))
    summed, *rest = around["kv"]  # first, in one collective with h
    around["kv"] = (summed, *(P(*entries(spec)) for spec in (summed, *rest)))
    changed = _whole(base) | around | {"h": (base.h[0], hidden), "g": (hidden,), "together": True}
    return dataclasses.replace(base, attention=attention, **changed)


def _whole(made: Layout) -> dict:
    """The residual stream kept as the matmuls take it, so that it is not gathered."""
    e = made.x[-1]
    return {"embed": (made.embed[0], e), "x": (e,), "out": (made.out[0], e), "rows": (e,)}


LEAN: dict[str, Maker] = {"ws1d": ws1d_lean, "ws2d": ws2d_lean}
"""What `+lean` makes of a layout, as another way to make it: attention has other axes there."""

LOOPED = {"h": ("w_in", "h"), "kv": ("w_kv",), "out": ("w_out", "g", "out")}
"""What comes out of a matmul -> the ladders that may be looped with it, the best first. A gathered weight outweighs
any activation. Inside the block, h and g are wider than the residual stream (x, out) and move over one axis, so that
their rings are short; the paper looped these two. x is not looped: its norm needs whole rows first."""


def ring(made: Layout) -> Layout:
    """Collectives looped with their matmuls, one way round."""
    return _looped(made, 1)


def biring(made: Layout) -> Layout:
    """Collectives looped with their matmuls, both ways round."""
    return _looped(made, 2)


def _looped(made: Layout, ways: Literal[1, 2]) -> Layout:
    moving = any(_is_looped(getattr(made, name)) for names in LOOPED.values() for name in names)
    return dataclasses.replace(made, rings=ways) if moving and not made.prefetch else made


def _is_looped(ladder: Ladder) -> bool:
    """Whether it has a step that can be: sums that stay whole, as with `lean`, are none."""
    if len(ladder) < 2:
        return False
    before, after = (sum(len(axes_of(e)) for e in entries(spec)) for spec in ladder[:2])
    return before != after


def prefetch(made: Layout) -> Layout:
    """Weights gathered one layer ahead, but for a last step that is looped: `+ring` comes before, if at all."""
    ahead = any(len(getattr(made, name)) > (2 if made.rings else 1) for name in WEIGHTS)
    return dataclasses.replace(made, prefetch=True) if ahead else made


VARIANTS: dict[str, Callable[[Layout], Layout]] = {"ring": ring, "biring": biring, "prefetch": prefetch}
"""What may follow a layout's name after a `+`, beside `lean`: each makes another layout of it."""


def layout(name: str, attention: str, mesh: Shape, n_kv_heads: int) -> Layout:
    """The layout `name`, with variants (`ws2d+lean`) and its attention, for a mesh and a number of KV heads.

    Args:
        name: of `LAYOUTS`, and of `VARIANTS` after a `+` each: `ws2d+ring`.

    Raises:
        ValueError: an unknown name, attention that the layout does not have, or a variant that changes nothing in it.
    """
    made_by = parts_of(name)
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention!r} must be one of {', '.join(ATTENTIONS)}")
    return _layout(made_by, name, attention, mesh, kv_axes(mesh, n_kv_heads))


def parts_of(name: str) -> tuple[Callable[..., Any], ...]:
    """What makes the layout `name`, and its variants.

    Raises:
        ValueError: an unknown name.
    """
    base, *variants = str(name).split("+")
    known_variants = ("lean", *VARIANTS)
    for part, known in ((base, tuple(LAYOUTS)), *((v, known_variants) for v in variants)):
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            what = f": {part!r} is no variant" if known is known_variants else " is unknown"
            raise ValueError(f"layout={name!r}{what}{hint}; known: {', '.join(known)}")
    if len(set(variants)) < len(variants):
        raise ValueError(f"layout={name!r} names a variant twice")
    if {"ring", "biring"} <= set(variants):
        raise ValueError(f"layout={name!r}: rings send one way (ring) or both (biring), not both of these")
    if "prefetch" in variants[:-1]:
        raise ValueError(f"layout={name!r}: prefetch comes last, it gathers ahead what is not looped")
    if "lean" in variants and base not in LEAN:
        raise ValueError(f"layout='{base}+lean' does not exist: lean is for {' and '.join(LEAN)}")
    make = LEAN[base] if "lean" in variants else LAYOUTS[base]
    return (make, *(VARIANTS[v] for v in variants if v != "lean"))


@functools.lru_cache(maxsize=4096)
def _layout(made_by: tuple[Callable[..., Any], ...], name: str, attention: Attention, mesh: Shape, kv: Axes) -> Layout:
    """`made_by`, what the parts of `name` stand for, is in the key: tests register others under old names."""
    make, *variants = made_by
    made = make(attention, kv)
    for variant in variants:
        changed = variant(made)
        if changed == made:
            raise ValueError(f"layout={name!r}: {variant.__name__!r} changes nothing in it")
        made = changed
    made = dataclasses.replace(made, name=name)
    if attention == "heads" and made.explicit and not any(axes_of(spec[1]) for spec in made.q):
        raise NoAxisLeft(
            f"attention='heads' makes no sense under layout={name!r}: no axis is left to split heads over; "
            "use attention='batch'"
        )
    made = made.on(mesh)
    if attention.startswith("batch-") and made.explicit and len(made.q) == 1:
        extents = "x".join(map(str, mesh))
        raise NoAxisLeft(f"attention={attention!r}: no axis of the mesh {extents} is left to split the batch over")
    return made
