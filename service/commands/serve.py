"""`retinaserve serve`."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import sys
import threading
from pathlib import Path

import click

from service.api import create_app
from service.errors import DataError
from service.observability import configure_logging
from service.server import Companion, Server, listen, url
from service.settings import load_settings, unknown_variables

_log = logging.getLogger("retinaserve")


def run(
    *,
    given: dict[str, object],
    root_path: str,
    certificate: Path | None,
    key: Path | None,
) -> None:
    """Serve until a signal comes. Raises AddressError, DeviceError, ArtifactError or DataError."""
    if key is not None and certificate is None:
        raise DataError("--ssl-keyfile needs --ssl-certfile")
    settings = load_settings(**given)
    configure_logging(settings.log_format, settings.log_level)
    for name in unknown_variables(os.environ):
        # Whoever sets, say, a rate limit must not believe that there is one.
        _log.warning("%s is no setting of this version and does nothing", name)
    with contextlib.ExitStack() as ports:
        # Every port before anything is loaded.
        listener = ports.enter_context(listen(settings.host, settings.port))
        app = create_app(settings)
        companions: list[Companion] = []
        server = Server(
            app, root_path=root_path, certificate=certificate, key=key, companions=companions
        )
        try:
            server.config.load()
        except ssl.SSLError as error:
            raise DataError(
                f"--ssl-certfile {certificate}: not a certificate with its key: {error}"
            ) from error
        click.echo(
            f"retinaserve serves {app.state.service.registry.default} on "
            f"{app.state.service.hardware.name}: {url(listener, tls=certificate is not None)}"
        )
        sys.stdout.flush()
        server.run([listener])
    _leave()


def _leave() -> None:
    """Exit now, even where a thread is stuck in native code that would not let Python end."""
    stuck = [
        thread.name
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and thread.is_alive()
    ]
    sys.stdout.flush()
    sys.stderr.flush()
    if stuck:
        os._exit(0)
