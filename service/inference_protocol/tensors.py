"""The tensors that a detector takes and gives, and the ways in which a request writes them.

Whatever the wire, a tensor is declared first (name, datatype, shape) and checked before its data
is looked at, so that no declared size ever decides how much memory is taken.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.canvas import MULTIPLE
from service.errors import MalformedRequest, TooLarge

Buffer = bytes | memoryview
T = TypeVar("T")

PICTURES: Final = "encoded_images"

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "UINT8": np.dtype("<u1"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}
"""The datatypes of numbers that occur here, as they lie in raw data."""

_STEP: Final = 4096
"""Entries of a list that become an array at a time: other threads run in between."""
_MAX_RANK: Final = 8
_PREFIX: Final = struct.Struct("<I")


class Signature(NamedTuple):
    """What metadata says of a tensor."""

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
    Signature(PICTURES, "BYTES", (-1,)),
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
    """The largest request that one model takes."""

    batch: int
    """Canvases."""
    area: int
    """Pixels of a canvas."""
    pictures: int
    """Compressed pictures."""


@dataclass(frozen=True, slots=True)
class Declared:
    """An input tensor as a request announces it, checked."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def declare(name: object, datatype: object, shape: object, limits: Limits) -> Declared:
    """Check what a request says of an input. Raises MalformedRequest or TooLarge."""
    if not isinstance(name, str) or name not in _BY_NAME:
        raise MalformedRequest(f"unknown input {_shown(name)}; there is {', '.join(_BY_NAME)}")
    expected = _BY_NAME[name]
    if datatype != expected.datatype:
        raise MalformedRequest(f"{name}: datatype is {_shown(datatype)}, not {expected.datatype}")
    sides = _sides(name, shape)
    if name == PICTURES and len(sides) == 2 and sides[1] == 1:
        # A column of pictures, as clients send that put a batch dimension before everything.
        sides = sides[:1]
    fits = len(sides) == len(expected.shape) and all(
        wanted in (-1, side) for side, wanted in zip(sides, expected.shape, strict=True)
    )
    if not fits or min(sides) < 1:
        raise MalformedRequest(
            f"{name}: shape is {_shown(list(sides))}, not {list(expected.shape)} "
            "(-1: any number from 1)"
        )
    if name == "images":
        _check_canvases(sides, limits)
    if name == PICTURES and sides[0] > limits.pictures:
        raise TooLarge(f"{name}: {sides[0]} pictures; at most {limits.pictures} in one request")
    return Declared(name, expected.datatype, sides)


def check_together(declared: Sequence[Declared]) -> None:
    """Check that the inputs of a request go together. Raises MalformedRequest."""
    names = [each.name for each in declared]
    for name in names:
        if names.count(name) > 1:
            raise MalformedRequest(f"the input {name} is given more than once")
    if ("images" in names) == (PICTURES in names):
        raise MalformedRequest(f"give one of the inputs images and {PICTURES}, not both or neither")
    if PICTURES in names and "image_sizes" in names:
        raise MalformedRequest(f"image_sizes goes with images, not with {PICTURES}")
    shapes = {each.name: each.shape for each in declared}
    if "image_sizes" in shapes and shapes["image_sizes"][0] not in (1, shapes["images"][0]):
        raise MalformedRequest(
            f"image_sizes: {shapes['image_sizes'][0]} rows for {shapes['images'][0]} images; "
            "give one for each, or one for all"
        )


def from_raw(declared: Declared, raw: memoryview) -> NDArray[Any]:
    """Numbers from their bytes, little-endian, row by row; nothing is copied.

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


def from_values(declared: Declared, values: object) -> NDArray[Any]:
    """Numbers from a list, flat or nested. Raises MalformedRequest."""
    if not isinstance(values, list):
        raise MalformedRequest(f"{declared.name}: data must be a list of numbers")
    dtype = DTYPES[declared.datatype]
    try:
        pieces = [_converted(piece, dtype) for piece in _pieces(values)]
    except ValueError as error:
        raise MalformedRequest(
            f"{declared.name}: data is not a list of {declared.datatype} numbers: {error}"
        ) from error
    count = sum(piece.size for piece in pieces)
    _check_count(declared, count)
    return np.concatenate(pieces).reshape(declared.shape)


def elements(declared: Declared, raw: memoryview) -> tuple[memoryview, ...]:
    """The elements of a BYTES tensor: each has its length before it, 4 bytes, little-endian.

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
    """The elements of a tensor, as many as its shape says. Raises MalformedRequest."""
    _check_count(declared, len(values))
    return values


def _check_count(declared: Declared, count: int) -> None:
    if count != declared.count:
        raise MalformedRequest(
            f"{declared.name}: the shape {list(declared.shape)} takes {declared.count} elements, "
            f"the data has {'more' if count > declared.count else count}"
        )


def _sides(name: str, shape: object) -> tuple[int, ...]:
    # A bool is an int to Python.
    if not isinstance(shape, list) or any(type(side) is not int for side in shape):
        raise MalformedRequest(f"{name}: shape must be a list of whole numbers")
    return tuple(shape)


def _check_canvases(sides: tuple[int, ...], limits: Limits) -> None:
    batch, height, width, _ = sides
    if batch > limits.batch:
        raise TooLarge(f"images: a batch of {batch}; at most {limits.batch} in one request")
    if height % MULTIPLE or width % MULTIPLE:
        raise MalformedRequest(
            f"images: {height} x {width} pixels; height and width must be multiples of {MULTIPLE}"
        )
    if height * width > limits.area:
        raise TooLarge(
            f"images: {height} x {width} = {height * width} pixels; the model's largest canvas "
            f"has {limits.area}"
        )


def _pieces(values: list[Any], rank: int = 1) -> Iterator[NDArray[Any]]:
    """Arrays of a part of the list each: of its last two levels at most."""
    inner = values[0] if values else None
    if isinstance(inner, list) and inner and isinstance(inner[0], list):
        if rank == _MAX_RANK:
            raise ValueError("the lists are nested too deeply")
        for each in values:
            if not isinstance(each, list):
                raise ValueError("numbers and lists are mixed")
            yield from _pieces(each, rank + 1)
        return
    for start in range(0, len(values), _STEP):
        yield np.asarray(values[start : start + _STEP]).ravel()


def _converted(piece: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if piece.size == 0:
        return piece.astype(dtype)
    if dtype.kind == "f":
        if piece.dtype.kind not in "iuf":
            raise ValueError("something in it is no number")
        with np.errstate(over="ignore"):
            return piece.astype(dtype)
    if piece.dtype.kind not in "iu":
        raise ValueError("something in it is no whole number of 64 bits")
    bounds = np.iinfo(dtype)
    if int(piece.min()) < bounds.min or int(piece.max()) > bounds.max:
        raise ValueError(f"a number is outside {bounds.min}..{bounds.max}")
    return piece.astype(dtype)


def _shown(value: object) -> str:
    """What a client sent, cut to a length that an error may have."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
