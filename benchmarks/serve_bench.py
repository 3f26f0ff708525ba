"""The ladder from request-level batching to Orca, on one engine with one memory, on the same traces.

    toruslab serve-bench
    toruslab serve-bench --trace fixed:32:16 --scale 1
    toruslab serve-bench --trace long-mix --policies orca,chunked-64 --timeline
    toruslab serve-bench --stages 2 --policies request-level-early,orca@1,orca
    toruslab serve-bench --requests 10000 --seeds 1 --policies orca --rates 30

Every scheme (policy@batches in flight), rate and seed is a row of OUT/rows.jsonl, written when it is done; table and
pictures come beside them at the end. A run that was interrupted continues where it stopped when it is started again
with the same options; a finished one starts afresh. The weights are random: outputs are as long as the trace says.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import processes, serving_setting
from toruslab.benchmarks.runs.options import InputError, Parser, guarded, path
from toruslab.benchmarks.runs.rows import Row, RowFile, environment, line
from toruslab.benchmarks.runs.serving_setting import Scheme, ServingSetting
from toruslab.partitioning.plan.point import WEIGHTS
from toruslab.serving.scheduling.policies import POLICIES
from toruslab.serving.scheduling.reservation import RESERVATIONS
from toruslab.serving.traffic.traces import ARRIVALS, TRACES

if TYPE_CHECKING:
    from toruslab.serving.engine.engine import Engine

QUICK = {"model": "toy-s", "requests": 32, "seeds": 1, "max_bs": 8, "policies": "request-level-early,orca"}
"""What `--quick` takes for options that were left alone."""
RATES, TIMELINES = "rates.json", "timeline"


def parser() -> Parser:
    """The options."""
    p = Parser(prog="toruslab serve-bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", default="toy", help="preset or config.json (default: %(default)s)")
    p.add_argument("--checkpoint", metavar="DIR", help="model and weights from a folder, as in generate")
    p.add_argument("--slice", default="cpu:2x2x2", help="the chips of all stages (default: %(default)s)")
    p.add_argument("--stages", type=int, default=1, help="of the pipeline: equal layers, equal chips (default: 1)")
    p.add_argument("--mesh", help="extents of one stage's mesh (default: the slice's, one extent of it cut)")
    p.add_argument("--layout", default="ws1d+lean", help="of every stage (default: %(default)s)")
    p.add_argument("--attention", default="heads", help="default: %(default)s")
    p.add_argument("--weights", default="f32", help=f"{', '.join(WEIGHTS)} (default: %(default)s)")
    p.add_argument(
        "--policies",
        metavar="RUNG,...",
        help=f"schemes, POLICY or POLICY@N with N batches in flight (default N: the stages);\n{', '.join(POLICIES)},\n"
        "chunked-N (default: all but shortest-prompt-early, request-level-early with one more in flight,\n"
        "and chunked-N with N twice --max-bs)",
    )
    p.add_argument("--reservation", default="own", help=f"{', '.join(RESERVATIONS)} (default: %(default)s)")
    p.add_argument("--held", default="rows", help="rows or pages of the KV cache (default: %(default)s)")
    p.add_argument("--max-bs", type=int, default=16, help="requests in a batch (default: %(default)s)")
    p.add_argument("--slots", type=int, help="of the KV cache (default: --max-bs of the longest request)")
    p.add_argument("--trace", default="orca", help=f"{', '.join(TRACES)}, or fixed:P:O (default: %(default)s)")
    p.add_argument(
        "--scale",
        default="1/8:1/4",
        metavar="FACTOR",
        help="of the trace's lengths, or PROMPT:OUTPUT (default: %(default)s, for the small default model:\n"
        "prompts cost it about as much, beside decoding, as they cost the paper's 175B)",
    )
    p.add_argument("--arrivals", default="poisson", metavar="WHEN", help=f"{ARRIVALS} (default: %(default)s)")
    p.add_argument(
        "--rates",
        metavar="R,...",
        help="requests per second (default: around the capacity that a closed burst measures first;\n"
        "a file of --arrivals is taken as it is)",
    )
    p.add_argument("--requests", type=int, default=64, help="of each run (default: %(default)s)")
    p.add_argument(
        "--seeds", type=int, default=3, help="so many traces, the same for all schemes (default: %(default)s)"
    )
    p.add_argument(
        "--warm-up", type=float, default=0.2, metavar="SHARE", help="of the arrivals, left out (default: %(default)s)"
    )
    p.add_argument("--limits", metavar="TTFT:TPOT", help="seconds that 90%% of requests must meet: adds goodput")
    p.add_argument("--quick", action="store_true", help="two schemes of a smaller model, one seed: under a minute")
    p.add_argument("--timeline", action="store_true", help="also a trace of each scheme that ui.perfetto.dev opens")
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, as it was started")
    p.add_argument("--out", type=path, default=Path("results/serve"), help="folder (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="rows on standard output instead of a table")
    return p


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options; `--quick` fills in those that were left alone."""
    options, given = run_folder.options_of(parser(), argv, QUICK), parser().given(argv)
    for name in given:
        if getattr(options, name) == "":
            raise InputError(f"{name}='' must not be empty")
    if options.checkpoint and "model" in given:
        raise InputError("--model stands beside --checkpoint, which says which model it is; leave one of them out")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a run failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = options_of(argv)
    if options.resume:
        argv = [*run_folder.unfinished(options.out), "--out", str(options.out), *(["--json"] if options.json else [])]
        options = options_of(argv)
    try:
        setting = serving_setting.read(options)
        own = (setting.arrivals.rate,) if setting.arrivals.rate else None
        asked = serving_setting.rates(options.rates) if options.rates else own
        processes.join(processes.platform_of(setting.slice, None), setting.slice.n_chips, 1)
        _attached(setting)
        _fits(setting)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    settings = setting.to_json() | {"rungs": [scheme.name for scheme in setting.schemes], "rates": asked}
    # as JSON has it: what is read back from the folder must be equal
    settings = json.loads(json.dumps(settings))
    with run_folder.open_run(options.out.resolve(), settings, argv, of_a_run, RATES) as rows:
        ladder = Ladder(options, rows, setting, asked)
        failed = ladder.climb()
        ladder.report()
        if not failed:
            (ladder.folder / "finished").touch()
    for row in failed:
        print(
            f"failed: {row['rung']}, {row['rate_per_s']} requests/s, seed {row['seed']}: {row['error']}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _attached(setting: ServingSetting) -> None:
    """Refuses a slice that is not here."""
    from toruslab.partitioning.torus.mesh import attach

    try:
        attach((setting.slice.n_chips, 1, 1), chip=setting.slice.chip)
    except RuntimeError as error:
        raise ValueError(f"slice={setting.slice}: {str(error).splitlines()[0]}") from None


def _fits(setting: ServingSetting) -> None:
    """Refuses what the chips' memory cannot hold: a host that runs out of it ends the process without a word."""
    import jax

    from toruslab.benchmarks.measure.chip_file import memory_of

    device, n = jax.devices()[0], setting.slice.n_chips
    there = memory_of(device, jax.device_count()) * n
    if setting.least_bytes > there:
        raise ValueError(
            f"model={setting.model!r}, max_bs={setting.max_bs}, {setting.rows} rows of {setting.trace.longest} tokens: "
            f"weights and KV cache take at least {setting.least_bytes / 1e9:.1f} GB, and the {n} chips have "
            f"{there / 1e9:.1f}"
        )


def of_a_run(row: Row) -> None:
    """Refuses what is no row of this command."""
    if not isinstance(row["rung"], str) or not isinstance(row["serving"], dict):
        raise TypeError
    for field in ("rate_per_s", "seed"):
        float(row[field])


class Ladder:
    """All runs, those that an interrupted command has left included.

    Args:
        options: of the command.
        rows: of its folder.
        setting: read from the options.
        asked: the rates, if they were given.
    """

    def __init__(
        self, options: argparse.Namespace, rows: RowFile, setting: ServingSetting, asked: tuple[float, ...] | None
    ):
        self.setting, self.folder, self._json = setting, options.out.resolve(), options.json
        self._asked, self._timeline = asked, options.timeline
        self.rows = rows
        self.environment = environment(0)
        if self._json:
            for row in self.rows.rows:
                print(line(row), flush=True)

    def climb(self) -> list[Row]:
        """Makes the runs that are missing; answers those that failed."""
        setting = self.setting
        done = {_key(row) for row in self.rows.rows if "error" not in row}
        todo = self._rates is None or any(_of(*run) not in done for run in serving_setting.runs(setting, self._rates))
        if not todo and not self._missing():
            return []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        failed: list[Row] = []
        with (
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar,
            self._engine(bar) as made,
        ):
            rates = self._rates_of(made)
            runs = list(serving_setting.runs(setting, rates))
            task = bar.add_task("runs", total=len(runs))
            for scheme, rate, seed in runs:
                bar.update(task, description=f"{scheme.name}, {rate:g}/s, seed {seed}")
                if _of(scheme, rate, seed) not in done:
                    row = self._run(made, scheme, rate, seed)
                    failed += [row] if "error" in row else []
                bar.advance(task)
            for scheme in self._missing():
                from toruslab.benchmarks.measure.serving_run import timeline

                bar.update(task, description=f"timeline of {scheme.name}")
                drawn = timeline(setting, made, scheme, rates[len(rates) // 2])
                self._drawn(scheme).parent.mkdir(exist_ok=True)
                _write(self._drawn(scheme), drawn)
        return failed

    def report(self) -> None:
        """Prints the table, unless rows were asked for; writes it and the pictures."""
        from toruslab.benchmarks.reports.serving_report import show, write

        traces = {r.name: _read(self._drawn(r)) for r in self.setting.schemes if self._drawn(r).exists()}
        if not self._json:
            show(self.rows.rows, Console(width=None if sys.stdout.isatty() else 140))
        for written in write(self.rows.rows, traces, self.folder):
            print(written, file=sys.stderr if self._json else sys.stdout)

    @contextmanager
    def _engine(self, bar: Progress) -> "Iterator[Engine]":
        """Compiled, warm, and closed at the end."""
        from toruslab.benchmarks.measure.serving_run import engine, warm

        task = bar.add_task("compiling", total=None)
        try:
            opened = engine(self.setting, lambda done, of: bar.update(task, completed=done, total=of))
        except ValueError as error:
            raise InputError(str(error)) from None
        with opened as made:
            bar.update(task, description="warming up")
            warm(self.setting, made)
            bar.remove_task(task)
            yield made

    def _rates_of(self, made: "Engine") -> tuple[float, ...]:
        from toruslab.benchmarks.measure.serving_run import capacity

        found = self._rates
        if found is None:
            measured = capacity(self.setting, made)
            found = serving_setting.rates_around(measured)
            _write(self.folder / RATES, {"capacity_per_s": measured, "rates_per_s": found})
        return found

    @property
    def _rates(self) -> tuple[float, ...] | None:
        """Those that were asked for, or that the run began with."""
        kept = self.folder / RATES
        if self._asked or not kept.exists():
            return self._asked
        try:
            return tuple(map(float, _read(kept)["rates_per_s"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{kept} does not hold the run's rates; mend it, or choose another --out") from None

    def _run(self, made: "Engine", scheme: Scheme, rate: float, seed: int) -> Row:
        from toruslab.benchmarks.measure.serving_run import Invalid, measure

        numbers: dict[str, Any]
        try:
            numbers = measure(self.setting, made, scheme, rate, seed)
            line(numbers)  # what JSON does not have would be no row
        except Invalid as error:
            numbers = {"error": str(error), **error.numbers}
        except Exception as error:  # a run that fails is a row with its error; the others go on
            said = str(error).splitlines()[0] if str(error) else ""
            numbers = {"error": f"{type(error).__name__}: {said}"}
        row = {
            "serving": self.setting.to_json(),
            "source": "measured",
            "rung": scheme.name,
            "request_level": scheme.is_request_level,
            "n_workers": scheme.n_workers,
            "rate_per_s": rate,
            "seed": seed,
            **numbers,
            "environment": self.environment,
        }
        self.rows.add(row)
        if self._json:
            print(line(row), flush=True)
        return row

    def _drawn(self, scheme: Scheme) -> Path:
        return self.folder / TIMELINES / f"{scheme.name}.json"

    def _missing(self) -> list[Scheme]:
        """Rungs whose timeline is wanted and not there."""
        return [scheme for scheme in self.setting.schemes if self._timeline and not self._drawn(scheme).exists()]


def _write(file: Path, what: Any) -> None:
    """Whole or not at all: an interrupted run must find nothing that is half of a file."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(what, allow_nan=False))
    part.replace(file)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise InputError(f"{file} is damaged; remove it, or choose another --out") from None


def _key(row: Row) -> tuple[str, float, int]:
    return row["rung"], row["rate_per_s"], row["seed"]


def _of(scheme: Scheme, rate: float, seed: int) -> tuple[str, float, int]:
    return scheme.name, rate, seed


if __name__ == "__main__":
    sys.exit(guarded(main))
