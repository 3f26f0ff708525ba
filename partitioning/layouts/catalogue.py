"""The layouts of Pope et al. 2022 and two comparators: each is a function that returns a `Layout`, listed in `LAYOUTS`.

To add a layout, write such a function and add its line to `LAYOUTS`. The decoder, the plan, the cost, the check of the
compiled program and the tests then cover it; `tests/partitioning/layouts/test_new_layout.py` does this for one.

The functions take the kind of attention and the axes that KV heads can be split over (`kv_axes`). They write all three
mesh axes; `Layout.on` drops those of size 1. All layouts but `ws1d` and `replicated` keep their weights at rest as
`ws2d` does, so that prefill and decode can use different layouts without moving weights.

Comments give the specs as the paper writes them, with the letters of `partitioning.layouts.layout`.
"""

import dataclasses
from collections.abc import Callable

from jax.sharding import PartitionSpec as P

from toruslab.partitioning.layouts.layout import XYZ, ZY, ZYX, Attention, Axes, Layout, NoAxisLeft
from toruslab.partitioning.torus.mesh import AXES, Shape

Maker = Callable[[Attention, Axes], Layout]
"""Makes a layout from the kind of attention and the axes that KV heads can be split over."""


def kv_axes(mesh: Shape, n_kv_heads: int) -> Axes:
    """The axes that KV heads are split over: z, y, x in this order, as long as they divide the heads evenly.

    Multiquery attention (one KV head) has none.

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


def ws1d(attention: Attention, kv: Axes) -> Layout:
    """1D weight-stationary: every weight is split along one dimension, over all chips. Paper, section 3.2.1."""
    return Layout(
        name="ws1d",
        attention=attention,
        table=P(ZYX, None),
        w_in=(P(None, ZYX),),  # EC_xyz
        w_kv=(P(None, kv),),
        w_out=(P(ZYX, None),),  # G_xyzE
        tokens=(P(None),),
        embed=(P(None, None, unreduced=frozenset(XYZ)), P(None, XYZ)),  # TE (partialsum-xyz) -> TE_xyz
        x=(P(None, XYZ), P(None, None)),  # TE_xyz -> TE
        h=(P(None, ZYX),),  # TC_xyz
        g=(P(None, ZYX),),  # TG_xyz
        out=(P(None, None, unreduced=frozenset(XYZ)), P(None, XYZ)),  # TE (partialsum-xyz) -> TE_xyz
        rows=(P(None, XYZ), P(None, None)),
        logits=(P(None, ZYX),),
        ids=(P(None),),
        **around_attention(attention, batch=(), heads=ZYX, partial=(), w_kv=kv, kv=kv, e=()),
    )


def ws2d(attention: Attention, kv: Axes) -> Layout:
    """2D weight-stationary: weights E_xC_yz stay, activations move along both dimensions. Paper, section 3.2.2."""
    kv_zy = tuple(a for a in kv if a != "x")
    return Layout(
        name="ws2d",
        attention=attention,
        table=P(ZY, "x"),
        w_in=(P("x", ZY),),  # E_xC_yz
        w_kv=(P("x", kv_zy),),
        w_out=(P(ZY, "x"),),  # G_yzE_x
        tokens=(P(None),),
        embed=(P(None, "x", unreduced=frozenset("yz")), P(None, XYZ)),  # TE_x (partialsum-yz) -> TE_xyz
        x=(P(None, XYZ), P(None, "x")),  # TE_xyz -> TE_x
        h=(P(None, ZY, unreduced=frozenset("x")), P(None, ZYX)),  # TC_yz (partialsum-x) -> TC_xyz
        g=(P(None, ZYX), P(None, ZY)),  # TG_xyz -> TG_yz
        out=(P(None, "x", unreduced=frozenset("yz")), P(None, XYZ)),  # TE_x (partialsum-yz) -> TE_xyz
        rows=(P(None, XYZ), P(None, "x")),
        logits=(P(None, ZY, unreduced=frozenset("x")), P(None, ZYX)),
        ids=(P(None),),
        **around_attention(attention, batch=(), heads=ZYX, partial=("x",), w_kv=kv_zy, kv=kv, e=("x",)),
    )


def wgx(attention: Attention, kv: Axes) -> Layout:
    """X weight-gathered: the batch is split over x, weights are gathered over x. Paper, section 3.2.3, figure A.2."""
    kv_zy = tuple(a for a in kv if a != "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgx",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY)),  # E_xC_yz -> EC_yz
        w_kv=(P("x", kv_zy), P(None, kv_zy)),
        w_out=(P(ZY, "x"), P(ZY, None)),  # G_yzE_x -> G_yzE
        embed=(
            P(None, "x", unreduced=frozenset("yz")),  # TE_x (partialsum-yz)
            P("x", None, unreduced=frozenset("yz")),  # T_xE (partialsum-yz)
            P("x", ("y", "z")),  # T_xE_yz
        ),
        x=(P("x", ("y", "z")), P("x", None)),  # T_xE_yz -> T_xE
        h=(P("x", ZY),),  # T_xC_yz
        g=(P("x", ZY),),  # T_xG_yz
        out=(P("x", None, unreduced=frozenset("yz")), P("x", ("y", "z"))),  # T_xE (partialsum-yz) -> T_xE_yz
        rows=(P("x", ("y", "z")), P("x", None), P(None, "x")),
        **around_attention(attention, batch=("x",), heads=ZY, partial=(), w_kv=kv_zy, kv=kv_zy, e=()),
    )


def wgxy(attention: Attention, kv: Axes) -> Layout:
    """XY weight-gathered: the batch is split over x and y, weights are gathered over both. Paper, section 3.2.3."""
    kv_zy = tuple(a for a in kv if a != "x")
    kv_z = tuple(a for a in kv if a == "z")
    yx = ("y", "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgxy",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY), P(None, "z")),  # E_xC_yz -> EC_yz -> EC_z
        w_kv=(P("x", kv_zy), P(None, kv_zy), P(None, kv_z)),
        w_out=(P(ZY, "x"), P(ZY, None), P("z", None)),  # G_yzE_x -> G_yzE -> G_zE
        embed=(
            P(None, "x", unreduced=frozenset("yz")),  # TE_x (partialsum-yz)
            P("y", "x", unreduced=frozenset("z")),  # T_yE_x (partialsum-z)
            P(yx, None, unreduced=frozenset("z")),  # T_xyE (partialsum-z)
            P(yx, "z"),  # T_xyE_z
        ),
        x=(P(yx, "z"), P(yx, None)),  # T_xyE_z -> T_xyE
        h=(P(yx, "z"),),  # T_xyC_z
        g=(P(yx, "z"),),  # T_xyG_z
        out=(P(yx, None, unreduced=frozenset("z")), P(yx, "z")),  # T_xyE (partialsum-z) -> T_xyE_z
        rows=(P(yx, "z"), P(yx, None), P("y", "x"), P(None, "x")),
        **around_attention(attention, batch=yx, heads=("z",), partial=(), w_kv=kv_z, kv=kv_z, e=()),
    )


def wgxyz(attention: Attention, kv: Axes) -> Layout:
    """XYZ weight-gathered: the batch is split over all chips, whole weights are gathered, and no activation moves.
    Paper, section 3.2.3."""
    kv_zy = tuple(a for a in kv if a != "x")
    return dataclasses.replace(
        ws2d("heads", kv),
        name="wgxyz",
        attention=attention,
        w_in=(P("x", ZY), P(None, ZY), P(None, None)),  # E_xC_yz -> EC_yz -> EC
        w_kv=(P("x", kv_zy), P(None, kv_zy), P(None, None)),
        w_out=(P(ZY, "x"), P(ZY, None), P(None, None)),  # G_yzE_x -> G_yzE -> GE
        embed=(
            P(None, "x", unreduced=frozenset("yz")),  # TE_x (partialsum-yz)
            P(ZY, "x"),  # T_yzE_x
            P(ZYX, None),  # T_xyzE
        ),
        x=(P(ZYX, None),),  # T_xyzE
        h=(P(ZYX, None),),
        g=(P(ZYX, None),),
        out=(P(ZYX, None),),
        rows=(P(ZYX, None), P(ZY, "x"), P(None, "x")),
        **around_attention(attention, batch=ZYX, heads=(), partial=(), w_kv=(), kv=(), e=()),
    )


def replicated(attention: Attention, kv: Axes) -> Layout:
    """Whole weights on every chip. A comparator, not in the paper.

    With `batch` attention each chip has its share of the batch, and the sampled tokens are all that moves. With
    `heads` attention only attention is split, over heads, and every chip repeats the rest.
    """
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
    """Weights and cache are placed as in `ws2d`; XLA's partitioner decides the rest. A comparator."""
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


def around_attention(attention: str, *, batch: Axes, heads: Axes, partial: Axes, w_kv: Axes, kv: Axes, e: Axes) -> dict:
    """The ladders around attention: `x_kv`, `kv`, `q`, `o` and the spec of `cache`.

    Args:
        attention: `heads`: H stays split over all axes of `heads`. `batch`: T takes over all of them, and H is whole.
            `batch-x`, `batch-xy`...: T takes over the axes named, which must end `heads`; H keeps the others.
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
    if kv_moved:  # like Q, from heads to batch; the axes that K and V are not split over then cut the batch further
        x_kv = (source,)
        kv_ladder = (
            P(batch, w_kv, unreduced=frozenset(partial)),
            P(batch + kv_moved, kv_kept, unreduced=frozenset(partial)),
            P(before, kv_kept, unreduced=frozenset(partial)),
            P(every, kv_kept),
        )
    else:  # as with multiquery: each chip computes K and V only for its own slice of the batch
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
    """The axes that change from heads to batch, in the order of `heads`."""
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
