"""The application factory: HTTP routes over one Service. Any ASGI server can host the result."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service.engine.models.startup import Models
from service.engine.service import Service
from service.errors import InvalidParameter, RetinaserveError, shown
from service.http.application import Application
from service.http.auth.gate import Gate
from service.http.auth.keys import KeyStore
from service.http.bodies import Uploads
from service.http.middleware.envelope import Envelope
from service.http.middleware.guard import Guard
from service.http.middleware.overload import OverloadGuard
from service.http.middleware.security_headers import SecurityHeaders
from service.http.oip import rest
from service.http.problems import http_problem, respond
from service.http.refusal import refusal
from service.http.routes import batch, detect, docs, health, models, openapi, page
from service.http.short_way import ShortWay
from service.observability.request_id import request_id
from service.observability.tracing import open_tracing
from service.settings import Settings
from service.version import package_version

_DESCRIPTION: Final = "Images in, detections out. Boxes are pixels of the original image."
_LONGEST_METHOD: Final = 32
_FLUSH_SECONDS: Final = 2.0
"""How long the end of the server may wait for a collector of traces."""
_CORS_REQUEST_HEADERS: Final = (
    "Authorization",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Deadline-Ms",
    "X-Request-Id",
)
_CORS_ANSWER_HEADERS: Final = (
    "Inference-Header-Content-Length",
    "Retry-After",
    "Server-Timing",
    "X-Request-Id",
)


def create_app(settings: Settings, *, loading: Models | None = None) -> FastAPI:
    """Build the application. Its models load in the background once its lifespan begins.

    `loading` are models that may be loading already.

    `app.state.service` is the Service behind it; setting its `draining` turns /readyz to 503.
    Raises DeviceError, ArtifactError or DataError when it could never serve.
    """
    path = settings.api_keys_file
    # None: every client may call.
    keys = None if path is None else KeyStore(path)
    gate = Gate(keys, settings.rate_limit)
    service = Service(settings, loading)
    service.tracing = open_tracing(os.environ, version=package_version())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()
            if service.tracing is not None:
                seconds = min(_FLUSH_SECONDS, settings.drain_seconds)
                await asyncio.to_thread(service.tracing.close, seconds)

    app = Application(
        title="retinaserve",
        version=package_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.keys, app.state.gate = keys, gate
    app.state.uploads = Uploads(settings.max_queue_bytes)
    _add_layers(app, service, gate)
    add_error_handlers(app, service)
    for module in (detect, batch, health, models, rest):
        module.add_routes(app, service)
    docs.add_routes(app)
    page.add_routes(app)
    if keys is not None:
        openapi.describe_keys(app)
    return app


def _add_layers(app: FastAPI, service: Service, gate: Gate) -> None:
    """What lies around the routes, from the inside out."""
    settings = service.settings
    app.add_middleware(ShortWay, routes=app.routes, metrics=service.metrics)
    app.add_middleware(OverloadGuard, service=service)
    app.add_middleware(
        Guard, gate=gate, metrics=service.metrics, open_metrics=settings.metrics_public
    )
    if settings.cors_origins:
        # Outside the guard: a browser asks for permission without the key. Keys are headers and
        # not cookies, so no page can use a key that it was not given.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_ANSWER_HEADERS,
        )
    app.add_middleware(Envelope, metrics=service.metrics, tracing=service.tracing)
    app.add_middleware(SecurityHeaders)


def add_error_handlers(app: FastAPI, service: Service) -> None:
    """Answer errors with problem details, and count them."""

    async def own(request: Request, error: Exception) -> Response:
        assert isinstance(error, RetinaserveError)
        return refusal(error, service.metrics, request.scope["path"])

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, remedy = request.scope["path"], ""
        if (allowed := (error.headers or {}).get("Allow")) is not None:
            remedy = f"; use {allowed}"
        elif (known := _known_path(request)) is not None:
            remedy = f"; use {shown(known)}"
        document = http_problem(
            error.status_code,
            f"{request.method[:_LONGEST_METHOD]} {shown(path)}: {error.detail}{remedy}",
            instance=path,
            request_id=request_id.get(),
        )
        return respond(document, dict(error.headers or {}))

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await own(request, InvalidParameter(_describe(error)))

    app.add_exception_handler(RetinaserveError, own)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)


def _known_path(request: Request) -> str | None:
    """Return the path that a request with slashes too many means; None where it means none."""
    path = get_route_path(request.scope)
    meant = re.sub("/+", "/", path).rstrip("/") or "/"
    if meant == path:
        return None
    patterns = (getattr(route, "path_regex", None) for route in request.app.routes)
    return meant if any(each is not None and each.match(meant) for each in patterns) else None


def _describe(error: RequestValidationError) -> str:
    """Which parameters are wrong, and what would be right."""
    return "; ".join(
        f"{shown('.'.join(map(str, each['loc'][1:])))}={shown(each.get('input'))}: {each['msg']}"
        for each in error.errors()
    )
