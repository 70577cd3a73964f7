"""The gRPC server: its own port, in the event loop of the HTTP server."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from service.engine.service import Service
from service.errors import DataError, RetinaserveError
from service.http.auth.gate import Gate
from service.http.connections.bounds import HEAD_SECONDS
from service.http.connections.descriptors import descriptors
from service.http.listening import AddressError
from service.http.oip import grpc_messages
from service.http.oip.grpc_codec import read
from service.http.oip.grpc_messages import Method
from service.http.oip.grpc_methods import GrpcMethods
from service.http.oip.grpc_streams import Arrivals, Watches
from service.http.problems import headers_of
from service.observability.record import Record, current
from service.observability.request_id import request_id, valid_or_new

if TYPE_CHECKING:
    import grpc
    from opentelemetry.trace import Span

_log = logging.getLogger("retinaserve.grpc")
_access_log = logging.getLogger("retinaserve.access")
_error_log = logging.getLogger("retinaserve.error")

_CODES: Final = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""gRPC's status code for each HTTP status; any other is INTERNAL."""
_INFER: Final = "ModelInfer"
_PROBES: Final = frozenset({"ServerLive", "ServerReady", "Check"})
"""Methods that need no key, like the probes over HTTP."""
_IDLE_SECONDS: Final = 300
"""A connection without calls is closed after that time; clients reconnect by themselves."""
_MANY: Final = 1 << 30
_GRACE: Final = 1.0
"""Seconds after the drain in which late calls get their error."""
_MAX_DETAIL: Final = 2048
"""Characters. The detail is sent as a header, of which clients accept 8 KiB."""


class GrpcServer:
    """Serves GRPCInferenceService and gRPC's health checks beside the HTTP server."""

    def __init__(
        self,
        service: Service,
        gate: Gate,
        listener: socket.socket,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """`listener` keeps the port until the start, when gRPC binds it itself.

        Raises DataError for a certificate or key that cannot be read.
        """
        self._service = service
        self._gate = gate
        self._listener = listener
        self._certificate = None if certificate is None else _pem(certificate, key or certificate)
        self._server: grpc.aio.Server | None = None
        self._watches: list[Watches] = []

    async def start(self) -> None:
        """Accept calls. Raises AddressError."""
        import grpc

        settings = self._service.settings
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would each get some of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", int(1e3 * HEAD_SECONDS)),
                ("grpc.max_connection_idle_ms", 1000 * _IDLE_SECONDS),
                # Each takes a file descriptor, and HTTP needs some, for its probes too.
                ("grpc.max_allowed_incoming_connections", int(min(descriptors() / 2, _MANY))),
            ),
            maximum_concurrent_rpcs=2 * settings.max_queue_size,
        )
        server.add_generic_rpc_handlers(self._handlers())
        host, port = self._listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._listener.close()
        try:
            if self._certificate is None:
                server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials([self._certificate])
                server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise AddressError(
                f"cannot serve gRPC on {address}; is the certificate good? "
                "choose another port with RETINASERVE_GRPC_PORT"
            ) from error
        await server.start()
        self._server = server
        _log.info("gRPC on %s", address)

    async def stop(self, seconds: float) -> None:
        """Accept no new calls, and finish those in flight within `seconds`."""
        server, self._server = self._server, None
        for watches in self._watches:
            watches.close()
        if server is not None:
            await server.stop(seconds + _GRACE)

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Return a handler for each gRPC service, and one for unknown methods."""
        import grpc

        service, arrivals = self._service, Arrivals(self._service)
        methods = GrpcMethods(service)

        def handler(name: str, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
            write = method.response.SerializeToString
            if method.streams:
                watches = Watches(service, method, partial(arrivals.receive, probe=True))
                self._watches.append(watches)
                return grpc.stream_stream_rpc_method_handler(
                    partial(_watch, watches), response_serializer=write
                )
            call = _Call(service, self._gate, methods, f"/{name}/{method.name}", method, arrivals)
            # A stream of messages is the same on the wire, and its handler is called before the
            # message has arrived, so that the call can be refused. Without a deserializer: the
            # call reports a malformed message.
            return grpc.stream_unary_rpc_method_handler(call.handle, response_serializer=write)

        described = grpc_messages.load()
        return (
            *(
                grpc.method_handlers_generic_handler(
                    name, {method.name: handler(name, method) for method in offered}
                )
                for name, offered in described.items()
            ),
            _unknown_methods(described[grpc_messages.INFERENCE]),
        )


def _unknown_methods(offered: Iterable[Method]) -> grpc.GenericRpcHandler:
    """Return a handler that names the known methods."""
    import grpc

    names = ", ".join(method.name for method in offered)

    class Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]
        """Handles every method."""

        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
            """Return the handler of a method."""

            async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
                sentence = f"no method {details.method[:80]}; there are {names}"
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, sentence)

            return grpc.stream_unary_rpc_method_handler(refuse)

    return Unknown()


async def _watch(
    watches: Watches,
    messages: AsyncIterator[bytes],
    context: grpc.aio.ServicerContext[Any, Any],
) -> AsyncIterator[Any]:
    """Handle a streaming call, without a log line or metrics."""
    try:
        async for state in watches.states(messages):
            yield state
    except RetinaserveError as error:
        await _abort(context, error, Record(valid_or_new(None)))


def _pem(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Return (key, certificate), as gRPC takes them."""
    try:
        return key.read_bytes(), certificate.read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


class _Call:
    """One method, with key, request id, errors, log line and metrics around each call."""

    def __init__(
        self,
        service: Service,
        gate: Gate,
        methods: GrpcMethods,
        path: str,
        method: Method,
        arrivals: Arrivals,
    ) -> None:
        self._service = service
        self._gate = gate
        self._arrivals = arrivals
        self._methods = methods
        self._path = path
        self._method = method

    async def handle(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Handle one call."""
        metadata = {str(name): value for name, value in context.invocation_metadata() or ()}
        record = Record(valid_or_new(metadata.get("x-request-id")))
        request_id.set(record.request_id)
        current.set(record)
        span = self._begin_span(record, metadata)
        status = 499
        try:
            answer = await self._work(messages, metadata, context, record)
            status = 200
        except RetinaserveError as error:
            status = error.status
            self._service.metrics.count_refusal(error)
            await _abort(context, error, record)
        except Exception:
            status = 500
            _error_log.exception("unhandled exception in a call")
            await _abort(context, RetinaserveError("something went wrong"), record)
        finally:
            self._finish(record, status)
            if span is not None:
                self._finish_span(span, record, status)
        return answer

    async def _work(
        self,
        messages: AsyncIterator[bytes],
        metadata: dict[str, Any],
        context: grpc.aio.ServicerContext[Any, Any],
        record: Record,
    ) -> Any:
        if self._method.name not in _PROBES:
            key = self._gate.enter(_presented(metadata), _address(context.peer()))
            record.key = None if key is None else key.name
        receive = partial(self._receive, messages, record)
        if self._method.name == _INFER:
            return await self._methods.infer(self._method, receive, context.time_remaining())
        request = read(await receive(), self._method.request)
        return self._methods.plain[self._method.name](self._method, request)

    async def _receive(self, messages: AsyncIterator[bytes], record: Record) -> bytes:
        content = await self._arrivals.receive(messages, probe=self._method.name in _PROBES)
        record.body_bytes = len(content)
        record.body_finished = time.monotonic()
        return content

    def _finish(self, record: Record, status: int) -> None:
        seconds = time.monotonic() - record.started
        self._service.metrics.observe_request(
            self._path, "gRPC", status, seconds=seconds, body_bytes=record.body_bytes
        )
        # Probes come every few seconds.
        level = logging.DEBUG if self._method.name in _PROBES else logging.INFO
        if not _access_log.isEnabledFor(level):
            return
        code, milliseconds = _CODES.get(status, "INTERNAL"), round(seconds * 1e3, 1)
        fields = {
            "method": "gRPC",
            "path": self._path,
            "route": self._path,
            "status": status,
            "code": code,
            "milliseconds": milliseconds,
        }
        _access_log.log(
            level,
            "gRPC %s %s %.1f ms",
            self._path,
            code,
            milliseconds,
            extra={"fields": fields | record.fields()},
        )

    def _begin_span(self, record: Record, metadata: dict[str, Any]) -> Span | None:
        tracing = self._service.tracing
        if tracing is None or self._method.name in _PROBES:
            return None
        headers = {name: value for name, value in metadata.items() if isinstance(value, str)}
        return tracing.begin(record, self._path[1:], headers)

    def _finish_span(self, span: Span, record: Record, status: int) -> None:
        tracing = self._service.tracing
        assert tracing is not None, "it began the span"
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": self._path[1:].partition("/")[0],
            "rpc.method": self._method.name,
            "retinaserve.code": _CODES.get(status, "INTERNAL"),
            "retinaserve.request_id": record.request_id,
        }
        tracing.finish(span, record, self._path[1:], attributes, failed=status >= 500)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], error: RetinaserveError, record: Record
) -> None:
    """End a call with an error. Raises gRPC's AbortError."""
    import grpc

    code = grpc.StatusCode[_CODES.get(error.status, "INTERNAL")]
    trailing = {name.lower(): value for name, value in headers_of(error).items()}
    trailing = {name: trailing[name] for name in ("retry-after",) if name in trailing}
    detail = str(error)[:_MAX_DETAIL]
    if error.status >= 500 and code is grpc.StatusCode.INTERNAL:
        detail = f"{detail}; the server's log has it under request {record.request_id}"
    trailing["x-request-id"] = record.request_id
    await context.abort(code, detail, tuple(trailing.items()))


def _presented(metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of a call, as over HTTP."""
    bearer = metadata.get("authorization")
    if isinstance(bearer, str) and bearer[:7].lower() == "bearer ":
        yield bearer[7:].strip()
    api_key = metadata.get("x-api-key")
    if isinstance(api_key, str):
        yield api_key.strip()


def _address(peer: str) -> str:
    """Return the address in "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"."""
    _, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]")
