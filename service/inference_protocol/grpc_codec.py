"""Requests and answers as the gRPC dialect writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from service.errors import MalformedRequest
from service.inference_protocol import tensors
from service.inference_protocol.data_plane import InferRequest, check_outputs
from service.inference_protocol.tensors import INPUTS, OUTPUTS, PICTURES, Buffer, Declared, Limits

_CONTENTS: Final = {
    "UINT8": "uint_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
"""Where the elements of a datatype stand when they are not raw."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a message asks for."""

    request: InferRequest
    outputs: tuple[str, ...]
    raw: bool
    """Whether the inputs are raw bytes, and so the outputs."""


def read(content: bytes, kind: Any) -> Any:
    """A message of class `kind`. Raises MalformedRequest."""
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise MalformedRequest(f"the message is no {kind.DESCRIPTOR.name}: {error}") from error


def parse(message: Any, limits: Limits) -> Parsed:
    """Take a ModelInferRequest apart. Raises MalformedRequest or TooLarge."""
    inputs, raw = message.inputs, message.raw_input_contents
    if not 0 < len(inputs) <= len(INPUTS):
        raise MalformedRequest(f"inputs: {len(inputs)} are given; there are 1 to {len(INPUTS)}")
    declared = [
        tensors.declare(each.name, each.datatype, list(each.shape), limits) for each in inputs
    ]
    tensors.check_together(declared)
    for each in (*inputs, *message.outputs):
        if "shared_memory_region" in each.parameters or "classification" in each.parameters:
            raise MalformedRequest(
                f"{each.name}: neither shared memory nor classification is offered"
            )
    if raw:
        numbers, pictures = _read_raw(inputs, declared, raw)
    else:
        numbers, pictures = _read_typed(inputs, declared)
    return Parsed(
        InferRequest(numbers, pictures, _parameters(message)),
        check_outputs([each.name for each in message.outputs]),
        bool(raw),
    )


def write(
    parsed: Parsed,
    outputs: Mapping[str, NDArray[Any]],
    kind: Any,
    *,
    model: str,
    version: int,
    request_id: str,
) -> Any:
    """The answer, a message of class `kind`."""
    answer = kind(model_name=model, model_version=str(version), id=request_id)
    for name, datatype, _ in (each for each in OUTPUTS if each.name in parsed.outputs):
        values = outputs[name]
        described = answer.outputs.add(name=name, datatype=datatype, shape=values.shape)
        if parsed.raw:
            little_endian = values.astype(tensors.DTYPES[datatype], copy=False)
            answer.raw_output_contents.append(little_endian.tobytes())
        else:
            # An empty tensor has contents too.
            described.contents.SetInParent()
            getattr(described.contents, _CONTENTS[datatype]).extend(values.ravel().tolist())
    return answer


def _read_raw(
    inputs: Any, declared: list[Declared], raw: Any
) -> tuple[dict[str, NDArray[Any]], tuple[Buffer, ...]]:
    if len(raw) != len(inputs):
        raise MalformedRequest(
            f"raw_input_contents has {len(raw)} entries for {len(inputs)} inputs; "
            "there is one for each or none at all"
        )
    numbers: dict[str, NDArray[Any]] = {}
    pictures: tuple[Buffer, ...] = ()
    for entry, each, content in zip(inputs, declared, raw, strict=True):
        if entry.HasField("contents"):
            raise MalformedRequest(f"{each.name}: contents beside raw_input_contents; give one")
        if each.name == PICTURES:
            pictures = tensors.elements(each, memoryview(content))
        else:
            numbers[each.name] = tensors.from_raw(each, memoryview(content))
    return numbers, pictures


def _read_typed(
    inputs: Any, declared: list[Declared]
) -> tuple[dict[str, NDArray[Any]], tuple[Buffer, ...]]:
    numbers: dict[str, NDArray[Any]] = {}
    pictures: tuple[Buffer, ...] = ()
    for entry, each in zip(inputs, declared, strict=True):
        place = _CONTENTS[each.datatype]
        others = [field.name for field, _ in entry.contents.ListFields() if field.name != place]
        if others:
            raise MalformedRequest(
                f"{each.name}: {each.datatype} belongs into {place}, not {others[0]}"
            )
        values = tensors.check_count(each, getattr(entry.contents, place))
        if each.name == PICTURES:
            pictures = tuple(values)
        else:
            numbers[each.name] = tensors.from_values(each, list(values))
    return numbers, pictures


def _parameters(message: Any) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, parameter in message.parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found
