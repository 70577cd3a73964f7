"""What /openapi.json says of the routes below /v2."""

from __future__ import annotations

from typing import Any, Final

from starlette.responses import Response

from service.http.oip.json_codec import HEADER_LENGTH
from service.http.oip.tensors import INPUTS, OUTPUTS
from service.http.schemas import DEADLINE, REQUEST_ID

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
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
_STRING: Final = {"type": "string"}
_STRINGS: Final = {"type": "array", "items": _STRING}
_INTEGERS: Final = {"type": "array", "items": {"type": "integer"}}
_PARAMETERS: Final = {
    "type": "object",
    "description": (
        "score_threshold, iou_threshold, max_detections, timeout (microseconds), "
        "binary_data_output; of a tensor: binary_data_size, binary_data."
    ),
}


def server() -> dict[str, Any]:
    """GET /v2."""
    schema = _object(name=_STRING, version=_STRING, extensions=_STRINGS)
    return _operation("Name, version and extensions", schema, 401, 429)


def live() -> dict[str, Any]:
    """GET /v2/health/live."""
    return _operation("Whether the server is alive", _object(live={"type": "boolean"}), 503)


def ready() -> dict[str, Any]:
    """GET /v2/health/ready."""
    return _operation("Whether the default model serves", _object(ready={"type": "boolean"}), 503)


def model() -> dict[str, Any]:
    """GET /v2/models/{name}."""
    tensor = _object(name=_STRING, datatype=_STRING, shape=_INTEGERS)
    tensors = {"type": "array", "items": tensor}
    schema = _object(
        name=_STRING, versions=_STRINGS, platform=_STRING, inputs=tensors, outputs=tensors
    )
    return _operation("Inputs and outputs of a model", schema, 401, 404, 429, 503)


def model_ready() -> dict[str, Any]:
    """GET /v2/models/{name}/ready."""
    schema = _object(name=_STRING, ready={"type": "boolean"})
    return _operation("Whether a model serves", schema, 401, 404, 429, 503)


def config() -> dict[str, Any]:
    """GET /v2/models/{name}/config."""
    return _operation("A model in Triton's words", {"type": "object"}, 401, 404, 429, 503)


def index() -> dict[str, Any]:
    """POST /v2/repository/index."""
    entry = _object(name=_STRING, version=_STRING, state=_STRING, reason=_STRING)
    described = _operation(
        "Every version of every model",
        {"type": "array", "items": entry},
        *(400, 401, 408, 413, 415, 429),
    )
    body = {"type": "object", "properties": {"ready": {"type": "boolean"}}}
    described["openapi_extra"] = {
        "requestBody": {"required": False, "content": {"application/json": {"schema": body}}}
    }
    return described


def infer() -> dict[str, Any]:
    """POST /v2/models/{name}/infer."""
    described = _operation(
        "Tensors or compressed images in, tensors out", _response_schema(), *_ERRORS
    )
    binary = {"schema": {"type": "string", "format": "binary"}}
    described["responses"][200]["content"]["application/octet-stream"] = binary
    header = {
        "name": HEADER_LENGTH,
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
        "description": "Length of the JSON, where the raw bytes of tensors follow it.",
    }
    described["openapi_extra"] = {
        "parameters": [header, DEADLINE, REQUEST_ID],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _request_schema()},
                "application/octet-stream": binary,
            },
        },
    }
    return described


def _request_schema() -> dict[str, Any]:
    entry = _object(
        name={"type": "string", "enum": [signature.name for signature in INPUTS]},
        datatype={"type": "string", "enum": sorted({each.datatype for each in INPUTS})},
        shape={"type": "array", "items": {"type": "integer", "minimum": 1}},
    )
    entry["properties"] |= {"data": {"type": "array", "items": {}}, "parameters": _PARAMETERS}
    output = _object(name={"type": "string", "enum": [each.name for each in OUTPUTS]})
    output["properties"]["parameters"] = _PARAMETERS
    schema = _object(inputs={"type": "array", "items": entry, "minItems": 1})
    schema["properties"] |= {
        "id": _STRING,
        "parameters": _PARAMETERS,
        "outputs": {"type": "array", "items": output},
    }
    return schema


def _response_schema() -> dict[str, Any]:
    output = _object(name=_STRING, datatype=_STRING, shape=_INTEGERS)
    output["properties"] |= {
        "data": {"type": "array", "items": {"type": "number"}},
        "parameters": _PARAMETERS,
    }
    schema = _object(
        model_name=_STRING, model_version=_STRING, outputs={"type": "array", "items": output}
    )
    schema["properties"]["id"] = _STRING
    return schema


def _operation(summary: str, schema: dict[str, Any], *errors: int) -> dict[str, Any]:
    """Arguments that describe a route to FastAPI."""
    good: dict[int | str, dict[str, Any]] = {
        200: {"description": summary, "content": {"application/json": {"schema": schema}}}
    }
    bad: dict[int | str, dict[str, Any]] = {
        status: {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": _ERROR}},
        }
        for status in errors
    }
    return {
        "summary": summary,
        "tags": ["open inference protocol"],
        "response_class": Response,
        "responses": good | bad,
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}
