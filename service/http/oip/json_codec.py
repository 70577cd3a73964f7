"""Requests and responses of the REST API: JSON, with the binary tensor data extension.

With that extension a body is JSON, whose length an HTTP header gives, and then the raw bytes of the
tensors with `binary_data_size`, in the order of the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from numpy.typing import NDArray

from service.errors import MalformedRequest, shown
from service.http.bodies import Body, decode_base64, load_object
from service.http.oip import tensors
from service.http.oip.data_plane import InferRequest, check_id, check_outputs, short_parameters
from service.http.oip.tensors import (
    IMAGES,
    OUTPUT_NAMES,
    OUTPUTS,
    Buffer,
    Declared,
    Limits,
)

HEADER_LENGTH: Final = "Inference-Header-Content-Length"

_MAX_OBJECTS: Final = 10_000
_MAX_VALUES: Final = 1_000_000
"""Values, and lists, that a request may hold (or as many as the largest canvas has, if more). Two
characters become up to 90 bytes of memory, and no other thread runs meanwhile."""
_SPARE_VALUES: Final = 10_000
"""Values beside those of a canvas."""
_SHARED_MEMORY: Final = "shared_memory_region"
_CLASSIFICATION: Final = "classification"


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed body."""

    request: InferRequest
    id: str | None
    outputs: tuple[str, ...]
    binary: frozenset[str]
    """The outputs that are returned as raw bytes."""


def parse(body: Body, header_length: str | None, limits: Limits) -> Parsed:
    """Parse a body. Raises MalformedRequest or TooLarge."""
    header, binary = _split(body, header_length)
    document = _load(header, limits)
    inputs = _list_of_objects(document, "inputs")
    declared = tensors.declare_all(
        [(each.get("name"), each.get("datatype"), each.get("shape")) for each in inputs], limits
    )
    parameters = short_parameters(_parameters(document, "the request"))
    numbers, images = _read(inputs, declared, binary)
    outputs, raw = _requested(document, parameters)
    given = check_id(document.get("id"))
    return Parsed(InferRequest(numbers, images, parameters), given, outputs, raw)


def write(
    parsed: Parsed, outputs: Mapping[str, NDArray[Any]], *, model: str, version: int
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON where raw bytes follow."""
    described = []
    blobs = []
    for name, datatype, _ in (each for each in OUTPUTS if each.name in parsed.outputs):
        values = outputs[name]
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
        if name in parsed.binary:
            blob = values.astype(tensors.DTYPES[datatype], copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = values.ravel()
        described.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if parsed.id is not None:
        document["id"] = parsed.id
    document["outputs"] = described
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parsed.binary:
        return header, None
    return b"".join((header, *blobs)), len(header)


def _split(body: Body, header_length: str | None) -> tuple[Body, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    # int() refuses thousands of digits with an error of its own.
    plausible = header_length.isascii() and header_length.isdecimal() and len(header_length) < 16
    if not plausible or int(header_length) > len(body):
        raise MalformedRequest(
            f"{HEADER_LENGTH} is {header_length[:32]!r}; it is the length of the JSON part of the "
            f"body, which has {len(body)} bytes"
        )
    view = memoryview(body)
    return bytes(view[: int(header_length)]), view[int(header_length) :]


def _load(header: Body, limits: Limits) -> dict[str, Any]:
    most = max(_MAX_VALUES, 3 * limits.area + _SPARE_VALUES)
    for mark, kind, bound in (
        (b",", "values", most),
        (b"[", "lists", most),
        (b"{", "objects", _MAX_OBJECTS),
    ):
        if header.count(mark) > bound:
            raise MalformedRequest(
                f"the JSON holds more than {bound} {kind}; send large tensors as binary data "
                f"({HEADER_LENGTH}, binary_data_size)"
            )
    return load_object(header)


def _list_of_objects(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = document.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise MalformedRequest(f"{name} must be a list of objects")
    return found


def _parameters(owner: Mapping[str, Any], whose: str) -> dict[str, Any]:
    found = owner.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MalformedRequest(f"the parameters of {whose} must be an object")
    return found


def _read(
    inputs: list[dict[str, Any]], declared: list[Declared], binary: memoryview
) -> tuple[dict[str, NDArray[Any]], tuple[Buffer, ...]]:
    numbers: dict[str, NDArray[Any]] = {}
    images: tuple[Buffer, ...] = ()
    position = 0
    for entry, each in zip(inputs, declared, strict=True):
        size = _binary_size(entry, each, len(binary) - position)
        raw = None if size is None else binary[position : position + size]
        position += size or 0
        if each.name == IMAGES:
            if raw is None:
                images = tuple(map(decode_base64, tensors.flatten(each, entry["data"])))
            else:
                images = tensors.elements(each, raw)
        elif raw is None:
            values = tensors.flatten(each, entry["data"])
            numbers[each.name] = tensors.from_values(each, values)
        else:
            numbers[each.name] = tensors.from_raw(each, raw)
    if position != len(binary):
        raise MalformedRequest(
            f"{len(binary)} bytes follow the JSON, but the inputs' binary_data_size add up to "
            f"{position}"
        )
    return numbers, images


def _binary_size(entry: Mapping[str, Any], declared: Declared, left: int) -> int | None:
    """Return the number of an input's raw bytes; None for data in the JSON."""
    parameters = _parameters(entry, declared.name)
    if _SHARED_MEMORY in parameters:
        raise MalformedRequest(f"{declared.name}: there is no shared memory; send the data")
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in entry):
        raise MalformedRequest(
            f"{declared.name}: give either data or the parameter binary_data_size"
        )
    if size is None:
        return None
    # A bool is an int in Python.
    if type(size) is not int or not 0 <= size <= left:
        raise MalformedRequest(
            f"{declared.name}: binary_data_size is {shown(size)}, but {left} bytes are left for "
            f"it; is {HEADER_LENGTH} right?"
        )
    return size


def _requested(
    document: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[tuple[str, ...], frozenset[str]]:
    entries = _list_of_objects(document, "outputs")
    names = check_outputs([entry.get("name") for entry in entries])
    by_default = _flag(parameters, "binary_data_output", default=False)
    if not entries:
        return names, frozenset(OUTPUT_NAMES if by_default else ())
    binary = set()
    for entry in entries:
        own = _parameters(entry, entry["name"])
        if _CLASSIFICATION in own or _SHARED_MEMORY in own:
            raise MalformedRequest(
                f"{entry['name']}: neither {_CLASSIFICATION} nor shared memory is offered"
            )
        if _flag(own, "binary_data", default=by_default):
            binary.add(entry["name"])
    return names, frozenset(binary)


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise MalformedRequest(f"the parameter {name} must be true or false")
    return value
