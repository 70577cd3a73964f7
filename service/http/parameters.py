"""Query parameters and headers that the detection routes share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import Request

from service.engine.postprocessing import Selection, resolve, split_classes
from service.engine.request import ImageType
from service.engine.tiling import MAX_TILE, MIN_TILE, parse_tile
from service.errors import InvalidParameter, shown
from service.runtime.artifact import MAX_DETECTIONS_CAP, Metadata, VersionText

Format = Literal["native", "coco", "roboflow", "hf"]

_SHORT_QUERY: Final = 256
"""Bytes of a query string that is cached."""
_REMEMBERED: Final = 64
"""Entries of each cache. Most clients repeat one query string."""
_MOST_PARAMETERS: Final = 256
_MOST_ERRORS: Final = 4
"""Wrong parameters that an error describes."""
_JSON_RANGES: Final = ("application/json", "application/*", "*/*")
_IMAGE_RANGES: Final[dict[str, ImageType]] = {
    "image/jpeg": "image/jpeg",
    "image/png": "image/png",
    "image/*": "image/jpeg",
}

TileSide = Annotated[int, Field(ge=MIN_TILE, le=MAX_TILE)]
TileQuery = Annotated[Literal["off", "auto"] | TileSide, BeforeValidator(parse_tile)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class BatchQuery(BaseModel):
    """The query of a request. The model's own thresholds are the defaults."""

    # Not `use_attribute_docstrings`, which reads and parses the source file at every start.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    score_threshold: Fraction | None = Field(
        default=None,
        description="Only detections that score above this; replaces the model's per-class "
        "thresholds too.",
    )
    iou_threshold: Fraction | None = Field(
        default=None,
        description="A box that overlaps a better one of its class by more than this is "
        "suppressed.",
    )
    max_detections: int | None = Field(
        default=None, ge=1, le=MAX_DETECTIONS_CAP, description="Most detections for an image."
    )
    classes: list[str] | None = Field(
        default=None, description="Only these classes: repeated, or separated by commas."
    )
    tile: TileQuery = Field(
        default="off",
        description="Cut large images into overlapping tiles. auto: tiles of the model's canvas "
        "size, for images that would shrink to less than half; a number: a tile's longer side in "
        "pixels.",
    )
    model: str | None = Field(
        default=None, description="Name of the model; default: the server's default model."
    )
    version: VersionText | None = Field(
        default=None,
        description="Version of the model; default: the highest that is ready.",
    )

    def selection(self, metadata: Metadata) -> Selection:
        """Return which detections to keep. Raises InvalidParameter."""
        return resolve(
            metadata,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            classes=None if self.classes is None else split_classes(self.classes, metadata.classes),
        )


class DetectQuery(BatchQuery):
    """The query of a request with one image."""

    format: Format = Field(default="native", description="Shape of the JSON answer.")


Query = TypeVar("Query", bound=BatchQuery)


def parse_query(request: Request, kind: type[Query]) -> Query:
    """Return the query string as `kind`, which is frozen. Raises InvalidParameter.

    FastAPI's own parsing of a query model takes a fifth of a request's time outside the model.
    """
    written: bytes = request.scope["query_string"]
    return _parsed(written, kind) if len(written) <= _SHORT_QUERY else _parse(written, kind)


def _parse(written: bytes, kind: type[Query]) -> Query:
    given: dict[str, Any] = {}
    if written.count(b"&") >= _MOST_PARAMETERS:
        raise InvalidParameter(
            f"the query has more than {_MOST_PARAMETERS} parameters; join classes by commas"
        )
    for name, value in QueryParams(written).multi_items():
        if name == "classes":
            given.setdefault(name, []).append(value)
        elif name in given:
            raise InvalidParameter(f"{shown(name)} is given more than once")
        else:
            given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InvalidParameter(describe_errors(error, kind)) from error


_parsed = lru_cache(maxsize=_REMEMBERED)(_parse)


class Selections:
    """A cache of `BatchQuery.selection`. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Metadata, Selection]] = {}

    def of(self, request: Request, query: BatchQuery, metadata: Metadata) -> Selection:
        """Return which detections to keep. Raises InvalidParameter."""
        written: bytes = request.scope["query_string"]
        known = self._known.get(written)
        if known is not None and known[0] is metadata:
            return known[1]
        found = query.selection(metadata)
        if len(written) <= _SHORT_QUERY:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[written] = metadata, found
        return found


def describe_errors(error: ValidationError, kind: type[BaseModel]) -> str:
    """Return which parameters are wrong, and what would be right, in one line."""
    errors = error.errors(include_url=False, include_context=False)
    lines = []
    for each in errors[:_MOST_ERRORS]:
        message = each["msg"]
        if each["type"] == "extra_forbidden":
            message = f"unknown parameter; there is {', '.join(kind.model_fields)}"
        name = shown(".".join(map(str, each["loc"])))[1:-1]
        lines.append(f"{name}={shown(each['input'])}: {message}")
    if len(errors) > _MOST_ERRORS:
        lines.append(f"and {len(errors) - _MOST_ERRORS} more parameters are wrong")
    return "; ".join(lines)


def deadline_seconds(headers: Mapping[str, str], limit_ms: int) -> float:
    """Return the value of `X-Deadline-Ms` in seconds; inf without it. Raises InvalidParameter."""
    asked = headers.get("x-deadline-ms")
    if asked is None:
        return math.inf
    # int() refuses thousands of digits with an error of its own.
    plausible = asked.isascii() and asked.isdecimal() and len(asked) <= len(str(limit_ms)) + 8
    if not (plausible and 1 <= int(asked) <= limit_ms):
        raise InvalidParameter(
            f"X-Deadline-Ms: {shown(asked)} is not a whole number in 1..{limit_ms}"
        )
    return int(asked) / 1e3


def wanted_image(accept: str | None) -> ImageType | None:
    """Return the image type that `Accept` prefers to JSON; None for JSON."""
    if accept is None or accept == "*/*":
        return None
    json_weight, best, image = 0.0, 0.0, None
    for item in accept.split(","):
        media, _, parameters = item.partition(";")
        media, weight = media.strip().lower(), _weight(parameters)
        if media in _JSON_RANGES:
            json_weight = max(json_weight, weight)
        elif media in _IMAGE_RANGES and weight > best:
            best, image = weight, _IMAGE_RANGES[media]
    return image if best > json_weight else None


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
