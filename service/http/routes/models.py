"""GET /v1/models: the models and their metadata."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response

from service.engine.models.versions import Slot, Snapshot
from service.engine.service import Service
from service.http.responses import json_response
from service.http.schemas import problems


class ModelRoutes:
    """Translates the registry to JSON."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def every(self) -> Response:
        """Every version of every model, including those that failed to load."""
        snapshot = self._service.registry.snapshot()
        names = dict.fromkeys(key.name for key in snapshot.slots)
        return json_response({"models": [self._model(snapshot, name) for name in names]})

    async def one(self, name: str) -> Response:
        """Every version of one model."""
        return json_response(self._model(self._service.registry.snapshot(), name))

    def _model(self, snapshot: Snapshot, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "default": name == snapshot.default,
            "serving": snapshot.serving(name),
            "pinned": name in snapshot.pins,
            "versions": [self._version(slot) for slot in snapshot.find(name)],
        }

    def _version(self, slot: Slot) -> dict[str, Any]:
        described: dict[str, Any] = {
            "version": slot.version,
            "state": slot.state,
            "reason": slot.reason,
            "device": self._service.hardware.name,
            "sha256": slot.sha256,
        }
        if slot.metadata is not None:
            metadata = slot.metadata.model_dump(mode="json", by_alias=True)
            described |= {
                name: metadata[name]
                for name in ("classes", "canvas", "thresholds", "metrics", "calibrated")
            }
            described["provenance"] = metadata["provenance"]
            described["licence"] = metadata["provenance"].get("licences")
        return described


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""
    routes = ModelRoutes(service)
    app.add_api_route(
        "/v1/models",
        routes.every,
        methods=["GET"],
        tags=["models"],
        operation_id="models",
        response_class=Response,
    )
    app.add_api_route(
        "/v1/models/{name}",
        routes.one,
        methods=["GET"],
        tags=["models"],
        operation_id="model",
        response_class=Response,
        responses=problems(404),
    )
