"""Published numbers, as data with their sources, and the analytic model beside them.

The data is in `published/data/`, each file with its table or figure of Pope et al. 2022. The constants of TPU v4 were
fitted on the layers of Tables 2 and 3 and Figure B.1 (`partitioning.published.fit`). Everything else is predicted.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from toruslab.partitioning.cost.estimate import estimate
from toruslab.partitioning.cost.forward import Constants
from toruslab.partitioning.plan.point import Point
from toruslab.partitioning.published import closed_forms as paper
from toruslab.partitioning.torus.chip import chip

CALIBRATION = ("Tables 2, 3", "Figure B.1")
NOMINAL = {"palm-540b": 540e9, "palm-62b": 62e9, "palm-8b": 8e9, "mt-nlg-530b": 530e9}
"""The number of parameters that the papers' MFU counts; for other models, that of their configuration."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published latency.

    Args:
        point: what was measured.
        set: the table or figure; statistics are taken over a set.
        citation: the source.
        stack_s, published_s: seconds of the layers alone, and of the whole pass; at least one of them.
        mfu: as a fraction; of the whole pass if that is given, else of the layers.
        line: its line in a user's file.

    Raises:
        ValueError: a number that is not positive, or neither kind of seconds.
    """

    point: Point
    set: str
    citation: str
    stack_s: float | None = None
    published_s: float | None = None
    mfu: float | None = None
    line: int | None = None

    def __post_init__(self):
        for field, top in (("stack_s", 1e12), ("published_s", 1e12), ("mfu", 1)):
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= top):
                raise ValueError(f"{field}={value!r} must be a positive number, at most {top:g}")
        if self.stack_s is None and self.published_s is None:
            raise ValueError("missing field 'stack_s' or 'published_s': seconds of the layers, or of the whole pass")

    @property
    def compared_s(self) -> float:
        """The seconds that the model is compared with: those of the layers if there are any."""
        return self.stack_s if self.stack_s is not None else self.published_s or math.nan

    @property
    def is_calibration(self) -> bool:
        return self.point in _calibration_points()


def data(name: str) -> Any:
    """A file of `partitioning/published/data`."""
    file = resources.files("toruslab.partitioning.published").joinpath("data", f"{name}.json")
    return json.loads(file.read_text(encoding="utf-8"))


def parse(fields: object, set_: str | None = None, line: int | None = None, of: str = "") -> Published:
    """A published number from its JSON fields.

    Args:
        fields: `point`, `source`, and `stack_s`, `published_s`, `mfu` where they are known.
        set_: the set; otherwise `of` and the source.
        line: its line in a user's file.

    Raises:
        ValueError: no object, a field that is missing or wrong, or a point that makes no sense.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"a row is a JSON object, not {type(fields).__name__}")
    if not isinstance(fields.get("source"), str) or not fields["source"]:
        raise ValueError(f"source={fields.get('source')!r} must be text: where the number is from")
    if "point" not in fields:
        raise ValueError("missing field 'point'")
    numbers = {k: fields.get(k) for k in ("stack_s", "published_s", "mfu")}
    point = Point.from_json(fields["point"])
    source = fields["source"]
    return Published(point=point, set=set_ or of + source, citation=source, line=line, **numbers)


@functools.cache
def calibration() -> tuple[Published, ...]:
    """The 28 published latencies that the constants are fitted on."""
    files = zip(CALIBRATION, ("esti_tables", "esti_fig_b1"), strict=True)
    return tuple(parse(fields, set_) for set_, file in files for fields in data(file))


@functools.cache
def _calibration_points() -> frozenset[Point]:
    return frozenset(p.point for p in calibration())


def figures() -> tuple[Published, ...]:
    """Figures 6 and 7, layers alone. Figure 7 prints MFU; the nominal 540e9 parameters turn it into seconds.

    Its weight-gathered series is wgxyz throughout: at 131k and at 262k tokens it takes the same 28 to 29 s, the time of
    a gather of the weights, which hides the matmuls.
    """
    found, both = [], data("fig6_fig7")
    for layout in ("ws2d", "ws1d"):
        for chips, mesh, ms in zip(both["fig6"]["chips"], both["fig6"]["mesh"], both["fig6"][layout], strict=True):
            point = figure_6_point(layout, chips, mesh)
            found.append(Published(point=point, set="Figure 6", citation=both["source"], stack_s=ms / 1e3))
    for layout, series in (("ws2d", "ws2d"), ("wgxyz", "weight_gathered")):
        for tokens, percent in zip(both["fig7"]["tokens"], both["fig7"][series], strict=True):
            point, mfu = figure_7_point(layout, tokens), percent / 100
            seconds = mfu_of(point, 1.0) / mfu
            found.append(Published(point=point, set="Figure 7", citation=both["source"], stack_s=seconds, mfu=mfu))
    return tuple(found)


def figure_6_point(layout: str, n_chips: int, mesh: str) -> Point:
    """Decode, 540B, batch 512, context 2048; heads padded to the number of chips."""
    fields = {"phase": "decode", "batch": 512, "context": 2048, "layout": layout, "attention": "batch"}
    return Point(model=f"palm-540b-h{n_chips}", slice=f"v4:{mesh}", **fields)


def figure_7_point(layout: str, tokens: int) -> Point:
    """Prefill, 540B, 64 chips, sequences of 2048."""
    fields = {"phase": "prefill", "batch": tokens // 2048, "length": 2048, "layout": layout, "attention": "batch"}
    return Point(model="palm-540b-h64", slice="v4:4x4x4", **fields)


def mfu_of(point: Point, seconds: float) -> float:
    """2 x parameters x tokens / (seconds x chips x peak), with the parameters that the papers count."""
    n_params = NOMINAL.get(re.sub(r"-h\d+$", "", point.model), point.config.n_params)
    peak = chip(point.chip).peak("bf16")
    return paper.forward_flops(n_params, point.tokens) / (seconds * point.n_chips * peak)


def answer(published: Published, constants: Constants | None = None) -> dict[str, Any]:
    """A row of results: the published number, the model's, the relative error, and MFU.

    Args:
        published: the number.
        constants: replace those of TPU v4, for all chips without constants of their own.
    """
    own = chip(published.point.chip).fitted if published.point.chip != "v4" else {}
    found = estimate(published.point, None if own else constants)
    by_stack = published.stack_s is not None
    analytic = found.stack_latency_s if by_stack else found.latency_s
    numbers = {k: v for k in ("stack_s", "published_s", "mfu") if (v := getattr(published, k)) is not None}
    row = {
        "point": published.point.to_json(),
        "source": "published",
        "set": published.set,
        "citation": published.citation,
        **({} if published.line is None else {"line": published.line}),
        **numbers,
        "compared": "stack_s" if by_stack else "published_s",
        "analytic_s": analytic,
        "error": analytic / published.compared_s - 1,
        "analytic_mfu": mfu_of(published.point, found.latency_s if published.published_s else found.stack_latency_s),
        "calibrated": published.is_calibration,
    }
    if by_stack and published.published_s:
        row |= {"analytic_pass_s": found.latency_s, "pass_error": found.latency_s / published.published_s - 1}
    return row


def closed_form_rows() -> list[dict[str, Any]]:
    """Figure 3 and Table 1 from the paper's own closed forms. Nothing in them is fitted, and they have no point."""
    found, figure, table = [], data("fig3"), data("table1")
    common = {"point": None, "source": "published", "calibrated": False}

    def add(set_: str, citation: str, case: dict[str, Any], unit: str, published: float, analytic: float) -> None:
        numbers = {f"published_{unit}": published, f"analytic_{unit}": analytic, "error": analytic / published - 1}
        found.append({**common, "set": set_, "citation": citation, "case": case, **numbers})

    for tokens, *volumes in figure["rows"]:
        for layout, gigabytes in zip(figure["columns"][1:], volumes, strict=True):
            case = {"layout": layout, "tokens": tokens}
            add("Figure 3", figure["source"], case, "bytes", gigabytes * 1e9, figure_3_bytes(layout, tokens))
    for row in table["rows"]:
        kv_bytes = paper.kv_bytes_per_token(table["n_layers"], row["n_kv_heads"], row["d_head"])
        memory = chip("v4").hbm_bytes
        context = paper.longest_context(memory, row["n_kv_shards"], row["batch"], kv_bytes, table["kv_fraction"])
        case = {"attention": row["attention"], "batch": row["batch"]}
        add("Table 1", table["source"], case, "tokens", row["context"], float(context))
    return found


def figure_3_bytes(layout: str, tokens: float) -> float:
    """Bytes per chip of one MLP of 16384 x 65536 in bf16 on 4x4x4."""
    return float(2 * paper.layout_volume(layout, tokens, 16384, 65536, (4, 4, 4)))
