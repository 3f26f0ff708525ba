"""A run as a timeline: Chrome's trace-event JSON, which Perfetto (ui.perfetto.dev) opens.

It has a track for each pipeline stage with its batches, tracks for the requests, and counters of reserved and used
slots. It keeps every event, which is fine for thousands of requests, not for a million.
"""

import heapq
import json
from pathlib import Path
from typing import Any

from toruslab.serving.scheduling.batch import Batch
from toruslab.serving.scheduling.observer import Observer
from toruslab.serving.scheduling.request import Request

_STAGES, _REQUESTS, _SLOTS = 1, 2, 3


class Timeline(Observer):
    """An observer that keeps the events of a timeline. It draws returned requests only."""

    def __init__(self):
        self._events: list[dict[str, Any]] = []
        self._back: list[Request] = []
        self._n_stages = 0

    def made(self, batch: Batch) -> None:
        self._slots(batch.made_s, batch.reserved, batch.used)

    def stage(self, batch: Batch, stage: int, start_s: float, end_s: float) -> None:
        self._n_stages = max(self._n_stages, stage + 1)
        args = {
            "requests": [work.request for work in batch.work],
            "tokens": batch.tokens,
            "padding": batch.padding,
            "dead": batch.dead,
        }
        self._events.append(_span(f"batch {batch.number}", _STAGES, stage, start_s, end_s, args))

    def completed(self, batch: Batch, now_s: float, back: list[Request], reserved: int, used: int) -> None:
        self._slots(now_s, reserved, used)
        self._back += back

    def to_json(self) -> dict[str, Any]:
        """The timeline, with times in whole microseconds."""
        spans, n_tracks = self._requests()
        names = [_name("process_name", _STAGES, 0, "pipeline"), _name("process_name", _REQUESTS, 0, "requests")]
        names += [_name("process_name", _SLOTS, 0, "KV cache")]
        names += [_name("thread_name", _STAGES, stage, f"stage {stage}") for stage in range(self._n_stages)]
        names += [_name("thread_name", _REQUESTS, track, f"place {track}") for track in range(n_tracks)]
        return {"traceEvents": names + self._events + spans, "displayTimeUnit": "ms"}

    def write(self, path: str | Path) -> None:
        """Writes the timeline to a file."""
        Path(path).write_text(json.dumps(self.to_json(), allow_nan=False))

    def _slots(self, now_s: float, reserved: int, used: int) -> None:
        # Perfetto stacks the values of a counter, hence the difference.
        args = {"used": used, "reserved, not used": reserved - used}
        self._events.append(
            {"name": "slots", "ph": "C", "ts": _microseconds(now_s), "pid": _SLOTS, "tid": 0, "args": args}
        )

    def _requests(self) -> tuple[list[dict[str, Any]], int]:
        """Spans of the returned requests, and the number of tracks. Requests on one track never overlap."""
        spans: list[dict[str, Any]] = []
        free: list[int] = []
        busy: list[tuple[float, int]] = []
        n_tracks = 0
        for request in sorted(self._back, key=lambda request: (request.arrival_s, request.order)):
            assert request.scheduled_s is not None and request.finished_s is not None and request.returned_s is not None
            while busy and busy[0][0] <= request.arrival_s:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                free, n_tracks = [n_tracks], n_tracks + 1
            track = heapq.heappop(free)
            heapq.heappush(busy, (request.returned_s, track))
            parts = (
                ("waits", request.arrival_s, request.scheduled_s),
                ("prompt", request.scheduled_s, request.token_s[0]),
                ("decodes", request.token_s[0], request.finished_s),
                ("done, not returned", request.finished_s, request.returned_s),
            )
            args = {"prompt": request.prompt, "output": request.n_tokens}
            for what, start_s, end_s in parts:
                if end_s > start_s:
                    spans.append(_span(f"{request.id} {what}", _REQUESTS, track, start_s, end_s, args))
        return spans, n_tracks


def _span(name: str, pid: int, tid: int, start_s: float, end_s: float, args: dict[str, Any]) -> dict[str, Any]:
    ts = _microseconds(start_s)
    return {"name": name, "ph": "X", "ts": ts, "dur": _microseconds(end_s) - ts, "pid": pid, "tid": tid, "args": args}


def _microseconds(seconds: float) -> int:
    """Whole microseconds: a span ends exactly where the next begins, since viewers drop overlapping spans."""
    return round(seconds * 1e6)


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
