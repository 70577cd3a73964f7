"""uvicorn with sockets that are bound before models load, a drain, and exit code 0."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, Protocol, cast

import uvicorn
from fastapi import FastAPI

from service.engine.service import Service
from service.http.connections.bounds import HEAD_SECONDS
from service.http.connections.descriptors import DescriptorLimit
from service.http.connections.httptools_protocol import HttpTools
from service.observability.metrics import Metrics
from service.system.process import stop_signals

_log = logging.getLogger("retinaserve.server")
_TLS_CLOSE_SECONDS: Final = 2.0
"""Longest time for a client to confirm the end of a TLS connection."""


class Companion(Protocol):
    """Another server of the same service, which starts and stops with the HTTP server."""

    async def start(self) -> None:
        """Return once the server accepts requests."""

    async def stop(self, seconds: float) -> None:
        """Accept no new requests, and finish those in flight within `seconds`."""


def configuration(
    app: FastAPI,
    *,
    metrics: Metrics,
    drain_seconds: float,
    root_path: str = "",
    certificate: Path | None = None,
    key: Path | None = None,
) -> uvicorn.Config:
    """Return the configuration of an HTTP listener. The application is not started."""
    limit = DescriptorLimit(metrics)
    return uvicorn.Config(
        app,
        root_path=root_path,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        loop=_available("uvloop"),
        # Annotated as a class, but called.
        http=cast("type[asyncio.Protocol]", partial(HttpTools, limit=limit)),
        ws="none",
        # `Server.serve` runs it, around the companions too.
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than the usual 60 s of load balancers, so that they close first: otherwise a
        # request can arrive on a connection that is being closed.
        timeout_keep_alive=75,
        # A request that has not arrived by the end of the drain is cancelled.
        timeout_graceful_shutdown=math.ceil(drain_seconds) + 1,
    )


class HttpServer(uvicorn.Server):
    """Accepts connections as uvicorn does, with time limits on TLS handshakes."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections on bound sockets."""
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            make = cast("Callable[..., asyncio.Protocol]", config.http_protocol_class)
            return make(config=config, server_state=self.server_state, app_state={})

        # uvicorn does not pass these on, and the event loop's defaults are 60 s and 30 s.
        bounds: dict[str, Any] = {
            "ssl_handshake_timeout": HEAD_SECONDS,
            "ssl_shutdown_timeout": _TLS_CLOSE_SECONDS,
        }
        tls = {"ssl": config.ssl, **bounds} if config.ssl is not None else {}
        self.servers = [
            await loop.create_server(protocol, sock=each, backlog=config.backlog, **tls)
            for each in sockets or ()
        ]
        self.started = True


class Server(HttpServer):
    """Serves one application on one listener until a signal, then drains."""

    def __init__(
        self,
        app: FastAPI,
        *,
        root_path: str = "",
        certificate: Path | None = None,
        key: Path | None = None,
        companions: Sequence[Companion] = (),
    ) -> None:
        self._app = app
        self._companions = tuple(companions)
        self._service: Service = app.state.service
        settings = self._service.settings
        self._drain_delay = settings.drain_delay_seconds
        self._closes_at: float | None = None
        super().__init__(
            configuration(
                app,
                metrics=self._service.metrics,
                drain_seconds=settings.drain_seconds,
                root_path=root_path,
                certificate=certificate,
                key=key,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but signals are not raised again after the drain: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        if self._closes_at is not None:
            self.should_exit = True
            self.force_exit = True
            return
        self._service.draining = True
        delay = 0.0 if sig == signal.SIGINT else self._drain_delay
        self._closes_at = time.monotonic() + delay
        self.should_exit = delay == 0.0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run the application's lifespan around the server."""
        with self.capture_signals():
            async with self._app.router.lifespan_context(self._app):
                await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the listener, then the companions."""
        await super().startup(sockets)
        for companion in self._companions:
            await companion.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls it ten times a second."""
        if self._service.pipeline.fatal is not None:
            # All requests have failed by now; a supervisor restarts the process.
            self.should_exit = True
        if self._closes_at is not None and time.monotonic() >= self._closes_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener and the companions, and finish the requests in flight."""
        seconds = self._service.settings.drain_seconds
        _log.info("draining for at most %g s", seconds)
        late = asyncio.get_running_loop().call_later(
            seconds,
            self._service.pipeline.abort,
            "the server stops; try another or again later",
            "draining",
        )
        await _all_of(super().shutdown(sockets), *(each.stop(seconds) for each in self._companions))
        late.cancel()
        # Lets tasks that were cancelled at the end of the drain handle the cancellation.
        await asyncio.sleep(0)


async def _all_of(*ends: Coroutine[Any, Any, None]) -> None:
    """Run all to their end, and log those that fail."""
    for result in await asyncio.gather(*ends, return_exceptions=True):
        if isinstance(result, Exception):
            _log.error("a server failed to stop", exc_info=result)


def _available(package: Literal["uvloop"]) -> Literal["uvloop", "auto"]:
    return package if importlib.util.find_spec(package) else "auto"
