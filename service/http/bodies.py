"""Request bodies: reading within limits, multipart, JSON and base64.

Images are copied as little as possible: a multipart part is a view of the body.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import time
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header

from service.contents import kind_of
from service.engine.service import Service
from service.errors import (
    BodyTimeout,
    InvalidParameter,
    MalformedImage,
    MalformedRequest,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
    shown,
)
from service.http.connections.client import ClientDisconnected, client_of
from service.http.parameters import deadline_seconds
from service.imaging.decode import media_type

P = ParamSpec("P")
T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Body = bytes | bytearray

_THREAD_BYTES: Final = 256 * 1024
"""Bodies from this size on are parsed in a thread: base64 takes time, and so does a form that is
full of near-boundaries."""
_MAX_JSON_VALUES: Final = 20_000
"""Values, lists and objects: far above what images need, and parsed in about a millisecond. No
other thread runs meanwhile, and a body of 32 MB could hold sixteen million."""

_LONGEST_BOUNDARY: Final = 256
_LONGEST_PART_HEAD: Final = 4096
_MOST_OPTIONS: Final = 16
"""Semicolons in a header; a file name may contain some."""

_BEGINNINGS: Final = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")
LINE_BREAKS: Final = (
    "the image's line breaks were removed on the way here, as `curl -d @FILE` does; use "
    "`curl --data-binary @FILE`"
)
_WAYS: Final = (
    "Send the file's bytes (curl --data-binary @FILE), or a form with the part 'file' "
    '(curl -F file=@FILE), or {"image": "<base64>"} with Content-Type application/json'
)

_PADDING: Final = re.compile(rb"[ \t]+")
"""Padding after a boundary (RFC 2046, 5.1.1)."""

_BASE64_STEP: Final = 1 << 20
"""Characters decoded at a time, a multiple of 4: the interpreter can switch threads between."""
_WHITE_SPACE: Final = b" \t\n\r\f\v"
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_TRANSLATED: Final = b"-_" + _WHITE_SPACE
_DATA_URL: Final = re.compile(rb"\s*data:[^,]{0,256};base64,", re.IGNORECASE)


class Part(NamedTuple):
    """One part of a multipart body."""

    name: str
    filename: str | None
    data: memoryview


class Times(NamedTuple):
    """The times of a request, on the clock of `time.monotonic`."""

    arrived: float
    read: float
    """When the body was complete."""
    deadline: float
    """When a response is too late."""


class Uploads:
    """Bounds the bytes of all bodies that are arriving. Not thread-safe.

    Bytes and not bodies: hundreds of clients that send a byte a second hold little memory, and must
    not keep out those that send images.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int, *, own: int) -> None:
        """Hold `size` bytes more for a body that holds `own`. Raises Unavailable without room."""
        # The largest body passes when it is alone: its size has a bound of its own.
        if self.held > own and self.held + size > self.limit:
            raise Unavailable(
                f"bodies of {self.held} bytes are arriving (at most {self.limit}); "
                "try again in a second",
                reason="uploads-full",
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Free `size` bytes, of a body that is complete or was given up."""
        self.held -= size


async def receive_body(
    service: Service, request: Request, headers: Mapping[str, str]
) -> tuple[Body, Times]:
    """Read a request's body within the service's limits.

    `X-Deadline-Ms` counts from the arrival of the request, the service's own limit from the end of
    the body. Raises what `read_body` raises; InvalidParameter before anything is read.
    """
    arrived = time.monotonic()
    settings, client = service.settings, client_of(request.scope)
    asked = deadline_seconds(headers, settings.request_timeout_ms)
    body = await read_body(
        headers,
        request.receive,
        limit=settings.max_body_bytes,
        timeout=settings.body_timeout_ms / 1e3,
        uploads=request.app.state.uploads,
        complete=client is not None and client.body_complete,
    )
    read = time.monotonic()
    deadline = min(read + settings.request_timeout_ms / 1e3, arrived + asked)
    return body, Times(arrived, read, deadline)


async def parse_body(
    service: Service,
    function: Callable[Concatenate[Body, P], T],
    body: Body,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Return `function` of a body, called in a thread where the body is large."""
    if len(body) < _THREAD_BYTES:
        return function(body, *args, **kwargs)
    return await service.off_loop(function, body, *args, **kwargs)


async def read_body(
    headers: Mapping[str, str],
    receive: Receive,
    *,
    limit: int,
    timeout: float,
    uploads: Uploads | None = None,
    complete: bool = False,
) -> Body:
    """Read a body of at most `limit` bytes within `timeout` seconds.

    `complete` says that the server has received all of it, so that no timeout is needed.

    Raises UnsupportedMedia for an encoded body, TooLarge (at once when the length is declared),
    BodyTimeout, ClientDisconnected, or Unavailable where `uploads` has no room for it.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(
            f"Content-Encoding {shown(encoding)} is not accepted; send it unencoded"
        )
    declared = headers.get("content-length", "")
    # Compared by its digits first: int() refuses thousands of them with an error of its own.
    digits = declared.lstrip("0") if declared.isdecimal() else ""
    if len(digits) > len(str(limit)) or (digits and int(digits) > limit):
        raise _too_large(limit, f"{digits[:20]} bytes are declared")
    if complete:
        return await _collect(receive, limit, uploads or Uploads(limit))
    try:
        async with asyncio.timeout(timeout):
            return await _collect(receive, limit, uploads or Uploads(limit))
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not arrive within {timeout:g} s; send it faster or make it smaller"
        ) from None


async def _collect(receive: Receive, limit: int, uploads: Uploads) -> Body:
    body: Body = b""
    held = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            chunk: bytes = message.get("body", b"")
            if held + len(chunk) > limit:
                raise _too_large(limit, "more has arrived")
            uploads.take(len(chunk), own=held)
            held += len(chunk)
            if not body:
                body = chunk
            elif isinstance(body, bytearray):
                body += chunk
            else:
                body = bytearray(body) + chunk
            if not message.get("more_body", False):
                return body
    finally:
        uploads.give_back(held)


def check_raw(body: Body, content_type: str) -> None:
    """Raise MalformedImage or UnsupportedMedia for a body that is no image, with what to send."""
    # Not one image is without a NUL, which curl removes as well.
    if lacks_line_breaks(body) and b"\0" not in body:
        raise MalformedImage(LINE_BREAKS)
    try:
        media_type(body if isinstance(body, bytes) else memoryview(body))
    except (MalformedImage, UnsupportedMedia) as error:
        sent_as = shown(content_type) if content_type else "missing"
        raise type(error)(f"{error}. Content-Type is {sent_as}. {_WAYS}") from error


def lacks_line_breaks(body: Body) -> bool:
    """Return whether an image may have lost its line breaks to `curl -d @FILE`.

    Those of a single colour may have none.
    """
    return body.startswith(_BEGINNINGS) and b"\n" not in body and b"\r" not in body


def parse_multipart(body: Body, content_type: str, *, max_parts: int) -> list[Part]:
    """Return the parts of a multipart/form-data body. Raises MalformedRequest, InvalidParameter.

    The body is searched with `bytes.find`: a state machine in Python takes up to a hundred times
    longer for bytes that look like boundaries or padding.
    """
    boundary = _options(content_type).get(b"boundary")
    if not boundary:
        raise MalformedRequest(
            "multipart/form-data without a boundary in Content-Type; leave that header to the "
            f"library that writes the form (the body looks like {kind_of(body)})"
        )
    if len(boundary) > _LONGEST_BOUNDARY:
        raise _malformed(f"its boundary has {len(boundary)} characters, not 1..{_LONGEST_BOUNDARY}")
    # A line that begins with the boundary is a delimiter whatever follows (RFC 2046, 5.1.1).
    delimiter = b"\r\n--" + boundary
    parts: list[Part] = []
    # No line break precedes the first line.
    first = -2 if body.startswith(delimiter[2:]) else body.find(delimiter)
    if first == -1:
        raise _malformed(
            f"the boundary of its Content-Type is not in it; it looks like {kind_of(body)}"
        )
    at = first + len(delimiter)
    while not body.startswith(b"--", at):
        end = body.find(delimiter, at)
        if end < 0:
            raise MalformedRequest("the multipart body ends before its closing boundary")
        if len(parts) == max_parts:
            raise InvalidParameter(f"more than {max_parts} parts in one multipart body")
        parts.append(_part(body, at, end))
        at = end + len(delimiter)
    return parts


def _part(body: Body, start: int, end: int) -> Part:
    """Read the part between two delimiters: CRLF, a header on each line, an empty line, data."""
    padding = _PADDING.match(body, start)
    start = start if padding is None else padding.end()
    blank = body.find(b"\r\n\r\n", start, min(end, start + _LONGEST_PART_HEAD))
    if not body.startswith(b"\r\n", start) or blank < 0:
        raise _malformed(
            f"part headers end with an empty line within {_LONGEST_PART_HEAD} bytes, and a line "
            "follows each boundary"
        )
    disposition = b""
    for line in body[start:blank].split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            raise _malformed(f"{shown(line.decode('latin-1'))} is not a header")
        if name.lower() == b"content-disposition":
            disposition = bytes(value)
    options = _options(disposition.decode("latin-1"))
    if b"name" not in options:
        raise MalformedRequest("a multipart part has no name in its Content-Disposition")
    filename = options.get(b"filename")
    return Part(
        name=options[b"name"].decode("utf-8", "replace"),
        filename=None if filename is None else filename.decode("utf-8", "replace"),
        data=memoryview(body)[blank + 4 : end],
    )


def _options(value: str) -> dict[bytes, bytes]:
    """Return the parameters of a Content-Type or Content-Disposition. Raises MalformedRequest."""
    # The time to parse them grows faster than their number.
    if value.count(";") > _MOST_OPTIONS:
        raise MalformedRequest(
            f"the header {shown(value)} has more than {_MOST_OPTIONS} parameters"
        )
    return parse_options_header(value)[1]


def _malformed(why: str) -> MalformedRequest:
    return MalformedRequest(f"the multipart body is malformed: {why}")


def parse_json(body: Body) -> dict[str, Any]:
    """Return a JSON object of few values. Raises MalformedRequest."""
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise MalformedRequest(
            f"the JSON body holds more than {_MAX_JSON_VALUES} values; send images only, as base64"
        )
    return load_object(body)


def load_object(body: Body) -> dict[str, Any]:
    """Return a JSON object, with or without a byte-order mark. Raises MalformedRequest."""
    try:
        document = orjson.loads(memoryview(body)[3:] if body.startswith(BOM_UTF8) else body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not valid JSON ({error}); it looks like {kind_of(body)}; send a JSON "
            "object, or the right Content-Type"
        ) from error
    if not isinstance(document, dict):
        raise MalformedRequest(f"the JSON body must be an object, not {shown(document)}")
    return document


def decode_base64(text: object) -> bytes:
    """Return the bytes of a base64 string. Raises MalformedRequest.

    As clients write it: in either alphabet, with or without padding, white space, a byte-order mark
    and the prefix of a data URL.
    """
    if not isinstance(text, str | bytes):
        found = "missing" if text is None else shown(text)
        raise MalformedRequest(f"the image is {found}; send it as a base64 string")
    raw = (text if isinstance(text, bytes) else text.encode()).removeprefix(BOM_UTF8)
    start = raw[:_BASE64_STEP]
    try:
        prefix = _DATA_URL.match(raw)
        if prefix is not None:
            raw = raw[prefix.end() :]
        if any(each in raw for each in _TRANSLATED):
            raw = raw.translate(_URL_SAFE, _WHITE_SPACE)
        raw += b"=" * (-len(raw) % 4)
        return b"".join(
            binascii.a2b_base64(raw[at : at + _BASE64_STEP], strict_mode=True)
            for at in range(0, len(raw), _BASE64_STEP)
        )
    except ValueError as error:
        raise MalformedRequest(
            f"the image is not valid base64 ({error}); it looks like {kind_of(start)}; send the "
            "file's bytes as base64"
        ) from error


def _too_large(limit: int, found: str) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes ({found})")
