"""Accept, deadlines, query strings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.requests import Request

from service.errors import InvalidParameter
from service.http.parameters import (
    DetectQuery,
    accept_of,
    deadline_seconds,
    parse_query,
    wanted_image,
    wants_lines,
)


def query(text: str) -> DetectQuery:
    scope = {"type": "http", "query_string": text.encode(), "headers": []}
    return parse_query(Request(scope), DetectQuery)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("text/html", None),
        ("image/webp", None),
        ("image/jpeg", "image/jpeg"),
        ("IMAGE/PNG", "image/png"),
        ("image/*", "image/jpeg"),
        ("image/png, image/jpeg", "image/png"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("image/*, image/png", "image/png"),
        ("image/png;q=0.9, image/*;q=0.5", "image/png"),
        ("image/*, image/jpeg;q=0", "image/png"),
        ("image/jpeg, text/html", "image/jpeg"),
        ("image/jpeg, application/json;q=0", "image/jpeg"),
        ("image/png, */*, application/json;q=0", "image/png"),
        ("image/png, application/*;q=0, */*", "image/png"),
        ("image/jpeg, */*;q=0.1", None),
        ("image/jpeg, *;q=.1", None),
        ("image/jpeg, application/*;q=0.1", None),
        ("image/*;q=0.5, application/json;q=0.1", None),
        ("image/jpeg, application/json;charset=utf-8", None),
        ("image/jpeg, application/json", None),
        ("image/jpeg;q=0.4, application/json;q=0.5", None),
        ("text/html,image/avif,image/webp,image/png,*/*;q=0.8", None),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", None),
        ("image/gif", None),
        ("image/jpeg;q=0", None),
        ("image/jpeg;q=high", None),
        ("image/jpeg;q=nan", None),
        ("image/jpeg;q=-1", None),
        ("image/jpeg;q=1e9", None),
        (";,;q=,=,image/png ; Q=0.5;;", "image/png"),
    ],
)
def test_accept_chooses_json_or_image(accept: str, chosen: str | None) -> None:
    assert wanted_image(accept) == chosen


@pytest.mark.parametrize(
    ("accept", "lines"),
    [
        ("application/x-ndjson", True),
        ("Application/X-NDJSON; q=.5", True),
        ("application/x-ndjson, application/json", True),
        ("application/x-ndjson, */*;q=0.5", True),
        ("application/x-ndjson;q=0.5, application/json", False),
        ("application/x-ndjson;q=0.5, */*", False),
        ("application/x-ndjson;q=0", False),
        ("application/x-ndjson-seq", False),
        ("application/*", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_accept_chooses_json_or_lines(accept: str, lines: bool) -> None:
    assert wants_lines(accept, "application/x-ndjson") is lines


@given(st.lists(st.sampled_from([*"*/;,=.q ", "image", "json", "png", "0", "²", "\xff"])))
def test_any_accept_is_parsed(pieces: list[str]) -> None:
    accept = "".join(pieces)
    assert wanted_image(accept) in (None, "image/jpeg", "image/png")
    assert wants_lines(accept, "application/x-ndjson") is False


def test_several_accept_headers_are_one_of_bounded_length() -> None:
    def of(*values: bytes) -> str:
        headers = [(b"accept", value) for value in values]
        return accept_of(Request({"type": "http", "headers": [(b"host", b"a"), *headers]}))

    assert of() == ""
    assert of(b"image/png", b"application/json;q=0") == "image/png,application/json;q=0"
    assert len(of(*[b";," * 1000] * 30)) == 2048


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
