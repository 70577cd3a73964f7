"""POST /v1/detect: one image."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import orjson
from fastapi import FastAPI, Request, Response

from service.engine import postprocessing as results
from service.engine.detection import Answer, detect
from service.engine.request import DetectRequest
from service.engine.service import Service
from service.engine.work import Servable
from service.errors import MalformedRequest, shown_list
from service.http.bodies import (
    Body,
    ClientGone,
    decode_base64,
    parse_json,
    parse_multipart,
    read_body,
)
from service.http.connections.client import presence_of
from service.http.parameters import (
    DetectQuery,
    Format,
    Selections,
    deadline,
    deadline_ms,
    parse_query,
    wanted_image,
)
from service.http.routes import openapi

P = ParamSpec("P")
T = TypeVar("T")

_BIG_BODY: Final = 256 * 1024
"""From this size on taking a body apart is worth a thread. Base64 takes its time, and so does a
form that is full of almost-boundaries."""
_MANY_DETECTIONS: Final = 200
"""From this number on an answer is worth a thread."""
_MAX_PARTS: Final = 16


class DetectRoute:
    """Translates one image's request to the pipeline and back."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._selections = Selections()

    async def answer(self, request: Request) -> Response:
        """One request."""
        service, arrived = self._service, time.monotonic()
        query = parse_query(request, DetectQuery)
        model = service.registry.get(query.model, query.version)
        selection = self._selections.of(request, query, model.metadata)
        headers = _fields(request)
        body = await receive_body(service, request, headers)
        read = time.monotonic()
        limit = deadline(
            headers,
            arrived=arrived,
            read=read,
            limit_ms=service.settings.request_timeout_ms,
        )
        with service.places.slot(len(body)), WhileConnected(request):
            image = await self._image(headers.get("content-type", ""), body)
            # Base64 has been copied out of it.
            del body
            image_type = wanted_image(headers.get("accept"))
            written_as = partial(_write, query.format, model, read)
            answer = await detect(
                service,
                DetectRequest(image, model, selection, limit, query.tile, draw_as=image_type),
                write=None if image_type else partial(_write_few, written_as),
            )
            written = answer.written
            if written is None:
                written = await service.off_loop(written_as, answer)
        return Response(written, media_type=image_type or "application/json")

    async def _image(self, content_type: str, body: Body) -> bytes | memoryview:
        kind = content_type.partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await take_apart(self._service, _file_part, body, content_type)
        if kind == "application/json":
            return await take_apart(self._service, _json_image, body)
        return body if isinstance(body, bytes) else memoryview(body)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route to an application."""
    app.add_api_route(
        "/v1/detect",
        DetectRoute(service).answer,
        methods=["POST"],
        **openapi.detect(),
    )


def _fields(request: Request) -> Mapping[str, str]:
    """The first header field of each name: starlette's own way goes through all for each look."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reversed(request.scope["headers"])
    }


async def receive_body(service: Service, request: Request, headers: Mapping[str, str]) -> Body:
    """Read a request's body within the service's limits."""
    settings, presence = service.settings, presence_of(request.scope)
    asked = headers.get("x-deadline-ms")
    if asked is not None:
        deadline_ms(asked, settings.request_timeout_ms)
    return await read_body(
        headers,
        request.receive,
        limit=settings.max_body_bytes,
        timeout=settings.body_timeout_ms / 1e3,
        uploads=request.app.state.uploads,
        whole=presence is not None and presence.whole,
    )


async def take_apart(
    service: Service,
    function: Callable[Concatenate[Body, P], T],
    body: Body,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """`function` of a body, in a thread where that may take more than a moment."""
    if len(body) < _BIG_BODY:
        return function(body, *args, **kwargs)
    return await service.off_loop(function, body, *args, **kwargs)


class WhileConnected:
    """Stops the work inside as soon as the client closes its connection. Raises ClientGone then."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._presence = presence_of(request.scope)
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "runs inside a request"
        self._task = task
        if self._presence is None:
            self._watcher = asyncio.create_task(self._watch())
        elif self._presence.gone:
            raise ClientGone
        else:
            self._presence.watch(self._leave)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        if self._presence is not None:
            self._presence.watch(None)
        if self._gone and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise ClientGone from None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._task.cancel()


def model_json(model: Servable) -> dict[str, Any]:
    """How answers name the model that made them."""
    return {"name": model.name, "version": model.version}


def _write_few(written_as: Callable[[Answer], bytes], answer: Answer) -> bytes | None:
    """The answer as JSON; None where that is worth a thread of its own."""
    return written_as(answer) if len(answer.found) < _MANY_DETECTIONS else None


def _write(shape: Format, model: Servable, read: float, answer: Answer) -> bytes:
    """The answer as JSON. `read` is when the body was complete."""
    found, classes = answer.found, model.metadata.classes
    if shape == "coco":
        return orjson.dumps(results.coco(found))
    if shape == "roboflow":
        return orjson.dumps(results.roboflow(found, classes, answer.image))
    if shape == "hf":
        return orjson.dumps(results.hugging_face(found, classes))
    timing = answer.timing._asdict() | {"total": time.monotonic() - read}
    return orjson.dumps(
        {
            "model": model_json(model),
            "image": results.image(answer.image, answer.canvases),
            "detections": results.native(found, classes),
            "timing_ms": {stage: round(seconds * 1e3, 2) for stage, seconds in timing.items()},
        }
    )


def _file_part(body: Body, content_type: str) -> memoryview:
    parts = parse_multipart(body, content_type, max_parts=_MAX_PARTS)
    files = [part for part in parts if part.name == "file"]
    if len(files) != 1:
        names = shown_list([part.name for part in parts])
        raise MalformedRequest(f"send exactly one part named 'file'; the body holds {names}")
    return files[0].data


def _json_image(body: Body) -> bytes:
    document = parse_json(body)
    if "image" not in document:
        raise MalformedRequest('the JSON body must be {"image": "<base64>"}')
    return decode_base64(document["image"])
