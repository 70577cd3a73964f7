"""Smaller model files: the network in float16 or int8, everything behind it in float32.

What counts as the network is read from the graph: the convolutions and what lies between them.
Normalisation of the image before it, decoding, sigmoid and selection after it, inputs and
outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from service.runtime import devices


class Precision(StrEnum):
    """What the network of a model file computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


ACCEPTED_LOSS: Final[Mapping[Precision, float]] = {Precision.FP16: 0.5, Precision.INT8: 1.5}
"""AP in points of 100 that a file may lose against float32."""

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Batch:
    """Canvases as the model file takes them."""

    images: NDArray[np.uint8]
    """(B, H, W, 3)"""
    image_sizes: NDArray[np.int64]
    """(B, 2)"""


@dataclass(frozen=True, slots=True)
class Network:
    """The part of a model file's graph that may be computed in another precision."""

    nodes: tuple[onnx.NodeProto, ...]
    """In the graph's order."""
    last: frozenset[str]
    """Names of the convolutions whose answer is the logits and deltas."""


def network(model: onnx.ModelProto) -> Network:
    """The convolutions of a graph, and every node that lies between two of them."""
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
    """The element type of every tensor whose type can be told."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {each.name: each.data_type for each in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type.elem_type
    return known


def float_tensors(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[str]:
    """Names of the float32 tensors, constants apart, that go into and come out of nodes."""
    types = element_types(model)
    constant = {each.name for each in model.graph.initializer}
    names = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output))
    return [
        name for name in names if name not in constant and types.get(name) == onnx.TensorProto.FLOAT
    ]


def activation_ranges(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Batch]
) -> dict[str, Range]:
    """Smallest and largest value of tensors over images."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    del graph.output[:]
    outputs = []
    for index, tensor in enumerate(tensors):
        for operator in ("ReduceMin", "ReduceMax"):
            outputs.append(f"watched_{index}_{operator}")
            graph.node.append(onnx.helper.make_node(operator, [tensor], [outputs[-1]], keepdims=0))
            graph.output.append(
                onnx.helper.make_tensor_value_info(outputs[-1], onnx.TensorProto.FLOAT, [])
            )
    device = devices.Device("cpu")
    session = ort.InferenceSession(
        watched.SerializeToString(),
        sess_options=devices.session_options(device),
        providers=devices.providers(device),
    )
    low = np.full(len(tensors), np.inf)
    high = -low
    for batch in batches:
        found: list[NDArray[Any]] = session.run(
            outputs, {"images": batch.images, "image_sizes": batch.image_sizes}
        )
        low, high = np.minimum(low, found[0::2]), np.maximum(high, found[1::2])
    return dict(zip(tensors, zip(low.tolist(), high.tolist(), strict=True), strict=True))
