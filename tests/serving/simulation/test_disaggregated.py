"""Disaggregated serving: a schedule by hand, and no request lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toruslab.serving.results.metrics import Metrics
from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.policies import ORCA, REQUEST_LEVEL, chunked
from toruslab.serving.scheduling.request import Request
from toruslab.serving.simulation.disaggregated import simulate_disaggregated
from toruslab.serving.simulation.scenario import Scenario
from toruslab.serving.simulation.simulator import Server
from toruslab.serving.traffic.arrivals import Poisson
from toruslab.serving.traffic.lengths import Uniform
from toruslab.serving.traffic.workload import Workload


def request(id: int, prompt: int, output: int, arrival_s: float = 0.0) -> Request:
    return Request(id=id, arrival_s=arrival_s, prompt=prompt, max_output=output, output=output)


def test_three_requests_by_hand():
    """A prompt takes 1 s, one at a time. K and V take 0.5 s for each token, one request at a time. A step takes 1 s.

    prefill        A 0-1      B 1-2      C 2-3, whose only token ends it
    links          A 1-2      B 2-3.5 (3 tokens)
    decode         A at 2: 2-3, 3-4 (two more tokens); B waits for 4 (its batch is full at 3.5): 4-5
    """
    requests = [request(0, 2, 3), request(1, 3, 2), request(2, 4, 1)]
    seen: list[Batch] = []

    def decode_times(batch: Batch) -> tuple[float]:
        seen.append(batch)
        return (1.0,)

    runs = simulate_disaggregated(
        requests,
        Server(times=lambda batch: (1.0,), n_stages=1, n_chips=1, max_bs=1, slots=99),
        Server(times=decode_times, n_stages=1, n_chips=1, max_bs=2, slots=99),
        lambda tokens: 0.5 * tokens,
    )
    assert [r.token_s for r in requests] == [[1.0, 3.0, 4.0], [2.0, 5.0], [3.0]]
    assert [r.returned_s for r in requests] == [4.0, 5.0, 3.0]
    assert [[(w.request, w.start, w.length) for w in b.work] for b in seen] == [[(0, 2, 1)], [(0, 3, 1)], [(1, 3, 1)]]
    assert [b.used for b in seen] == [3, 4, 4]
    assert [run.batches for run in runs] == [3, 3]


@pytest.mark.parametrize("policy", [ORCA, chunked(16)], ids=lambda policy: policy.name)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rate=st.floats(0.1, 20.0), slots=st.integers(40, 200))
def test_every_request_comes_back_once(policy, seed: int, rate: float, slots: int):
    trace = Workload(
        n=40, arrivals=Poisson(rate=rate), prompt=Uniform(low=1, high=20), output=Uniform(low=1, high=25), seed=seed
    )

    def server(n_stages: int, max_bs: int) -> Server:
        return Server(
            times=lambda batch: [0.02 + 0.001 * batch.computed] * n_stages,
            n_stages=n_stages,
            n_chips=8,
            max_bs=max_bs,
            slots=slots,
            policy=policy,
        )

    case = Scenario(server=server(2, 4), prefill=server(1, 2), kv_bytes=10.0, kv_bytes_per_s=1e3)
    requests: list[Request] = []

    class Keep(Metrics):
        def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
            requests.extend(back)
            super().completed(batch, now_s, back, reserved, used)

    metrics = Keep(max_bs=4)
    first, second = case.simulate(trace, [metrics])
    summary = metrics.summary()
    sizes = {r.id: (r.prompt, r.target) for r in trace.requests()}
    large = sum(p + n > slots for p, n in sizes.values())
    assert (summary.arrived, summary.refused, summary.returned) == (40, large, 40 - large)
    assert len({r.id for r in requests}) == len(requests) == 40 - large
    for r in requests:
        assert (r.prompt, r.n_tokens) == sizes[r.id] and r.token_s == sorted(r.token_s)
        assert r.scheduled_s is not None and r.arrival_s <= r.scheduled_s < r.token_s[0]
        assert r.returned_s == r.token_s[-1]
    assert first.tokens == sum(r.prompt for r in requests)
    assert second.tokens == sum(r.n_tokens - 1 for r in requests)
    assert len(summary.stage_busy) == 3 or second.batches == 0


def test_policies_that_cannot_go_on_from_a_prompt_are_refused():
    server = Server(times=lambda batch: (1.0,), n_stages=1, n_chips=1, max_bs=1, slots=9, policy=REQUEST_LEVEL)
    with pytest.raises(ValueError, match="policy='request-level' cannot go on"):
        Scenario(server=server, prefill=server)
