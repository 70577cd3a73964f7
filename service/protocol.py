"""uvicorn's HTTP protocols with the bounds of `service.connection`."""

from __future__ import annotations

import importlib.util
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.connection import HEAD_BYTES, Bounded


def http_protocol() -> type[Bounded]:
    """The protocol with the fastest parser that is installed."""
    if importlib.util.find_spec("httptools") is None:
        return H11
    from service.protocol_httptools import HttpTools

    return HttpTools


class H11(Bounded, H11Protocol):
    """Reads with h11, in Python alone, which bounds what it buffers at HEAD_BYTES by itself."""

    def head_is_open(self, received: int) -> bool:
        """Whether the bytes that were just received began headers and did not complete them."""
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def handle_events(self) -> None:
        """What was parsed."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self.adopt(self.cycle)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self.refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        else:
            self.refuse(400, msg)
