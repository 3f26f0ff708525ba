"""The engine runs the scheduler's batches on the partitioned decoder.

It cuts each batch into passes of fixed sizes and hands each request its token. The scheduler decides which requests run
together, `models.decoder.mixed` defines a pass, `serving.engine.stage` the program of one stage. All programs are
compiled when the engine is made.

Each stage has a thread that dispatches its passes, so that the scheduler never waits for a device. Control data goes
from the host to every stage as soon as a pass is made; activations go from stage to stage. The host waits for the
tokens of the last stage only [Orca, section 4.2]. `Engine.finish` raises what a thread raised. The threads end with
`Engine.close`, or when the engine is garbage.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np

from toruslab.models.decoder.mixed import Control, MixedForm
from toruslab.models.weights.packing import layers
from toruslab.serving.engine.pages import Held, Pages
from toruslab.serving.engine.stage import Stage
from toruslab.serving.scheduling.batch import Batch, Work

Ids = np.ndarray
Spans = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The static sizes of an engine.

    Args:
        rows: most requests at once: max_bs * n_workers.
        n_slots: most positions that the scheduler reserves at once.
        longest: most positions of one request.
        singles: numbers of single tokens that a part of a pass is padded to, ascending. A batch with more than the last
            takes several passes.
        pieces: the same for pieces of prompts.
        length: tokens in a piece.
        page: positions in a page of the cache.
        held: when requests take pages, see `serving.engine.pages.Held`.

    Raises:
        ValueError: field, value and rule.
    """

    rows: int
    n_slots: int
    longest: int
    singles: tuple[int, ...] = (8, 32)
    pieces: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    length: int = 16
    page: int = 64
    held: Held = "rows"

    def __post_init__(self):
        for field in ("rows", "n_slots", "longest", "length", "page"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for field, least in (("singles", 1), ("pieces", 0)):
            sizes = getattr(self, field)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < least or sizes[-1] < 1:
                raise ValueError(f"{field}={sizes} must be ascending sizes of at least {least}, and end with some")
        if self.held not in get_args(Held):
            raise ValueError(f"held={self.held!r} must be {' or '.join(get_args(Held))}")


@dataclass(kw_only=True)
class Flight:
    """A batch in flight.

    Args:
        batch: of the scheduler.
        ids: the sampled ids of each pass.
        emitting: (request, pass, index in the pass's ids) for each request that gets a token.
        spans: by pass and stage, from when to when the stage had the pass.
        tokens: that the passes compute, padding included.
    """

    batch: Batch
    ids: list[Future]
    emitting: list[tuple[int, int, int]]
    spans: list[list[Future]]
    tokens: int = 0

    @property
    def ready(self) -> bool:
        """Whether all of its tokens have come out."""
        return all(ids.done() for ids in self.ids)


@dataclass(frozen=True, kw_only=True)
class PartWork:
    """The work of one part in a batch or a pass: single tokens, and pieces of prompts."""

    singles: list[Work]
    pieces: list[Work]


class Engine(AbstractContextManager["Engine"]):
    """The stages of one model and the caches of its requests. A context manager that closes itself.

    Args:
        stages: in their order, together all layers. All of them must split attention's batch into the same number of
            parts.
        packed: the model's parameters, nested as `models.weights.packing.pack` does, quantised if the stages are int8.
        sizes: see `Sizes`.
        compiled: called after each compiled program with (programs done, all programs).

    Raises:
        ValueError: the stages do not fit together.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        packed: Mapping[str, Any],
        sizes: Sizes,
        *,
        compiled: Callable[[int, int], None] = lambda done, of: None,
    ):
        self.stages, self.sizes = tuple(stages), sizes
        self.parts = _check(stages, packed)
        self._senders, self._watchers = (
            [ThreadPoolExecutor(1, f"{what}-{i}") for i in range(len(self.stages))] for what in ("send", "watch")
        )
        self._closed = False
        self._lost: set[int] = set()  # stages with a failed pass, which may have lost the donated cache
        self.clear()
        self._pools = [stage.pool(self.pages.n_pages, sizes.page) for stage in self.stages]
        firsts = itertools.accumulate((stage.config.n_layers for stage in self.stages[:-1]), initial=0)
        self._params = [
            stage.params(layers(packed, first, stage.config.n_layers))
            for stage, first in zip(self.stages, firsts, strict=True)
        ]
        self._programs: dict[MixedForm, list[Any]] = {}
        self._compile(compiled)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads, after the passes that were dispatched. No run can follow."""
        self._closed = True
        for thread in (*self._senders, *self._watchers):
            thread.shutdown(cancel_futures=True)

    def clear(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Forgets all requests. `clock` returns the current time in seconds, for the spans of stages.

        Waits for passes that a failed run left in flight, and makes a new cache for one that it lost.

        Raises:
            RuntimeError: the engine is closed.
        """
        if self._closed:
            raise RuntimeError("the engine is closed; make another one")
        for thread in (*self._senders, *self._watchers):  # a thread runs its tasks in order
            thread.submit(lambda: None).result()
        sizes = self.sizes
        self.pages = Pages(
            parts=self.parts,
            rows=sizes.rows,
            n_slots=sizes.n_slots,
            page=sizes.page,
            longest=sizes.longest,
            held=sizes.held,
        )
        self.clock = clock
        self._tokens: dict[int, Ids] = {}
        self._length: dict[int, int] = {}
        self._left_s = [0.0] * len(self.stages)
        self._sending_s = [0.0] * len(self.stages)  # each counted by its own thread
        for i in self._lost:
            for lost in jax.tree.leaves(self._pools[i]):  # free its memory before the new cache takes it
                lost.delete()
            self._pools[i] = self.stages[i].pool(self.pages.n_pages, sizes.page)
        self._lost.clear()

    @property
    def sending_s(self) -> float:
        """Processor seconds that dispatching passes took since `clear`, summed over stages."""
        return sum(self._sending_s)

    def _form(self, singles: int, pieces: int) -> MixedForm:
        sizes = self.sizes
        return MixedForm(
            parts=self.parts,
            singles=singles,
            pieces=pieces,
            length=sizes.length,
            pages=self.pages.per_request,
            page=sizes.page,
        )

    def _compile(self, compiled: Callable[[int, int], None]) -> None:
        forms = [self._form(s, p) for s in self.sizes.singles for p in self.sizes.pieces]
        of = len(forms) * len(self.stages)
        for n, form in enumerate(forms):
            programs = self._programs[form] = []
            for i, (stage, pool) in enumerate(zip(self.stages, self._pools, strict=True)):
                programs.append(stage.compile(form, pool))
                compiled(n * len(self.stages) + i + 1, of)

    def admit(self, request: int, prompt: Ids, max_output: int) -> None:
        """Registers a request by its id, its prompt [L] and its most output tokens, before it is in a batch.

        Raises:
            ValueError: the prompt is empty, or prompt and output exceed `sizes.longest`.
        """
        if len(prompt) == 0:
            raise ValueError(f"request {request}: its prompt is empty")
        if len(prompt) + max_output > self.sizes.longest:
            raise ValueError(
                f"request {request}: {len(prompt)} tokens and {max_output} new ones exceed longest={self.sizes.longest}"
            )
        tokens = np.zeros(len(prompt) + max_output, np.int32)
        tokens[: len(prompt)] = prompt
        self._tokens[request], self._length[request] = tokens, len(prompt)

    def tokens(self, request: int, prompt: int) -> Ids:
        """The output ids of a request so far, given the number of prompt tokens."""
        return self._tokens[request][prompt : self._length[request]].copy()

    def forget(self, request: int) -> None:
        """Drops a request's tokens. Its pages are freed when the scheduler releases them."""
        del self._tokens[request], self._length[request]

    def start(self, batch: Batch) -> Flight:
        """Dispatches a batch to the stages and returns at once."""
        for request in batch.released:
            if request in self.pages:
                self.pages.release(request)
        for work in batch.work:
            if work.request not in self.pages:
                self.pages.admit(work.request)
            self.pages.reach(work.request, work.start + work.length)
        flight = Flight(batch=batch, ids=[], emitting=[], spans=[])
        for form, control, emitting in self.passes(batch.work):
            flight.emitting += [(request, len(flight.ids), place) for request, place in emitting]
            flight.tokens += form.parts * form.tokens
            # sent[0] -----> sent[1] -----> sent[2]          a sender starts the pass when the previous stage has
            #   `-> left[0]    `-> left[1]    `-> left[2]    started it, a watcher waits until it has left the stage
            sent: list[Future] = []
            left: list[Future] = []
            for i, (sender, watcher) in enumerate(zip(self._senders, self._watchers, strict=True)):
                before = sent[-1] if sent else None
                sent.append(sender.submit(self._send, i, self._programs[form][i], control.whole, before))
                left.append(watcher.submit(self._watch, i, sent[-1]))
            flight.ids.append(left[-1])
            flight.spans.append(left)
        return flight

    def _send(self, i: int, program: Any, told: np.ndarray, before: Future | None) -> tuple[jax.Array, float]:
        """Starts a pass on stage `i` after the previous stage has started it. Returns the output and the start time."""
        stage = self.stages[i]
        x = before.result()[0] if before else None
        began_s, began_cpu_s = self.clock(), time.thread_time()
        x = None if x is None else stage.receive(x)
        out, self._pools[i] = program(self._params[i], x, stage.control(told), self._pools[i])
        self._sending_s[i] += time.thread_time() - began_cpu_s
        return out, began_s

    def finish(self, flight: Flight) -> tuple[dict[int, int], list[Spans]]:
        """Waits for a batch. Returns its tokens by request, and by pass the (start, end) of all stages in seconds."""
        ids = [np.asarray(found.result()[2]) for found in flight.ids]
        found = {request: int(ids[n][place]) for request, n, place in flight.emitting}
        for request, token in found.items():
            if request in self._tokens:  # it may have been cancelled and forgotten
                self._tokens[request][self._length[request]] = token
                self._length[request] += 1
        return found, [[span.result()[:2] for span in spans] for spans in flight.spans]

    def _watch(self, stage: int, sent: Future) -> tuple[float, float, jax.Array]:
        """When a pass started and ended on a stage, and its output."""
        try:
            out, sent_s = sent.result()
            out.block_until_ready()
        except Exception:
            self._lost.add(stage)
            raise
        begin_s, self._left_s[stage] = max(sent_s, self._left_s[stage]), self.clock()
        return begin_s, self._left_s[stage], out

    def passes(self, work: Iterable[Work]) -> Iterable[tuple[MixedForm, Control, list[tuple[int, int]]]]:
        """Cuts a batch into passes: form, control data, and (request, index in the sampled ids) of each token."""
        parts = [PartWork(singles=[], pieces=[]) for _ in range(self.parts)]
        for w in work:
            part = parts[self.pages.of(w.request)[0]]
            if w.padded == 1:
                part.singles.append(w)
            else:
                part.pieces.extend(self._pieces(w))
        while any(part.singles or part.pieces for part in parts):
            now = [self._next(part) for part in parts]
            singles, pieces = max(len(part.singles) for part in now), max(len(part.pieces) for part in now)
            form = self._form(
                next(size for size in self.sizes.singles if size >= singles),
                next(size for size in self.sizes.pieces if size >= pieces),
            )
            yield self._fill(form, now)

    def _next(self, part: PartWork) -> PartWork:
        """Removes as much work from the part as one pass holds, and returns it."""
        singles, pieces = self.sizes.singles[-1], self.sizes.pieces[-1]
        now = PartWork(singles=part.singles[:singles], pieces=part.pieces[:pieces])
        del part.singles[:singles], part.pieces[:pieces]
        return now

    def _pieces(self, w: Work) -> Iterable[Work]:
        """Cuts a prompt and its padding into pieces. The last piece with a token of the prompt emits."""
        size = self.sizes.length
        for at in range(0, w.padded, size):
            n = min(max(w.length - at, 0), size)
            ends = at < w.length <= at + size
            yield Work(w.request, w.start + at, n, size, w.emits and ends, w.dead)

    def _fill(self, form: MixedForm, parts: Sequence[PartWork]) -> tuple[MixedForm, Control, list[tuple[int, int]]]:
        told, emitting = form.describe(), []
        for part, of in enumerate(parts):
            placed = [(i, i, w) for i, w in enumerate(of.singles)]
            placed += [(form.singles + i, form.singles + i * form.length, w) for i, w in enumerate(of.pieces)]
            for segment, token, w in placed:
                if not w.length:
                    continue
                told.ids[part, token : token + w.length] = self._tokens[w.request][w.start : w.start + w.length]
                told.starts[part, segment] = w.start
                told.lengths[part, segment] = w.length
                told.requests[part, segment] = w.request % 2**31
                told.tables[part, segment] = self.pages.of(w.request)[1]
                if w.emits:
                    emitting.append((w.request, part * form.segments + segment))
        return form, told, emitting


def _check(stages: Sequence[Stage], packed: Mapping[str, Any]) -> int:
    """Refuses stages that do not fit. Returns their number of parts."""
    parts = {stage.parts for stage in stages}
    if len(parts) != 1:
        raise ValueError(f"stages split attention over {sorted(parts)} parts; they must agree")
    n_layers = [stage.config.n_layers for stage in stages]
    (of, *_) = [len(block["norm"]) for block in packed.values() if isinstance(block, Mapping)]
    if sum(n_layers) != of:
        raise ValueError(f"stages have {n_layers} layers, together {sum(n_layers)}; the model has {of}")
    ends = [(i == 0, i == len(stages) - 1) for i in range(len(stages))]
    if [(stage.first, stage.last) for stage in stages] != ends:
        raise ValueError("stages: the first one, and no other, must be first=True, and the last one last=True")
    return parts.pop()
