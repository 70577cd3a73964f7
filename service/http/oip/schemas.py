"""The schemas and errors of the routes below /v2 in /openapi.json."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field
from starlette.responses import Response

from service.http.oip.json_codec import HEADER_LENGTH
from service.http.oip.tensors import INPUTS, OUTPUTS
from service.http.schemas import request_body

_ERRORS: Final = {
    400: "The request is malformed, or a tensor or parameter is not what the model takes.",
    401: "The key is missing or wrong.",
    404: "No such model or version.",
    408: "The body came too slowly.",
    413: "Too many bytes, pixels or images.",
    415: "An image is no JPEG, PNG or WebP (by content), or the body is encoded.",
    422: "X-Deadline-Ms is out of range.",
    429: "This key's rate limit is reached; see Retry-After.",
    500: "The model failed on this request.",
    503: "Queue full, deadline out of reach, loading or draining; see Retry-After.",
    504: "Accepted, but late.",
}
_PARAMETERS: Final = (
    "score_threshold, iou_threshold, max_detections, timeout (microseconds), "
    "binary_data_output; of a tensor: binary_data_size, binary_data."
)


class ServerMetadata(BaseModel):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """Whether the server is alive."""

    live: bool


class ServerReady(BaseModel):
    """Whether the default model serves."""

    ready: bool


class ModelReady(BaseModel):
    """Whether a model serves."""

    name: str
    ready: bool


class TensorMetadata(BaseModel):
    """A tensor; -1 for a side that each request chooses."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class IndexEntry(BaseModel):
    """A version of a model."""

    name: str
    version: str
    state: str
    reason: str


class OutputTensor(TensorMetadata):
    """A tensor with its data, or with the size of its raw bytes as a parameter."""

    data: list[float] = []
    parameters: dict[str, Any] = Field(default={}, description=_PARAMETERS)


class InferResponse(BaseModel):
    """The outputs of a model."""

    model_config = {"protected_namespaces": ()}

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


class ProtocolError(BaseModel):
    """An error, as the Open Inference Protocol has it."""

    error: str


def describe(summary: str, model: Any, *errors: int) -> dict[str, Any]:
    """Return the arguments that describe a route to FastAPI."""
    responses: dict[int | str, dict[str, Any]] = {200: {"model": model, "description": summary}}
    for status in errors:
        responses[status] = {"model": ProtocolError, "description": _ERRORS[status]}
    return {
        "summary": summary,
        "tags": ["open inference protocol"],
        "response_class": Response,
        "responses": responses,
    }


def describe_index() -> dict[str, Any]:
    """Return the arguments that describe POST /v2/repository/index."""
    described = describe(
        "Every version of every model", list[IndexEntry], 400, 401, 408, 413, 415, 429
    )
    body = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    content = {"application/json": {"schema": body}}
    return described | {"openapi_extra": {"requestBody": {"required": False, "content": content}}}


def describe_infer() -> dict[str, Any]:
    """Return the arguments that describe POST /v2/models/{name}/infer."""
    described = describe("Tensors or compressed images in, tensors out", InferResponse, *_ERRORS)
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    described["responses"][200]["content"] = binary
    length = {
        "name": HEADER_LENGTH,
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
        "description": "Length of the JSON, where the raw bytes of tensors follow it.",
    }
    content = {"application/json": {"schema": _infer_request()}} | binary
    return described | {"openapi_extra": request_body(content, length)}


def _infer_request() -> dict[str, Any]:
    parameters = {"type": "object", "description": _PARAMETERS}
    tensor = _object(
        name={"type": "string", "enum": [each.name for each in INPUTS]},
        datatype={"type": "string", "enum": sorted({each.datatype for each in INPUTS})},
        shape={"type": "array", "items": {"type": "integer", "minimum": 1}},
    )
    tensor["properties"] |= {"data": {"type": "array", "items": {}}, "parameters": parameters}
    output = _object(name={"type": "string", "enum": [each.name for each in OUTPUTS]})
    output["properties"]["parameters"] = parameters
    request = _object(inputs={"type": "array", "items": tensor, "minItems": 1})
    request["properties"] |= {
        "id": {"type": "string"},
        "parameters": parameters,
        "outputs": {"type": "array", "items": output},
    }
    return request


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}
