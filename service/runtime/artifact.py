"""The model file's own description, and the model repository on disk.

A model file is one ONNX file that holds the whole detector; what it is (classes, canvas,
thresholds, metrics, provenance) is JSON in `metadata_props["retinaserve"]`, and `Metadata` is its
schema. A repository is `MODELS_DIR/<name>/<version>/model.onnx`.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import onnx
import orjson
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.contents import is_lfs_pointer, kind_of
from service.errors import ArtifactError, shown
from service.imaging.canvas import CanvasRule

METADATA_KEY: Final = "retinaserve"
SCHEMA: Final = 1
_LARGEST_FILE: Final = 2 << 30
"""Bytes: more than a protobuf message may have."""
_LARGEST_CHECKSUM: Final = 4096
MODEL_FILE: Final = "model.onnx"
CHECKSUM_FILE: Final = "model.sha256"
MAX_DETECTIONS_CAP: Final = 1000
"""Most detections of one image."""

INPUT_TYPES: Final[Mapping[str, tuple[int, int]]] = {
    "images": (TensorProto.UINT8, 4),
    "image_sizes": (TensorProto.INT64, 2),
    "score_threshold": (TensorProto.FLOAT, 1),
    "iou_threshold": (TensorProto.FLOAT, 1),
    "max_detections": (TensorProto.INT64, 1),
}
"""Element type and number of dimensions of each input of a model file."""
OUTPUT_TYPES: Final[Mapping[str, tuple[int, int]]] = {
    "image_index": (TensorProto.INT64, 1),
    "boxes": (TensorProto.FLOAT, 2),
    "scores": (TensorProto.FLOAT, 1),
    "labels": (TensorProto.INT64, 1),
}
"""The same of each output."""

NAME_RULE: Final = (
    "a model's name is 1 to 128 ASCII letters, digits, '.', '_' or '-', and begins with a letter "
    "or a digit"
)
VERSION_RULE: Final = (
    "a version is a positive integer of at most 18 ASCII digits without a leading zero"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# With 18 digits it fits into 64 bits, as JSON writers and clients need it.
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MAX_VERSION: Final = 10**18 - 1

_UNMOVED_BOXES: Final = "candidate_boxes"
"""Boxes as they are answered; see `service.runtime.detector.SEAM`."""
_MAX_METADATA: Final = 1 << 20
"""Characters of JSON."""
_MAX_CLASSES: Final = 10_000
_MAX_NAMED: Final = 8
"""Skipped files that a message names."""
_MOST_FIXED: Final = 1024
"""Bytes of an initializer up to which it may hold a shape; weights are larger."""


def parse_version(text: str) -> int | None:
    """Return the number that a version is written as, or None for text that is no version.

    >>> parse_version("12"), parse_version("01"), parse_version("v1")
    (12, None, None)
    """
    return int(text) if _VERSION.fullmatch(text) else None


def _version_of_text(value: object) -> object:
    number = parse_version(value) if isinstance(value, str) else None
    if number is None:
        raise PydanticCustomError("version", VERSION_RULE)
    return number


Version = Annotated[int, Field(ge=1, le=_MAX_VERSION)]
"""A version as a number, as JSON has it."""
VersionText = Annotated[Version, BeforeValidator(_version_of_text)]
"""A version as text, as queries have it."""
ClassName = Annotated[str, StringConstraints(max_length=256)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Thresholds(BaseModel):
    """The thresholds of requests that give none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Fraction = 0.3
    """Detections score strictly above this."""
    per_class: dict[str, Fraction] = Field(default_factory=dict)
    """Replaces `score` for the classes named."""
    iou: Fraction = 0.5
    """A box that overlaps a better one of its class by strictly more is suppressed."""
    max_detections: int = Field(default=300, ge=1, le=MAX_DETECTIONS_CAP)

    def of(self, name: str) -> float:
        """Return the score threshold of a class."""
        return self.per_class.get(name, self.score)


class Metrics(BaseModel):
    """Accuracy, measured on the exported file."""

    model_config = ConfigDict(frozen=True, extra="allow")

    dataset: str
    split: str
    ap: float
    """COCO AP over IoU 0.50:0.95, in [0, 1]."""
    ap50: float


class Metadata(BaseModel):
    """`metadata_props["retinaserve"]` of a model file."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    name: str = Field(min_length=1, max_length=128)
    classes: tuple[ClassName, ...] = Field(min_length=1, max_length=_MAX_CLASSES)
    """Label i is classes[i]."""
    canvas: CanvasRule
    thresholds: Thresholds = Thresholds()
    metrics: Metrics | None = None
    calibrated: bool = False
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Git commit, command, config, data, weights, licences."""

    @model_validator(mode="after")
    def _check_classes(self) -> Metadata:
        repeated = [name for name, count in Counter(self.classes).items() if count > 1]
        if repeated:
            raise ValueError(f"class names repeat: {reprlib.repr(repeated)}")
        unknown = set(self.thresholds.per_class) - set(self.classes)
        if unknown:
            raise ValueError(
                f"thresholds.per_class names unknown classes {reprlib.repr(sorted(unknown))}"
            )
        return self

    @model_validator(mode="after")
    def _check_writable(self) -> Metadata:
        # /v1/models shows all of it, and its writer knows no integers beyond 64 bits.
        try:
            orjson.dumps(self.model_dump(mode="json"))
        except TypeError as error:
            raise ValueError(f"a value cannot be written as JSON: {error}") from error
        return self

    def to_json(self) -> str:
        """Return the JSON text for the file."""
        return self.model_dump_json(by_alias=True)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file that was read and checked."""

    path: Path
    content: bytes
    metadata: Metadata
    sha256: str
    weights: Mapping[str, NDArray[np.float32]] | None = field(
        default=None, compare=False, repr=False
    )
    """Inputs of `content` that belong to it: where it was rewritten for a device, else None."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One version of one model in a repository."""

    name: str
    version: int
    path: Path


def read_artifact(path: Path) -> Artifact:
    """Read and check one model file. Raises ArtifactError that names the file and the remedy."""
    try:
        content = _read(path, _LARGEST_FILE)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    if is_lfs_pointer(content):
        # Before the checksum, which is that of the file it stands for.
        raise ArtifactError(f"{path}: not a model but a Git LFS pointer; run `git lfs pull`")
    digest = hashlib.sha256(content).hexdigest()
    _check_checksum(path, digest)
    model = _parse(path, content)
    _refuse_external_data(path, model)
    metadata = _parse_metadata(path, model)
    _check_signature(path, model.graph)
    _check_class_count(path, model, metadata.classes)
    return Artifact(path=path, content=content, metadata=metadata, sha256=digest)


def write_metadata(path: Path, metadata: Metadata) -> None:
    """Replace the description inside a model file; a checksum file beside it is renewed.

    Raises ArtifactError.
    """
    try:
        model = _parse(path, path.read_bytes())
        set_metadata(model, metadata)
        # Beside the target first: a kill half-way must not cost the model.
        partial = path.with_name(path.name + ".part")
        partial.write_bytes(model.SerializeToString())
        partial.replace(path)
        checksum = path.parent / CHECKSUM_FILE
        if checksum.exists():
            write_checksum(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be changed: {error.strerror or error}") from error


def set_metadata(model: onnx.ModelProto, metadata: Metadata) -> None:
    """Put the description into a model in memory; its thresholds become the defaults of inputs."""
    others = {p.key: p.value for p in model.metadata_props if p.key != METADATA_KEY}
    onnx.helper.set_model_props(model, {**others, METADATA_KEY: metadata.to_json()})
    thresholds = metadata.thresholds
    defaults: dict[str, NDArray[Any]] = {
        "score_threshold": np.array([thresholds.score], dtype=np.float32),
        "iou_threshold": np.array([thresholds.iou], dtype=np.float32),
        "max_detections": np.array([thresholds.max_detections], dtype=np.int64),
    }
    for initializer in model.graph.initializer:
        if initializer.name in defaults:
            value = defaults[initializer.name]
            initializer.CopyFrom(onnx.numpy_helper.from_array(value, initializer.name))


def write_checksum(path: Path) -> None:
    """Write `model.sha256` beside a model file, in the format of sha256sum."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / CHECKSUM_FILE).write_text(f"{digest}  {path.name}\n")


def scan_repository(root: Path) -> list[Entry]:
    """Return every `<name>/<version>/model.onnx` below `root`, by name, then by version.

    Raises ArtifactError when `root` is not a folder or holds no model.
    """
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such folder; a model repository is expected there")
    entries = sorted(filter(None, map(entry_of, root.glob(f"*/*/{MODEL_FILE}"))))
    if not entries:
        skipped = skipped_files(root)
        raise ArtifactError(
            f"{root}: no model; expected {root}/<name>/<version>/{MODEL_FILE}"
            + (f"; skipped: {list_skipped(skipped)}" if skipped else "")
        )
    return entries


def entry_of(path: Path) -> Entry | None:
    """Return the entry of a file by its path; None outside of a repository."""
    place = path.parts[-3:]
    return None if why_skipped(place) else Entry(place[0], int(place[1]), path)


def why_skipped(place: Sequence[str]) -> str | None:
    """Return why `place`, a path below a repository, holds no model version; None if it does."""
    if len(place) != 3 or place[-1] != MODEL_FILE:
        return f"expected <name>/<version>/{MODEL_FILE}"
    name, version, _ = place
    reasons = []
    if not _NAME.fullmatch(name):
        reasons.append(f"{name!r} is not a model's name: {NAME_RULE}")
    if parse_version(version) is None:
        reasons.append(f"{version!r} is not a version: {VERSION_RULE}")
    return "; ".join(reasons) or None


def skipped_files(root: Path) -> dict[Path, str]:
    """Return ONNX files below `root` that are not where a model is expected, with the reasons.

    Looks one level higher and one lower than that. Leaves out hidden files and folders, and what
    lies beside a model.
    """
    found = {}
    for levels in range(4):
        for path in root.glob("*/" * levels + "*.onnx"):
            place = path.relative_to(root)
            beside = entry_of(path.with_name(MODEL_FILE))
            hidden = any(part.startswith(".") for part in place.parts)
            if hidden or (levels == 2 and beside and beside.path.exists()):
                continue
            if reason := why_skipped(place.parts):
                found[place] = reason
    return dict(sorted(found.items()))


def list_skipped(skipped: Mapping[Path, str]) -> str:
    """Return a sentence that lists skipped files."""
    named = [f"{str(path)!r} ({reason})" for path, reason in skipped.items()][:_MAX_NAMED]
    rest = len(skipped) - len(named)
    return ", ".join([*named, *([f"{rest} more"] if rest else [])])


def _read(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises OSError."""
    # A pipe in the file's place would never end.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(number, "rb") as file:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is not a regular file")
        if state.st_size > most:
            raise OSError(f"it has {state.st_size} bytes; at most {most} are read")
        return file.read()


def _check_checksum(path: Path, digest: str) -> None:
    checksum = path.parent / CHECKSUM_FILE
    if not checksum.exists():
        return
    try:
        words = _read(checksum, _LARGEST_CHECKSUM).decode(errors="replace").split()
    except OSError as error:
        raise ArtifactError(f"{checksum}: cannot be read: {error.strerror or error}") from error
    if len(words) > 1 and words[1].lstrip("*") != path.name:
        # Of another model file in the same folder.
        return
    if not words or words[0].lower() != digest:
        raise ArtifactError(
            f"{path}: sha256 is {digest}, but {checksum.name} says "
            f"{shown(words[0]) if words else 'nothing'}; copy the file again or renew the checksum"
        )


def _parse(path: Path, content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ArtifactError(
            f"{path}: not an ONNX file but {kind_of(content)} ({error}); copy or export it again"
        ) from error
    if not model.graph.node:
        raise ArtifactError(f"{path}: not an ONNX file with a graph; is it empty or cut off?")
    return model


def _refuse_external_data(path: Path, model: onnx.ModelProto) -> None:
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArtifactError(
                f"{path}: weight {tensor.name!r} lies outside the file; a model is one file, "
                "export it again with `retinaserve export`"
            )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def _parse_metadata(path: Path, model: onnx.ModelProto) -> Metadata:
    text = next((p.value for p in model.metadata_props if p.key == METADATA_KEY), None)
    if text is None:
        raise ArtifactError(
            f"{path}: no {METADATA_KEY!r} metadata; this is an ONNX file, but not one that "
            "`retinaserve export` wrote"
        )
    if len(text) > _MAX_METADATA:
        raise ArtifactError(
            f"{path}: the metadata has {len(text)} characters; at most {_MAX_METADATA} are read"
        )
    try:
        return Metadata.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "metadata"
        raise ArtifactError(
            f"{path}: metadata is not of schema {SCHEMA}: {where[:200]}: {first['msg']} "
            f"(given {reprlib.repr(first['input'])})"
        ) from error


def _check_signature(path: Path, graph: onnx.GraphProto) -> None:
    """Raise ArtifactError unless a graph's inputs and outputs are those of a model file."""
    constants = {each.name for each in graph.initializer}
    # Until IR version 4 the weights are inputs, too.
    inputs = [
        each for each in graph.input if each.name in INPUT_TYPES or each.name not in constants
    ]
    for what, values, expected in (
        ("input", inputs, INPUT_TYPES),
        ("output", list(graph.output), OUTPUT_TYPES),
    ):
        names = [value.name for value in values]
        if sorted(names) != sorted(expected):
            raise ArtifactError(
                f"{path}: the {what}s are {reprlib.repr(names)}, expected {', '.join(expected)}"
            )
        for value in values:
            _check_type(path, what, value, *expected[value.name])
    images = next(value for value in inputs if value.name == "images")
    height_width = images.type.tensor_type.shape.dim[:3]
    if any(side.HasField("dim_value") for side in height_width):
        raise ArtifactError(
            f"{path}: batch, height and width of the input 'images' are "
            f"{[side.dim_value or side.dim_param for side in height_width]}; all three must be "
            "open, since canvases and batches of several sizes come"
        )


def _check_type(
    path: Path, what: str, value: ValueInfoProto, element: int, dimensions: int
) -> None:
    tensor = value.type.tensor_type
    found = len(tensor.shape.dim) if tensor.HasField("shape") else dimensions
    if (tensor.elem_type, found) != (element, dimensions):
        name = TensorProto.DataType.Name
        raise ArtifactError(
            f"{path}: the {what} {value.name!r} is {name(tensor.elem_type)} with {found} "
            f"dimensions, expected {name(element)} with {dimensions}"
        )


def _check_class_count(path: Path, model: onnx.ModelProto, classes: Sequence[str]) -> None:
    """Raise ArtifactError unless the metadata names every class of the network, and no other."""
    count = _class_count(model)
    if count is not None and count != len(classes):
        raise ArtifactError(
            f"{path}: the network tells {count} classes apart, but the metadata names "
            f"{len(classes)}: {reprlib.repr(classes)}; export the file again"
        )


def _class_count(model: onnx.ModelProto) -> int | None:
    """Return the length of the class axis of the graph's NonMaxSuppression.

    None where the graph leaves it open, or tells classes apart in another way: by boxes that are
    moved away from those of other classes.
    """
    suppressions = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    if not suppressions:
        return None
    shapes = {value.name: value.type.tensor_type.shape.dim for value in _inferred(model)}
    counts = set()
    for node in suppressions:
        boxes, scores = node.input[:2]
        dimensions = shapes.get(scores, ())
        count = dimensions[1].dim_value if len(dimensions) == 3 else 0
        if count > 1 or boxes == _UNMOVED_BOXES:
            counts.add(count)
    return counts.pop() or None if len(counts) == 1 else None


def _inferred(model: onnx.ModelProto) -> Iterable[ValueInfoProto]:
    """Return the shapes of a graph's values, as far as onnx infers them."""
    graph = model.graph
    # Without the weights' data: to copy that would take longer than all the rest.
    slim = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.node,
            graph.name or "graph",
            graph.input,
            graph.output,
            [
                each
                if each.ByteSize() <= _MOST_FIXED
                else TensorProto(name=each.name, dims=each.dims, data_type=each.data_type)
                for each in graph.initializer
            ],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    slim.functions.extend(model.functions)
    try:
        known = onnx.shape_inference.infer_shapes(slim).graph
    except onnx.shape_inference.InferenceError:
        # onnxruntime says what is wrong with it.
        return ()
    return (*known.input, *known.value_info, *known.output)
