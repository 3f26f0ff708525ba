"""What a call of the program costs beside its steps, by how many decode steps one call takes.

    python -m benchmarks.studies.dispatch
    python -m benchmarks.studies.dispatch --steps 1,4,16 --batch 16 --json

The bench's own model (4 layers) on 8 fake CPU devices, ws2d/batch. In one interleaved run: the decode step with so many
steps in a call, and for each of them a program of the same arguments and results that does nothing, called and waited
for in the same way. Overhead is the time of the empty call as a share of the whole one, repetition by repetition.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from toruslab.benchmarks.runs import processes
from toruslab.benchmarks.runs.parser import InputError, Parser, guarded
from toruslab.benchmarks.runs.rows import Row
from toruslab.benchmarks.studies import ratios
from toruslab.models.weights import corpus
from toruslab.partitioning.plan.point import Point

WANTED = 0.02
"""The share of a step that dispatch may take, with several steps in a call."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser("python -m benchmarks.studies.dispatch", __doc__)
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
    """Runs the study; returns 1 when a point failed."""
    options = parser().parse_args(argv)
    ratios.at_least(options, repeats=1, seed=0)
    fields = {"model": "toy", "slice": "cpu:2x2x2", "phase": "decode", "weights": "f32"}
    fields |= {name: getattr(options, name) for name in ("batch", "context", "layout", "attention")}
    try:
        points = [Point.from_json(fields | {"steps_per_call": n}) for n in ratios.integers("steps", options.steps)]
    except ValueError as error:
        raise InputError(str(error)) from None
    processes.join("cpu", 8, 1)

    from toruslab.benchmarks.runs.rows import environment

    timed = ratios.measured(points, repeats=options.repeats, budget_s=20, seed=options.seed, beside=empty)
    rows = [row(x) for x in timed if not x.error]
    if options.json:
        known = environment(options.seed)
        print("\n".join(json.dumps(each | {"environment": known}) for each in rows))
    else:
        show(rows)
    return ratios.failures(timed, [f"{p.steps_per_call} steps a call" for p in points])


def row(x: ratios.TimedPoint) -> Row:
    """Seconds of a step, of a whole call and of the empty one, and the share of the latter."""
    assert x.timing and x.beside
    low, share, high = ratios.shares(x.beside.times_s, x.timing.times_s)
    return {
        "point": x.point.to_json(),
        "source": "measured",
        **x.timing.per(x.point.steps_per_call).numbers(),
        "call_s": x.timing.median_s,
        "empty_call_s": x.beside.median_s,
        "dispatch_share": share,
        "dispatch_share_quartiles": [low, high],
    }


def empty(point: Point) -> Callable[[], None]:
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


def show(rows: Sequence[Row]) -> None:
    """A line for every number of steps."""
    headings = f"{'steps a call':>12}{'ms a step':>11}{'half within':>16}{'empty call, ms':>16}"
    print(f"{headings}   dispatch's share (half within)")
    for each in rows:
        (low, high), (q1, q3) = each["quartiles_s"], each["dispatch_share_quartiles"]
        much = " above 2%" if each["dispatch_share"] > WANTED else ""
        print(
            f"{each['point'].get('steps_per_call', 1):12}{each['latency_s'] * 1e3:11.2f}"
            f"{f'{low * 1e3:.2f}..{high * 1e3:.2f}':>16}{each['empty_call_s'] * 1e3:16.3f}"
            f"   {each['dispatch_share']:.2%} ({q1:.2%}..{q3:.2%}){much}"
        )


if __name__ == "__main__":
    sys.exit(guarded(main))
