"""From request-level batching to Orca: batching schemes on one engine with one memory, on the same traces.

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

from toruslab.benchmarks.runs import folder as run_folder
from toruslab.benchmarks.runs import output, processes, serving_options, serving_setting
from toruslab.benchmarks.runs.kept import write_whole
from toruslab.benchmarks.runs.parser import InputError, Parser, at_least, guarded, path, refused
from toruslab.benchmarks.runs.progress import Progress, progress
from toruslab.benchmarks.runs.rows import Row, environment, failure, line
from toruslab.benchmarks.runs.serving_setting import MOST, Scheme, ServingSetting
from toruslab.serving.scheduling.policies import POLICIES

if TYPE_CHECKING:
    from toruslab.serving.engine.engine import Engine

QUICK = {"model": "toy-s", "requests": 32, "seeds": 1, "max_bs": 8, "policies": "request-level-early,orca"}
"""The values of `--quick` for options that are not given."""
RATES, TIMELINES = "rates.json", "timeline"


def parser() -> Parser:
    """The options."""
    p = Parser("toruslab serve-bench", __doc__)
    serving_options.add(p, model="toy", attention="heads", weights="f32", max_bs=16, most_bs=MOST["max_bs"])
    p.add_argument("--checkpoint", metavar="DIR", help="model and weights from a folder, as in generate")
    p.add_argument("--slice", default="cpu:2x2x2", help="the chips of all stages")
    p.add_argument("--mesh", help="extents of one stage's mesh (default: the slice's, one extent of it cut)")
    p.add_argument("--layout", default="ws1d+lean", help="of every stage")
    p.add_argument(
        "--policies",
        metavar="SCHEME,...",
        help="schemes, POLICY or POLICY@N with N batches in flight (default N: the stages);\n"
        f"{', '.join(POLICIES)},\n"
        "chunked-N (default: all but shortest-prompt-early, request-level-early with one more in flight,\n"
        "and chunked-N with N twice --max-bs)",
    )
    p.add_argument("--held", default="rows", help="rows or pages of the KV cache")
    p.add_argument(
        "--slots",
        type=at_least(1, MOST["slots"]),
        help="tokens of the KV cache (default: --max-bs of the longest request)",
    )
    p.add_argument(
        "--scale",
        default="1/8:1/4",
        metavar="FACTOR",
        help="of the trace's lengths, or PROMPT:OUTPUT (default: %(default)s, for the small default model:\n"
        "prompts cost it about as much, beside decoding, as they cost the paper's 175B)",
    )
    p.add_argument(
        "--rates",
        metavar="R,...",
        help="requests per second (default: around the capacity that a closed burst measures first;\n"
        "a file of --arrivals is taken as it is)",
    )
    p.add_argument("--requests", type=at_least(2, MOST["requests"]), default=64, help="of each run")
    p.add_argument(
        "--seeds", type=at_least(1, MOST["seeds"]), default=3, help="so many traces, the same for all schemes"
    )
    p.add_argument("--quick", action="store_true", help="two schemes of a smaller model, one seed: under a minute")
    p.add_argument("--timeline", action="store_true", help="also a trace of each scheme that ui.perfetto.dev opens")
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, as it was started")
    p.add_argument("--out", type=path, default=Path("results/serve"), help="folder")
    return p


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the values of `--quick`."""
    options, given = run_folder.options_of(parser(), argv, QUICK), parser().given(argv)
    serving_options.refuse_empty(options, given)
    if options.checkpoint and "model" in given:
        raise InputError("--model stands beside --checkpoint, which says which model it is; leave one of them out")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 when a run failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = run_folder.as_started(options_of(argv), argv)
    options = options_of(argv)
    with refused():
        setting = serving_setting.read(options)
        asked = serving_setting.rates(options, setting)
        processes.attached(setting.slice, (setting.slice.n_chips, 1, 1))
        _check_memory(setting)
    settings = setting.to_json() | {"rungs": [scheme.name for scheme in setting.schemes], "rates": asked}
    settings = json.loads(json.dumps(settings))  # equal to what is read back from the folder
    with run_folder.open_run(options, settings, argv, of_a_run, others=(RATES,)) as folder:
        failed = _Runs(options, folder, setting, asked).make()
        _report(options, folder, setting)
        if not failed:
            folder.finish()
    return output.failures(failed, lambda row: f"{row['rung']}, {row['rate_per_s']} requests/s, seed {row['seed']}: ")


def _check_memory(setting: ServingSetting) -> None:
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


def _report(options: argparse.Namespace, folder: run_folder.RunFolder, setting: ServingSetting) -> None:
    """Prints the table, unless rows were asked for; writes it and the pictures."""
    from toruslab.benchmarks.reports.serving_report import show, write

    drawn = {scheme.name: _timeline_of(folder, scheme) for scheme in setting.schemes}
    timelines = {name: _read(file) for name, file in drawn.items() if file.exists()}
    if not options.json:
        show(folder.rows, output.console(140))
    output.written(write(folder.rows, timelines, folder.path), options.json)


class _Runs:
    """Makes the runs that an interrupted command has not left.

    Args:
        options: of the command.
        folder: of the rows.
        setting: read from the options.
        asked: the rates, if they were given.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        folder: run_folder.RunFolder,
        setting: ServingSetting,
        asked: tuple[float, ...] | None,
    ):
        self.options, self.folder, self.setting, self.asked = options, folder, setting, asked
        self.environment = environment(0)

    def make(self) -> list[Row]:
        """Makes the missing runs and timelines; returns the rows that failed."""
        setting = self.setting
        done = {(r["rung"], r["rate_per_s"], r["seed"]) for r in self.folder.rows if "error" not in r}
        rates = self._kept_rates()
        missing = [s for s in setting.schemes if not _timeline_of(self.folder, s).exists()]
        undrawn = missing if self.options.timeline else []
        runs = serving_setting.runs(setting, rates or ())
        if rates and not undrawn and all((s.name, rate, seed) in done for s, rate, seed in runs):
            return []
        failed: list[Row] = []
        with progress("toruslab serve-bench", what="compiling") as work, self._engine(work) as engine:
            rates = rates or self._measured_rates(engine)
            runs = list(serving_setting.runs(setting, rates))
            work.begin("runs", total=len(runs))
            for scheme, rate, seed in runs:
                work.advance(0, f"{scheme.name}, {rate:g}/s, seed {seed}")
                if (scheme.name, rate, seed) not in done:
                    row = self._run(engine, scheme, rate, seed)
                    failed += [row] if "error" in row else []
                work.advance()
            for scheme in undrawn:
                from toruslab.benchmarks.measure.serving_run import timeline

                work.begin(f"timeline of {scheme.name}")
                drawn = timeline(setting, engine, scheme, rates[len(rates) // 2])
                _write(_timeline_of(self.folder, scheme), drawn)
        return failed

    @contextmanager
    def _engine(self, work: Progress) -> "Iterator[Engine]":
        """Compiled, warm, and closed at the end."""
        from toruslab.benchmarks.measure.serving_run import engine, warm

        with refused():
            opened = engine(self.setting, work.reach)
        with opened as made:
            work.begin("warming up")
            warm(self.setting, made)
            yield made

    def _kept_rates(self) -> tuple[float, ...] | None:
        """The rates that were asked for, or that the interrupted run has measured."""
        kept = self.folder.path / RATES
        if self.asked or not kept.exists():
            return self.asked
        try:
            return tuple(map(float, _read(kept)["rates_per_s"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{kept} does not hold the run's rates; mend it, or choose another --out") from None

    def _measured_rates(self, engine: "Engine") -> tuple[float, ...]:
        from toruslab.benchmarks.measure.serving_run import capacity

        measured = capacity(self.setting, engine)
        found = serving_setting.rates_around(measured)
        _write(self.folder.path / RATES, {"capacity_per_s": measured, "rates_per_s": found})
        return found

    def _run(self, engine: "Engine", scheme: Scheme, rate: float, seed: int) -> Row:
        from toruslab.benchmarks.measure.serving_run import Invalid, measure

        numbers: dict[str, Any]
        try:
            numbers = measure(self.setting, engine, scheme, rate, seed)
            line(numbers)  # refuses numbers that JSON does not have
        except Invalid as error:
            numbers = {"error": str(error), **error.numbers}
        except Exception as error:  # a run that fails is a row with its error; the others go on
            numbers = failure(error)
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
        self.folder.add(row)
        return row


def _timeline_of(folder: run_folder.RunFolder, scheme: Scheme) -> Path:
    return folder.path / TIMELINES / f"{scheme.name}.json"


def _write(file: Path, what: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    write_whole(file, json.dumps(what, allow_nan=False))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise InputError(f"{file} is damaged; remove it, or choose another --out") from None


if __name__ == "__main__":
    sys.exit(guarded(main))
