"""uvicorn's protocol on h11, with the bounds of `service.http.connections.bounds`."""

from __future__ import annotations

import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.http.connections.bounds import HEAD_BYTES, Bounded


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

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: h11 reads on as if another protocol was not asked for."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self.refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        else:
            self.refuse(400, msg)
