"""uvicorn's protocol on h11, with the bounds of `service.http.connections.bounds`."""

from __future__ import annotations

import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.http.connections.bounds import HEAD_BYTES, Bounded


class H11(Bounded, H11Protocol):
    """Parses with h11, which bounds its buffer at HEAD_BYTES by itself."""

    def head_is_open(self, received: int) -> bool:
        """Return whether the last received bytes began headers and did not complete them."""
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def handle_events(self) -> None:
        """Track each request that was parsed."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self.track(self.cycle)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: h11 ignores the upgrade."""

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not a request."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self.refuse(431, f"the headers are larger than {HEAD_BYTES} bytes")
        else:
            self.refuse(400, msg)
