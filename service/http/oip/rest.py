"""The REST routes, /v2 and everything below it, on the data plane."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Final

from fastapi import FastAPI, Request, Response

from service.engine.service import Service
from service.engine.work import Servable
from service.errors import MalformedRequest
from service.http.bodies import load_object, parse_body, read_body, receive_body
from service.http.connections.client import CancelOnDisconnect
from service.http.oip import metadata, schemas
from service.http.oip.data_plane import earlier, find_model, infer, limits_of
from service.http.oip.json_codec import HEADER_LENGTH, Parsed, parse, write
from service.http.oip.schemas import describe
from service.http.responses import json_response, state_response

_SMALL_BODY: Final = 64 * 1024
_BIG_BODY: Final = 1 << 20
"""Bodies from this size on are parsed one at a time. JSON becomes up to 45 times as large, and its
parser holds the interpreter's lock: in parallel it takes no less time."""
_MANY_DETECTIONS: Final = 200
"""Responses from this number on are written in a thread."""


class RestRoutes:
    """Translates requests to calls of the data plane, and their results to responses."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._big_bodies = asyncio.Semaphore(1)

    async def server(self) -> Response:
        """Name, version and extensions of this server."""
        return json_response(metadata.server())

    async def live(self) -> Response:
        """Alive; 503 only once the device is lost for good."""
        fatal = self._service.pipeline.fatal
        return _state({"live": fatal is None}, fatal)

    async def ready(self) -> Response:
        """Ready for requests: the default model is warm and no drain has begun."""
        reason = self._service.not_ready()
        return _state({"ready": reason is None}, reason)

    async def model(self, name: str) -> Response:
        """Inputs, outputs and versions of a model."""
        return json_response(metadata.model(self._service, name))

    async def model_version(self, name: str, version: str) -> Response:
        """Inputs and outputs of one version of a model."""
        return json_response(metadata.model(self._service, name, version))

    async def model_ready(self, name: str) -> Response:
        """Whether some version of a model serves."""
        return self._model_ready(name, "")

    async def model_version_ready(self, name: str, version: str) -> Response:
        """Whether one version of a model serves."""
        return self._model_ready(name, version)

    async def config(self, name: str) -> Response:
        """A model in the words of Triton's model configuration."""
        return json_response(metadata.config(self._service, name))

    async def config_version(self, name: str, version: str) -> Response:
        """One version of a model in the words of Triton's model configuration."""
        return json_response(metadata.config(self._service, name, version))

    async def index(self, request: Request) -> Response:
        """Every version of every model; {"ready": true} leaves out what does not serve."""
        settings = self._service.settings
        body = await read_body(
            request.headers,
            request.receive,
            limit=_SMALL_BODY,
            timeout=settings.body_timeout_ms / 1e3,
        )
        document = load_object(body or b"{}")
        if not isinstance(document.get("ready", False), bool):
            raise MalformedRequest('the request must be {} or {"ready": true}')
        return json_response(metadata.index(self._service, ready=document.get("ready", False)))

    async def infer(self, request: Request, name: str) -> Response:
        """Inference on a model's highest version that is ready."""
        return await self._infer(request, find_model(self._service, name))

    async def infer_version(self, request: Request, name: str, version: str) -> Response:
        """Inference on one version of a model."""
        return await self._infer(request, find_model(self._service, name, version))

    async def _infer(self, request: Request, model: Servable) -> Response:
        service = self._service
        body, times = await receive_body(service, request, request.headers)
        with service.places.slot(len(body)), CancelOnDisconnect(request):
            async with self._big_bodies if len(body) >= _BIG_BODY else nullcontext():
                parsed = await parse_body(
                    service,
                    parse,
                    body,
                    request.headers.get(HEADER_LENGTH),
                    limits_of(service, model),
                )
            deadline = earlier(times.deadline, parsed.request.parameters, arrived=times.arrived)
            outputs = await infer(service, model, parsed.request, deadline)
            if len(outputs["scores"]) < _MANY_DETECTIONS:
                return _response(parsed, outputs, model)
            return await service.off_loop(_response, parsed, outputs, model)

    def _model_ready(self, name: str, version: str) -> Response:
        reason = metadata.model_ready(self._service, name, version)
        return _state({"name": name, "ready": reason is None}, reason)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""
    routes = RestRoutes(service)
    model, versioned = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    about_server = describe("Name, version and extensions", schemas.ServerMetadata, 401, 429)
    about_live = describe("Whether the server is alive", schemas.ServerLive, 503)
    about_ready = describe("Whether the default model serves", schemas.ServerReady, 503)
    errors = 401, 404, 429, 503
    about_model = describe("Inputs and outputs of a model", schemas.ModelMetadata, *errors)
    about_model_ready = describe("Whether a model serves", schemas.ModelReady, *errors)
    about_config = describe("A model in Triton's words", dict[str, Any], *errors)
    about_infer = schemas.describe_infer()
    operations: tuple[tuple[str, str, Callable[..., Awaitable[Response]], dict[str, Any]], ...] = (
        ("GET", "/v2", routes.server, about_server),
        ("GET", "/v2/health/live", routes.live, about_live),
        ("GET", "/v2/health/ready", routes.ready, about_ready),
        ("GET", model, routes.model, about_model),
        ("GET", versioned, routes.model_version, about_model),
        ("GET", f"{model}/ready", routes.model_ready, about_model_ready),
        ("GET", f"{versioned}/ready", routes.model_version_ready, about_model_ready),
        ("GET", f"{model}/config", routes.config, about_config),
        ("GET", f"{versioned}/config", routes.config_version, about_config),
        ("POST", f"{model}/infer", routes.infer, about_infer),
        ("POST", f"{versioned}/infer", routes.infer_version, about_infer),
        ("POST", "/v2/repository/index", routes.index, schemas.describe_index()),
    )
    for method, path, endpoint, about in operations:
        app.add_api_route(path, endpoint, methods=[method], **about)


def _response(parsed: Parsed, outputs: dict[str, Any], model: Servable) -> Response:
    content, header_length = write(parsed, outputs, model=model.name, version=model.version)
    if header_length is None:
        return Response(content, media_type="application/json")
    return Response(
        content,
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(header_length)},
    )


def _state(document: dict[str, Any], reason: str | None) -> Response:
    return state_response(document if reason is None else document | {"error": reason}, reason)
