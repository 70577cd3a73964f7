"""The route that skips FastAPI's handling of a request."""

from __future__ import annotations

from typing import Any, get_type_hints

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.http.parameters import parse_query


class DirectRoute(APIRoute):
    """A route that FastAPI documents and does not run.

    The endpoint takes a request and its query, as the annotation of its parameter `query` says.
    FastAPI's dependencies, validation and exit stacks would add 22 µs to the 42 µs that a request
    takes in all of `service.http`.
    """

    def __init__(self, path: str, endpoint: Any, **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        self._query = get_type_hints(endpoint)["query"]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the endpoint, and send its response."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive, send)
        response = await self.endpoint(request, parse_query(request, self._query))
        await response(scope, receive, send)
