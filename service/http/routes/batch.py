"""POST /v1/detect/batch: many images in one request, each with a result of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, NamedTuple

import orjson
from fastapi import FastAPI, Query, Request, Response
from starlette.responses import StreamingResponse

from service.contents import kind_of
from service.engine import postprocessing as results
from service.engine.batch_queue import Urgency
from service.engine.detection import detect
from service.engine.request import DetectRequest
from service.engine.service import Service
from service.errors import (
    InvalidParameter,
    MalformedRequest,
    RetinaserveError,
    UnsupportedMedia,
    shown,
    shown_list,
)
from service.http import schemas
from service.http.bodies import (
    Body,
    decode_base64,
    parse_body,
    parse_json,
    parse_multipart,
    receive_body,
)
from service.http.connections.client import CancelOnDisconnect
from service.http.parameters import BatchQuery, accept_of, wants_lines
from service.http.problems import problem_of
from service.http.routes.detect import model_json
from service.http.routing import DirectRoute
from service.observability.request_id import request_id

_log = logging.getLogger("retinaserve.batch")

NDJSON: Final = "application/x-ndjson"
_SPARE_PARTS: Final = 16
"""Parts of other names that a form may have."""


_LONGEST_ID: Final = 1024


class Image(NamedTuple):
    """One image of a request, as it was sent."""

    id: str
    content: object
    """A memoryview of a part; or a value of the JSON body, which should be a base64 string (bytes
    where it is not ASCII)."""


class BatchRoute:
    """Translates a request of many images to DetectRequests, and their detections to a response."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def respond(self, request: Request, query: Annotated[BatchQuery, Query()]) -> Response:
        """Detect the objects in every image."""
        service = self._service
        model = service.registry.get(query.model, query.version)
        selection = query.selection(model.metadata)
        body, times = await receive_body(service, request, request.headers)
        size = len(body)
        # All of the images are in memory from now on, not only those that hold a place.
        service.places.check(0, size)
        images = await self._images(request.headers.get("content-type", ""), body)
        # Base64 has been copied out of it.
        del body
        template = DetectRequest(b"", model, selection, times.deadline, query.tile, Urgency.BULK)
        run = _Run(service, template, request.scope["path"])
        if wants_lines(accept_of(request), NDJSON):
            return StreamingResponse(run.lines(images, size), media_type=NDJSON)
        with service.places.body(size), CancelOnDisconnect(request):
            entries = [entry async for entry in run.results(images)]
            entries.sort(key=lambda entry: int(entry["index"]))
            content = await service.off_loop(
                orjson.dumps, {"results": entries, "model": model_json(model)}
            )
        return Response(content, media_type="application/json")

    async def _images(self, content_type: str, body: Body) -> list[Image]:
        kind = content_type.partition(";")[0].strip().lower()
        most = self._service.settings.max_batch_images
        if kind == "multipart/form-data":
            images = await parse_body(self._service, _form_images, body, content_type, most)
        elif kind == "application/json":
            images = await parse_body(self._service, _json_images, body)
        else:
            sent_as = f"Content-Type {shown(content_type)}" if content_type else "no Content-Type"
            raise UnsupportedMedia(
                f"{kind_of(body)} with {sent_as} is not accepted here; send multipart/form-data "
                'with parts named \'files\', or {"images": [{"image": "<base64>"}]} with '
                "Content-Type application/json"
            )
        if not 1 <= len(images) <= most:
            raise InvalidParameter(f"{len(images)} images in one request; send 1 to {most}")
        return images


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route to an application."""
    app.router.add_api_route(
        "/v1/detect/batch",
        BatchRoute(service).respond,
        methods=["POST"],
        summary="Objects in many images",
        operation_id="detect_batch",
        tags=["detection"],
        response_class=Response,
        responses=schemas.BATCH_ANSWER | schemas.problems(),
        openapi_extra=schemas.request_body(schemas.BATCH_BODY),
        route_class_override=DirectRoute,
    )


class _Run:
    """Detection on the images of one request, a window of them at a time."""

    def __init__(self, service: Service, template: DetectRequest, path: str) -> None:
        """`template` lacks the image."""
        self._service = service
        self._template = template
        self._path = path
        # A tiled image fills the window alone, and images of one request must not take the
        # places that the tiles of another need.
        self._window = asyncio.Semaphore(service.batch_window if template.tile == "off" else 1)

    async def results(self, images: Sequence[Image]) -> AsyncIterator[dict[str, Any]]:
        """Yield the result of each image as it finishes."""
        tasks = [
            asyncio.create_task(self._result(index, image)) for index, image in enumerate(images)
        ]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()

    async def lines(self, images: Sequence[Image], size: int) -> AsyncIterator[bytes]:
        """Yield the results as newline-delimited JSON. All the images have `size` bytes."""
        # Here and not around the response: a generator that is never started is never closed.
        with self._service.places.hold(0, size):
            async for entry in self.results(images):
                yield orjson.dumps(entry) + b"\n"

    async def _result(self, index: int, image: Image) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": index, "id": image.id}
        try:
            async with self._window:
                return entry | {"status": 200} | await self._detect(image)
        except RetinaserveError as error:
            failure = error
        except Exception:
            _log.exception("unhandled exception on image %d of a batch", index)
            failure = RetinaserveError("the server failed on this image; its log says why")
        self._service.metrics.count_refusal(failure)
        document = problem_of(failure, instance=self._path, request_id=request_id.get())
        return entry | {"status": failure.status, "error": document}

    async def _detect(self, image: Image) -> dict[str, Any]:
        service, content = self._service, image.content
        with service.places.slot(urgency=Urgency.BULK):
            if not isinstance(content, memoryview):
                content = memoryview(await service.off_loop(decode_base64, content))
            request = replace(self._template, image=content)
            detected = await detect(service, request)
            return {
                "image": results.image(detected.image, detected.canvases),
                "detections": results.native(detected.found, request.model.metadata.classes),
            }


def _form_images(body: Body, content_type: str, most: int) -> list[Image]:
    parts = parse_multipart(body, content_type, max_parts=most + _SPARE_PARTS)
    files = [part for part in parts if part.name == "files"]
    if not files:
        names = shown_list([part.name for part in parts])
        raise MalformedRequest(f"send parts named 'files'; the body holds {names}")
    return [Image(part.filename or str(i), part.data) for i, part in enumerate(files)]


def _json_images(body: Body) -> list[Image]:
    images = parse_json(body).get("images")
    if not isinstance(images, list):
        raise MalformedRequest('the JSON body must be {"images": [{"id": …, "image": "<base64>"}]}')
    return [_json_image(index, entry) for index, entry in enumerate(images)]


def _json_image(index: int, entry: object) -> Image:
    if not isinstance(entry, dict):
        raise MalformedRequest(f'images[{index}] must be {{"image": "<base64>"}}')
    name = entry.get("id")
    if not isinstance(name, str | int | None):
        raise MalformedRequest(f"images[{index}].id must be a string, not {shown(name)}")
    name = str(index if name is None else name)
    if len(name) > _LONGEST_ID:
        raise MalformedRequest(
            f"images[{index}].id has {len(name)} characters; at most {_LONGEST_ID} are accepted"
        )
    # Invalid base64 is an error of this image, not of the request. Beyond ASCII a string may take
    # four times its bytes, and is kept until the image has its turn.
    text = entry.get("image")
    return Image(name, text.encode() if isinstance(text, str) and not text.isascii() else text)
