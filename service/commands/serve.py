"""`retinaserve serve`."""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from service.engine.drawing import LabelFont
from service.engine.models.registry import Registry
from service.engine.models.startup import Models, open_models
from service.engine.process import prepare_process
from service.errors import DataError
from service.http.auth.keys import read_keys
from service.http.listening import Listeners, listen, url
from service.observability.logs import LineWriter
from service.settings import Settings, load_settings
from service.system.process import leave

_log = logging.getLogger("retinaserve")
_STDOUT: Final = 1
_LONGEST_LOAD: Final = 60.0
"""Seconds that a start which failed may wait for the file that is being loaded."""


def run(
    *,
    given: dict[str, object],
    root_path: str,
    certificate: Path | None,
    key: Path | None,
) -> None:
    """Serve until a signal. Raises AddressError, DeviceError, ArtifactError or DataError."""
    if key is not None and certificate is None:
        raise DataError("--ssl-keyfile needs --ssl-certfile")
    if certificate is not None:
        _check_certificate(certificate, key)
    settings = load_settings(**given)
    prepare_process(settings)
    with contextlib.ExitStack() as ports:
        # Every port before anything is loaded.
        listener = ports.enter_context(listen(settings.host, settings.port))
        listeners = Listeners(
            _listen_for_admins(settings, ports), _listen_for_grpc(settings, ports)
        )
        # Files as well: once models load, the end of a start that fails waits for them.
        if settings.api_keys_file is None:
            _warn_of_strangers(listener)
        else:
            read_keys(settings.api_keys_file)
        LabelFont(settings.font_file)
        models = open_models(settings)
        with _loading(models.registry):
            # To import the web framework takes about as long as to load a model.
            from service.http.connections.descriptors import ask_for_descriptors
            from service.http.hosting import open_server

            ask_for_descriptors()
            server, service = open_server(
                settings, models, listeners, root_path=root_path, certificate=certificate, key=key
            )
            _announce(models, url(listener, tls=certificate is not None))
            # What is there now stays: the collector need not walk through it again and again.
            gc.freeze()
            gc.enable()
            server.run([listener])
    leave(0 if service.pipeline.fatal is None else 1)


@contextlib.contextmanager
def _loading(registry: Registry) -> Iterator[None]:
    """Load models from now on; stop if the block fails."""
    registry.start()
    try:
        yield
    except BaseException:
        # Python must not end while another thread is in native code.
        registry.close(_LONGEST_LOAD)
        raise


def _check_certificate(certificate: Path, key: Path | None) -> None:
    """Raises DataError for what cannot be served with."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise DataError(
            f"--ssl-certfile {certificate}: not a certificate with its key: {error}"
        ) from error


def _announce(models: Models, address: str) -> None:
    # Serve even if stdout is closed or not read.
    writer = LineWriter(_STDOUT, str)
    writer.write(
        f"retinaserve serves {models.registry.default} on {models.hardware.name}: {address}"
    )
    writer.close()


def _listen_for_admins(settings: Settings, ports: contextlib.ExitStack) -> socket.socket | None:
    """Bind the admin listener's address, if there is to be one."""
    if settings.admin_port is None:
        return None
    path = settings.api_keys_file
    if path is None:
        # Not even on loopback: every user and container of the host may be able to reach that.
        raise DataError(
            "RETINASERVE_ADMIN_PORT needs RETINASERVE_API_KEYS_FILE: only an admin's key opens it; "
            "`retinaserve keys new NAME --admin --file PATH` makes one"
        )
    if not any(entry.admin for entry in read_keys(path)):
        _log.warning(
            "%s has no admin key, so models cannot be changed; "
            "`retinaserve keys new NAME --admin --file %s` makes one",
            path,
            path,
        )
    remedy = "choose another with RETINASERVE_ADMIN_PORT"
    return ports.enter_context(listen(settings.admin_host, settings.admin_port, remedy=remedy))


def _listen_for_grpc(settings: Settings, ports: contextlib.ExitStack) -> socket.socket | None:
    """Bind the gRPC server's address, if there is to be one."""
    if settings.grpc_port is None:
        return None
    # protobuf is imported by those who need it only.
    from service.http.oip.grpc_messages import check_installed

    check_installed()
    remedy = "choose another with RETINASERVE_GRPC_PORT"
    return ports.enter_context(listen(settings.host, settings.grpc_port, remedy=remedy))


def _warn_of_strangers(listener: socket.socket) -> None:
    address = listener.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        _log.warning(
            "any client that reaches %s can use the service; to require keys, set "
            "RETINASERVE_API_KEYS_FILE (`retinaserve keys new NAME --file PATH`)",
            address,
        )
