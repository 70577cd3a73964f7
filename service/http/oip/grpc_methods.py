"""The methods of GRPCInferenceService and of gRPC's health checks, on the data plane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from google.protobuf.json_format import ParseDict

from service.engine.batch_queue import Urgency
from service.engine.service import Service
from service.engine.work import Servable
from service.errors import UnknownModel, shown
from service.http.oip import metadata
from service.http.oip.data_plane import earlier, find_model, infer, limits_of
from service.http.oip.grpc_codec import Parsed, parse, read_infer, write
from service.http.oip.grpc_messages import INFERENCE, Method

_BIG_MESSAGE: Final = 256 * 1024
"""Messages from this size on are parsed in a thread."""
UNKNOWN_SERVICE: Final = "SERVICE_UNKNOWN"

Answer = Callable[[Method, Any], Any]
Receive = Callable[[], Awaitable[bytes]]


class GrpcMethods:
    """Translates messages to calls of the data plane, and results to messages."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._big_messages = asyncio.Semaphore(1)
        """Parsing holds the interpreter's lock: in parallel it takes more memory, and no less
        time."""
        self.plain: dict[str, Answer] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "RepositoryIndex": self._repository_index,
            "Check": self._check,
        }
        """The methods without inference, by name."""

    async def infer(self, method: Method, receive: Receive, remaining: float | None) -> Any:
        """Handle ModelInfer; the client waits `remaining` seconds.

        A call that cannot be served is refused before `receive` has its message.
        """
        service, arrived = self._service, time.monotonic()
        longest = service.settings.request_timeout_ms / 1e3
        patience = longest if remaining is None else max(0.0, min(longest, remaining))
        service.admission.check(patience, Urgency.INTERACTIVE)
        content = await receive()
        limit = time.monotonic() + longest
        if remaining is not None:
            limit = min(limit, arrived + remaining)
        with service.places.slot(len(content)):
            if len(content) < _BIG_MESSAGE:
                model, parsed = self._parse(method, content)
            else:
                async with self._big_messages:
                    model, parsed = await service.off_loop(self._parse, method, content)
            # Its tensors have been copied out of it.
            del content
            limit = earlier(limit, parsed.request.parameters, arrived=arrived)
            outputs = await infer(service, model, parsed.request, limit)
        return write(
            parsed,
            outputs,
            method.response,
            model=model.name,
            version=model.version,
        )

    def _parse(self, method: Method, content: bytes) -> tuple[Servable, Parsed]:
        """Return the model and the tensors of a message. Thread-safe."""
        service = self._service
        request = read_infer(content, method.request, service.settings.max_batch_images)
        model = find_model(service, request.model_name, request.model_version)
        return model, parse(request, limits_of(service, model))

    def _server_live(self, method: Method, _: Any) -> Any:
        return method.response(live=self._service.pipeline.fatal is None)

    def _server_ready(self, method: Method, _: Any) -> Any:
        return method.response(ready=self._service.not_ready() is None)

    def _server_metadata(self, method: Method, _: Any) -> Any:
        return method.response(**metadata.server())

    def _model_ready(self, method: Method, request: Any) -> Any:
        reason = metadata.model_ready(self._service, request.name, request.version)
        return method.response(ready=reason is None)

    def _model_metadata(self, method: Method, request: Any) -> Any:
        described = metadata.model(self._service, request.name, request.version)
        known = [field.name for field in method.response.DESCRIPTOR.fields]
        return method.response(**{name: described[name] for name in known})

    def _model_config(self, method: Method, request: Any) -> Any:
        described = metadata.config(self._service, request.name, request.version)
        return ParseDict({"config": described}, method.response())

    def _repository_index(self, method: Method, request: Any) -> Any:
        return method.response(models=metadata.index(self._service, ready=request.ready))

    def _check(self, method: Method, request: Any) -> Any:
        status = health(self._service, request.service)
        if status == UNKNOWN_SERVICE:
            raise UnknownModel(f"no service {shown(request.service)}; there is {INFERENCE}")
        return method.response(status=status)


def health(service: Service, name: str) -> str:
    """Return the health status of the gRPC service `name`."""
    if name not in ("", INFERENCE):
        return UNKNOWN_SERVICE
    return "SERVING" if service.not_ready() is None else "NOT_SERVING"
