"""Request bodies: read within limits and in memory, multipart and JSON taken apart.

A picture is copied as little as may be: a multipart part is a view of the body.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, NamedTuple, cast

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import (
    BodyTimeout,
    InvalidParameter,
    MalformedRequest,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Body = bytes | bytearray

_MAX_JSON_COMMAS: Final = 100_000
"""Far above what pictures need, far below what 32 MB can hold: `{},` makes 30 bytes of memory from
each one, and the interpreter stands still while they are made."""

_BASE64_STEP: Final = 1 << 20
"""Characters decoded at a time, a multiple of 4: the interpreter can switch threads between."""


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


class Part(NamedTuple):
    """One part of a multipart body."""

    name: str
    filename: str | None
    data: memoryview


class Uploads:
    """Bounds the bytes of all bodies that are arriving. One event loop's.

    Bytes and not bodies: hundreds of clients that send a byte a second hold next to nothing, and
    must not take the places of those who send pictures.
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
        """A body has arrived, or never will."""
        self.held -= size


async def read_body(
    headers: Mapping[str, str],
    receive: Receive,
    *,
    limit: int,
    timeout: float,
    uploads: Uploads | None = None,
    whole: bool = False,
) -> Body:
    """Read a body of at most `limit` bytes within `timeout` seconds.

    `whole` says that the server has all of it, so that there is nothing to wait for.

    Raises UnsupportedMedia for an encoded body, TooLarge (at once when the length is declared),
    BodyTimeout, ClientGone, or Unavailable where `uploads` has no room for it.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding {encoding!r} is not accepted; send it unencoded")
    declared = headers.get("content-length", "")
    # Compared by its digits first: int() refuses thousands of them with an error of its own.
    digits = declared.lstrip("0") if declared.isdecimal() else ""
    if len(digits) > len(str(limit)) or (digits and int(digits) > limit):
        raise _too_large(limit, f"{digits[:20]} bytes are declared")
    if whole:
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
                raise ClientGone
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


def parse_multipart(body: Body, content_type: str, *, max_parts: int) -> list[Part]:
    """Take a multipart/form-data body apart. Raises MalformedRequest or InvalidParameter."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise MalformedRequest("multipart/form-data without a boundary in Content-Type")
    collector = _PartCollector(max_parts)
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        # Its annotation says bytes, its code does nothing that a bytearray cannot.
        parser.write(cast(bytes, body))
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequest(f"the multipart body is malformed: {error}") from error
    if not collector.ended:
        raise MalformedRequest("the multipart body ends before its closing boundary")
    return collector.parts


class _PartCollector:
    """Gathers what the parser calls back with."""

    def __init__(self, max_parts: int) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._max_parts = max_parts
        self._field = b""
        self._value = b""
        self._disposition: bytes | None = None
        self._pieces: list[memoryview] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_field,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_part_data": self._on_data,
            "on_part_end": self._end,
            "on_end": self._on_end,
        }

    def _begin(self) -> None:
        if len(self.parts) >= self._max_parts:
            raise InvalidParameter(f"more than {self._max_parts} parts in one multipart body")
        self._disposition = None
        self._pieces = []

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(memoryview(data)[start:end])

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition or b"")
        if b"name" not in options:
            raise MalformedRequest("a multipart part has no name in its Content-Disposition")
        filename = options.get(b"filename")
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        self.parts.append(
            Part(
                name=options[b"name"].decode("utf-8", "replace"),
                filename=None if filename is None else filename.decode("utf-8", "replace"),
                data=data,
            )
        )

    def _on_end(self) -> None:
        self.ended = True


def parse_json(body: Body) -> dict[str, Any]:
    """A JSON object. Raises MalformedRequest."""
    if body.count(b",") > _MAX_JSON_COMMAS:
        raise MalformedRequest(
            f"the JSON body holds more than {_MAX_JSON_COMMAS} values; send pictures only"
        )
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedRequest("the JSON body must be an object")
    return document


def decode_base64(text: object) -> bytes:
    """Bytes of a base64 string, white space allowed. Raises MalformedRequest."""
    if not isinstance(text, str):
        raise MalformedRequest('"image" is missing or no string; send the picture as base64')
    if text.startswith("data:"):
        raise MalformedRequest("an image in JSON is plain base64, without a data: prefix")
    try:
        raw = text.encode("ascii")
        if b"\n" in raw or b" " in raw or b"\r" in raw:
            raw = raw.translate(None, b" \t\r\n")
        return b"".join(
            binascii.a2b_base64(raw[start : start + _BASE64_STEP], strict_mode=True)
            for start in range(0, len(raw), _BASE64_STEP)
        )
    except ValueError as error:
        raise MalformedRequest(f"the image is not valid base64: {error}") from error


def _too_large(limit: int, found: str) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes ({found})")
