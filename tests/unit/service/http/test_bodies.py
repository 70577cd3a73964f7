"""Bodies: limits while reading, multipart and base64 in memory."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.requests import Request

from service.errors import (
    BodyTimeout,
    InvalidParameter,
    MalformedRequest,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
)
from service.http.bodies import (
    Uploads,
    decode_base64,
    parse_json,
    parse_multipart,
    read_body,
    receive_body,
)
from service.http.connections.client import ClientDisconnected
from service.settings import Settings


def chunks(*bodies: bytes, gone: bool = False) -> Callable[[], Awaitable[dict[str, Any]]]:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": body, "more_body": gone or i < len(bodies) - 1}
        for i, body in enumerate(bodies)
    ]
    if gone:
        messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return receive


async def read(
    *bodies: bytes, limit: int = 10, headers: dict[str, str] | None = None, gone: bool = False
) -> bytes:
    receive = chunks(*bodies, gone=gone)
    return bytes(await read_body(Headers(headers or {}), receive, limit=limit, timeout=5.0))


@pytest.mark.parametrize(
    ("asked", "counts_from", "seconds"),
    [(None, "read", 10.0), ("250", "arrived", 0.25), ("9999", "arrived", 9.999)],
)
async def test_receive_body_returns_the_earlier_deadline(
    asked: str | None, counts_from: str, seconds: float
) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"image"}

    state = SimpleNamespace(uploads=Uploads(10))
    request = Request({"type": "http", "app": SimpleNamespace(state=state)}, receive)
    service = cast(Any, SimpleNamespace(settings=Settings(request_timeout_ms=10_000)))
    headers = {} if asked is None else {"x-deadline-ms": asked}
    body, times = await receive_body(service, request, headers)
    assert body == b"image"
    assert times.read - times.arrived >= 0.01
    assert times.deadline == getattr(times, counts_from) + seconds


async def test_read_body_joins_chunks() -> None:
    assert await read(b"") == b""
    assert await read(b"0123456789") == b"0123456789"
    assert await read(b"012", b"", b"345", b"6789") == b"0123456789"
    assert await read(b"", b"0") == b"0"


async def test_read_body_does_not_copy_one_chunk() -> None:
    chunk = b"0123456789"
    assert await read_body(Headers(), chunks(chunk), limit=10, timeout=5.0) is chunk


async def test_uploads_bound_the_bytes_of_arriving_bodies() -> None:
    uploads = Uploads(10)

    async def collect(*bodies: bytes, gone: bool = False) -> bytes:
        receive = chunks(*bodies, gone=gone)
        body = await read_body(Headers(), receive, limit=100, timeout=5.0, uploads=uploads)
        return bytes(body)

    assert await collect(b"0123456789") == b"0123456789"
    assert await collect(b"0" * 7, b"1" * 7) == b"0" * 7 + b"1" * 7, "alone, it may be larger"
    uploads.take(4, own=0)
    assert await collect(b"012345") == b"012345"
    with pytest.raises(Unavailable) as raised:
        await collect(b"0123", b"456")
    assert raised.value.reason == "uploads-full"
    with pytest.raises(ClientDisconnected):
        await collect(b"0123", gone=True)
    assert uploads.held == 4, "whatever happened, it was given back"


async def test_read_body_refuses_large_encoded_and_lost_bodies() -> None:
    with pytest.raises(TooLarge, match="larger than 10 bytes"):
        await read(b"0123456789a")
    with pytest.raises(TooLarge):
        await read(b"01234", b"56789", b"a")
    with pytest.raises(TooLarge, match="11 bytes are declared"):
        await read(headers={"Content-Length": "11"})
    with pytest.raises(TooLarge):
        await read(headers={"Content-Length": "9" * 5000})
    assert await read(b"0", headers={"Content-Length": "0001"}) == b"0"
    with pytest.raises(UnsupportedMedia, match="'br'"):
        await read(b"0", headers={"Content-Encoding": "br"})
    with pytest.raises(ClientDisconnected):
        await read(b"0", b"1", gone=True)


async def test_read_body_times_out() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"", "more_body": True}

    started = time.monotonic()
    with pytest.raises(BodyTimeout, match=r"0\.05 s"):
        await read_body(Headers(), receive, limit=10, timeout=0.05)
    assert time.monotonic() - started < 5.0


def form(parts: Sequence[tuple[str, str | None, bytes]], data: bytes = b"") -> tuple[bytes, str]:
    files = [
        (name, (filename, content) if filename is not None else (None, content))
        for name, filename, content in parts
    ]
    request = httpx.Request("POST", "http://x", files=files)
    return request.read(), request.headers["content-type"]


names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8)


@given(
    st.lists(st.tuples(names, st.none() | names, st.binary(max_size=200)), min_size=1, max_size=8)
)
def test_multipart_round_trip(
    parts: list[tuple[str, str | None, bytes]],
) -> None:
    body, content_type = form(parts)
    for held in (body, bytearray(body)):
        found = parse_multipart(held, content_type, max_parts=8)
        assert [(each.name, each.filename, bytes(each.data)) for each in found] == parts


def test_multipart_keeps_near_boundaries_in_the_data() -> None:
    content = b"\r\n--b\r--b\r\n--\r\n\r\n--bb"[:-1] + b"\r\n-" * 50
    body = (
        b'--boundary\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        + content
        + b"\r\n--boundary--\r\n"
    )
    (part,) = parse_multipart(body, 'multipart/form-data; boundary="boundary"', max_parts=1)
    assert bytes(part.data) == content


def part(disposition: str, *, data: bytes = b"x", more: str = "") -> bytes:
    """Return a form of one part, with the boundary "b"."""
    head = f"--b\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode()
    return head + data + b"\r\n--b--\r\n"


def test_multipart_preamble_and_epilogue_are_skipped() -> None:
    body = b"preamble\r\n" + part('form-data; name="file"', data=b"image") + b"epilogue"
    for held in (body, b"\r\n" + body[10:]):
        (found,) = parse_multipart(held, "multipart/form-data; boundary=b", max_parts=1)
        assert (found.name, bytes(found.data)) == ("file", b"image")


def test_multipart_file_names_may_hold_semicolons_and_need_no_quotes() -> None:
    body = part('form-data; name=file; filename="a; b;c\\".jpg"', more="Content-Type: x;y\r\n")
    (found,) = parse_multipart(body, "Multipart/Form-Data; Boundary=b; x=y", max_parts=1)
    assert (found.name, found.filename) == ("file", 'a; b;c".jpg')


@pytest.mark.parametrize(
    "data",
    [b"\r\n--ba", b"\r\n--b-", b"\r\n--b\r", b"\r\n--b ", b"\r\n--b\r\n"],
)
def test_multipart_lines_that_begin_with_the_boundary_are_delimiters(data: bytes) -> None:
    """Each is a delimiter, and no byte behind it is looked at one by one."""
    body = part('form-data; name="file"', data=data * 40_000)
    with pytest.raises((MalformedRequest, InvalidParameter), match=r"malformed|more than 16 parts"):
        parse_multipart(body, "multipart/form-data; boundary=b", max_parts=16)


def test_multipart_takes_white_space_behind_a_boundary() -> None:
    part = b'Content-Disposition: form-data; name="file"\r\n\r\nabc\r\n'
    body = b"--b \t\r\n" + part + b"--b  \r\n" + part + b"--b--\r\n"
    found = parse_multipart(body, "multipart/form-data; boundary=b", max_parts=2)
    assert [bytes(each.data) for each in found] == [b"abc", b"abc"]


def test_multipart_part_is_a_view_of_the_body() -> None:
    body, content_type = form([("file", "a.jpg", bytes(5_000_000))])
    (part,) = parse_multipart(body, content_type, max_parts=1)
    assert part.data.obj is body


def test_multipart_rejects_too_many_parts() -> None:
    body, content_type = form([("a", None, b"x")] * 5)
    assert len(parse_multipart(body, content_type, max_parts=5)) == 5
    with pytest.raises(InvalidParameter, match="more than 4 parts"):
        parse_multipart(body, content_type, max_parts=4)


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"--b--", "multipart/form-data", "without a boundary"),
        (b"\xff\xd8\xff", "multipart/form-data", "a JPEG image"),
        (b"\xff\xd8\xff", "multipart/form-data; boundary=b", "a JPEG image"),
        (b"--c\r\n", "multipart/form-data; boundary=b", "malformed"),
        (b"--b\r\nX: y\r\n\r\n1\r\n--b--", "multipart/form-data; boundary=b", "no name"),
        (
            b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\n1',
            "multipart/form-data; boundary=b",
            "closing boundary",
        ),
        (b"", "multipart/form-data; boundary=b", r"nothing \(0 bytes\)"),
        (b"--b--", "multipart/form-data; boundary=" + "b" * 1000, "1000 characters, not 1..256"),
        (b"--b--", "multipart/form-data" + ";" * 60_000 + "boundary=b", "more than 16 parameters"),
        (part(";" * 17 + 'name="file"'), "multipart/form-data; boundary=b", "more than 16 param"),
        (part("x" * 4096 + '; name="f"'), "multipart/form-data; boundary=b", "within 4096 bytes"),
        (part("form-data", more="no colon\r\n"), "multipart/form-data; boundary=b", "not a header"),
        (b"--b \t \r\n" + part("form-data")[5:], "multipart/form-data; boundary=b", "has no name"),
        (b"--b\r\n--b--\r\n", "multipart/form-data; boundary=b", "malformed"),
    ],
)
def test_multipart_rejects_malformed_bodies(body: bytes, content_type: str, message: str) -> None:
    with pytest.raises(MalformedRequest, match=message):
        parse_multipart(body, content_type, max_parts=8)


@given(st.binary(max_size=2000), st.sampled_from(["", "\r\n", *" \t\n\r\f\v"]), st.integers(1, 80))
def test_base64_accepts_any_line_breaks(content: bytes, separator: str, width: int) -> None:
    text = base64.b64encode(content).decode()
    broken = separator.join(text[i : i + width] for i in range(0, len(text), width))
    assert decode_base64(broken) == content


def test_base64_decodes_more_than_one_step() -> None:
    content = bytes(range(256)) * 10_000
    assert decode_base64(base64.b64encode(content).decode()) == content


@pytest.mark.parametrize(
    "text",
    [
        "+/+/aGk=",
        "\ufeff+/+/aGk=",
        "-_-_aGk=",
        "+/-_aGk",
        "data:;base64,+_+/aGk",
        " DATA:image/png;BASE64,-/-/aGk=",
    ],
)
def test_base64_accepts_both_alphabets_missing_padding_and_data_urls(text: str) -> None:
    assert decode_base64(text) == b"\xfb\xff\xbfhi"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a", "text"),
        ("ab=c", "base64"),
        ("aGk=aGk=", "base64"),
        ("§§§§", "text ('§§§§')"),
        ("aG k=!", "text"),
        ("data:image/svg+xml;utf8,<svg/>", "a data URL"),
        ("data:image/png;base64,***", "a data URL"),
        ("/home/me/cells.jpg", "the name of a file ('/home/me/cells.jpg')"),
        ("@cells.jpg", "the name of a file"),
        ("https://example.org/cells.jpg", "a URL"),
        ("b'/9j/4AAQ'", "bytes as Python prints them"),
        ("<svg/>", "an SVG drawing"),
    ],
)
def test_base64_error_names_what_was_found(text: str, found: str) -> None:
    for body in (text, text.encode()):
        with pytest.raises(MalformedRequest, match="not valid base64") as raised:
            decode_base64(body)
        assert found in str(raised.value)


@pytest.mark.parametrize("rubbish", [b"{},", b"0,", b'"",', b"[[[[[[[[]]]]]]]],", b'{"":{}},'])
def test_json_rejects_many_values_before_parsing(rubbish: bytes) -> None:
    # Less than what is parsed on the event loop.
    body = b'{"images":[' + rubbish * (240_000 // len(rubbish)) + b"0]}"
    with pytest.raises(MalformedRequest, match="more than 20000 values"):
        parse_json(body)


def test_base64_rejects_values_other_than_strings() -> None:
    for value, found in ((None, "missing"), (7, "7"), (["aGk="], "a list")):
        with pytest.raises(MalformedRequest, match=f"the image is {found}; .* base64 string"):
            decode_base64(value)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", "nothing"),
        (b"[]", "a list"),
        (b"null", "None"),
        (b"{", "JSON text"),
        (b"\xff", "bytes that begin with ff"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"image=%2F9j%2F", "form fields"),
        ('{"image": ""}'.encode("utf-16"), "UTF-16 text"),
    ],
)
def test_json_error_names_what_was_found(body: bytes, found: str) -> None:
    with pytest.raises(MalformedRequest, match="JSON") as raised:
        parse_json(body)
    assert found in str(raised.value)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    for body in (b'\xef\xbb\xbf{"image": ""}', bytearray(b'\xef\xbb\xbf {"image": ""}')):
        assert parse_json(body) == {"image": ""}
