"""A layout by its name, with variants: `ws2d`, `wgx+ring`, `ws2d+lean`, `wgxy+ring+prefetch`.

Each variant after a `+` turns a layout into another one:

- `lean`: as few collectives as possible; replaces the function that makes the layout.
- `ring`, `biring`: collectives looped with their matmuls, in one direction or both; changes the record.
- `prefetch`: weights gathered one layer ahead; changes the record.

The layouts without variants are in `catalogue`, and how a ring runs is in `rings`.
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
    """`ws1d` with the fewest collectives: the output's partial sums are all-reduced, and the residual stream stays
    whole. A parallel layer has one collective, and two more if attention is split over the batch.

    One is the lower bound, because a matmul whose inner dimension is split must be summed once. The bytes are those of
    `ws1d`, but all chips repeat the elementwise work. This is for decode steps, where the number of collectives
    decides the latency.
    """
    base = ws1d(attention, kv)
    return dataclasses.replace(base, **_whole(base))


def ws2d_lean(attention: Attention, kv: Axes) -> Layout:
    """`ws2d` with the fewest collectives: the partial sums of both matmuls are all-reduced and then stay whole along
    those axes, and K, V and the norm's sum share the all-reduce of h. A parallel layer has two collectives, and two
    more if attention is split over the batch. See `ws1d_lean`.
    """
    base = ws2d("heads", kv)
    hidden, kv_zy = P(None, ZY), tuple(a for a in kv if a != "x")
    around = around_attention(attention, batch=(), heads=ZY, partial=("x",), w_kv=kv_zy, kv=kv_zy, e=("x",))
    summed, *rest = around["kv"]  # the first step sums over x, in one collective with h; the rest has whole values
    around["kv"] = (summed, *(P(*entries(spec)) for spec in (summed, *rest)))
    changed = _whole(base) | around | {"h": (base.h[0], hidden), "g": (hidden,), "together": True}
    return dataclasses.replace(base, attention=attention, **changed)


def _whole(made: Layout) -> dict:
    """Keeps the residual stream in the spec that the matmuls read, so that it is never gathered."""
    e = made.x[-1]
    return {"embed": (made.embed[0], e), "x": (e,), "out": (made.out[0], e), "rows": (e,)}


LEAN: dict[str, Maker] = {"ws1d": ws1d_lean, "ws2d": ws2d_lean}
"""Makers for `+lean`. They do not change a made layout, because attention is split over other axes there."""

LOOPED = {"h": ("w_in", "h"), "kv": ("w_kv",), "out": ("w_out", "g", "out")}
"""Result of a matmul -> the ladders that may be looped with it, the best first. A gathered weight moves more bytes than
any activation. Of the activations, h and g are wider than the residual stream (x, out) and move over one axis, so that
their rings are short; the paper loops these two. x is never looped: its norm needs whole rows first."""


def ring(made: Layout) -> Layout:
    """Collectives looped with their matmuls, in one direction."""
    return _looped(made, 1)


def biring(made: Layout) -> Layout:
    """Collectives looped with their matmuls, in both directions."""
    return _looped(made, 2)


def _looped(made: Layout, ways: Literal[1, 2]) -> Layout:
    moving = any(_is_looped(getattr(made, name)) for names in LOOPED.values() for name in names)
    return dataclasses.replace(made, rings=ways) if moving and not made.prefetch else made


def _is_looped(ladder: Ladder) -> bool:
    """Whether its first step changes the number of split axes: gathers and scatters do, the all-reduces of `lean` do
    not."""
    if len(ladder) < 2:
        return False
    before, after = (sum(len(axes_of(e)) for e in entries(spec)) for spec in ladder[:2])
    return before != after


def prefetch(made: Layout) -> Layout:
    """Weights gathered one layer ahead. A last step that is looped is not: `+ring` therefore comes before this."""
    ahead = any(len(getattr(made, name)) > (2 if made.rings else 1) for name in WEIGHTS)
    return dataclasses.replace(made, prefetch=True) if ahead else made


VARIANTS: dict[str, Callable[[Layout], Layout]] = {"ring": ring, "biring": biring, "prefetch": prefetch}
"""The variants that change a made layout: all but `lean`."""


def layout(name: str, attention: str, mesh: Shape, n_kv_heads: int) -> Layout:
    """The layout of that name, for a mesh and a number of KV heads.

    Args:
        name: one of `LAYOUTS`, and any variants, each after a `+`: `ws2d+lean+ring`.
        attention: one of `ATTENTIONS`.
        mesh: extents X, Y, Z.
        n_kv_heads: KV heads of the model.

    Returns:
        The layout without mesh axes of size 1.

    Raises:
        ValueError: an unknown name, or a variant that changes nothing in the layout.
        NoAxisLeft: attention that this layout cannot have on this mesh.

    Example:
        >>> layout("ws2d", "heads", (4, 2, 1), 1).h == (P(None, "y", unreduced={"x"}), P(None, ("y", "x")))
        True
    """
    made_by = parts_of(name)
    if attention not in ATTENTIONS:
        raise ValueError(f"attention={attention!r} must be one of {', '.join(ATTENTIONS)}")
    return _layout(made_by, name, attention, mesh, kv_axes(mesh, n_kv_heads))


def parts_of(name: str) -> tuple[Callable[..., Any], ...]:
    """The maker of the layout and the functions of its variants, in order.

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
    """`layout`, cached. The key includes the functions `made_by`, because tests register others under old names."""
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
