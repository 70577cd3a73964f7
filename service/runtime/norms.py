"""Batch norms of a model file as part of the convolutions before them.

onnxruntime does the same when it opens a file, too late for what changes convolutions before that:
Winograd's rewriting and int8. A file holds the norms, because heads that are shared over levels
have one for each level, and their weights once.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper


def fold_norms(model: ModelProto) -> int:
    """Fold each batch norm into the convolution that it alone follows; return their number."""
    graph = model.graph
    given = {value.name for value in graph.input}
    constants = {each.name: each for each in graph.initializer if each.name not in given}
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(value.name for value in graph.output)
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    folded = []
    for norm in graph.node:
        if norm.op_type != "BatchNormalization" or norm.domain or reads[norm.input[0]] > 1:
            continue
        convolution = convolutions.get(norm.input[0])
        if convolution is None or any(
            name not in constants for name in (*convolution.input[1:], *norm.input[1:])
        ):
            continue
        scale, shift, mean, variance, weight, *bias = (
            numpy_helper.to_array(constants[name]).astype(np.float64)
            for name in (*norm.input[1:], *convolution.input[1:])
        )
        factor = scale / np.sqrt(variance + _epsilon(norm))
        values = {
            f"{norm.output[0]}/weight": weight * factor.reshape(-1, *[1] * (weight.ndim - 1)),
            f"{norm.output[0]}/bias": shift + (sum(bias) - mean) * factor,
        }
        for name, value in values.items():
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        convolution.input[1:] = list(values)
        convolution.output[0] = norm.output[0]
        folded.append(norm)
    for norm in folded:
        graph.node.remove(norm)
    used = {name for node in graph.node for name in node.input} | given
    for initializer in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(initializer)
    return len(folded)


def _epsilon(norm: NodeProto) -> float:
    given = {each.name: onnx.helper.get_attribute_value(each) for each in norm.attribute}
    return float(given.get("epsilon", 1e-5))
