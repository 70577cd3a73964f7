"""Query parameters and headers that the detection routes share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
_LONGEST_ACCEPT: Final = 2048
_JSON: Final = "application/json"
_IMAGES: Final[tuple[ImageType, ...]] = ("image/jpeg", "image/png")

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


def accept_of(request: Request) -> str:
    """Return all `Accept` headers as one, cut to the length that one may have."""
    values = [value for name, value in request.scope["headers"] if name == b"accept"]
    return b",".join(values)[:_LONGEST_ACCEPT].decode("latin-1")


def wanted_image(accept: str) -> ImageType | None:
    """Return the image type that `Accept` asks for; None for JSON.

    A client that accepts JSON gets JSON: browsers and Java's HttpURLConnection name images before
    everything else, whatever they are used for.
    """
    if accept in ("", "*/*"):
        return None
    weights = _weights(accept)
    if _weight_of(_JSON, weights) > 0.0:
        return None
    # Of equal weight: the one that is named first, or at all.
    named = list(weights)
    images = sorted(_IMAGES, key=lambda each: named.index(each) if each in weights else len(named))
    best = max(images, key=lambda each: _weight_of(each, weights))
    return best if _weight_of(best, weights) > 0.0 else None


def wants_lines(accept: str, media: str) -> bool:
    """Return whether `Accept` names `media` and does not prefer JSON."""
    weights = _weights(accept)
    return weights.get(media, 0.0) > 0.0 and weights[media] >= _weight_of(_JSON, weights)


def _weights(accept: str) -> dict[str, float]:
    """Return the media ranges of `Accept` with their weights, in their order."""
    weights: dict[str, float] = {}
    for item in accept.split(","):
        media, *parameters = item.split(";")
        media = media.strip().lower()
        # Java's HttpURLConnection writes */* as a bare star.
        weights.setdefault("*/*" if media == "*" else media, _weight(parameters))
    return weights


def _weight_of(media: str, weights: Mapping[str, float]) -> float:
    """Return the weight of a media type, by the most specific range (RFC 9110, 12.5.1)."""
    ranges = (media, f"{media.partition('/')[0]}/*", "*/*")
    return next((weights[each] for each in ranges if each in weights), 0.0)


def _weight(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0
