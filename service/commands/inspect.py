"""`retinaserve inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import onnx
import orjson

from service.errors import InvalidParameter
from service.imaging.canvas import Buckets
from service.runtime.artifact import Artifact, Metadata, Thresholds, read_artifact, write_metadata
from service.runtime.detector import INPUTS
from service.runtime.devices import Device, open_detector


def run(path: Path, changes: Sequence[str]) -> None:
    """Change thresholds where asked, then print what the file says.

    Raises ArtifactError or InvalidParameter; the file is then as it was.
    """
    artifact = read_artifact(path)
    if changes:
        write_metadata(path, with_thresholds(artifact.metadata, changes))
        artifact = read_artifact(path)
    # A file that onnxruntime cannot load says so here.
    open_detector(artifact, Device("cpu"))
    for line in _describe(artifact):
        click.echo(line)


def with_thresholds(metadata: Metadata, changes: Sequence[str]) -> Metadata:
    """Return the metadata with other score thresholds: "0.4", or "RBC=0.4" for one class."""
    score, per_class = metadata.thresholds.score, dict(metadata.thresholds.per_class)
    for change in changes:
        name, separator, text = change.rpartition("=")
        value = _fraction(change, text)
        if not separator:
            score = value
        elif name in metadata.classes:
            per_class[name] = value
        else:
            raise InvalidParameter(
                f"--set-threshold {change}: no class {name!r}; the model knows "
                f"{', '.join(metadata.classes)}"
            )
    thresholds = Thresholds(
        score=score,
        per_class=per_class,
        iou=metadata.thresholds.iou,
        max_detections=metadata.thresholds.max_detections,
    )
    # What is written there of the thresholds is no longer true.
    provenance = {key: value for key, value in metadata.provenance.items() if key != "thresholds"}
    return metadata.model_copy(update={"thresholds": thresholds, "provenance": provenance})


def _fraction(change: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise InvalidParameter(f"--set-threshold {change}: {text!r} is not a number in 0..1")
    return value


def _describe(artifact: Artifact) -> Iterator[str]:
    metadata, thresholds = artifact.metadata, artifact.metadata.thresholds
    graph = onnx.load_model_from_string(artifact.content).graph
    # Until IR version 4 the weights are inputs, too.
    inputs = [value for value in graph.input if value.name in INPUTS]
    defaults = {each.name for each in graph.initializer}.intersection(INPUTS)
    rows: list[tuple[str, Any]] = [
        ("file", artifact.path),
        ("size", f"{len(artifact.content) / 1e6:.2f} MB"),
        ("sha256", artifact.sha256),
        ("name", metadata.name),
        ("schema", metadata.schema_version),
        ("inputs", "optional" if defaults else "required"),
        *(
            ("input", _signature(value) + " (has a default)" * (value.name in defaults))
            for value in inputs
        ),
        *(("output", _signature(value)) for value in graph.output),
        ("classes", f"{len(metadata.classes)}: {', '.join(metadata.classes)}"),
        ("canvas", _canvas(metadata)),
        ("score threshold", thresholds.score),
        *((f"  of {name}", value) for name, value in thresholds.per_class.items()),
        ("IoU threshold", thresholds.iou),
        ("max detections", thresholds.max_detections),
        ("calibrated", "yes" if metadata.calibrated else "no"),
    ]
    if metadata.metrics is None:
        rows.append(("metrics", "none in the file"))
    else:
        m = metadata.metrics
        rows.append(("metrics", f"AP {m.ap:.3f}, AP50 {m.ap50:.3f} on {m.dataset} {m.split}"))
    for name, value in rows:
        yield f"{name:<16} {value}"
    yield "provenance"
    text = orjson.dumps(metadata.provenance, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    yield from (f"  {line}" for line in text.decode().splitlines())


def _signature(value: onnx.ValueInfoProto) -> str:
    """Return name, type and shape as text."""
    tensor = value.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    shape = [each.dim_param or each.dim_value for each in tensor.shape.dim]
    return f"{value.name} ({element}) {shape}"


def _canvas(metadata: Metadata) -> str:
    rule = metadata.canvas
    if isinstance(rule, Buckets):
        sizes = ", ".join(f"{size.height}x{size.width}" for size in rule.sizes)
        return f"the one of {sizes} (height x width) with least padding"
    return f"short side {rule.short}, long side at most {rule.long}"
