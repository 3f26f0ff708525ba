"""What a call of the program costs beside its steps, by how many decode steps one call takes.

    python -m benchmarks.studies.dispatch
    python -m benchmarks.studies.dispatch --steps 1,4,16 --batch 16 --json

The bench's own model (4 layers) on 8 fake CPU devices, ws2d/batch. In one interleaved run: the decode step with so many
steps in a call, and for each of them a program of the same arguments and results that does nothing, called and waited
for in the same way. Overhead is the time of the empty call as a share of the whole one, repetition by repetition.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.options import InputError, Parser, guarded
from toruslab.models.weights import corpus
from toruslab.partitioning.plan.point import Point

WANTED = 0.02
"""The share of a step that dispatch may take, with several steps in a call."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(
        prog="python -m benchmarks.studies.dispatch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--steps", default="1,4,16", help="in one call (default: %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    p.add_argument("--context", type=int, default=256, help="default: %(default)s")
    p.add_argument("--layout", default="ws2d", help="default: %(default)s")
    p.add_argument("--attention", default="batch", help="default: %(default)s")
    p.add_argument("--repeats", type=int, default=40, help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", action="store_true", help="one JSON row a number of steps on standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options = parser().parse_args(argv)
    for field in ("repeats", "seed"):
        if getattr(options, field) < (field == "repeats"):
            raise InputError(f"{field}={getattr(options, field)} must be at least {int(field == 'repeats')}")
    points = _points(options)
    processes.join("cpu", 8, 1)

    from toruslab.benchmarks.measure.contenders import prepare
    from toruslab.benchmarks.measure.timing import interleaved
    from toruslab.benchmarks.runs.rows import environment

    contenders = [prepare(p, options.seed, corpus.read()) for p in points]
    steps = [s for c in contenders for s in (c.step, empty(c.point))]
    timings = interleaved(steps, repeats=options.repeats, budget_s=20)
    rows = []
    for contender, called, nothing in zip(contenders, timings[::2], timings[1::2], strict=True):
        n = contender.point.steps_per_call
        shares = [a / b for a, b in zip(nothing.times_s, called.times_s, strict=False)]
        rows.append(
            {
                "point": contender.point.to_json(),
                "source": "measured",
                **called.per(n).numbers(),
                "call_s": called.median_s,
                "empty_call_s": nothing.median_s,
                "dispatch_share": statistics.median(shares),
                "dispatch_share_quartiles": statistics.quantiles(shares, n=4)[::2] if len(shares) > 1 else shares * 2,
            }
        )
    if options.json:
        known = environment(options.seed)
        print("\n".join(json.dumps(row | {"environment": known}) for row in rows))
    else:
        show(rows)
    return 0


def _points(options: argparse.Namespace) -> list[Point]:
    try:
        each = [int(n) for n in options.steps.split(",")]
    except ValueError:
        raise InputError(f"steps={options.steps!r} must be integers with commas between them") from None
    fields = {"model": "toy", "slice": "cpu:2x2x2", "phase": "decode", "weights": "f32"}
    fields |= {name: getattr(options, name) for name in ("batch", "context", "layout", "attention")}
    try:
        return [Point.from_json(fields | {"steps_per_call": n}) for n in each]
    except ValueError as error:
        raise InputError(str(error)) from None


def empty(point: Point):
    """A step that calls a program with the arguments and results of a point's, which does nothing, and waits for it."""
    from toruslab.benchmarks.measure.timing import idle, stepper
    from toruslab.models.decoder.parameters import initial
    from toruslab.models.programs.program import Program
    from toruslab.partitioning.torus.mesh import attach

    layout = point.layout_value
    mesh = attach(point.mesh_shape, chip=point.chip, explicit=layout.explicit)
    program = Program(config=point.config, layout=layout, mesh=mesh, pass_=point.pass_)
    params = initial(point.config, layout, mesh, dtype=program.dtype, int8=program.int8)
    return stepper(program, idle(program), params, corpus.prompts(point.batch, 1, 0, corpus.read()), point.start)


def show(rows: Sequence[dict]) -> None:
    """A line for every number of steps."""
    headings = f"{'steps a call':>12}{'ms a step':>11}{'half within':>16}{'empty call, ms':>16}"
    print(f"{headings}   dispatch's share (half within)")
    for row in rows:
        (low, high), (q1, q3) = row["quartiles_s"], row["dispatch_share_quartiles"]
        much = " above 2%" if row["dispatch_share"] > WANTED else ""
        print(
            f"{row['point'].get('steps_per_call', 1):12}{row['latency_s'] * 1e3:11.2f}"
            f"{f'{low * 1e3:.2f}..{high * 1e3:.2f}':>16}{row['empty_call_s'] * 1e3:16.3f}"
            f"   {row['dispatch_share']:.2%} ({q1:.2%}..{q3:.2%}){much}"
        )


if __name__ == "__main__":
    sys.exit(guarded(main))
