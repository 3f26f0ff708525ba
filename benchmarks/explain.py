"""One layer's ladder in the paper's notation: every tensor, every step, and what each step moves.

    toruslab explain --model palm-540b-h64 --slice v4:4x4x4 --batch 512 --context 2048 --layout ws2d --weights bf16
    toruslab explain '{"model":"toy","slice":"cpu:2x2x2",...}' --json

`BLE_xyz` is a tensor of B*L tokens by E, split over all three axes along E; `(partialsum-x)` says that the chips along
x hold terms of a sum. In a training step the gradients follow, back over the same ladders. Touches no device.
"""

import math
import sys
from collections.abc import Sequence

from rich.console import Console

from toruslab.benchmarks.runs import output, point_options
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded, refused
from toruslab.partitioning.cost.explain import steps
from toruslab.partitioning.plan.point import Point


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    p = Parser("toruslab explain", __doc__)
    point_options.add(p, model="toy", slice_="cpu:2x2x2", batch=8, context=256, weights="f32")
    p.add_argument("--json", action="store_true", help="one JSON object a step on standard output")
    options = p.parse_args(argv)
    point = point_options.read(options)
    if not point.layout_value.explicit:
        raise InputError(f"layout={point.layout!r} constrains nothing, so there is no ladder: XLA decides (see bench)")
    with refused():  # a mesh that cannot be laid over the slice's torus has no seconds
        rows = steps(point)
    if options.json:
        output.print_rows({"point": point.to_json(), "source": "analytic", **row} for row in rows)
    else:
        _show(point, rows)
    return 0


def _show(point: Point, rows: list[dict]) -> None:
    x, y, z = point.mesh_shape
    trained = point.phase == "train"
    title = f"{point.layout}/{point.attention}: {point.model}, {point.phase}, {point.batch} x {point.length} tokens, "
    title += f"mesh X={x} Y={y} Z={z} ({point.slice}), weights {point.weights}"
    title += f", cache {point.cache}" if point.cache else ""
    table = output.table((), title=title, title_style="bold")
    for name in ("part", "scope", "tensor", "from", "move", "to")[0 if trained else 1 :]:
        table.add_column(name, no_wrap=name != "tensor")
    for name in ("kB a chip", "us", "times"):
        table.add_column(name, justify="right")
    for row in rows:
        move = f"{'+ ' if row['rides'] else ''}{row['kind']}({''.join(row['axes'])})" if row["kind"] else ""
        move += f" in {row['sends']} sends" if "sends" in row else ""
        volume = f"{row['bytes'] / 1e3:,.2f}" if row["bytes"] else ""
        taken = "" if row["seconds"] is None else f"{row['seconds'] * 1e6:,.1f}"
        named = [row[k] for k in ("part", "scope", "tensor", "from")[0 if trained else 1 :]]
        table.add_row(*named, move, row["to"] if move else "", volume, taken, str(row["count"]))
    console = Console(width=max(155 if trained else 140, Console().width))
    console.print(table)
    moved = [r for r in rows if r["kind"] not in (None, "slice", "pad")]
    in_layer = [r for r in moved if r["in_layer"]]
    n_layer, n_pass = (math.fsum(r["count"] for r in some if not r["rides"]) for some in (in_layer, moved))
    console.print(
        f"{n_layer / point.config.n_layers:.0f} collectives a layer, "
        f"{sum(r['bytes'] for r in in_layer) / 1e3:,.2f} kB a chip a layer; {n_pass:.0f} collectives, "
        f"{sum(r['bytes'] * r['count'] for r in moved) / 1e3:,.2f} kB a chip in the pass."
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
