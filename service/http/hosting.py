"""The servers around one Service: HTTP, the admin listener, gRPC."""

from __future__ import annotations

from pathlib import Path

from service.engine.models.startup import Models
from service.engine.service import Service
from service.http.admin import AdminListener
from service.http.app import create_app
from service.http.listening import Listeners
from service.http.server import Companion, Server
from service.settings import Settings


def open_server(
    settings: Settings,
    models: Models,
    listeners: Listeners,
    *,
    root_path: str,
    certificate: Path | None,
    key: Path | None,
) -> tuple[Server, Service]:
    """Return the HTTP server with its companions, not started. Raises DataError."""
    app = create_app(settings, loading=models)
    service: Service = app.state.service
    companions: list[Companion] = []
    if listeners.admin is not None:
        companions.append(
            AdminListener(
                service, app.state.keys, listeners.admin, certificate=certificate, key=key
            )
        )
    if listeners.grpc is not None:
        from service.http.oip.grpc_server import GrpcServer

        companions.append(
            GrpcServer(service, app.state.gate, listeners.grpc, certificate=certificate, key=key)
        )
    server = Server(
        app, root_path=root_path, certificate=certificate, key=key, companions=companions
    )
    server.config.load()
    return server, service
