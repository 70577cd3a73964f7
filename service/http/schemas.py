"""The schemas, examples and errors of the detection routes in /openapi.json.

The models are documentation: responses are written straight to JSON, and the tests validate real
responses against them.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """An object without further properties."""

    model_config = ConfigDict(extra="forbid")


class Box(Schema):
    """Pixels of the original image, EXIF orientation applied."""

    x1: float
    y1: float
    x2: float
    y2: float


class Detection(Schema):
    """One object."""

    label: str
    class_id: int
    score: float
    box: Box


class ModelName(Schema):
    """The model that made an answer."""

    name: str
    version: int


class ImageSize(Schema):
    """Size of the original image, EXIF orientation applied."""

    width: int
    height: int
    tiles: int | None = None
    """Canvases that the image took, the whole image's included; only where `tile` was asked
    for. 1: it went onto one canvas, as without."""


class TimingMs(Schema):
    """Milliseconds in each stage."""

    decode: float
    queue: float
    inference: float
    total: float


class DetectAnswer(Schema):
    """Objects of one image, in falling score."""

    model: ModelName
    image: ImageSize
    detections: list[Detection]
    timing_ms: TimingMs


class CocoDetection(Schema):
    """One object, by `format=coco`."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """x, y, width, height."""
    score: float


class RoboflowDetection(Schema):
    """One object, by `format=roboflow`."""

    x: float
    """Of the centre, as y."""
    y: float
    width: float
    height: float
    confidence: float
    class_: str = Field(alias="class")
    class_id: int


class RoboflowSize(Schema):
    """Size of the original image."""

    width: int
    height: int


class RoboflowAnswer(Schema):
    """Objects of one image, by `format=roboflow`."""

    image: RoboflowSize
    predictions: list[RoboflowDetection]


class HuggingFaceBox(Schema):
    """Pixels of the original image."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class HuggingFaceDetection(Schema):
    """One object, by `format=hf`."""

    label: str
    score: float
    box: HuggingFaceBox


AnyAnswer = DetectAnswer | RoboflowAnswer | list[CocoDetection] | list[HuggingFaceDetection]
"""One image's answer, whatever its format."""


class Problem(Schema):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str


class ImageAnswer(Schema):
    """One image of a batch: objects, or the reason why there are none."""

    index: int
    id: str
    status: int
    image: ImageSize | None = None
    detections: list[Detection] | None = None
    error: Problem | None = None


class BatchAnswer(Schema):
    """Answers in the order of the images."""

    results: list[ImageAnswer]
    model: ModelName


def _object(**required: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required}


_PROBLEMS: Final = {
    400: "Malformed, truncated or empty image or body.",
    401: "Key missing or wrong.",
    404: "No such model or version.",
    408: "The body came too slowly.",
    413: "Too many bytes, pixels or tiles.",
    415: "Not a JPEG, PNG or WebP (by content), or an encoded body.",
    422: "A parameter is out of range or unknown.",
    429: "This key calls too often; see Retry-After.",
    503: "Queue full, loading or draining; see Retry-After.",
    504: "Accepted, but late.",
}

_OF_EVERY_ROUTE: Final = (401, 429)

_IMAGE: Final = {
    "model": {"name": "blood-cells", "version": 1},
    "image": {"width": 640, "height": 480},
    "detections": [
        {
            "label": "RBC",
            "class_id": 0,
            "score": 0.97,
            "box": {"x1": 12.3, "y1": 40.0, "x2": 118.9, "y2": 150.2},
        }
    ],
    "timing_ms": {"decode": 2.1, "queue": 0.4, "inference": 41.0, "total": 44.2},
}
_BASE64: Final = {
    "type": "string",
    "format": "byte",
    "description": "base64 of the image, or a data URL",
}
_BINARY: Final = {"type": "string", "format": "binary"}
_PROBLEM: Final = {
    "type": "urn:retinaserve:problem:unsupported-media-type",
    "title": "Unsupported media type",
    "status": 415,
    "detail": "not an accepted image type but a GIF image; send JPEG, PNG or WebP (judged by "
    "content)",
    "instance": "/v1/detect/batch",
    "request_id": "5f1c0e7a9b3d4c55",
}
_ENTRY: Final = {
    "type": "object",
    "required": ["image"],
    "properties": {"id": {"type": "string"}, "image": _BASE64},
}
DEADLINE: Final = {
    "name": "X-Deadline-Ms",
    "in": "header",
    "schema": {"type": "integer", "minimum": 1},
    "description": "Answer within this time or with 504; at most REQUEST_TIMEOUT_MS.",
}
REQUEST_ID: Final = {
    "name": "X-Request-Id",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    "description": "Comes back with the answer and stands in the log.",
}


DETECT_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": AnyAnswer,
        "description": "The objects, shaped as `format` says; or, where Accept names image "
        "types and not JSON, the image with boxes drawn.",
        "content": {
            "application/json": {"example": _IMAGE},
            "image/jpeg": {"schema": _BINARY},
            "image/png": {"schema": _BINARY},
        },
    }
}
DETECT_BODY: Final = {
    **{f"image/{kind}": {"schema": _BINARY} for kind in ("jpeg", "png", "webp")},
    "multipart/form-data": {"schema": _object(file=_BINARY)},
    "application/json": {"schema": _object(image=_BASE64)},
}
BATCH_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": BatchAnswer,
        "description": "One result for each image; NDJSON streams them as they finish.",
        "content": {
            "application/json": {
                "example": {
                    "results": [
                        {
                            "index": 0,
                            "id": "a",
                            "status": 200,
                            "image": _IMAGE["image"],
                            "detections": _IMAGE["detections"],
                        },
                        {"index": 1, "id": "b", "status": 415, "error": _PROBLEM},
                    ],
                    "model": _IMAGE["model"],
                }
            },
            "application/x-ndjson": {"schema": {"type": "string"}},
        },
    }
}
BATCH_BODY: Final = {
    "multipart/form-data": {"schema": _object(files={"type": "array", "items": _BINARY})},
    "application/json": {"schema": _object(images={"type": "array", "items": _ENTRY})},
}


def request_body(content: dict[str, Any], *headers: dict[str, Any]) -> dict[str, Any]:
    """Return `openapi_extra` of a route that reads its body and headers itself."""
    return {
        "parameters": [*headers, DEADLINE, REQUEST_ID],
        "requestBody": {"required": True, "content": content},
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route: these statuses, 401 and 429; by default all."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "model": Problem,
            "description": text,
            "content": {"application/problem+json": {"schema": schema}},
        }
        for status, text in _PROBLEMS.items()
        if not statuses or status in (*statuses, *_OF_EVERY_ROUTE)
    }


def describe_keys(app: FastAPI) -> None:
    """Describe the two ways to send a key."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
        return document

    app.openapi = with_keys  # type: ignore[method-assign]
