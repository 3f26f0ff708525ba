"""The engine: each request gets the tokens that the reference picks for it alone, whatever shares its batches."""

import dataclasses
import functools
import math
from concurrent.futures import wait

import jax
import numpy as np
import pytest

from tests import battery
from tests.canonical import unpack
from tests.serving.engine.virtual_clock import Virtual
from toruslab.models.decoder import mixed
from toruslab.models.decoder.mixed import MixedForm
from toruslab.models.decoder.quantise import dequantise, quantise
from toruslab.models.decoder.reference import init, logits
from toruslab.models.decoder.sampling import Sampler
from toruslab.models.weights.packing import pack
from toruslab.partitioning.hlo.collectives import read
from toruslab.partitioning.hlo.compare import compare
from toruslab.partitioning.hlo.cycles import copies
from toruslab.partitioning.layouts.variants import layout
from toruslab.partitioning.plan.passes import Pass
from toruslab.partitioning.plan.plan import plan
from toruslab.partitioning.torus.mesh import AXES, attach
from toruslab.serving.engine.engine import Engine, Sizes
from toruslab.serving.engine.pages import Held, Pages
from toruslab.serving.engine.play import serve
from toruslab.serving.engine.stage import Stage
from toruslab.serving.scheduling.batch import Work
from toruslab.serving.scheduling.policies import policy
from toruslab.serving.scheduling.request import Request
from toruslab.serving.scheduling.scheduler import Scheduler

LONGEST, MAX_BS, N_SLOTS = 30, 4, 90
NEAR_TIE = 1e-5  # of the largest logit: what float32 may differ by
CONFIG = dataclasses.replace(battery.model("parallel", 1), n_layers=6)  # 1, 2 or 3 stages of equal length


@functools.lru_cache(maxsize=8)
def weights(config):
    return init(config, 0)


def stages(name, attention, shape, n=1, config=CONFIG, **options):
    each = dataclasses.replace(config, n_layers=config.n_layers // n)
    made = layout(name, attention, shape, config.n_kv_heads)
    return [
        Stage(
            config=each,
            layout=made,
            mesh=attach(shape, chip="cpu", explicit=made.explicit, first=i * math.prod(shape)),
            first=i == 0,
            last=i == n - 1,
            **options,
        )
        for i in range(n)
    ]


def engine(of, config=CONFIG, *, held: Held = "rows", workers=1, int8=False, singles=(2, 4), pieces=(4,)):
    """An engine whose caches start with what other requests may have left there."""
    packed = pack(config, weights(config))
    sizes = Sizes(
        rows=MAX_BS * workers,
        n_slots=N_SLOTS,
        longest=LONGEST,
        singles=singles,
        pieces=pieces,
        length=4,
        page=8,
        held=held,
    )
    made = Engine(of, quantise(packed, np.float32) if int8 else packed, sizes)
    poison(made)
    return made


def poison(made, free_only=False, value=1e3):
    """Writes large numbers or NaN where no request has written."""
    for i, pool in enumerate(made._pools):
        at = slice(None)
        if free_only:
            at = [p * made.pages.n_pages + n for p, free in enumerate(made.pages._free) for n in free]
        changed = [np.array(a) for a in (pool.k, pool.v)]
        for a in changed:
            a[:, at] = value
        made._pools[i] = pool._replace(k=jax.device_put(changed[0], pool.k.sharding))
        made._pools[i] = made._pools[i]._replace(v=jax.device_put(changed[1], pool.v.sharding))


def trace(seed, n=12, config=CONFIG):
    """Requests and their prompts, several of them at the same time."""
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.integers(0, 12, n))
    found = []
    for i in range(n):
        prompt = rng.integers(0, config.vocab, rng.integers(1, 20)).astype(np.int32)
        found.append((float(arrivals[i]), prompt, int(rng.integers(1, 10))))
    return found


def run(made, of, name="orca", workers=1, clock=None, **options):
    """The output ids of every request, and the totals of `serve`."""
    requests = [
        Request(id=i, arrival_s=at, prompt=len(prompt), max_output=n_new) for i, (at, prompt, n_new) in enumerate(of)
    ]
    scheduler = Scheduler(max_bs=MAX_BS, n_slots=N_SLOTS, n_workers=workers, policy=policy(name), model_max=LONGEST)
    found = {}
    served = serve(
        requests,
        scheduler,
        made,
        lambda request: of[request.id][1],
        clock=clock or Virtual(),
        returned=lambda request, ids: found.__setitem__(request.id, ids),
        **options,
    )
    assert scheduler.reserved == scheduler.used == 0
    return found, served


def check_alone(found, of, config=CONFIG, seen=None):
    """Each token is the reference's choice for the request alone. Near ties may differ; there are few."""
    skipped = total = 0
    for i, ids in found.items():
        _, prompt, n_new = of[i]
        assert len(ids) == n_new
        expected = logits(config, seen or weights(config), np.concatenate([prompt, ids]))[len(prompt) - 1 : -1]
        for row, token in zip(expected, ids, strict=True):
            near = row.max() - row[token] < NEAR_TIE * np.abs(row).max()
            assert near, f"request {i}: {token} instead of {np.argmax(row)}"
            skipped += token != np.argmax(row)
            total += 1
    assert skipped < 0.01 * total


CASES = [
    ("ws2d", "batch", (2, 2, 2), 1, "orca", 1, "rows"),
    ("ws2d", "heads", (2, 2, 2), 1, "orca", 2, "pages"),
    ("wgxyz", "batch", (4, 2, 1), 1, "chunked-8", 1, "pages"),
    ("ws1d+lean", "heads", (2, 2, 1), 1, "request-level", 2, "rows"),
    ("ws2d+lean", "batch-y", (1, 2, 4), 1, "request-level-early", 1, "pages"),
    ("auto", "batch", (2, 2, 2), 1, "orca", 1, "rows"),
    ("wgxy", "heads", (2, 2, 2), 1, "orca", 1, "rows"),
    ("ws2d", "heads", (2, 1, 2), 2, "orca", 2, "pages"),
    ("ws2d", "batch", (1, 2, 1), 3, "orca", 3, "rows"),
    ("wgx+ring", "heads", (2, 1, 1), 3, "shortest-prompt", 3, "pages"),
    ("ws1d", "heads", (1, 2, 1), 3, "chunked-8", 3, "rows"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention", "shape", "n", "rule", "workers", "held"), CASES)
def test_same_tokens_as_alone(name, attention, shape, n, rule, workers, held):
    made = engine(stages(name, attention, shape, n), held=held, workers=workers)
    for seed in range(3):
        of = trace(seed)
        found, served = run(made, of, rule, workers)
        assert len(found) == len(of)
        assert served.compilations == 0
        check_alone(found, of)


@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_grouped_queries_and_two_blocks(block):
    config = battery.model(block, 4)
    made = engine(stages("ws2d", "heads", (2, 2, 2), config=config), config)
    of = trace(7, config=config)
    check_alone(run(made, of)[0], of, config)


def test_int8_weights():
    config = CONFIG
    made = engine(stages("ws2d", "heads", (2, 2, 2), int8=True), int8=True)
    of = trace(5)
    seen = unpack(config, dequantise(quantise(pack(config, weights(config)), np.float64)))
    check_alone(run(made, of)[0], of, seen=seen)


def test_stages_with_layouts_of_their_own():
    one, two = stages("ws2d", "heads", (2, 1, 2), 2), stages("ws1d+lean", "heads", (2, 1, 2), 2)
    of = trace(6)
    check_alone(run(engine([one[0], two[1]], workers=2), of, workers=2)[0], of)


def test_stages_that_do_not_fit():
    one, two = stages("ws2d", "heads", (2, 1, 2), 2), stages("ws2d", "batch", (2, 1, 2), 2)
    with pytest.raises(ValueError, match=r"stages split attention over \[1, 4\] parts; they must agree"):
        engine([one[0], two[1]])
    with pytest.raises(ValueError, match=r"stages have \[3\] layers, together 3; the model has 6"):
        engine(one[:1])
    with pytest.raises(ValueError, match="the first one, and no other, must be first=True"):
        engine([one[1], one[0]])


@pytest.fixture(scope="module")
def small():
    """A stage on two devices."""
    return engine(stages("ws1d", "heads", (1, 2, 1)))


@pytest.mark.parametrize("value", [1e3, np.nan, np.inf])
def test_reused_rows_and_stale_pages(small, monkeypatch, value):
    """The contents of free pages never matter, not even NaN that an overflowing request leaves in the middle of a
    run."""
    start, of = small.start, trace(1)
    poison(small, value=value)

    def poisoned(batch):
        flight = start(batch)
        wait([span for spans in flight.spans for span in spans])
        poison(small, free_only=True, value=value)
        return flight

    with monkeypatch.context() as patch:
        patch.setattr(small, "start", poisoned)
        check_alone(run(small, of)[0], of)
    poison(small)


def test_sampled_tokens_do_not_depend_on_company():
    """Random numbers depend on the request and the position only."""
    of = trace(3, n=6)
    made = engine(stages("ws2d", "batch", (2, 2, 1), sampler=Sampler(temperature=1.0, seed=4)), singles=(4,))
    together, _ = run(made, of)
    apart, _ = run(made, [(100.0 * i, *rest) for i, (_, *rest) in enumerate(of)])
    assert {i: list(ids) for i, ids in together.items()} == {i: list(ids) for i, ids in apart.items()}
    assert len({tuple(ids) for ids in together.values()}) > 1


def test_a_stop_id_ends_a_request(small):
    of = [(0.0, prompt, 9) for _, prompt, _ in trace(2)]
    whole, _ = run(small, of)
    stop = int(whole[0][2])
    stopped, _ = run(small, of, stop=stop)
    for i, ids in whole.items():
        ends = [n + 1 for n, token in enumerate(ids) if token == stop] or [len(ids)]
        assert list(stopped[i]) == list(ids[: ends[0]])


@pytest.mark.parametrize("rule", ["orca", "request-level", "chunked-8"])
def test_cancelling_leaves_others_alone(rule):
    """With two batches in flight, some requests are cancelled while they run, some while they wait."""
    made, of = engine(stages("ws1d", "heads", (1, 2, 1)), workers=2, singles=(4,)), trace(4)
    whole, _ = run(made, of, rule, 2)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        leaving = sorted((float(rng.uniform(0, 15)), int(i)) for i in rng.permutation(len(of))[:5])
        left, _ = run(made, of, rule, 2, cancelled=leaving)
        assert len(left) < len(whole)
        assert all(list(left[i]) == list(whole[i]) for i in left)
        assert set(range(len(of))) - set(left) <= {i for _, i in leaving}


def test_virtual_time_repeats(small):
    of = trace(8)
    assert run(small, of)[1].end_s == run(small, of)[1].end_s


@pytest.mark.parametrize("clock", ["wall"])
def test_on_the_real_clock(small, clock):
    from toruslab.serving.engine.play import Wall

    of = [(0.002 * at, *rest) for at, *rest in trace(9)]
    found, served = run(small, of, clock=Wall())
    check_alone(found, of)
    assert served.end_s > of[-1][0]
    assert served.host_s > 0


def wrong_position(monkeypatch):
    positions = mixed.token_positions
    # RoPE knows distances only: off by one for single tokens, and not for pieces
    monkeypatch.setattr(
        mixed,
        "token_positions",
        lambda form, told: positions(form, told) + np.int32(np.arange(form.tokens) < form.singles),
    )


def missing_mask(monkeypatch):
    tile = mixed.jnp.tile
    monkeypatch.setattr(mixed.jnp, "tile", lambda a, n: tile(a, n) + 3)


def wrong_row(monkeypatch):
    of = Pages.of
    monkeypatch.setattr(Pages, "of", lambda self, request: of(self, min(self._at)))


@pytest.mark.parametrize("mistake", [wrong_position, missing_mask, wrong_row])
def test_mistakes_are_caught(monkeypatch, mistake):
    mistake(monkeypatch)
    of = trace(0)
    with pytest.raises(AssertionError, match="instead of"):
        check_alone(run(engine(stages("ws1d", "heads", (1, 2, 1))), of)[0], of)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 16])
@pytest.mark.parametrize(("name", "attention"), battery.legal())
def test_planned_is_compiled(name, attention, kv_heads):
    """The collectives of a mixed pass are the layout's plan, and the pages are never copied."""
    config, shape = battery.model("parallel", kv_heads), (2, 2, 2)
    (stage,) = stages(name, attention, shape, config=config)
    form = MixedForm(parts=stage.parts, singles=3, pieces=2, length=5, pages=3, page=7)
    pool = stage.pool(11, form.page)
    text = stage.compile(form, pool).as_text() or ""
    if not stage.layout.explicit:  # XLA partitions it freely and copies the pages
        return
    shard = [d for d in pool.k.sharding.shard_shape(pool.k.shape) if d > 1]
    copied = [c for c in copies(text, 4 * math.prod(shard), unknown_trips=1) if [d for d in c.dims if d > 1] == shard]
    assert not copied
    sizes = (stage.parts * form.tokens, stage.parts * form.segments)
    pass_ = Pass(batch=11 * stage.parts, length=1, capacity=form.page, mixed=sizes)
    found = read(text, dict(zip(AXES, shape, strict=True)), unknown_trips=1)
    matched = compare(plan(stage.layout, config, pass_, shape), found)
    assert all(m.verdict == "as planned" for m in matched), matched


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "batch"])
def test_compiled_for_tpus(attention):
    """Four layers of 540B on 64 described TPUs have no unplanned collective and no copy of the pages."""
    pytest.importorskip("libtpu", reason="needs libtpu to compile for TPUs")
    from toruslab.models.decoder.cache import abstract_cache
    from toruslab.models.presets import model
    from toruslab.partitioning.torus.described import target
    from toruslab.partitioning.torus.mesh import Slice

    config, shape = model("palm-540b-h64-4l"), (4, 4, 4)
    mesh, made = target(Slice.parse("v4:4x4x4"), shape), layout("ws2d", attention, shape, 1)
    stage = Stage(config=config, layout=made, mesh=mesh, itemsize=2)
    form = MixedForm(
        parts=stage.parts, singles=64 // stage.parts, pieces=64 // stage.parts, length=64, pages=16, page=128
    )
    pool = abstract_cache(config, 256, form.page, made, mesh, stage.dtype)
    text = stage.compile(form, pool).as_text() or ""
    shard = [d for d in pool.k.sharding.shard_shape(pool.k.shape) if d > 1]
    found = copies(text, 2 * math.prod(shard), unknown_trips=1)
    # copies between two memories of the chip are allowed: so small a pool fits a v4's CMEM
    assert not [c for c in found if c.from_space == c.to_space and [d for d in c.dims if d > 1] == shard]
    sizes = (stage.parts * form.tokens, stage.parts * form.segments)
    pass_ = Pass(batch=256, length=1, capacity=form.page, itemsize=2, weight_itemsize=2, mixed=sizes)
    found = read(text, dict(zip(AXES, shape, strict=True)), unknown_trips=1, partial_axes=True)
    assert all(m.explained for m in compare(plan(made, config, pass_, shape), found))


def works(*lengths, starts=None):
    starts = starts or [0] * len(lengths)
    return [Work(i, s, n, n, True, False) for i, (n, s) in enumerate(zip(lengths, starts, strict=True))]


def told(made, batch):
    """Admits the requests of a batch and returns its passes."""
    made.clear()
    for w in batch:
        made.admit(w.request, np.arange(w.start + w.length, dtype=np.int32) + 10, 1)
        made.pages.admit(w.request)
        made.pages.reach(w.request, w.start + w.length)
    return list(made.passes(batch))


def test_seven_tokens_of_four_requests(small):
    """Orca's Figure 5: two requests with one token each and prompts of two and three tokens are seven tokens for
    everything but attention."""
    ((form, control, emitting),) = told(small, works(1, 1, 2, 3, starts=[4, 7, 0, 0]))
    assert control.lengths.sum() == 7
    assert [request for request, _ in emitting] == [0, 1, 2, 3]
    assert control.ids[0, :2].tolist() == [14, 17]
    assert control.starts[0, :2].tolist() == [4, 7]
    assert control.lengths[0].tolist() == [1, 1, 2, 3, 0, 0]
    assert control.ids[0, form.singles :][:7].tolist() == [10, 11, 0, 0, 10, 11, 12]


def test_more_than_a_pass_holds(small):
    """A prompt of five pieces takes two passes of four. Its token comes out of the second."""
    passes = told(small, works(18, 1, starts=[0, 3]))
    assert [control.lengths[0].tolist() for _, control, _ in passes] == [[1, 0, 4, 4, 4, 4], [0, 0, 2, 0, 0, 0]]
    assert [[request for request, _ in emitting] for _, _, emitting in passes] == [[1], [0]]


def test_padding_is_computed_and_kept_nowhere(small):
    """A prompt of 3 tokens padded to 9, and a request that has ended."""
    batch = [Work(0, 0, 3, 9, True, False), Work(1, 5, 0, 1, False, True)]
    ((form, control, emitting),) = told(small, batch)
    assert control.lengths[0].tolist() == [0, 0, 3, 0, 0, 0]
    assert form.singles == 2
    assert [request for request, _ in emitting] == [0]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"singles": ()}, r"singles=\(\) must be ascending sizes"),
        ({"pieces": (4, 2)}, r"pieces=\(4, 2\) must be ascending sizes"),
        ({"held": "page"}, "held='page' must be rows or pages"),
    ],
)
def test_bad_sizes(change, rule):
    with pytest.raises(ValueError, match=rule):
        Sizes(**{"rows": 4, "n_slots": 90, "longest": 30} | change)


def test_a_scheduler_that_does_not_fit(small):
    scheduler = Scheduler(max_bs=MAX_BS + 1, n_slots=N_SLOTS)
    with pytest.raises(ValueError, match="max_bs\\*n_workers=5 exceeds the engine's rows=4"):
        serve([], scheduler, small, lambda request: np.zeros(1, np.int32))


def test_a_layout_that_cannot_divide():
    with pytest.raises(ValueError, match="n_heads=16 is not divisible by"):
        stages("ws1d", "heads", (3, 1, 1))
