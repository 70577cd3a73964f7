"""The model file's own description, and the model repository on disk.

A model file is one ONNX file that holds the whole detector; what it is (classes, canvas,
thresholds, metrics, provenance) is JSON in `metadata_props["retinaserve"]`, and `Metadata` is its
schema. A repository is `MODELS_DIR/<name>/<version>/model.onnx`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.canvas import CanvasRule
from service.errors import ArtifactError

METADATA_KEY: Final = "retinaserve"
SCHEMA: Final = 1
MODEL_FILE: Final = "model.onnx"
CHECKSUM_FILE: Final = "model.sha256"
MAX_DETECTIONS_CAP: Final = 1000
"""No picture ever has more detections than this, whatever is asked for."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Thresholds(BaseModel):
    """What a request gets that names no thresholds of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Fraction = 0.3
    """Detections score strictly above this."""
    per_class: dict[str, Fraction] = Field(default_factory=dict)
    """Replaces `score` for the classes named."""
    iou: Fraction = 0.5
    """A box that overlaps a better one of its class by strictly more is suppressed."""
    max_detections: int = Field(default=300, ge=1, le=MAX_DETECTIONS_CAP)


class Metrics(BaseModel):
    """How well the file detects, measured on the file itself."""

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
    name: str = Field(pattern=_NAME.pattern)
    classes: tuple[str, ...] = Field(min_length=1)
    """Label i is classes[i]."""
    canvas: CanvasRule
    thresholds: Thresholds = Thresholds()
    metrics: Metrics | None = None
    calibrated: bool = False
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Git commit, command, config, data, weights, licences."""

    @model_validator(mode="after")
    def _check_classes(self) -> Metadata:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"class names repeat: {', '.join(self.classes)}")
        unknown = set(self.thresholds.per_class) - set(self.classes)
        if unknown:
            raise ValueError(f"thresholds.per_class names unknown classes {sorted(unknown)}")
        return self

    def to_json(self) -> str:
        """The JSON text that goes into the file."""
        return self.model_dump_json(by_alias=True)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model file that has been read and checked, ready to become a session."""

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
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    digest = hashlib.sha256(content).hexdigest()
    _check_checksum(path, digest)
    model = _parse(path, content)
    _refuse_external_data(path, model)
    return Artifact(
        path=path, content=content, metadata=_parse_metadata(path, model), sha256=digest
    )


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
    """Put the description into a model in memory; its thresholds become the inputs' defaults."""
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
    """Every `<name>/<version>/model.onnx` below `root`, by name, then by version.

    Raises ArtifactError when `root` is not a folder or holds no model.
    """
    if not root.is_dir():
        raise ArtifactError(f"{root}: no such folder; a model repository is expected there")
    entries = sorted(_entries(root))
    if not entries:
        raise ArtifactError(f"{root}: no model; expected {root}/<name>/<version>/{MODEL_FILE}")
    return entries


def _entries(root: Path) -> Iterator[Entry]:
    for path in root.glob(f"*/*/{MODEL_FILE}"):
        version = path.parent.name
        name = path.parent.parent.name
        if version.isdecimal() and int(version) > 0 and _NAME.fullmatch(name):
            yield Entry(name=name, version=int(version), path=path)


def _check_checksum(path: Path, digest: str) -> None:
    checksum = path.parent / CHECKSUM_FILE
    if not checksum.exists():
        return
    words = checksum.read_text(errors="replace").split()
    if len(words) > 1 and words[1].lstrip("*") != path.name:
        # Of another model file in the same folder.
        return
    if not words or words[0].lower() != digest:
        raise ArtifactError(
            f"{path}: sha256 is {digest}, but {checksum.name} says "
            f"{words[0] if words else 'nothing'}; copy the file again or renew the checksum"
        )


def _parse(path: Path, content: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ArtifactError(f"{path}: not an ONNX file ({error})") from error
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
    try:
        return Metadata.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "metadata"
        raise ArtifactError(
            f"{path}: metadata is not of schema {SCHEMA}: {where}: {first['msg']}"
        ) from error
