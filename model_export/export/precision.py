"""Model files of smaller precision: the network in float16 for GPUs or in int8 for CPUs.

The network is the convolutions and what lies between them, as the graph has them. Normalisation,
decoding, sigmoid and selection stay in float32, and so do inputs and outputs.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxruntime.transformers.float16 import convert_float_to_float16

from service.errors import DataError
from service.imaging.canvas import Buckets, ShortSide
from service.imaging.decode import prepare
from service.runtime.artifact import read_artifact, set_metadata
from service.runtime.detector import thresholds
from service.runtime.norms import fold_norms


class Precision(StrEnum):
    """Number format of a model file's network."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


RANGE_IMAGES: Final = 32
"""Images from which int8 takes the ranges of the activations."""

LARGEST: Final = float(np.finfo(np.float16).max)
HEADROOM: Final = 4.0
"""Factor between the largest activation seen and float16's largest number: other images may
reach higher."""
IN_FP16: Final = frozenset(
    ("Add", "Clip", "Concat", "Conv", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize")
)
"""Operators that run in float16. Those that sum squares or exponentials stay in float32."""

STEM: Final = 3
"""Number of first convolutions that stay in float32. In MobileNetV2 the second is depthwise with
weights up to 55 on inputs up to 6, one step of 6 / 255 is 1.3 behind it, and the third adds 32 of
these up: quantising the two costs 7 dB of the logits and saves no time."""
IN_INT8: Final = ("Conv", "Add", "Resize", "Clip", "Relu")

Range = tuple[float, float]

_WARNING: Final = 2
_ERROR: Final = 3
"""onnxruntime's log levels."""


@dataclass(frozen=True, slots=True)
class Network:
    """The part of a model file's graph that may run in another precision."""

    nodes: tuple[onnx.NodeProto, ...]
    """In the graph's order."""
    last: frozenset[str]
    """Names of the convolutions that output logits and deltas."""

    @property
    def in_fp16(self) -> list[onnx.NodeProto]:
        """The nodes that run in float16."""
        return [node for node in self.nodes if node.op_type in IN_FP16]

    @property
    def in_int8(self) -> list[onnx.NodeProto]:
        """The nodes that run in int8: not the stem, and not the last convolutions."""
        convolutions = [node.name for node in self.nodes if node.op_type == "Conv"]
        kept = self.last | set(convolutions[:STEM])
        return [node for node in self.nodes if node.op_type in IN_INT8 and node.name not in kept]


def write_reduced(
    source: Path, target: Path, precision: Precision, images: Sequence[bytes]
) -> None:
    """Write a float32 model file in another precision; `images` are compressed calibration images.

    Raises DataError if the network does not fit into float16.
    """
    model = onnx.load(source)
    metadata = read_artifact(source).metadata
    # A norm between a quantised convolution and its activation would stay in float32.
    fold_norms(model)
    network = find_network(model)
    reader = CanvasReader(images, metadata.canvas)
    if precision is Precision.FP16:
        check_fits(activation_ranges(model, network, reader))
        reduced = to_fp16(model, network)
    else:
        reduced = to_int8(model, network, reader)
    provenance = {**metadata.provenance, "precision": precision.value}
    set_metadata(reduced, metadata.model_copy(update={"provenance": provenance}))
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(reduced, target)


class CanvasReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
    """Feeds images to the calibrator, one canvas per run."""

    def __init__(self, images: Iterable[bytes], rule: Buckets | ShortSide) -> None:
        self._prepared = (prepare(image, rule) for image in images)

    def get_next(self) -> dict[str, Any] | None:
        """Return the inputs of the next run, or None at the end."""
        prepared = next(self._prepared, None)
        if prepared is None:
            return None
        return {
            "images": prepared.canvas[np.newaxis],
            "image_sizes": np.array([prepared.letterbox.resized], dtype=np.int64),
            # No part of the network reads them.
            **thresholds(0.5, 0.5, 1),
        }


def find_network(model: onnx.ModelProto) -> Network:
    """Return the convolutions of a graph and every node that lies between two of them."""
    nodes = list(model.graph.node)
    # Nodes are in topological order, so one pass each way is enough.
    after: set[str] = set()
    following: set[int] = set()
    for index, node in enumerate(nodes):
        if after.intersection(node.input):
            following.add(index)
        if node.op_type == "Conv" or index in following:
            after.update(node.output)
    before: set[str] = set()
    leading: set[int] = set()
    last: set[int] = set()
    for index in reversed(range(len(nodes))):
        node = nodes[index]
        if before.intersection(node.output):
            leading.add(index)
        elif node.op_type == "Conv":
            last.add(index)
        if node.op_type == "Conv" or index in leading:
            before.update(name for name in node.input if name)
    convolutions = {index for index, node in enumerate(nodes) if node.op_type == "Conv"}
    within = (following & leading) | convolutions
    return Network(
        nodes=tuple(nodes[index] for index in sorted(within)),
        last=frozenset(nodes[index].name for index in last),
    )


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor whose type is known or can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {each.name: each.data_type for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    return known


def float_tensors(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[str]:
    """Return the float32 inputs and outputs of nodes, constants apart."""
    types = element_types(model)
    constant = {each.name for each in model.graph.initializer}
    names = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output))
    return [name for name in names if name not in constant and types.get(name) == TensorProto.FLOAT]


def activation_ranges(
    model: onnx.ModelProto, network: Network, reader: CalibrationDataReader
) -> dict[str, Range]:
    """Return the smallest and the largest value of the network's float32 tensors."""
    tensors = float_tensors(model, network.nodes)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(model, source)
        with _without_warnings():
            calibrator = create_calibrator(
                source,
                sorted({node.op_type for node in network.nodes}),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
            )
            calibrator.collect_data(reader)
            found = calibrator.compute_data()
    extremes = {name: found[name].range_value for name in tensors}
    return {name: (float(low.item()), float(high.item())) for name, (low, high) in extremes.items()}


# --- float16 -------------------------------------------------------------------------------------


def check_fits(ranges: Mapping[str, Range]) -> None:
    """Raise DataError if an activation comes too near to float16's largest number."""
    for name, extremes in ranges.items():
        reach = float(np.abs(extremes).max())
        # Written so that nan is refused as well.
        if not reach * HEADROOM <= LARGEST:
            raise DataError(
                f"{name} reaches {reach:.3g}, too near to float16's largest number {LARGEST:g} "
                f"({HEADROOM:g}-fold headroom is required); export with --precision fp32"
            )


def to_fp16(model: onnx.ModelProto, network: Network) -> onnx.ModelProto:
    """Return the same graph with its network in float16.

    Raises DataError if a weight does not fit.
    """
    nodes = network.in_fp16
    used = {name for node in nodes for name in node.input}
    for initializer in model.graph.initializer:
        if initializer.name in used:
            _check_weight(initializer)
    reduced = onnx.ModelProto()
    reduced.CopyFrom(model)
    graph = reduced.graph
    # The converter casts every float tensor that is declared, those outside of the network to
    # float16 and back: only the network's are shown to it.
    inputs, outputs = list(graph.input), list(graph.output)
    for declared in (graph.input, graph.output, graph.value_info):
        del declared[:]
    graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in float_tensors(model, nodes)
    )
    names = {node.name for node in nodes}
    _separate_constants(graph, names)
    with warnings.catch_warnings():
        # It warns of weights that float16 rounds to its smallest number.
        warnings.simplefilter("ignore")
        reduced = convert_float_to_float16(
            reduced,
            disable_shape_infer=True,
            op_block_list=[],
            node_block_list=[node.name for node in graph.node if node.name not in names],
        )
    reduced.graph.input.extend(inputs)
    reduced.graph.output.extend(outputs)
    return _finish(reduced, model)


def _separate_constants(graph: onnx.GraphProto, names: set[str]) -> None:
    """Give the nodes called `names` copies of the constants that they share with other nodes.

    The converter would cast such a constant back before each other node, always under one name.
    """
    network = [node for node in graph.node if node.name in names]
    used = {name for node in network for name in node.input}
    others = {name for node in graph.node if node.name not in names for name in node.input}
    for initializer in list(graph.initializer):
        if initializer.name not in used & others:
            continue
        copy = graph.initializer.add()
        copy.CopyFrom(initializer)
        copy.name = f"{initializer.name}_network"
        for node in network:
            node.input[:] = [copy.name if name == initializer.name else name for name in node.input]


def _check_weight(initializer: onnx.TensorProto) -> None:
    values = onnx.numpy_helper.to_array(initializer)
    if not np.abs(values).max(initial=0.0) <= LARGEST:
        raise DataError(
            f"{initializer.name} holds a number beyond float16's largest, {LARGEST:g}; export "
            "with --precision fp32"
        )


# --- int8 ----------------------------------------------------------------------------------------


def to_int8(
    model: onnx.ModelProto, network: Network, reader: CalibrationDataReader
) -> onnx.ModelProto:
    """Return the same graph with its network quantised: static, per channel, as Q and DQ nodes.

    Activations are uint8 and weights int8, the operands of x86's dot products. Weights use 7 of
    their bits: an x86 without VNNI adds pairs of products in 16 bits, where full ones overflow
    unnoticed, and a file may be served on another machine than the one that wrote it.
    """
    source = onnx.ModelProto()
    source.CopyFrom(model)
    # Otherwise a warning advises an optimisation that the exporter has done.
    add_pre_process_metadata(source)
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        target = Path(folder) / "model.onnx"
        quantize_static(
            source,
            target,
            reader,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[node.name for node in network.in_int8],
            op_types_to_quantize=list(IN_INT8),
        )
        return _finish(onnx.load(target), model)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the calibrator's session, which warns of the inputs that have defaults."""
    ort.set_default_logger_severity(_ERROR)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNING)


def _finish(reduced: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Sort the nodes and restore what the converters change beside the network."""
    ONNXModel(reduced).topological_sort()
    del reduced.metadata_props[:]
    reduced.metadata_props.extend(model.metadata_props)
    reduced.producer_name = model.producer_name
    # Shapes inferred with `image_sizes` at its default, which has length 1.
    del reduced.graph.value_info[:]
    onnx.checker.check_model(reduced, full_check=True)
    return reduced
