"""Requests that `fuzz.py` sends for their heads, and those of the Open Inference Protocol.

Headers and query strings over HTTP, bytes over a bare socket, tensors as JSON, binary and gRPC
messages: valid, or with a few things wrong.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from typing import Any
from urllib.parse import quote_from_bytes

from fuzz_bodies import CLOSED, MOST_BYTES, Case, Headers, Source, large_image, mutate


def query(source: Source, rng: random.Random) -> Case:
    """A query string of up to thousands of parameters."""
    known = ("score_threshold", "iou_threshold", "max_detections", "classes", "tile", "format")
    values = ("0.5", "-1", "nan", "1e999", "9" * 5000, "", "auto", "%00", "%ff", "a,b" * 500, "RBC")
    pieces = []
    for _ in range(rng.choice((1, 2, 4, 300, 5000))):
        name = rng.choice(known) if rng.random() < 0.7 else quote_from_bytes(rng.randbytes(4))
        pieces.append(f"{name}={rng.choice(values)}")
    text = rng.choice(("&", "&", "&", ";", "&&")).join(pieces)[: rng.choice((2000, 50_000))]
    if rng.random() < 0.2:
        text = rng.choice(("&" * 40_000, "%" * 3000, "a=b&" * 12_000, "classes=," * 5000, "?" * 99))
    path = rng.choice(("/v1/detect", "/v1/detect", "/v1/detect/batch", "/v1/models"))
    method = "GET" if path == "/v1/models" else "POST"
    also = frozenset({"404", "414"})
    return Case(f"{path}?{text}", source.image(rng), (), also, method=method)


_HEADERS = (
    ("Content-Type", "multipart/form-data" + ";" * 60_000),
    ("Content-Type", "multipart/form-data; " + 'a="\\' * 10_000),
    ("Content-Type", "multipart/form-data; boundary*0=a; boundary*1=b"),
    ("Content-Type", "application/json; charset=utf-7"),
    ("Accept", "image/png;q=0.1," * 3500),
    ("Accept", "," * 60_000),
    ("Accept", "image/png;q=nan"),
    ("Accept", "image/*;q=1e999;" + "q=;" * 10_000),
    ("Accept-Encoding", "gzip," * 10_000),
    ("X-Request-Id", "x" * 60_000),
    ("X-Request-Id", "\xff\xfe"),
    ("X-Deadline-Ms", "9" * 5000),
    ("X-Deadline-Ms", "0"),
    ("X-Deadline-Ms", "-1"),
    ("X-Deadline-Ms", "1"),
    ("X-Deadline-Ms", "1e3"),
    ("X-Deadline-Ms", "\xb2"),
    ("Authorization", "Bearer " + "x" * 60_000),
    ("Authorization", "Basic Og=="),
    ("Authorization", "\xff"),
    ("X-API-Key", "rs_" + "a" * 2000),
    ("Upgrade", "h2c"),
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade, HTTP2-Settings"),
    ("Connection", "keep-alive, " * 4000),
    ("HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA"),
    ("Expect", "100-continue"),
    ("Expect", "200-ok"),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "x," * 20_000),
    ("Cookie", "a=b; " * 10_000),
    ("Range", "bytes=" + "0-1," * 10_000),
    ("If-None-Match", '"a",' * 10_000),
    ("Origin", "http://" + "a" * 3000),
    ("Access-Control-Request-Method", "x" * 3000),
    ("X-Forwarded-For", "1.2.3.4, " * 5000),
    ("Host", "a" * 3000),
    ("Host", "[::1"),
    ("traceparent", "00-" + "f" * 32 + "-" + "f" * 16 + "-01" + "-" * 5000),
    ("tracestate", "a=b," * 10_000),
    ("Inference-Header-Content-Length", "9" * 5000),
)
_PATHS = ("/v1/detect", "/v1/detect/batch", "/v1/models", "/", "/docs", "/healthz", "/metrics")
_OF_HEADS = frozenset({"401", "404", "405", "414", "431"})


def headers(source: Source, rng: random.Random) -> Case:
    """An image under odd headers."""
    odd = rng.sample(_HEADERS, rng.choice((1, 1, 2, 3)))
    # A head of more than 64 KiB may find the connection closed before all of it is sent.
    most = rng.choice((60_000, 2000, 200)) // len(odd)
    cut = {name: value[:most] for name, value in odd}
    chosen = {"Content-Type": "image/jpeg"} | cut
    also = _OF_HEADS | ({"504"} if "X-Deadline-Ms" in chosen else set())
    path = rng.choice(_PATHS[:1] * 5 + _PATHS)
    method = rng.choice(("POST",) * 7 + ("GET", "OPTIONS", "DELETE"))
    return Case(path, source.image(rng), tuple(chosen.items()), also, method=method)


_LINES = (
    *(b"Content-Length: " + each for each in (b"+5", b"0x10", b"-1", b"1e3", b"9" * 5000, b"5, 5")),
    *(b"Content-Length: " + each for each in (b"", b"5\r\nContent-Length: 6", b"\xd9\xa3", b"5 5")),
    *(b"Transfer-Encoding: " + each for each in (b"chunked", b"identity", b"gzip, chunked")),
    *(
        b"Transfer-Encoding: " + each
        for each in (b"xchunked", b"\x0bchunked", b"chunked\r\n chunked")
    ),
    *(b"Expect: " + each for each in (b"100-continue", b"100-continue, 100-continue", b"\xff")),
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    *(b"Connection: " + each for each in (b"keep-alive", b"close, close", b"x" * 9000)),
    *(
        b"X: \x00",
        b"X: a\rb",
        b"X: a\r\n folded",
        b"no colon",
        b": no name",
        b"X : y",
        b"\xff: \xff",
    ),
    *(b"X-Long: " + b"a" * 200_000, b"\r\n".join([b"X: y"] * 5000), b"\n".join([b"X: y"] * 20)),
    *(b"Host: b", b"Host: ", b"Content-Type: multipart/form-data; boundary=\xff\x00"),
)
_TARGETS = (
    *(
        b"*",
        b"http://h/v1/detect",
        b"//v1/detect",
        b"/v1/detect/",
        b"/%00",
        b"/\xff",
        b"",
        b"h:443",
    ),
    *(b"/" + b"a/" * 4000, b"/" * 70_000, b"/v1/models/" + b"%2e%2e/" * 500, b"/?" + b"&" * 9000),
)
_METHODS = (
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"x" * 3000,
    b"\x80",
    b"post",
)
_VERSIONS = (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/9.9", b"http/1.1", b"")
_CHUNKS = (
    *(
        b"0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"G\r\n",
        b"5\n",
    ),
    *(b"FFFFFFFFFFFFFFFFF\r\nx", b"7FFFFFFFFFFFFFFF\r\nx", b"5\r\nhelloo\r\n0\r\n\r\n"),
    *(b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n", b"1;" + b"e" * 400_000 + b"\r\nx\r\n0\r\n\r\n"),
    *(b"0\r\n" + b"X: y\r\n" * 50_000 + b"\r\n", b"0" * 100_000 + b"\r\n\r\n"),
)


def bare_bytes(source: Source, rng: random.Random) -> Case:
    """What no client's library would send, over a socket of its own."""
    method, target, version = b"POST", rng.choice((b"/v1/detect", b"/v1/detect/batch")), b"HTTP/1.1"
    if rng.random() < 0.2:
        method = rng.choice(_METHODS)
    if rng.random() < 0.2:
        target = rng.choice(_TARGETS)
    if rng.random() < 0.2:
        version = rng.choice(_VERSIONS)
    body = rng.choice(_CHUNKS) if rng.random() < 0.3 else source.image(rng)
    lines = [b"Host: a", b"Content-Type: image/jpeg"]
    if body in _CHUNKS:
        lines.append(b"Transfer-Encoding: chunked")
    elif rng.random() < 0.9:
        lines.append(b"Content-Length: %d" % (len(body) + rng.choice((0, 0, 0, 0, -1, 1, 1 << 40))))
    for line in rng.sample(_LINES, rng.choice((0, 0, 1, 2))):
        lines.insert(rng.randrange(len(lines) + 1), line)
    head = b"\r\n".join((b" ".join((method, target, version)), *lines, b"\r\n"))
    if rng.random() < 0.1:
        head = mutate(rng, head, [head])
    content = head + body
    if rng.random() < 0.2:
        content *= rng.choice((2, 20))
    also = _OF_HEADS | {CLOSED, "501"}
    return Case("socket", content[:MOST_BYTES], (), also, "socket")


_STRANGE = tuple(
    json.dumps(value)  # type: ignore[var-annotated]
    for value in (
        *(None, True, 0, -1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan")),
        *("", "1", "\x00", "a" * 60_000, "images", "9" * 5000, "\ud800"),
        *([], {}, [[]], [{}], [None], ["x", 1, None], [[0], [0, 0]], [[[0]] * 9] * 9),
        *(
            ["a" * 60_000] + [""] * 4095,
            [""] * 90_000 + ["a" * 90_000],
            [0] * 300_000,
            [[]] * 200_000,
            [{"a": 1}] * 2000,
        ),
        *([1, 32, 32, 3], [-1], [2**40], [0, 0, 0, 0], [2**62] * 4, ["1"], [1.5], [1] * 5000),
        {str(number): number for number in range(5000)},
    )
)
"""Values, as JSON."""
_DEEP = b"[" * 900 + b"]" * 900, b"[" * 400_000, b'{"a":' * 500 + b"1" + b"}" * 500
_PATHS_OF_MODELS = ("", "/ready", "/config", "/versions/1", "/versions/1/ready", "/versions/0")
_VERSIONS_OF_MODELS = ("1", "2", "0", "01", "-1", "9" * 30, "9" * 1000, "%D9%A1", "1.0", "a", "%00")


def tensors(source: Source, rng: random.Random) -> Case:
    """An inference request of the REST dialect."""
    document = _document(source, rng)
    if rng.random() < 0.3:
        document["inputs"][-1]["data"] = json.loads(rng.choice(_STRANGE))
    binary = b""
    chosen: Headers = (("Content-Type", "application/json"),)
    if rng.random() < 0.3:
        binary = rng.randbytes(rng.choice((0, 3072, 3072, 3073, 100_000)))
        size = rng.choice((len(binary), len(binary), len(binary) + 1, -1, 2**63, "1", None))
        document["inputs"][0].pop("data")
        document["inputs"][0]["parameters"] = {"binary_data_size": size}
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2, 5))):
        _spoil(rng, document)
    text = json.dumps(document).encode()
    if rng.random() < 0.1:
        text = text.replace(b"3072", rng.choice(_DEEP)).replace(b"[0, ", rng.choice(_DEEP), 1)
    if rng.random() < 0.2:
        text = mutate(rng, text, [text])
    if binary or rng.random() < 0.1:
        size = rng.choice((len(text),) * 5 + (0, len(text) + 1, 10**9, -1, "9" * 5000, "1e3", ""))
        chosen += (("Inference-Header-Content-Length", str(size)),)
    path = f"/v2/models/{source.model}"
    if rng.random() < 0.2:
        path += f"/versions/{rng.choice(_VERSIONS_OF_MODELS)}"
    # What has become of the parameter `timeout` may be short.
    also = frozenset({"404", "504"} if "parameters" in document else {"404"})
    return Case(f"{path}/infer", (text + binary)[:MOST_BYTES], chosen, also)


def _document(source: Source, rng: random.Random) -> dict[str, Any]:
    """A valid request."""
    if rng.random() < 0.5:
        images = [
            base64.b64encode(source.image(rng)).decode() for _ in range(rng.choice((1, 1, 3)))
        ]
        first = {"name": "encoded_images", "datatype": "BYTES", "shape": [len(images)]}
        first["data"] = images
    else:
        first = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
        if rng.random() < 0.2:
            first["data"] = [[[[0] * 3] * 32] * 32]
    document: dict[str, Any] = {"id": "a", "inputs": [first]}
    if rng.random() < 0.5:
        second = {"name": "score_threshold", "datatype": "FP32", "shape": [1], "data": [0.5]}
        document["inputs"].append(second)
    if rng.random() < 0.3:
        document["parameters"] = {"max_detections": 3, "timeout": 10**7}
    if rng.random() < 0.3:
        binary = {"binary_data": rng.random() < 0.5}
        document["outputs"] = [{"name": "boxes", "parameters": binary}, {"name": "scores"}]
    return document


def _spoil(rng: random.Random, node: Any) -> None:
    """Put something strange somewhere into a JSON document."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(min(len(node), 8))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(node[key], dict | list) or rng.random() < 0.3:
            break
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.3:
        node[rng.choice(("name", "data", "parameters", "shape", "x" * 60_000, ""))] = node.pop(key)
    else:
        node[key] = json.loads(rng.choice(_STRANGE))


def about_models(source: Source, rng: random.Random) -> Case:
    """What there is, by the names that clients give."""
    also = frozenset({"404", "405", "414"})
    if rng.random() < 0.5:
        body = rng.choice((*_STRANGE, '{"ready": true}', '{"ready": 1}', "{}")).encode()
        body = rng.choice((body, body, b"", *_DEEP, mutate(rng, body, [body])))
        return Case("/v2/repository/index", body[:MOST_BYTES], (), also)
    name = rng.choice((source.model, "x" * 4000, "x" * 60_000, "%00", "..", "%2e%2e%2f", "a%0ab"))
    path = rng.choice(("/v1/models/", "/v2/models/")) + name + rng.choice(_PATHS_OF_MODELS)
    return Case(path, b"", (), also, method="GET")


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(result) + bytes((value,))


def _field(number: int, content: bytes) -> bytes:
    """A text, some bytes, packed numbers, or a message."""
    return _key(number, 2) + _varint(len(content)) + content


_INFERENCE, _HEALTH = "/inference.GRPCInferenceService/", "/grpc.health.v1.Health/"
_SMALL_METHODS = (
    *(_INFERENCE + name for name in ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady")),
    *(_INFERENCE + name for name in ("ModelMetadata", "ModelConfig", "RepositoryIndex", "None")),
    _HEALTH + "Check",
)
_GROUP, _GROUP_END = _key(9, 3), _key(9, 4)
_METADATA = (
    *(("x-request-id", "x" * 5000), ("x-request-id", "a b"), ("authorization", "Bearer x")),
    *(("x-api-key", ""), ("traceparent", "00-" + "f" * 5000), ("x-a", "," * 3000)),
    *(("x-long", "x" * 7000), ("x-b", "")),
)


def message(source: Source, rng: random.Random) -> Case:
    """A call of any method over gRPC."""
    also = {"gRPC UNIMPLEMENTED"}
    if rng.random() < 0.6:
        image = source.image(rng)
        if rng.random() < 0.2:
            image = large_image(source, rng).body
            also.add("gRPC DEADLINE_EXCEEDED")
        method, content = _INFERENCE + "ModelInfer", _infer_message(source, rng, image)
        repeated = rng.choice((3, 4, 5, 6, 7))
    else:
        method, content = rng.choice(_SMALL_METHODS), _field(1, source.model.encode())
        repeated = rng.choice((1, 2))
    many = rng.choice((10, 1000, 100_000))
    wrong = rng.randrange(14)
    if wrong < 2:
        content = mutate(rng, content, [content])
    elif wrong == 2:
        content += _field(repeated, b"") * 5 * many
    elif wrong == 3:
        content += _field(5, _field(rng.choice((3, 4, 5)), b"") * 5 * many)
    elif wrong == 4:
        unknown = (_key(99, 0) + b"\x01", _key(99, 1) + bytes(8), _key(99, 5) + bytes(4))
        content += rng.choice((*unknown, _field(99, b""), _field(2**29 - 1, b"x"))) * many
    elif wrong == 5:
        content += rng.choice((_GROUP * many + _GROUP_END * many, _GROUP * many, _GROUP_END))
    elif wrong == 6:
        content += _field(rng.choice((1, 2, 3)), rng.choice((b"x", b"\xff", b"\x00")) * 9 * many)
    elif wrong == 7:
        numbers = rng.choice((b"\x00", b"\x80\x80\x80\x80\x10", b"\x80", b"\xff" * 9 + b"\x01"))
        contents = _field(5, _field(rng.choice((1, 2, 3, 4, 5, 6, 7)), numbers * many))
        content += _field(5, rng.choice((contents, _field(3, numbers * many))))
    elif wrong == 8:
        content += _field(5, (_key(3, 0) + b"\x01") * many)
    elif wrong == 9:
        content += _key(5, 2) + _varint(rng.choice((1, 2**31, 2**32, 2**63, -1))) + b"x"
    elif wrong == 10:
        content = rng.choice((b"", b"\x00", b"\xff" * many, b"\x80" * many, rng.randbytes(many)))
    chosen = tuple(rng.sample(_METADATA, rng.choice((0, 0, 0, 1, 2))))
    return Case(method, content[:MOST_BYTES], chosen, frozenset(also), "grpc")


def _infer_message(source: Source, rng: random.Random, image: bytes) -> bytes:
    """A ModelInferRequest, with a mistake at times."""
    raw = rng.random() < 0.5
    if rng.random() < 0.5:
        names, shape = _field(1, b"encoded_images") + _field(2, b"BYTES"), b"\x01"
        elements = struct.pack("<I", len(image)) + image if raw else _field(8, image)
    else:
        names, shape = _field(1, b"images") + _field(2, b"UINT8"), b"\x01\x20\x20\x03"
        elements = bytes(3072) if raw else _field(4, bytes(3072))
    if rng.random() < 0.2:
        shape = rng.choice((b"", b"\x02", b"\x00", b"\xff" * 9 + b"\x01", b"\x01" * 5000))
    tensor = names + _field(3, shape) + (b"" if raw else _field(5, elements))
    content = _field(1, source.model.encode()) + _field(3, b"an id") + _field(5, tensor)
    if raw:
        content += _field(7, elements) * rng.choice((1, 1, 1, 0, 2, 1000))
    if rng.random() < 0.3:
        value = rng.choice(
            (_key(1, 0) + b"\x01", _key(4, 1) + struct.pack("<d", 0.4), _field(3, b"x"))
        )
        name = rng.choice((b"score_threshold", b"timeout", b"x", b"\xff"))
        content += _field(4, _field(1, name) + _field(2, value)) * rng.choice((1, 1, 5000))
    if rng.random() < 0.3:
        content += _field(6, _field(1, rng.choice((b"boxes", b"other", b"")))) * rng.choice((1, 5))
    return content
