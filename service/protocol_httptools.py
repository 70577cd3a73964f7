"""uvicorn's protocol on httptools, whose parser bounds nothing itself."""

from __future__ import annotations

from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.connection import HEAD_BYTES, HEAD_FIELDS, Bounded

_PIPELINED: Final = 8
"""Requests that may wait behind one that is being answered. They fit into one packet by the
thousand, and each is worth kilobytes of memory."""


class _Refused(Exception):
    """Ends the parsing; what to answer is in `_wrong`."""


class HttpTools(Bounded, HttpToolsProtocol):
    """Reads with llhttp."""

    _wrong: tuple[int, str] | None = None
    _open = False
    _quiet = True
    _in_body = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, or of a body that nobody wants any more."""
        self._quiet = True
        super().data_received(data)

    def head_is_open(self, received: int) -> bool:
        """Whether the bytes that were just received began headers and did not complete them."""
        if self._quiet and not self._in_body:
            # Empty lines before a request: the parser takes any number and tells nobody.
            self._open = True
        # A field that never ends is no callback yet, however large it is.
        self._head_bytes = self._head_bytes + received if self._open else 0
        if self._head_bytes > HEAD_BYTES:
            self.refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        return self._open

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._open, self._in_body = True, False
        self._quiet = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the headers, or behind a chunked body."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request begins."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > HEAD_BYTES:
            self._refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        if len(self.headers) > HEAD_FIELDS:
            self._refuse(431, f"there are more than {HEAD_FIELDS} headers")
        if len(self.pipeline) >= _PIPELINED:
            self._refuse(400, f"more than {_PIPELINED} requests sent ahead of their answers")
        self._open, self._in_body = False, True
        super().on_headers_complete()
        self.adopt(self.cycle)

    def on_message_complete(self) -> None:
        """A request has come in full."""
        self._in_body = False
        self._quiet = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        if self.pipeline:
            # The request that is being answered is not the one that was parsed last.
            self.transport.close()
            return
        status, detail = self._wrong or (400, msg)
        self.refuse(status, detail)

    def _refuse(self, status: int, detail: str) -> None:
        self._wrong = status, detail
        raise _Refused
