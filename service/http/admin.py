"""The admin listener, which loads, unloads and chooses models for clients with an admin key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError

from service.engine.service import Service
from service.errors import Forbidden, InvalidParameter, shown
from service.http.auth.gate import Gate
from service.http.auth.keys import Key, KeyStore
from service.http.bodies import parse_json, read_body
from service.http.listening import url
from service.http.middleware import RequestContext, RequestGuard
from service.http.problems import add_error_handlers
from service.http.responses import json_response
from service.http.routes import health, models
from service.http.server import HttpServer, configuration
from service.runtime.artifact import VERSION_RULE, Version, VersionText

_log = logging.getLogger("retinaserve.admin")
_MAX_BODY_BYTES: Final = 4096


class AdminGate(Gate):
    """Accepts admin keys only."""

    def __init__(self, keys: KeyStore) -> None:
        super().__init__(keys, None)

    def enter(self, presented: Iterable[str], address: str) -> Key:
        """Return the admin key. Raises Unauthorized or Forbidden."""
        key = super().enter(presented, address)
        if key is None or not key.admin:
            raise Forbidden(
                "this key may not change models; "
                "`retinaserve keys new NAME --admin` makes one that may"
            )
        return key


class Choice(BaseModel):
    """The JSON body of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Version | None = None


class QueryChoice(Choice):
    """The query of a request."""

    version: VersionText | None = None


class AdminRoutes:
    """Translates requests to calls of the registry."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def load(self, name: str, request: Request) -> Response:
        """Load, or reload, a version: by default the newest in the folder."""
        version = await self._version(request)
        registry = self._service.registry
        future = await self._service.off_loop(registry.load, name, version)
        loaded = await asyncio.wrap_future(future)
        return self._response(
            name,
            version=loaded.key.version,
            state="ready",
            changed=loaded.changed,
            sha256=loaded.sha256,
            seconds=round(loaded.seconds, 3),
        )

    async def unload(self, name: str, request: Request) -> Response:
        """Unload a version: by default all of them."""
        version = await self._version(request)
        unloaded = self._service.registry.unload(name, version)
        return self._response(name, unloaded=unloaded, state="unloaded")

    async def default(self, name: str, request: Request) -> Response:
        """Make a model the default: one version, or always its highest ready one."""
        version = await self._version(request)
        self._service.registry.make_default(name, version)
        return self._response(name)

    async def _version(self, request: Request) -> int | None:
        timeout = self._service.settings.body_timeout_ms / 1e3
        body = await read_body(
            request.headers, request.receive, limit=_MAX_BODY_BYTES, timeout=timeout
        )
        names = [name for name, _ in request.query_params.multi_items()]
        if len(set(names)) < len(names):
            raise InvalidParameter("the query names a parameter twice; give it once")
        asked = _choice(dict(request.query_params), QueryChoice)
        if not body:
            return asked
        said = _choice(parse_json(body), Choice)
        if None not in (asked, said) and asked != said:
            raise InvalidParameter(
                f"version is {asked} in the query and {said} in the body; give it once"
            )
        return said if asked is None else asked

    def _response(self, name: str, **done: Any) -> Response:
        snapshot = self._service.registry.snapshot()
        document = {
            "name": name,
            **done,
            "serving": snapshot.serving(name),
            "pinned": name in snapshot.pins,
            "default": name == snapshot.default,
        }
        return json_response(document)


class AdminListener:
    """Serves the admin application beside the main one."""

    def __init__(
        self,
        service: Service,
        keys: KeyStore | None,
        listener: socket.socket,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        assert keys is not None, "the admin listener needs a keys file"
        self._registry = service.registry
        self._listener = listener
        self._url = url(listener, tls=certificate is not None)
        self._server = _Server(
            configuration(
                create_admin_app(service, keys),
                metrics=service.metrics,
                drain_seconds=service.settings.drain_seconds,
                certificate=certificate,
                key=key,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return once the listener accepts requests."""
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            listening.cancel()
            await self._serving
        _log.info("models are administered on %s", self._url)

    async def stop(self, seconds: float) -> None:
        """Close, without waiting for models that are loading."""
        self._registry.stop_loading()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


class _Server(HttpServer):
    """Sets an event once it listens, and leaves signals to the main server."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def create_admin_app(service: Service, keys: KeyStore) -> FastAPI:
    """Return the admin application. The main application starts and stops the service."""
    app = FastAPI(
        title="retinaserve admin",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(RequestGuard, service=service, gate=AdminGate(keys), open_metrics=False)
    app.add_middleware(RequestContext, service=service)
    add_error_handlers(app, service.metrics)
    routes = AdminRoutes(service)
    for action, endpoint in (
        ("load", routes.load),
        ("unload", routes.unload),
        ("default", routes.default),
    ):
        app.add_api_route(
            f"/v1/models/{{name}}/{action}", endpoint, methods=["POST"], response_class=Response
        )
    health.add_routes(app, service)
    models.add_routes(app, service)
    return app


def _choice(given: dict[str, Any], kind: type[Choice]) -> int | None:
    try:
        return kind.model_validate(given).version
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))[:80]
        raise InvalidParameter(
            f"{name}={shown(first['input'])}: the one parameter is version, and {VERSION_RULE}"
        ) from None
