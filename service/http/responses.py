"""JSON responses."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response


def json_response(
    document: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a document as a response."""
    return Response(orjson.dumps(document), status, headers, "application/json")


def state_response(document: dict[str, Any], reason: str | None) -> Response:
    """Return the response of a probe: 503 with a `reason`, 200 without."""
    headers = {"Cache-Control": "no-store"}
    if reason is None:
        return json_response(document, 200, headers)
    return json_response(document, 503, headers | {"Retry-After": "1"})
