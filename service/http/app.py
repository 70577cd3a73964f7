"""The application factory: HTTP routes over one Service. Any ASGI server can host the result."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.engine.models.startup import Models
from service.engine.service import Service
from service.http.auth.gate import Gate
from service.http.auth.keys import KeyStore
from service.http.bodies import Uploads
from service.http.middleware import RequestContext, RequestGuard
from service.http.oip import rest
from service.http.problems import add_error_handlers
from service.http.routes import batch, detect, docs, health, models, page
from service.http.schemas import describe_keys
from service.observability.tracing import open_tracing
from service.settings import Settings
from service.version import package_version

_DESCRIPTION: Final = "Images in, detections out. Boxes are pixels of the original image."
_FLUSH_SECONDS: Final = 2.0
"""Longest time that shutdown waits for a trace collector."""
_CORS_REQUEST_HEADERS: Final = (
    "Authorization",
    "Content-Type",
    "Inference-Header-Content-Length",
    "X-API-Key",
    "X-Deadline-Ms",
    "X-Request-Id",
)
_CORS_RESPONSE_HEADERS: Final = (
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
    # None: no key is needed.
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

    app = FastAPI(
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
    _add_middleware(app, service, gate)
    add_error_handlers(app, service.metrics)
    for module in (detect, batch, health, models, rest):
        module.add_routes(app, service)
    docs.add_routes(app)
    page.add_routes(app)
    if keys is not None:
        describe_keys(app)
    return app


def _add_middleware(app: FastAPI, service: Service, gate: Gate) -> None:
    """Add the layers around the routes, the innermost first."""
    settings = service.settings
    app.add_middleware(
        RequestGuard, service=service, gate=gate, open_metrics=settings.metrics_public
    )
    if settings.cors_origins:
        # Outside the guard: a browser's preflight request comes without the key. Keys are headers
        # and not cookies, so a page can only use a key that it was given.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
        )
    app.add_middleware(RequestContext, service=service)
