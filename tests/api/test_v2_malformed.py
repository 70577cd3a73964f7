"""Malformed requests of the Open Inference Protocol: each is refused, by name, never by a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import MalformedRequest, TooLarge
from service.http.oip.json_codec import parse
from service.http.oip.tensors import Limits
from tests.api.inference_protocol import (
    INFER,
    binary_images,
    canvas,
    images,
    prefixed,
    score,
    with_raw,
)
from tests.api.served import served
from tests.images import encoded, one_red

LIMITS = Limits(batch=4, area=96 * 128)


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[httpx.Client]:
    """Of one server for all: none of this leaves a trace."""
    with served(repository) as server, server.client() as client:
        yield client


def changed(**fields: Any) -> dict[str, Any]:
    """The input `images` with some of its fields changed; None takes one away."""
    given = images(np.zeros((1, 32, 32, 3), np.uint8)) | fields
    return {name: value for name, value in given.items() if value is not None}


def refusal(answer: httpx.Response) -> str:
    assert 400 <= answer.status_code < 500, answer.text
    assert list(answer.json()) == ["error"]
    assert len(answer.content) < 600, "an error does not repeat what was sent"
    return str(answer.json()["error"])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (b"{}", "inputs"),
        (b'{"inputs": 1}', "inputs"),
        (b'{"inputs": [1]}', "inputs"),
        (b'{"inputs": []}', "inputs"),
        (b'{"inputs": [{}]}', "unknown input None"),
        (b'{"inputs": [{"name": ["images"]}]}', "unknown input"),
        (b"[" * 100_000, "JSON"),
        (b'{"inputs": [' + b"{}," * 20_000 + b"{}]}", "objects"),
        (b'{"inputs": [' + b"1," * 1_000_001 + b"1]}", "more than 1000000 values"),
        (b'{"inputs": [' + b"[" * 1_000_000, "more than 1000000 lists"),
    ],
)
def test_v2_rejects_malformed_json(client: httpx.Client, body: bytes, named: str) -> None:
    assert named in refusal(client.post(INFER, content=body))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (changed(name="image"), "unknown input 'image'; there is images"),
        (changed(name="x" * 5000), "unknown input"),
        (changed(datatype="FP32"), "datatype is 'FP32', not UINT8"),
        (changed(datatype=None), "datatype"),
        (changed(datatype={"a": 1}), "datatype"),
        (changed(shape=None), "shape"),
        (changed(shape=[]), "shape"),
        (changed(shape="1,32,32,3"), "whole numbers"),
        (changed(shape=[1, 32, 32.0, 3]), "whole numbers"),
        (changed(shape=[True, 32, 32, 3]), "whole numbers"),
        (changed(shape=[1, 32, 32]), "shape"),
        (changed(shape=[1, 32, 32, 4]), "shape"),
        (changed(shape=[1, -1, 32, 3]), "shape"),
        (changed(shape=[0, 32, 32, 3]), "shape"),
        (changed(shape=[1, 0, 0, 3]), "shape"),
        (changed(shape=[1, 33, 32, 3]), "multiples of 32"),
        (changed(shape=[1, 2**40, 2**40, 3]), "largest canvas"),
        (changed(shape=[2**63, 32, 32, 3]), "9223372036854775808 images; at most 64"),
        (changed(shape=[10**30, 32, 32, 3]), "whole numbers"),
        (changed(shape=[1] * 10_000), "at most 8 whole numbers"),
        (changed(data=None), "either data or"),
        (changed(data={}), "list"),
        (changed(data="AAAA"), "list"),
        (changed(data=[]), "3072 elements"),
        (changed(data=[0] * 3071), "3072 elements"),
        (changed(data=[0] * 3073), "3072 elements"),
        (changed(data=[256] * 3072), "holds 256, which is outside 0..255"),
        (changed(data=[-1] * 3072), "outside 0..255"),
        (changed(data=[*[0] * 3071, 0.5]), "holds 0.5; UINT8 takes whole numbers"),
        (changed(data=["0"] * 3072), "whole number"),
        (changed(data=[None] * 3072), "whole number"),
        (changed(data=[True] * 3072), "whole number"),
        (changed(data=[{}] * 3072), "holds a dict"),
        (changed(data=["a" * 60_000, *[""] * 4095]), "3072 elements"),
        (changed(data=["a" * 60_000, *[""] * 3071]), "holds 'aaa"),
        (changed(data=[2**64 - 1, *[0] * 3071]), "outside 0..255"),
        (changed(data=[2**64, *[0] * 3071]), "holds 1.8446744073709552e+19"),
        (changed(data=[[0, 0], [0]]), "different lengths"),
        (changed(data=[[0] * 3071, [0]]), "different lengths"),
        (changed(data=[[[0]], 0]), "mixed"),
        (changed(data=[0, [0]] * 1536), "holds a list"),
        (changed(data=[[[[[[[[[[[0]]]]]]]]]]]), "3072 elements"),
        (changed(parameters=[]), "parameters"),
        (changed(parameters={"binary_data_size": 3072}), "either"),
        (changed(data=None, parameters={"binary_data_size": 3072}), "0 bytes are left"),
        (changed(data=None, parameters={"shared_memory_region": "a"}), "shared memory"),
    ],
)
def test_v2_rejects_unsupported_tensors(
    client: httpx.Client, given: dict[str, Any], named: str
) -> None:
    assert named in refusal(client.post(INFER, json={"inputs": [given]}))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"inputs": [score(0.5)]}, "not both or neither"),
        ({"inputs": [changed(), changed()]}, "more than once"),
        ({"inputs": [changed(), binary_images(b"x")[0]]}, "not both or neither"),
        ({"inputs": [score(0.5)] * 50}, "there are 1 to 6"),
        ({"id": 7}, "id is 7; it is a string of at most 1024 characters"),
        ({"id": "x" * 1025}, "id is 'xxx"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {f"p{i}": 0 for i in range(100)}}, "64 parameters"),
        ({"parameters": {"score_treshold": 0.5}}, "do you mean score_threshold?"),
        ({"parameters": {"score_threshold": 1.5}}, "score_threshold: 1.5"),
        ({"parameters": {"score_threshold": "much"}}, "score_threshold"),
        ({"parameters": {"score_threshold": "nan"}}, "finite"),
        ({"parameters": {"score_threshold": True}}, "score_threshold"),
        ({"parameters": {"max_detections": 0}}, "1..1000"),
        ({"parameters": {"max_detections": 1.5}}, "whole"),
        ({"parameters": {"binary_data_output": 1}}, "true or false"),
        ({"inputs": [changed(), score(-0.1)]}, "score_threshold: -0.1"),
        ({"inputs": [changed(), score(1e300)]}, "score_threshold: inf"),
        ({"outputs": {}}, "outputs"),
        ({"outputs": [{"name": "classes"}]}, "unknown output 'classes'; there is image_index"),
        ({"outputs": [{}]}, "unknown output"),
        ({"outputs": [{"name": ["x" * 100_000]}]}, "unknown output a list"),
        ({"outputs": [{"name": "boxes"}] * 2}, "more than once"),
        ({"outputs": [{"name": "boxes", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"outputs": [{"name": "boxes", "parameters": {"classification": 2}}]}, "classification"),
    ],
)
def test_v2_rejects_contradicting_inputs(
    client: httpx.Client, fields: dict[str, Any], named: str
) -> None:
    document = {"inputs": [changed()]} | fields
    assert named in refusal(client.post(INFER, json=document))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([[97, 128]], "does not lie on a canvas of [96, 128]"),
        ([[-1, 10]], "does not lie"),
        ([[96, 128]] * 2, "2 rows for 1 images"),
    ],
)
def test_v2_rejects_image_sizes_beyond_the_canvas(
    client: httpx.Client, sizes: list[list[int]], named: str
) -> None:
    entry = {"name": "image_sizes", "datatype": "INT64", "shape": [len(sizes), 2], "data": sizes}
    document = {"inputs": [images(canvas(one_red())), entry]}
    assert named in refusal(client.post(INFER, json=document))


@pytest.mark.parametrize("length", ["", "-1", "+5", "x", "1e3", "9" * 5000, "99999999", "0", "10"])
def test_v2_rejects_wrong_header_length(client: httpx.Client, length: str) -> None:
    declared, raw = binary_images(encoded(one_red()))
    refusal(client.post(INFER, **with_raw({"inputs": [declared]}, raw, length)))


@pytest.mark.parametrize("size", [-1, 0, 1, 2**31, 2**63, 1.5, "10", True, None, [], {}])
def test_v2_rejects_wrong_binary_size(client: httpx.Client, size: object) -> None:
    declared, raw = binary_images(encoded(one_red()))
    declared["parameters"]["binary_data_size"] = size
    refusal(client.post(INFER, **with_raw({"inputs": [declared]}, raw)))


def test_v2_rejects_missing_or_extra_bytes(client: httpx.Client) -> None:
    declared, raw = binary_images(encoded(one_red()))
    document = {"inputs": [declared]}
    assert "add up to" in refusal(client.post(INFER, **with_raw(document, raw + b"x")))
    assert "bytes are left" in refusal(client.post(INFER, **with_raw(document, raw[:-1])))
    # Two tensors that would have to share their bytes.
    threshold = {
        "name": "score_threshold",
        "datatype": "FP32",
        "shape": [1],
        "parameters": {"binary_data_size": 4},
    }
    answer = client.post(INFER, **with_raw({"inputs": [declared, threshold]}, raw))
    assert "0 bytes are left" in refusal(answer)
    answer = client.post(INFER, **with_raw({"inputs": [declared, threshold]}, raw + b"\0\0\0\0"))
    assert answer.status_code == 200
    threshold["parameters"] = {"binary_data_size": 3}
    answer = client.post(INFER, **with_raw({"inputs": [declared, threshold]}, raw + b"\0\0\0"))
    assert "takes 4" in refusal(answer)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "takes 1 elements, the data has 0"),
        (b"\1\0\0", "too few for the length"),
        (b"\xff\xff\xff\xff", "says that it has 4294967295 bytes, but 0 remain"),
        (b"\5\0\0\0abcd", "says that it has 5 bytes, but 4 remain"),
        (prefixed(b"abcd") + b"\0", "too few for the length"),
        (prefixed(b"abcd", b"efgh"), "takes 1 elements, the data has more"),
        (prefixed(*[b""] * 100_000), "the data has more"),
    ],
)
def test_v2_rejects_wrong_element_lengths(client: httpx.Client, raw: bytes, named: str) -> None:
    declared, _ = binary_images(b"", size=len(raw))
    assert named in refusal(client.post(INFER, **with_raw({"inputs": [declared]}, raw)))


@pytest.mark.parametrize(
    "data", [["%%%"], ["AAA"], [1], [None], [["QUJD"], "QUJD"], "QUJD", [], {}, ["a"] * 3, [[]]]
)
def test_v2_rejects_invalid_base64(client: httpx.Client, data: object) -> None:
    given = {"name": "encoded_images", "datatype": "BYTES", "shape": [1], "data": data}
    refusal(client.post(INFER, json={"inputs": [given]}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=4,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["images", "encoded_images", "score_threshold"]) | json_values,
        "datatype": st.sampled_from(["UINT8", "BYTES", "FP32"]) | json_values,
        "shape": st.sampled_from([[1, 32, 32, 3], [1]]) | json_values,
        "data": json_values,
        "parameters": st.fixed_dictionaries({"binary_data_size": json_values}) | json_values,
    },
)
documents = st.fixed_dictionaries(
    {"inputs": st.lists(fields, max_size=3) | json_values},
    optional={"outputs": json_values, "parameters": json_values, "id": json_values},
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(document=documents, raw=st.binary(max_size=16), offset=st.integers(-3, 3) | st.none())
def test_v2_parser_accepts_or_refuses_any_input(
    document: dict[str, Any], raw: bytes, offset: int | None
) -> None:
    header = json.dumps(document).encode()
    length = None if offset is None else str(len(header) + offset)
    try:
        parsed = parse(header + raw, length, LIMITS)
    except (MalformedRequest, TooLarge):
        return
    assert parsed.request.images or "images" in parsed.request.inputs


@settings(max_examples=100)
@given(raw=st.binary(max_size=40), count=st.integers(1, 4))
def test_v2_elements_stay_within_their_data(raw: bytes, count: int) -> None:
    declared, _ = binary_images(*[b""] * count, size=len(raw))
    header = json.dumps({"inputs": [declared]}).encode()
    try:
        parsed = parse(header + raw, str(len(header)), LIMITS)
    except MalformedRequest:
        return
    assert prefixed(*map(bytes, parsed.request.images)) == raw
    assert len(parsed.request.images) == count
