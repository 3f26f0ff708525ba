"""Traffic: draws have the asked distributions, and depend on the seed only."""

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toruslab.models.weights import byte_ids, corpus
from toruslab.serving.scheduling.request import Request
from toruslab.serving.traffic import lengths
from toruslab.serving.traffic.arrivals import Gamma, GivenTimes, Poisson
from toruslab.serving.traffic.lengths import Fixed, Quantiles, Uniform
from toruslab.serving.traffic.traces import arrivals
from toruslab.serving.traffic.workload import Workload, prompt_ids

ORCA = Workload(n=5000, arrivals=Poisson(rate=2.0), prompt=lengths.ORCA_PROMPT, output=lengths.ORCA_OUTPUT)


def as_tuples(workload: Workload, n: int | None = None) -> list[tuple[int, float, int, int, int | None]]:
    return [(r.id, r.arrival_s, r.prompt, r.max_output, r.output) for r in islice(workload.requests(), n)]


def test_orcas_trace():
    requests = list(ORCA.requests())
    prompts, outputs = [r.prompt for r in requests], [r.target for r in requests]
    assert (min(prompts), max(prompts), min(outputs), max(outputs)) == (32, 512, 1, 128)
    assert np.mean(prompts) == pytest.approx(272, rel=0.03) and np.mean(outputs) == pytest.approx(64.5, rel=0.03)
    assert all(r.max_output == r.output for r in requests)
    assert [r.id for r in requests] == list(range(5000))


@pytest.mark.parametrize(("arrivals", "cv"), [(Poisson(rate=2.0), 1.0), (Gamma(rate=2.0, cv=3.0), 3.0)])
def test_gaps_have_the_rate_and_the_burstiness(arrivals: Poisson | Gamma, cv: float):
    times = list(islice(arrivals.times(np.random.default_rng(0)), 100_000))
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0
    assert 1 / gaps.mean() == pytest.approx(2.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_seed_decides_and_more_requests_change_none_before():
    assert as_tuples(ORCA) == as_tuples(ORCA)
    other = Workload(n=7000, arrivals=ORCA.arrivals, prompt=ORCA.prompt, output=ORCA.output)
    assert as_tuples(other, 5000) == as_tuples(ORCA)
    seeded = Workload(n=5000, arrivals=ORCA.arrivals, prompt=ORCA.prompt, output=ORCA.output, seed=1)
    assert as_tuples(seeded, 5) != as_tuples(ORCA, 5)
    faster = Workload(n=5000, arrivals=Poisson(rate=20.0), prompt=ORCA.prompt, output=ORCA.output)
    assert [r[2:] for r in as_tuples(faster)] == [r[2:] for r in as_tuples(ORCA)], "the same lengths at any rate"


def test_fixed_times_are_kept_to_the_bit():
    times = (0.1, 0.3, 0.3, 7.7)
    trace = Workload(n=4, arrivals=GivenTimes(times_s=times), prompt=Fixed(tokens=9), output=Fixed(tokens=2))
    assert tuple(r.arrival_s for r in trace.requests()) == times
    assert trace.last_arrival_s() == 7.7 and trace.window_s(0.5) == (3.85, 7.7)


def test_times_of_a_file(tmp_path):
    file = tmp_path / "times"
    file.write_text("0.5\n\n1e0\n 1.0\r\n4\nnot read\n")
    found = arrivals(str(file), 4)
    assert found.rate == 1.0 and found.at(1.0) == GivenTimes(times_s=(0.5, 1.0, 1.0, 4.0))
    assert found.at(2.0) == GivenTimes(times_s=(0.25, 0.5, 0.5, 2.0)), "stretched to twice the rate"
    three = arrivals(str(file), 3)
    assert three.rate == 3.0 and three.digest != found.digest
    assert arrivals("gamma-2.5", 4).name == arrivals("gamma:2.5", 4).name == "gamma:2.5"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\n0.5\n", r"line 2: '0.5' must be a time in seconds, finite, and at least 1.0, the one before"),
        ("-1\n", "line 1: '-1' must be .* at least 0.0, where a run begins"),
        ("0\nnan\n", "line 2: 'nan' must be"),
        ("0\ninf\n", "line 2: 'inf' must be"),
        ("0,5,7\n", "line 1: '0,5,7' must be"),
        ("1\n", "has 1 times, fewer than requests=2"),
        ("", "has 0 times, fewer than requests=2"),
        ("0\n0\n", "has 2 requests until 0.0 s; there must be 1e-06 to 1e[+]09 a second"),
        ("0\n1e300\n", r"2 requests until 1e\+300 s; there must be"),
    ],
)
def test_a_file_that_holds_no_times(tmp_path, text: str, words: str):
    (tmp_path / "times").write_text(text)
    with pytest.raises(ValueError, match=words):
        arrivals(str(tmp_path / "times"), 2)


def test_last_arrival_without_the_requests():
    assert ORCA.last_arrival_s() == as_tuples(ORCA)[-1][1]


def test_declared_maximum_cuts_longer_outputs():
    trace = Workload(n=50, arrivals=ORCA.arrivals, prompt=ORCA.prompt, output=ORCA.output, max_output=60)
    requests = list(trace.requests())
    assert all(r.max_output == 60 for r in requests) and max(r.target for r in requests) == 60
    assert min(r.target for r in requests) < 60


@pytest.mark.parametrize(
    "name", ["AZURE_CONVERSATION_PROMPT", "AZURE_CONVERSATION_OUTPUT", "AZURE_CODE_PROMPT", "AZURE_CODE_OUTPUT"]
)
def test_published_quantiles_come_out(name: str):
    published: Quantiles = getattr(lengths, name)
    drawn = published.draw(np.random.default_rng(0), 200_000)
    assert published.at(np.array(published.shares)).tolist() == list(published.tokens)
    assert np.quantile(drawn, published.shares) == pytest.approx(published.tokens, rel=0.03)
    assert drawn.min() >= 1


@given(st.lists(st.floats(0.5, 1e4), min_size=2, max_size=9), st.floats(0.01, 4.0))
def test_quantiles_rise_and_scale(tokens: list[float], factor: float):
    shares = tuple((i + 1) / (len(tokens) + 1) for i in range(len(tokens)))
    values = Quantiles(shares=shares, tokens=tuple(sorted(tokens)))
    at = values.at(np.linspace(0, 1, 50))
    assert all(a <= b for a, b in pairwise(at.tolist()))
    drawn = values.scaled(factor).draw(np.random.default_rng(0), 50)
    assert drawn.min() >= 1 and drawn.dtype == np.int64


def scaled(workload: Workload, factor: float) -> Workload:
    """The workload with all lengths times `factor`."""
    cap = workload.max_output
    return replace(
        workload,
        prompt=workload.prompt.scaled(factor),
        output=workload.output.scaled(factor),
        max_output=cap if cap is None else max(1, round(cap * factor)),
    )


def test_scaled():
    large = Workload(n=9, arrivals=ORCA.arrivals, prompt=ORCA.prompt, output=ORCA.output, max_output=64)
    small = scaled(large, 1 / 8)
    assert (small.prompt, small.output, small.max_output) == (Uniform(low=4, high=64), Uniform(low=1, high=16), 8)
    assert Fixed(tokens=3).scaled(0.01) == Fixed(tokens=1)


def test_prompts_are_text_of_the_request():
    request = Request(id=11, arrival_s=0.0, prompt=40, max_output=1)
    ids = prompt_ids(request)
    assert ids.shape == (40,) and ids.dtype == np.int32
    text = corpus.read() * 2
    assert byte_ids.decode(ids) in text
    longer = prompt_ids(Request(id=11, arrival_s=5.0, prompt=60, max_output=1))
    assert (longer[:40] == ids).all(), "the window begins where the id says, however long"
    assert not (prompt_ids(Request(id=12, arrival_s=0.0, prompt=40, max_output=1)) == ids).all()
    assert not (prompt_ids(request, seed=1) == ids).all()
    n = byte_ids.encode(corpus.read(), bos=False).size
    whole = prompt_ids(Request(id=0, arrival_s=0.0, prompt=n + 5, max_output=1))
    assert (whole[:5] == whole[n:]).all(), "past its end the corpus begins again"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Poisson(rate=0.0), "rate=0.0 must be positive"),
        (lambda: Gamma(rate=1.0, cv=-1.0), "cv=-1.0 must be positive"),
        (lambda: GivenTimes(times_s=(1.0, 0.5)), "0.5 after 1.0"),
        (lambda: GivenTimes(times_s=(-1.0,)), "begin at 0"),
        (lambda: Uniform(low=3, high=2), "low=3, high=2"),
        (lambda: Fixed(tokens=0), "tokens=0"),
        (lambda: Fixed(tokens=2).scaled(0.0), "factor=0.0 must be positive"),
        (lambda: Quantiles(shares=(0.1, 0.9), tokens=(5,)), "2 shares and 1 tokens"),
        (lambda: Quantiles(shares=(0.1, 1.0), tokens=(5, 6)), "must rise between 0 and 1"),
        (lambda: Quantiles(shares=(0.1, 0.9), tokens=(6, 5)), "must be positive and not fall"),
        (
            lambda: Workload(n=2, arrivals=GivenTimes(times_s=(1.0,)), prompt=Fixed(tokens=1), output=Fixed(tokens=1)),
            "n=2 must be at most the number of times, 1",
        ),
        (lambda: Workload(n=0, arrivals=ORCA.arrivals, prompt=ORCA.prompt, output=ORCA.output), "n=0"),
        (lambda: ORCA.window_s(1.0), "warm_up=1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, words: str):
    with pytest.raises(ValueError, match=words):
        make()
