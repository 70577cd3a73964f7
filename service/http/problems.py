"""Errors as responses: RFC 9457 problem details, and below /v2 as the Open Inference Protocol."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RateLimited, RetinaserveError, Unauthorized, Unavailable, shown
from service.http.paths import route_path
from service.observability.request_id import request_id

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.observability.metrics import Metrics

MEDIA_TYPE: Final = "application/problem+json"
_TYPE_PREFIX: Final = "urn:retinaserve:problem:"
_INFERENCE_PROTOCOL: Final = re.compile(r"(/(?!v1(/|$))[^/]*)*?/v2(/|$)")
"""Paths of that protocol, which may follow the prefix of a proxy."""
_MAX_DETAIL: Final = 2048
_MAX_INSTANCE: Final = 256
"""Characters of the request that a response repeats, whatever the error's own text quotes."""
_MAX_METHOD: Final = 32


def problem_of(error: RetinaserveError, *, instance: str, request_id: str) -> dict[str, Any]:
    """Return the problem document of one of our own errors."""
    return _problem(error.status, str(error), error.title, error.slug, instance, request_id)


def http_problem(status: int, detail: str, *, instance: str, request_id: str) -> dict[str, Any]:
    """Return the problem document of an HTTP status."""
    phrase = HTTPStatus(status).phrase
    slug = phrase.lower().replace(" ", "-")
    return _problem(status, detail, phrase, slug, instance, request_id)


def _problem(
    status: int, detail: str, title: str, slug: str, instance: str, request_id: str
) -> dict[str, Any]:
    return {
        "type": _TYPE_PREFIX + slug,
        "title": title,
        "status": status,
        "detail": _cut(detail, _MAX_DETAIL),
        "instance": _cut(instance, _MAX_INSTANCE),
        "request_id": request_id,
    }


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def headers_of(error: RetinaserveError) -> dict[str, str]:
    """Return the response headers that go with an error."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="retinaserve"'}
    if isinstance(error, Unavailable | RateLimited):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if error.status == HTTPStatus.REQUEST_TIMEOUT:
        # The rest of the body may take long to arrive.
        return {"Connection": "close"}
    return {}


def respond(document: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """Return a problem as a response, in the protocol of the path that it happened on."""
    if _INFERENCE_PROTOCOL.match(document["instance"]):
        content, media_type = {"error": document["detail"]}, "application/json"
    else:
        content, media_type = document, MEDIA_TYPE
    return Response(
        orjson.dumps(content), document["status"], media_type=media_type, headers=headers
    )


def error_response(error: RetinaserveError, metrics: Metrics, path: str) -> Response:
    """Return the response to a request that failed with one of our own errors, and count it."""
    metrics.count_refusal(error)
    document = problem_of(error, instance=path, request_id=request_id.get())
    return respond(document, headers_of(error))


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Make an application respond to exceptions with problem details."""

    async def own_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RetinaserveError)
        return error_response(error, metrics, request.scope["path"])

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, remedy = request.scope["path"], ""
        if (allowed := (error.headers or {}).get("Allow")) is not None:
            remedy = f"; use {allowed}"
        elif (known := _known_path(request)) is not None:
            remedy = f"; use {shown(known)}"
        document = http_problem(
            error.status_code,
            f"{request.method[:_MAX_METHOD]} {shown(path)}: {error.detail}{remedy}",
            instance=path,
            request_id=request_id.get(),
        )
        return respond(document, dict(error.headers or {}))

    app.add_exception_handler(RetinaserveError, own_error)
    app.add_exception_handler(HTTPException, http_error)


def _known_path(request: Request) -> str | None:
    """Return the route that a path with superfluous slashes means; None where there is none."""
    path = route_path(request.scope)
    meant = re.sub("/+", "/", path).rstrip("/") or "/"
    if meant == path:
        return None
    patterns = (getattr(route, "path_regex", None) for route in request.app.routes)
    return meant if any(each is not None and each.match(meant) for each in patterns) else None
