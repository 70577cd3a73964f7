"""Metadata of the service and its models, for REST and gRPC."""

from __future__ import annotations

from typing import Any, Final

from service.engine.models.versions import Slot
from service.engine.service import Service
from service.errors import UnknownModel
from service.http.oip.data_plane import find_model, parse_version
from service.http.oip.tensors import INPUTS, OUTPUTS, Signature
from service.version import package_version

SERVER_NAME: Final = "retinaserve"
PLATFORM: Final = "onnxruntime_onnx"
"""Triton's word for an ONNX file that onnxruntime runs."""
EXTENSIONS: Final = ("binary_tensor_data", "model_configuration")

_CONFIG_TYPES: Final = {
    "UINT8": "TYPE_UINT8",
    "INT64": "TYPE_INT64",
    "FP32": "TYPE_FP32",
    "BYTES": "TYPE_STRING",
}
"""Datatypes as Triton's model configuration spells them."""
_INDEX_STATES: Final = {"ready": "READY", "loading": "LOADING", "waiting": "LOADING"}


def server() -> dict[str, Any]:
    """Return name, version and extensions of the server."""
    return {"name": SERVER_NAME, "version": package_version(), "extensions": list(EXTENSIONS)}


def model(service: Service, name: str, asked: str = "") -> dict[str, Any]:
    """Return inputs, outputs and ready versions. Raises UnknownModel or Unavailable."""
    found = find_model(service, name, asked)
    ready = [slot.version for slot in service.registry.versions(name) if slot.state == "ready"]
    return {
        "name": found.name,
        "versions": [str(number) for number in sorted(ready)],
        "platform": PLATFORM,
        "inputs": [_tensor(signature) for signature in INPUTS],
        "outputs": [_tensor(signature) for signature in OUTPUTS],
        "parameters": {"classes": list(found.metadata.classes)},
    }


def config(service: Service, name: str, asked: str = "") -> dict[str, Any]:
    """Return a model as a Triton model configuration. Raises UnknownModel or Unavailable."""
    found = find_model(service, name, asked)
    return {
        "name": found.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        # The shapes below have the batch in them.
        "max_batch_size": 0,
        "input": [_configured(signature) | {"optional": True} for signature in INPUTS],
        "output": [_configured(signature) for signature in OUTPUTS],
        "parameters": {"classes": {"string_value": ",".join(found.metadata.classes)}},
    }


def model_ready(service: Service, name: str, asked: str = "") -> str | None:
    """Return why a model cannot serve; None when it can. Raises UnknownModel."""
    if service.draining:
        return "the service is draining"
    number = parse_version(name, asked)
    slots = [slot for slot in service.registry.versions(name) if number in (None, slot.version)]
    if not slots:
        raise UnknownModel(f"model {name!r} has no version {number}")
    if any(slot.state == "ready" for slot in slots):
        return service.pipeline.fatal
    return slots[-1].reason or f"model {name!r} is {slots[-1].state}"


def index(service: Service, *, ready: bool) -> list[dict[str, str]]:
    """Return every version of every model; with `ready` only those that serve."""
    entries = [_indexed(slot) for slot in service.registry.slots()]
    return [entry for entry in entries if not ready or entry["state"] == "READY"]


def _indexed(slot: Slot) -> dict[str, str]:
    return {
        "name": slot.name,
        "version": str(slot.version),
        "state": _INDEX_STATES.get(slot.state, "UNAVAILABLE"),
        "reason": slot.reason or "",
    }


def _tensor(signature: Signature) -> dict[str, Any]:
    return {
        "name": signature.name,
        "datatype": signature.datatype,
        "shape": list(signature.shape),
    }


def _configured(signature: Signature) -> dict[str, Any]:
    return {
        "name": signature.name,
        "data_type": _CONFIG_TYPES[signature.datatype],
        "dims": list(signature.shape),
    }
