"""Listening sockets, bound before models load."""

from __future__ import annotations

import socket
from typing import Final, NamedTuple

from service.errors import DeviceError

_BACKLOG: Final = 2048


class AddressError(DeviceError):
    """A socket cannot listen on this address."""

    title = "Unusable address"


class Listeners(NamedTuple):
    """The sockets of the HTTP server's companions; None without that companion."""

    admin: socket.socket | None
    grpc: socket.socket | None


def listen(host: str, port: int, *, remedy: str = "choose another with --port") -> socket.socket:
    """Return a socket that listens on an address. Raises AddressError, which ends in `remedy`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise AddressError(f"cannot listen on {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; {remedy}"
        ) from error
    listener.set_inheritable(True)
    return listener


def url(listener: socket.socket, *, tls: bool) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1", "::1") else host
    if ":" in shown:
        shown = f"[{shown}]"
    return f"{'https' if tls else 'http'}://{shown}:{port}"
