"""The servers around one Service: HTTP, the admin listener, gRPC."""

from __future__ import annotations

from pathlib import Path

from service.admin import AdminListener
from service.api import create_app
from service.context import Service
from service.listening import Doors
from service.server import Companion, Server
from service.settings import Settings
from service.startup import Models


def open_server(
    settings: Settings,
    models: Models,
    doors: Doors,
    *,
    root_path: str,
    certificate: Path | None,
    key: Path | None,
) -> tuple[Server, Service]:
    """The HTTP server with its companions; nobody is served yet. Raises DataError."""
    app = create_app(settings, loading=models)
    service: Service = app.state.service
    companions: list[Companion] = []
    if doors.admin is not None:
        companions.append(AdminListener(service, doors.admin, certificate=certificate, key=key))
    if doors.grpc is not None:
        from service.inference_protocol.grpc_server import GrpcServer

        companions.append(GrpcServer(service, doors.grpc, certificate=certificate, key=key))
    server = Server(
        app, root_path=root_path, certificate=certificate, key=key, companions=companions
    )
    server.config.load()
    return server, service
