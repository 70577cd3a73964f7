"""The exception root of both packages; each kind carries the HTTP status it becomes.

The text of an exception is shown to the person who made the request or typed the command, so it
names what was wrong and what would be right.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Final

_LONGEST_SHOWN: Final = 80
_MOST_SHOWN: Final = 8


class RetinaserveError(Exception):
    """Root of every error that this project raises on purpose."""

    status = 500
    title = "Internal error"

    @property
    def slug(self) -> str:
        """Last part of the problem's `type`, e.g. "malformed-image"."""
        return self.title.lower().replace(" ", "-")


class MalformedRequest(RetinaserveError):
    """The request could not be parsed at all."""

    status = 400
    title = "Malformed request"


class MalformedImage(RetinaserveError):
    """The bytes are empty, truncated or do not decode."""

    status = 400
    title = "Malformed image"


class Unreadable(MalformedImage):
    """An image that is named cannot be read: it is not there, or may not be."""

    title = "Unreadable"


class Unauthorized(RetinaserveError):
    """No key came with the request, or one that is not known."""

    status = 401
    title = "Unauthorized"


class Forbidden(RetinaserveError):
    """The key is known, but not one for this."""

    status = 403
    title = "Forbidden"


class UnknownModel(RetinaserveError):
    """No such model or version."""

    status = 404
    title = "Unknown model"


class StateConflict(RetinaserveError):
    """The models that are loaded do not allow it."""

    status = 409
    title = "Conflict"


class LoadFailed(RetinaserveError):
    """A model file was not loaded: it, and not the request, is at fault."""

    status = 409
    title = "Load failed"


class BodyTimeout(RetinaserveError):
    """The request body arrived too slowly."""

    status = 408
    title = "Body timeout"


class TooLarge(RetinaserveError):
    """Too many bytes or too many pixels; decided before decoding."""

    status = 413
    title = "Too large"


class UnsupportedMedia(RetinaserveError):
    """Not an image of an accepted type, or an encoded body."""

    status = 415
    title = "Unsupported media type"


class InvalidParameter(RetinaserveError):
    """A parameter is out of range or unknown."""

    status = 422
    title = "Invalid parameter"


class RateLimited(RetinaserveError):
    """This caller calls too often. `retry_after` is in seconds."""

    status = 429
    title = "Rate limited"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(RetinaserveError):
    """The service cannot take the request now: loading, draining or the queue is full.

    `retry_after` is in seconds; `reason` is a word for the metrics.
    """

    status = 503
    title = "Unavailable"

    def __init__(self, message: str, *, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class DeadlineExceeded(RetinaserveError):
    """The request was accepted, but its deadline passed before an answer was ready."""

    status = 504
    title = "Deadline exceeded"


class InferenceFailed(RetinaserveError):
    """The model could not be run on an image."""

    title = "Inference failed"


class BulkFailed(RetinaserveError):
    """Detection over many images cannot go on; what is finished stays."""

    title = "Bulk detection failed"


class ArtifactError(RetinaserveError):
    """A model file is missing, broken, of an unknown schema, or fails its warm-up."""

    title = "Unusable model file"


class DeviceError(RetinaserveError):
    """The device that was asked for cannot be used."""

    title = "Unusable device"


class DataError(RetinaserveError):
    """A data set or a configuration cannot be used as it is."""

    title = "Unusable data"


def shown(value: object) -> str:
    """Return what a client sent, for the text of an error: at most 80 characters.

    Of lists and objects only the type, since they may hold millions of values.
    """
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    text = repr(value[:_LONGEST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def shown_list(values: Collection[object]) -> str:
    """Return the first 8 of `values` as `shown` has them, and how many more there are.

    >>> shown_list(["a", "b"]), shown_list([])
    ("'a', 'b'", 'nothing')
    """
    first = [shown(each) for each in islice(values, _MOST_SHOWN)]
    if len(values) > _MOST_SHOWN:
        first.append(f"and {len(values) - _MOST_SHOWN} more")
    return ", ".join(first) or "nothing"
