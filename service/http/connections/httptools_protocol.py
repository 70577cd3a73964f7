"""Bounds on the parsing of requests, which httptools does not have itself."""

from __future__ import annotations

import sys
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.connections.bounds import HEAD_BYTES, HEAD_FIELDS, Bounded, is_old

_PIPELINED: Final = 8
"""Requests that may be pipelined behind one without a response. Thousands fit into one packet, and
each takes kilobytes of memory."""


class _Refused(Exception):
    """Ends the parsing; `_wrong` has the response."""


class HttpTools(Bounded):
    """Parses with llhttp."""

    _wrong: tuple[int, str] | None = None
    _open = False
    _quiet = True
    _in_body = False
    _head_bytes = 0
    _received = b""

    def data_received(self, data: bytes) -> None:
        """Parse a request, or discard the rest of a body."""
        self._quiet = True
        self._received = data
        super().data_received(data)
        self._received = b""
        if not self.lingering and not self.transport.is_closing():
            self.time_head(self._head_is_open(len(data)))

    def _head_is_open(self, received: int) -> bool:
        """Return whether the last received bytes began headers and did not complete them."""
        if self._quiet and not self._in_body:
            # Empty lines before a request: the parser accepts any number without a callback.
            self._open = True
        # There is no callback for an incomplete field, however large it is.
        self._head_bytes = self._head_bytes + received if self._open else 0
        if self._head_bytes > HEAD_BYTES:
            self.refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        return self._open

    def on_message_begin(self) -> None:
        """Handle the first byte of a request."""
        super().on_message_begin()
        self._open, self._in_body = True, False
        self._quiet = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header; trailers are dropped."""
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check the headers, and start the request."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > HEAD_BYTES:
            self._refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        if len(self.headers) > HEAD_FIELDS:
            self._refuse(431, f"there are more than {HEAD_FIELDS} headers")
        if len(self.pipeline) >= _PIPELINED:
            self._refuse(400, f"more than {_PIPELINED} requests sent ahead of their responses")
        if self.parser.get_method() == b"CONNECT":
            self._refuse(501, "this server is not a proxy: the method CONNECT is not implemented")
        if is_old(self.parser.get_http_version()):
            self.expect_100_continue = False
        self._open, self._in_body = False, True
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self.track(self.cycle)

    def on_message_complete(self) -> None:
        """Handle the end of a request."""
        self._in_body = False
        self._quiet = False
        super().on_message_complete()

    def _should_upgrade(self) -> bool:
        # Called for upgrade requests alone: each goes to `handle_websocket_upgrade`.
        return True

    def handle_websocket_upgrade(self) -> None:
        """Parse a request again without its Upgrade header (RFC 9110, 7.8).

        The parser takes the body of such a request for bytes of the other protocol.
        """
        upgrade = sys.exception()
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        rest = self._received[upgrade.args[0] :]
        fields = [field for field in self.headers if field[0] != b"upgrade"]
        self._received = b"".join(
            (
                b"%s %s HTTP/" % (self.parser.get_method(), self.url),
                self.parser.get_http_version().encode(),
                *(b"\r\n%s: %s" % field for field in fields),
                b"\r\n\r\n",
                rest,
            )
        )
        self.parser = httptools.HttpRequestParser(self)
        # As in uvicorn: an error after the last request does not cost that its response.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        HttpToolsProtocol.data_received(self, self._received)

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a request."""
        if self.pipeline:
            # The request without a response is not the one that was parsed last.
            self.transport.close()
            return
        status, detail = self._wrong or (400, msg)
        self.refuse(status, detail)

    def _refuse(self, status: int, detail: str) -> None:
        self._wrong = status, detail
        raise _Refused
