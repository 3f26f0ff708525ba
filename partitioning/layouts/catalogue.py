"""The layouts of the paper, each a function that returns a `Layout`, and two comparators."""

import dataclasses
from collections.abc import Callable

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.layout import XYZ, ZY, ZYX, Attention, Axes, Layout, NoAxisLeft
from toruslab.partitioning.torus.mesh import AXES, Shape

Maker = Callable[[Attention, Axes], Layout]
"""A layout by its attention and the axes that KV heads can be split over."""


def around_attention(attention: str, *, batch: Axes, heads: Axes, partial: Axes, w_kv: Axes, kv: Axes, e: Axes) -> dict:
    """The ladders around attention.

    Args:
        attention: `heads`; `batch`: H is whole and T split over all axes of `heads`; `batch-x`, `batch-xy`...: only
            over those named, which end `heads`, and H stays split over the others.
        batch: axes that T is split over before attention.
        heads: axes that H is split over before attention.
        partial: axes that K and V are partial sums over when they leave their matmul.
        w_kv: axes that the columns of K and V are split over in their matmul.
        kv: axes that the KV heads can be split over under `heads` attention.
        e: axes that E is split over at the input of the matmuls.

    Raises:
        NoAxisLeft: the axes named do not end `heads`.
    """
    split = P(batch, heads, None)
    source = P(batch, e)
    if attention == "heads":
        made = P(batch, w_kv, unreduced=frozenset(partial))
        return {
            "x_kv": (source,),
            "kv": (made, P(batch, kv)),
            "q": (split,),
            "o": (split,),
            "cache": P(batch, kv, None, None),
        }
    moved = _moved(attention, heads)
    every, kept = batch + moved, heads[: len(heads) - len(moved)]
    before = tuple(a for a in every if a not in partial)
    kv_moved, kv_kept = tuple(a for a in w_kv if a in moved), tuple(a for a in w_kv if a not in moved)
    if kv_moved:  # like Q: heads to batch, then what is left of the batch is cut off
        x_kv = (source,)
        kv_ladder = (
            P(batch, w_kv, unreduced=frozenset(partial)),
            P(batch + kv_moved, kv_kept, unreduced=frozenset(partial)),
            P(before, kv_kept, unreduced=frozenset(partial)),
            P(every, kv_kept),
        )
    else:  # as with multiquery: K and V are made on the batch slice that they end on
        x_kv = (source, P(before, e))
        kv_ladder = (P(before, kv_kept, unreduced=frozenset(partial)), P(every, kv_kept))
    return {
        "x_kv": x_kv,
        "kv": kv_ladder,
        "q": (split, P(every, kept, None)),
        "o": (P(every, kept, None), split),
        "cache": P(every, kv_kept, None, None),
    }


def _moved(attention: str, heads: Axes) -> Axes:
    """The axes that go from heads to batch, in the order of `heads`."""
    if attention == "batch":
        return heads
    named = attention.removeprefix("batch-")
    moved = heads[len(heads) - len(named) :] if len(named) < len(heads) else ()
    if not moved or set(moved) != set(named):
        known = ["batch-" + "".join(sorted(heads[i:])) for i in range(len(heads) - 1, 0, -1)]
        raise NoAxisLeft(
            f"attention={attention!r}: heads are split over {'*'.join(heads) or 'nothing'} here; known: "
            + ", ".join(["heads", *known, "batch"])
        )
    return moved


def ws1d(attention: Attention, kv: Axes) -> Layout:
    """1D weight-stationary: every weight split over one dimension, all chips. Paper, section 3.2.1."""
    return Layout(
        name="ws1d",
        attention=attention,
        table=P(ZYX, None),
        w_in=(P(None, ZYX),),
        w_kv=(P(None, kv),),
        w_out=(P(ZYX, None),),
        tokens=(P(None),),
        embed=(P(None, None, unreduced=frozenset(XYZ)), P(None, XYZ)),
        x=(P(None, XYZ), P(None, None)),
        h=(P(None, ZYX),),
        g=(P(None, ZYX),),
        out=(P(None, None, unreduced=frozenset(XYZ)), P(None, XYZ)),
        rows=(P(None, XYZ), P(None, None)),
        logits=(P(None, ZYX),),
        ids=(P(None),),
        **around_attention(attention, batch=(), heads=ZYX, partial=(), w_kv=kv, kv=kv, e=()),
    )


def ws2d(attention: Attention, kv: Axes) -> Layout:
    """2D weight-stationary: weights E_xF_yz, activations move in both dimensions. Paper, section 3.2.2."""
    kv_zy = tuple(a for a in kv if a != "x")
    return Layout(
        name="ws2d",
        attention=attention,
        table=P(ZY, "x"),
        w_in=(P("x", ZY),),
        w_kv=(P("x", kv_zy),),
        w_out=(P(ZY, "x"),),
        tokens=(P(None),),
        embed=(P(None, "x", unreduced=frozenset("yz")), P(None, XYZ)),
        x=(P(None, XYZ), P(None, "x")),
        h=(P(None, ZY, unreduced=frozenset("x")), P(None, ZYX)),
        g=(P(None, ZYX), P(None, ZY)),
        out=(P(None, "x", unreduced=frozenset("yz")), P(None, XYZ)),
        rows=(P(None, XYZ), P(None, "x")),
        logits=(P(None, ZY, unreduced=frozenset("x")), P(None, ZYX)),
        ids=(P(None),),
        **around_attention(attention, batch=(), heads=ZYX, partial=("x",), w_kv=kv_zy, kv=kv, e=("x",)),
    )


def wgx(attention: Attention, kv: Axes) -> Layout:
    """X weight-gathered: batch over x, weights gathered over x. Paper, section 3.2.3 and figure A.2."""
    kv_zy = tuple(a for a in kv if a != "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgx",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY)),
        w_kv=(P("x", kv_zy), P(None, kv_zy)),
        w_out=(P(ZY, "x"), P(ZY, None)),
        embed=(
            P(None, "x", unreduced=frozenset("yz")),
            P("x", None, unreduced=frozenset("yz")),
            P("x", ("y", "z")),
        ),
        x=(P("x", ("y", "z")), P("x", None)),
        h=(P("x", ZY),),
        g=(P("x", ZY),),
        out=(P("x", None, unreduced=frozenset("yz")), P("x", ("y", "z"))),
        rows=(P("x", ("y", "z")), P("x", None), P(None, "x")),
        **around_attention(attention, batch=("x",), heads=ZY, partial=(), w_kv=kv_zy, kv=kv_zy, e=()),
    )


def wgxy(attention: Attention, kv: Axes) -> Layout:
    """XY weight-gathered: batch over x and y, weights gathered over both. Paper, section 3.2.3."""
    kv_zy = tuple(a for a in kv if a != "x")
    kv_z = tuple(a for a in kv if a == "z")
    yx = ("y", "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgxy",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY), P(None, "z")),
        w_kv=(P("x", kv_zy), P(None, kv_zy), P(None, kv_z)),
        w_out=(P(ZY, "x"), P(ZY, None), P("z", None)),
        embed=(
            P(None, "x", unreduced=frozenset("yz")),
            P("y", "x", unreduced=frozenset("z")),
            P(yx, None, unreduced=frozenset("z")),
            P(yx, "z"),
        ),
        x=(P(yx, "z"), P(yx, None)),
        h=(P(yx, "z"),),
        g=(P(yx, "z"),),
        out=(P(yx, None, unreduced=frozenset("z")), P(yx, "z")),
        rows=(P(yx, "z"), P(yx, None), P("y", "x"), P(None, "x")),
        **around_attention(attention, batch=yx, heads=("z",), partial=(), w_kv=kv_z, kv=kv_z, e=()),
    )


def wgxyz(attention: Attention, kv: Axes) -> Layout:
    """XYZ weight-gathered: batch over all chips, whole weights gathered, no activation moves. Section 3.2.3."""
    kv_zy = tuple(a for a in kv if a != "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgxyz",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY), P(None, None)),
        w_kv=(P("x", kv_zy), P(None, kv_zy), P(None, None)),
        w_out=(P(ZY, "x"), P(ZY, None), P(None, None)),
        embed=(
            P(None, "x", unreduced=frozenset("yz")),
            P(ZY, "x"),
            P(ZYX, None),
        ),
        x=(P(ZYX, None),),
        h=(P(ZYX, None),),
        g=(P(ZYX, None),),
        out=(P(ZYX, None),),
        rows=(P(ZYX, None), P(ZY, "x"), P(None, "x")),
        **around_attention(attention, batch=ZYX, heads=(), partial=(), w_kv=(), kv=(), e=()),
    )


def replicated(attention: Attention, kv: Axes) -> Layout:
    """Whole weights on every chip. `batch`: the chips share out the batch and never talk but for the sampled tokens;
    `heads`: every chip does everything but attention, which is split over heads. A comparator, not in the paper."""
    whole = P(None, None)
    if attention not in ("heads", "batch"):
        raise NoAxisLeft(f"attention={attention!r}: layout='replicated' has heads and batch only")
    if attention == "batch":
        t = P(ZYX, None)
        around = around_attention("batch", batch=ZYX, heads=(), partial=(), w_kv=(), kv=(), e=())
    else:
        t = whole
        around = {
            "x_kv": (whole,),
            "kv": (whole, P(None, kv)),
            "q": (P(None, None, None), P(None, ZYX, None)),
            "o": (P(None, ZYX, None), P(None, None, None)),
            "cache": P(None, kv, None, None),
        }
    return Layout(
        name="replicated",
        attention=attention,
        table=whole,
        w_in=(whole,),
        w_kv=(whole,),
        w_out=(whole,),
        tokens=(P(None), P(t[0])),
        embed=(t,),
        x=(t,),
        h=(t,),
        g=(t,),
        out=(t,),
        rows=(t,),
        logits=(t,),
        ids=(P(t[0]), P(None)),
        **around,
    )


def auto(attention: Attention, kv: Axes) -> Layout:
    """Weights and cache placed as in `ws2d`, everything else left to XLA's partitioner. A comparator."""
    placed = ws2d(attention, kv)
    activations = ("tokens", "embed", "x", "h", "x_kv", "kv", "q", "o", "g", "out", "rows", "logits", "ids")
    return dataclasses.replace(placed, name="auto", **dict.fromkeys(activations, ()))


LAYOUTS: dict[str, Maker] = {
    "ws1d": ws1d,
    "ws2d": ws2d,
    "wgx": wgx,
    "wgxy": wgxy,
    "wgxyz": wgxyz,
    "replicated": replicated,
    "auto": auto,
}


def kv_axes(mesh: Shape, n_kv_heads: int) -> Axes:
    """The axes that KV heads are split over: as many of z, y, x, in this order, as divide them. Multiquery: none.

    Example:
        >>> kv_axes((4, 4, 4), 8), kv_axes((2, 2, 2), 8), kv_axes((2, 2, 2), 1)
        (('z',), ('z', 'y', 'x'), ())
    """
    sizes = dict(zip(AXES, mesh, strict=True))
    taken: Axes = ()
    n = 1
    for axis in ZYX:
        n *= sizes[axis]
        if n_kv_heads % n:
            break
        taken += (axis,) if sizes[axis] > 1 else ()
    return taken
