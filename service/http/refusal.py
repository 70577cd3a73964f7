"""One of our own errors as the answer to a request."""

from __future__ import annotations

from starlette.responses import Response

from service.errors import RetinaserveError
from service.http.problems import headers_of, problem_of, respond
from service.observability.metrics import Metrics
from service.observability.request_id import request_id


def refusal(error: RetinaserveError, metrics: Metrics, path: str) -> Response:
    """The answer to a request that got one of our own errors, which is counted."""
    metrics.count_refusal(error)
    document = problem_of(error, instance=path, request_id=request_id.get())
    return respond(document, headers_of(error))
