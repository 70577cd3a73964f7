"""Requests and responses of the gRPC API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from service.errors import MalformedRequest, TooLarge
from service.http.oip import tensors
from service.http.oip.data_plane import InferRequest, check_id, check_outputs, short_parameters
from service.http.oip.tensors import (
    IMAGES,
    MAX_RANK,
    OUTPUTS,
    Buffer,
    Declared,
    Limits,
)

_CONTENTS: Final = {
    "UINT8": "uint_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
"""The field of each datatype for elements that are not raw."""

_MAX_SMALL: Final = 64 * 1024
"""Bytes of a message that holds a name and a version."""
_MAX_FIELDS: Final = 1024
"""Fields of a ModelInferRequest, in all of its messages, beside one for each image. An empty field
has two bytes, and becomes up to 100."""
_MAX_PACKED: Final = 8 << 20
"""Bytes of all packed numbers: a canvas of 1.4 million pixels at two bytes a value. A byte becomes
up to 8, and twice that while the list grows."""
_VARINT, _FIXED_64, _DELIMITED, _FIXED_32 = 0, 1, 2, 5
"""Wire types, https://protobuf.dev/programming-guides/encoding/; 3 and 4 are groups, which this
protocol does not have."""
_MAX_VARINT: Final = 10
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed message."""

    request: InferRequest
    id: str
    outputs: tuple[str, ...]
    raw: bool
    """Whether inputs and outputs are raw bytes."""


def read(content: bytes, kind: Any) -> Any:
    """Return a small message of class `kind`. Raises MalformedRequest or TooLarge."""
    if len(content) > _MAX_SMALL:
        raise TooLarge(
            f"the message has {len(content)} bytes; a {kind.DESCRIPTOR.name} has at most "
            f"{_MAX_SMALL}"
        )
    return _built(content, kind)


def read_infer(content: bytes, kind: Any, images: int) -> Any:
    """Return a ModelInferRequest, of class `kind`, with at most `images` images.

    Raises MalformedRequest.
    """
    check_size(content, kind.DESCRIPTOR, fields=_MAX_FIELDS + images)
    return _built(content, kind)


def check_size(content: bytes, described: Any, *, fields: int) -> None:
    """Check the memory that a message would take, before it is parsed. Raises MalformedRequest.

    Counts the fields on the wire, including nested and unknown ones, and the bytes of packed
    numbers. Names and raw contents take as much memory as on the wire. Protobuf checks whether the
    message is well-formed.
    """
    left, packed = fields, 0
    messages = [(memoryview(content), described)]
    while messages:
        message, described = messages.pop()
        position = 0
        while position < len(message):
            left -= 1
            if left < 0:
                raise MalformedRequest(
                    f"the message has more than {fields} fields; send large tensors in "
                    "raw_input_contents"
                )
            tag, position = _varint(message, position)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == _VARINT:
                _, position = _varint(message, position)
            elif wire_type == _FIXED_64:
                position += 8
            elif wire_type == _FIXED_32:
                position += 4
            elif wire_type == _DELIMITED:
                length, position = _varint(message, position)
                field = described.fields_by_number.get(number)
                if field is not None and field.message_type is not None:
                    messages.append((message[position : position + length], field.message_type))
                elif field is not None and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
                    packed += length
                position += length
            else:
                raise MalformedRequest(
                    f"the message has a field of wire type {wire_type}, which this protocol does "
                    "not use"
                )
    if packed > _MAX_PACKED:
        raise MalformedRequest(
            f"the message has {packed} bytes of numbers in shapes and contents, at most "
            f"{_MAX_PACKED}; send large tensors in raw_input_contents"
        )


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number and the position after it. Raises MalformedRequest."""
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise MalformedRequest("the message ends within a number, or has one of more than 10 bytes")


def _built(content: bytes, kind: Any) -> Any:
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise MalformedRequest(f"the message is not a {kind.DESCRIPTOR.name}: {error}") from error


def parse(message: Any, limits: Limits) -> Parsed:
    """Parse a ModelInferRequest. Raises MalformedRequest or TooLarge."""
    inputs, raw = message.inputs, message.raw_input_contents
    # One side above the limit, for the error.
    declared = tensors.declare_all(
        [(each.name, each.datatype, list(each.shape[: MAX_RANK + 1])) for each in inputs], limits
    )
    outputs = check_outputs([each.name for each in message.outputs])
    for each in (*inputs, *message.outputs):
        if "shared_memory_region" in each.parameters or "classification" in each.parameters:
            raise MalformedRequest(
                f"{each.name}: neither shared memory nor classification is offered"
            )
    if raw:
        numbers, images = _read_raw(inputs, declared, raw)
    else:
        numbers, images = _read_typed(inputs, declared)
    check_id(message.id)
    request = InferRequest(numbers, images, short_parameters(_parameters(message)))
    return Parsed(request, message.id, outputs, bool(raw))


def write(
    parsed: Parsed,
    outputs: Mapping[str, NDArray[Any]],
    kind: Any,
    *,
    model: str,
    version: int,
) -> Any:
    """Return the response, a message of class `kind`."""
    response = kind(model_name=model, model_version=str(version), id=parsed.id)
    for name, datatype, _ in (each for each in OUTPUTS if each.name in parsed.outputs):
        values = outputs[name]
        described = response.outputs.add(name=name, datatype=datatype, shape=values.shape)
        if parsed.raw:
            little_endian = values.astype(tensors.DTYPES[datatype], copy=False)
            response.raw_output_contents.append(little_endian.tobytes())
        else:
            # An empty tensor has contents too.
            described.contents.SetInParent()
            getattr(described.contents, _CONTENTS[datatype]).extend(values.ravel().tolist())
    return response


def _read_raw(
    inputs: Any, declared: list[Declared], raw: Any
) -> tuple[dict[str, NDArray[Any]], tuple[Buffer, ...]]:
    if len(raw) != len(inputs):
        raise MalformedRequest(
            f"raw_input_contents has {len(raw)} entries for {len(inputs)} inputs; "
            "there is one for each or none at all"
        )
    numbers: dict[str, NDArray[Any]] = {}
    images: tuple[Buffer, ...] = ()
    for entry, each, content in zip(inputs, declared, raw, strict=True):
        if entry.HasField("contents"):
            raise MalformedRequest(f"{each.name}: contents beside raw_input_contents; give one")
        if each.name == IMAGES:
            images = tensors.elements(each, memoryview(content))
        else:
            numbers[each.name] = tensors.from_raw(each, memoryview(content))
    return numbers, images


def _read_typed(
    inputs: Any, declared: list[Declared]
) -> tuple[dict[str, NDArray[Any]], tuple[Buffer, ...]]:
    numbers: dict[str, NDArray[Any]] = {}
    images: tuple[Buffer, ...] = ()
    for entry, each in zip(inputs, declared, strict=True):
        place = _CONTENTS[each.datatype]
        others = [field.name for field, _ in entry.contents.ListFields() if field.name != place]
        if others:
            raise MalformedRequest(
                f"{each.name}: {each.datatype} belongs into {place}, not {others[0]}"
            )
        values = tensors.check_count(each, getattr(entry.contents, place))
        if each.name == IMAGES:
            images = tuple(values)
        else:
            numbers[each.name] = tensors.from_values(each, values)
    return numbers, images


def _parameters(message: Any) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found
