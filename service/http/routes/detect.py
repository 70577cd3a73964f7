"""POST /v1/detect: one image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final

import orjson
from fastapi import FastAPI, Query, Request, Response
from starlette.types import Receive, Scope, Send

from service.engine import postprocessing as results
from service.engine.admission import Place
from service.engine.detection import Answer, detect
from service.engine.request import DetectRequest
from service.engine.service import Service
from service.engine.work import Servable
from service.errors import MalformedImage, MalformedRequest, shown_list
from service.http import schemas
from service.http.bodies import (
    LINE_BREAKS,
    Body,
    check_raw,
    decode_base64,
    lacks_line_breaks,
    parse_body,
    parse_json,
    parse_multipart,
    receive_body,
)
from service.http.connections.client import CancelOnDisconnect
from service.http.parameters import (
    DetectQuery,
    Format,
    Selections,
    accept_of,
    wanted_image,
)
from service.http.routing import DirectRoute

_MAX_PARTS: Final = 16


class DetectRoute:
    """Translates one image's request to a DetectRequest, and its detections to a response."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._selections = Selections()

    async def respond(self, request: Request, query: Annotated[DetectQuery, Query()]) -> Response:
        """Detect the objects in one image."""
        service = self._service
        model = service.registry.get(query.model, query.version)
        selection = self._selections.of(request, query, model.metadata)
        headers = _first_of_each(request)
        body, times = await receive_body(service, request, headers)
        with service.places.slot(len(body)), CancelOnDisconnect(request):
            content_type = headers.get("content-type", "")
            image = await self._image(content_type, body)
            stripped = lacks_line_breaks(body)
            # Base64 has been copied out of it.
            del body
            image_type = wanted_image(accept_of(request))
            # Written where an image of one canvas is post-processed: on a CPU in the inference
            # thread, which saves the event loop a fifth of an image's time.
            write = partial(_write, query.format, model, times.read)
            asked = DetectRequest(
                image, model, selection, times.deadline, query.tile, draw_as=image_type
            )
            try:
                detected = await detect(service, asked, write=None if image_type else write)
            except MalformedImage as error:
                if stripped:
                    raise MalformedImage(f"{error}; or {LINE_BREAKS}") from error
                raise
            content = write(detected) if detected.written is None else detected.written
        if image_type is None:
            return Response(content, media_type="application/json")
        # Raises Unavailable: clients that read slowly must not fill the memory.
        return _Counted(content, image_type, service.unsent.body(len(content)))

    async def _image(self, content_type: str, body: Body) -> bytes | memoryview:
        kind = content_type.partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await parse_body(self._service, _file_part, body, content_type)
        if kind == "application/json":
            return await parse_body(self._service, _json_image, body)
        check_raw(body, content_type)
        return body if isinstance(body, bytes) else memoryview(body)


class _Counted(Response):
    """A response whose bytes are held until the client has taken them."""

    def __init__(self, content: bytes, media_type: str, place: Place) -> None:
        super().__init__(content, media_type=media_type)
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._place:
            await super().__call__(scope, receive, send)


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route to an application."""
    app.router.add_api_route(
        "/v1/detect",
        DetectRoute(service).respond,
        methods=["POST"],
        summary="Objects in one image",
        operation_id="detect",
        tags=["detection"],
        response_class=Response,
        responses=schemas.DETECT_ANSWER | schemas.problems(),
        openapi_extra=schemas.request_body(schemas.DETECT_BODY),
        route_class_override=DirectRoute,
    )


def _first_of_each(request: Request) -> Mapping[str, str]:
    """Return the first header of each name. Starlette's mapping walks all of them for a look-up."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reversed(request.scope["headers"])
    }


def model_json(model: Servable) -> dict[str, Any]:
    """Return the model that made a response, as responses name it."""
    return {"name": model.name, "version": model.version}


def _write(shape: Format, model: Servable, read: float, detected: Answer) -> bytes:
    """Return detections as JSON. `read` is when the body was complete."""
    found, classes = detected.found, model.metadata.classes
    if shape == "coco":
        return orjson.dumps(results.coco(found))
    if shape == "roboflow":
        return orjson.dumps(results.roboflow(found, classes, detected.image))
    if shape == "hf":
        return orjson.dumps(results.hugging_face(found, classes))
    timing = detected.timing._asdict() | {"total": time.monotonic() - read}
    return orjson.dumps(
        {
            "model": model_json(model),
            "image": results.image(detected.image, detected.canvases),
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
