"""The gRPC messages, from the descriptors that `make proto` compiles.

They live in their own descriptor pool. Generated modules would register them in the process's
default pool, where a client in the same process may have messages of the same names; and they run
with few versions of protobuf, while every version reads a descriptor.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from service.errors import DataError

DESCRIPTORS: Final = "messages.binpb"
INFERENCE: Final = "inference.GRPCInferenceService"
HEALTH: Final = "grpc.health.v1.Health"


def check_installed() -> None:
    """Raise DataError where grpcio is missing."""
    if importlib.util.find_spec("grpc") is None:
        raise DataError(
            "RETINASERVE_GRPC_PORT needs grpcio, which is not installed: "
            "pip install 'retinaserve[grpc]'"
        )


class Method(NamedTuple):
    """A method of a service, with the classes of its messages."""

    name: str
    request: Any
    response: Any
    streams: bool
    """Whether there are several responses."""


def load() -> dict[str, tuple[Method, ...]]:
    """Return the methods of each service, by its full name."""
    described = FileDescriptorSet.FromString(
        files("service.http.oip").joinpath(DESCRIPTORS).read_bytes()
    )
    pool = DescriptorPool()
    for file in described.file:
        pool.AddSerializedFile(file.SerializeToString())
    return {name: _methods(pool, name) for name in (INFERENCE, HEALTH)}


def _methods(pool: DescriptorPool, service: str) -> tuple[Method, ...]:
    return tuple(
        Method(
            method.name,
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.server_streaming,
        )
        for method in pool.FindServiceByName(service).methods
    )
