"""GET /healthz, /readyz and /metrics."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import (
    CONTENT_TYPE_PLAIN_0_0_4,
    choose_encoder,
    generate_latest,
)

from service.engine.service import Service
from service.http.parameters import accept_of
from service.http.responses import state_response


class HealthRoutes:
    """Responds from flags alone, at once whatever the model does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # A scrape must not wait for the work of requests.
        self._metrics_thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    async def alive(self) -> Response:
        """Alive; 503 only once the device is lost for good."""
        fatal = self._service.pipeline.fatal
        document = {"status": "ok"} if fatal is None else {"status": "failed", "reason": fatal}
        return state_response(document, fatal)

    async def ready(self) -> Response:
        """Ready for requests: the default model is warm and no drain has begun."""
        service = self._service
        reason = service.not_ready()
        document = {
            "status": "ready" if reason is None else "not ready",
            "reason": reason,
            "device": service.hardware.name,
            "fallback": service.hardware.fallback,
            "model": service.registry.default,
        }
        known = {name: value for name, value in document.items() if value is not None}
        return state_response(known, reason)

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        scrape = partial(_scrape, self._service.metrics.registry, accept_of(request))
        content, content_type = await asyncio.get_running_loop().run_in_executor(
            self._metrics_thread, scrape
        )
        return Response(content, headers={"Content-Type": content_type})


def _scrape(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return the metrics in the format that `Accept` prefers, and its media type."""
    try:
        encoder, content_type = choose_encoder(accept)
        return encoder(registry), content_type
    except (TypeError, ValueError):
        # It compares a version that is no number.
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""
    routes = HealthRoutes(service)
    for path, endpoint in (
        ("/healthz", routes.alive),
        ("/readyz", routes.ready),
        ("/metrics", routes.metrics),
    ):
        app.add_api_route(
            path, endpoint, methods=["GET"], tags=["operation"], response_class=Response
        )
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
