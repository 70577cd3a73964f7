"""Errors as RFC 9457 problem details, and below /v2 as the Open Inference Protocol has them."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Any, Final

import orjson
from starlette.responses import Response

from service.errors import RateLimited, RetinaserveError, Unauthorized, Unavailable

MEDIA_TYPE: Final = "application/problem+json"
_TYPE_PREFIX: Final = "urn:retinaserve:problem:"
_INFERENCE_PROTOCOL: Final = re.compile(r"(/(?!v1(/|$))[^/]*)*?/v2(/|$)")
"""Paths of that protocol, which may stand behind a prefix of a proxy's."""
_DETAIL_CHARACTERS: Final = 2048
_INSTANCE_CHARACTERS: Final = 256
"""Bounds of what an answer repeats of its request, whatever the error's own text quotes."""


def problem(
    status: int, detail: str, *, title: str, slug: str, instance: str, request_id: str
) -> dict[str, Any]:
    """Return the problem document; a long `detail` or `instance` is cut."""
    return {
        "type": _TYPE_PREFIX + slug,
        "title": title,
        "status": status,
        "detail": _cut(detail, _DETAIL_CHARACTERS),
        "instance": _cut(instance, _INSTANCE_CHARACTERS),
        "request_id": request_id,
    }


def problem_of(error: RetinaserveError, *, instance: str, request_id: str) -> dict[str, Any]:
    """The problem document of one of our own errors."""
    return problem(
        error.status,
        str(error),
        title=error.title,
        slug=error.slug,
        instance=instance,
        request_id=request_id,
    )


def http_problem(status: int, detail: str, *, instance: str, request_id: str) -> dict[str, Any]:
    """The problem document of a bare HTTP status."""
    phrase = HTTPStatus(status).phrase
    slug = phrase.lower().replace(" ", "-")
    return problem(
        status, detail, title=phrase, slug=slug, instance=instance, request_id=request_id
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def headers_of(error: RetinaserveError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="retinaserve"'}
    if isinstance(error, Unavailable | RateLimited):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if error.status == HTTPStatus.REQUEST_TIMEOUT:
        # The rest of the body may come for a long time yet.
        return {"Connection": "close"}
    return {}


def written(document: dict[str, Any]) -> tuple[bytes, str]:
    """A problem in the dialect of the path that it happened on, and its media type."""
    if _INFERENCE_PROTOCOL.match(document["instance"]):
        return orjson.dumps({"error": document["detail"]}), "application/json"
    return orjson.dumps(document), MEDIA_TYPE


def respond(document: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """The problem as a response."""
    content, media_type = written(document)
    return Response(content, document["status"], media_type=media_type, headers=headers)
