"""Accept, deadlines, query strings."""

from __future__ import annotations

import math

import pytest
from starlette.datastructures import Headers
from starlette.requests import Request

from service.errors import InvalidParameter
from service.http.parameters import (
    DetectQuery,
    deadline_seconds,
    parse_query,
    wanted_image,
)


def query(text: str) -> DetectQuery:
    scope = {"type": "http", "query_string": text.encode(), "headers": []}
    return parse_query(Request(scope), DetectQuery)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, None),
        ("*/*", None),
        ("application/json", None),
        ("text/html", None),
        ("image/webp", None),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/PNG", "image/png"),
        ("image/*", "image/jpeg"),
        ("image/png, image/jpeg", "image/png"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("image/jpeg, */*;q=0.1", "image/jpeg"),
        ("image/jpeg, application/json", None),
        ("image/jpeg;q=0.4, application/json;q=0.5", None),
        ("text/html,image/avif,image/webp,image/png,*/*;q=0.8", "image/png"),
        ("image/jpeg;q=0", None),
        ("image/jpeg;q=high", None),
    ],
)
def test_accept_chooses_json_or_image(accept: str | None, chosen: str | None) -> None:
    assert wanted_image(accept) == chosen


def test_deadline_header_is_a_bounded_whole_number() -> None:
    def of(headers: dict[str, str]) -> float:
        return deadline_seconds(Headers(headers), 10_000)

    assert of({}) == math.inf
    assert of({"X-Deadline-Ms": "250"}) == 0.25
    assert of({"X-Deadline-Ms": "10000"}) == 10.0
    for bad in ("0", "10001", "-5", "1e3", "²", "9" * 5000, ""):
        with pytest.raises(InvalidParameter, match="X-Deadline-Ms"):
            of({"X-Deadline-Ms": bad})


def test_query_is_parsed_and_described_when_invalid() -> None:
    assert query("") == DetectQuery()
    asked = query("score_threshold=0.25&classes=a,b&classes=c&max_detections=7&format=hf")
    assert asked.score_threshold == 0.25
    assert asked.classes == ["a,b", "c"]
    assert (asked.max_detections, asked.format) == (7, "hf")
    with pytest.raises(InvalidParameter, match=r"treshold.*score_threshold"):
        query("treshold=1")
    with pytest.raises(InvalidParameter, match="more than once"):
        query("version=1&version=2")
    with pytest.raises(InvalidParameter, match=r"max_detections='0'.*iou_threshold='x'|iou.*max"):
        query("max_detections=0&iou_threshold=x")
