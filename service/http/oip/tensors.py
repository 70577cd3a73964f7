"""The input and output tensors of a detector, and their encodings.

A tensor's name, datatype and shape are checked before its data is read, so that memory is never
allocated by a declared size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import MalformedRequest, TooLarge, shown
from service.imaging.canvas import MULTIPLE

Buffer = bytes | memoryview
T = TypeVar("T")

IMAGES: Final = "encoded_images"

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "UINT8": np.dtype("<u1"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}
"""The numeric datatypes, as in raw data."""

_STEP: Final = 4096
"""Elements of a list that are converted at a time: other threads can run in between."""
MAX_RANK: Final = 8
"""Most sides of a shape."""
_PREFIX: Final = struct.Struct("<I")


class Signature(NamedTuple):
    """Name, datatype and shape of a tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 for a side that each request chooses."""


INPUTS: Final = (
    Signature("images", "UINT8", (-1, -1, -1, 3)),
    Signature("image_sizes", "INT64", (-1, 2)),
    Signature("score_threshold", "FP32", (1,)),
    Signature("iou_threshold", "FP32", (1,)),
    Signature("max_detections", "INT64", (1,)),
    Signature(IMAGES, "BYTES", (-1,)),
)
OUTPUTS: Final = (
    Signature("image_index", "INT64", (-1,)),
    Signature("boxes", "FP32", (-1, 4)),
    Signature("scores", "FP32", (-1,)),
    Signature("labels", "INT64", (-1,)),
)
OUTPUT_NAMES: Final = tuple(output.name for output in OUTPUTS)
_BY_NAME: Final = {signature.name: signature for signature in INPUTS}


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request to one model."""

    batch: int
    """Images, on canvases or compressed."""
    area: int
    """Pixels of a canvas."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A checked input tensor without its data."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def declare_all(inputs: Sequence[tuple[object, object, object]], limits: Limits) -> list[Declared]:
    """Check (name, datatype, shape) of all inputs. Raises MalformedRequest or TooLarge."""
    if not 0 < len(inputs) <= len(INPUTS):
        raise MalformedRequest(f"inputs: {len(inputs)} are given; there are 1 to {len(INPUTS)}")
    declared = [_declare(*each, limits) for each in inputs]
    names = [each.name for each in declared]
    for name in names:
        if names.count(name) > 1:
            raise MalformedRequest(f"the input {name} is given more than once")
    if ("images" in names) == (IMAGES in names):
        raise MalformedRequest(f"give one of the inputs images and {IMAGES}, not both or neither")
    if IMAGES in names and "image_sizes" in names:
        raise MalformedRequest(f"image_sizes goes with images, not with {IMAGES}")
    shapes = {each.name: each.shape for each in declared}
    if "image_sizes" in shapes and shapes["image_sizes"][0] not in (1, shapes["images"][0]):
        raise MalformedRequest(
            f"image_sizes: {shapes['image_sizes'][0]} rows for {shapes['images'][0]} images; "
            "give one for each, or one for all"
        )
    return declared


def _declare(name: object, datatype: object, shape: object, limits: Limits) -> Declared:
    """Check the declaration of an input. Raises MalformedRequest or TooLarge."""
    if not isinstance(name, str) or name not in _BY_NAME:
        raise MalformedRequest(f"unknown input {shown(name)}; there is {', '.join(_BY_NAME)}")
    expected = _BY_NAME[name]
    if datatype != expected.datatype:
        raise MalformedRequest(f"{name}: datatype is {shown(datatype)}, not {expected.datatype}")
    sides = _sides(name, shape)
    if name == IMAGES and len(sides) == 2 and sides[1] == 1:
        # A column of images, as clients send that add a batch dimension to every tensor.
        sides = sides[:1]
    fits = len(sides) == len(expected.shape) and all(
        wanted in (-1, side) for side, wanted in zip(sides, expected.shape, strict=True)
    )
    if not fits or min(sides) < 1:
        raise MalformedRequest(
            f"{name}: shape is {list(sides)}, not {list(expected.shape)} (-1: any number from 1)"
        )
    if name == "images":
        _check_canvases(sides, limits)
    if name in ("images", IMAGES) and sides[0] > limits.batch:
        raise TooLarge(f"{name}: {sides[0]} images; at most {limits.batch} in one request")
    return Declared(name, expected.datatype, sides)


def from_raw(declared: Declared, raw: memoryview) -> NDArray[Any]:
    """Return numbers from their bytes, little-endian and row-major, without a copy.

    Raises MalformedRequest.
    """
    dtype = DTYPES[declared.datatype]
    expected = declared.count * dtype.itemsize
    if len(raw) != expected:
        raise MalformedRequest(
            f"{declared.name}: {len(raw)} bytes of data, but {declared.datatype} "
            f"{list(declared.shape)} takes {expected}"
        )
    return np.frombuffer(raw, dtype).reshape(declared.shape)


def flatten(declared: Declared, data: object) -> Sequence[Any]:
    """Return the elements of a flat or nested list; their number is checked.

    Raises MalformedRequest.
    """
    if not isinstance(data, list):
        raise MalformedRequest(f"{declared.name}: data must be a list")
    while data and isinstance(data[0], list):
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise MalformedRequest(
                f"{declared.name}: data is mixed of values and lists, or of lists of different "
                "lengths; give one flat list, or one nested as the shape"
            )
        data = list(chain.from_iterable(data))
    return check_count(declared, data)


def from_values(declared: Declared, values: Sequence[Any]) -> NDArray[Any]:
    """Return numbers from their row-major values. Raises MalformedRequest."""
    dtype = DTYPES[declared.datatype]
    # Checked before numpy: it would convert all values to strings where one is.
    taken = {int} if dtype.kind in "iu" else {int, float}
    numbers = np.empty(len(values), dtype)
    for start in range(0, len(values), _STEP):
        piece = values[start : start + _STEP]
        if not taken.issuperset(map(type, piece)):
            stray = next(value for value in piece if type(value) not in taken)
            raise MalformedRequest(
                f"{declared.name}: data holds {shown(stray)}; {declared.datatype} takes "
                f"{'whole numbers' if taken == {int} else 'numbers'}"
            )
        try:
            # Values too large for float32 become infinite.
            with np.errstate(over="ignore"):
                numbers[start : start + len(piece)] = np.array(piece, dtype)
        except OverflowError:
            least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
            stray = next(value for value in piece if not least <= value <= most)
            raise MalformedRequest(
                f"{declared.name}: data holds {stray}, which is outside {least}..{most}"
            ) from None
    return numbers.reshape(declared.shape)


def elements(declared: Declared, raw: memoryview) -> tuple[memoryview, ...]:
    """Return the elements of a BYTES tensor; 4 bytes before each are its length, little-endian.

    Raises MalformedRequest.
    """
    found: list[memoryview] = []
    position = 0
    while position < len(raw):
        if len(raw) - position < _PREFIX.size:
            raise MalformedRequest(
                f"{declared.name}: {len(raw) - position} bytes remain after element {len(found)}, "
                "too few for the length of another"
            )
        (length,) = _PREFIX.unpack_from(raw, position)
        position += _PREFIX.size
        if length > len(raw) - position:
            raise MalformedRequest(
                f"{declared.name}: element {len(found)} says that it has {length} bytes, "
                f"but {len(raw) - position} remain"
            )
        found.append(raw[position : position + length])
        if len(found) > declared.count:
            break
        position += length
    _check_count(declared, len(found))
    return tuple(found)


def check_count(declared: Declared, values: Sequence[T]) -> Sequence[T]:
    """Return the elements of a tensor; their number is checked. Raises MalformedRequest."""
    _check_count(declared, len(values))
    return values


def _check_count(declared: Declared, count: int) -> None:
    if count != declared.count:
        raise MalformedRequest(
            f"{declared.name}: the shape {list(declared.shape)} takes {declared.count} elements, "
            f"the data has {'more' if count > declared.count else count}"
        )


def _sides(name: str, shape: object) -> tuple[int, ...]:
    # A bool is an int in Python.
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or any(type(side) is not int for side in shape)
    ):
        raise MalformedRequest(f"{name}: shape must be a list of at most {MAX_RANK} whole numbers")
    return tuple(shape)


def _check_canvases(sides: tuple[int, ...], limits: Limits) -> None:
    _, height, width, _ = sides
    if height % MULTIPLE or width % MULTIPLE:
        raise MalformedRequest(
            f"images: {height} x {width} pixels; height and width must be multiples of {MULTIPLE}"
        )
    if height * width > limits.area:
        raise TooLarge(
            f"images: {height} x {width} = {height * width} pixels; the model's largest canvas "
            f"has {limits.area}"
        )
