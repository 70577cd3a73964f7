"""The network of a model file in int8, for CPUs: static, per channel, as Q and DQ nodes.

Activations are uint8 and weights int8, what x86's dot products multiply. Weights use 7 of their
bits: an x86 without VNNI adds pairs of products in 16 bits, where full ones overflow unnoticed, and
a file is not always served where it was written. The first convolutions, and those that answer
with logits and deltas, stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from model_export.export.precision import Network, Range

STEM: Final = 3
"""So many of the first convolutions stay in float32. In MobileNetV2 the second is depthwise with
weights up to 55 on inputs up to 6, one step of 6 / 255 is 1.3 behind it, and the third adds 32 of
these up: quantising the two costs 7 dB of the logits and saves no time."""

QUANTISED: Final = ("Conv", "Add", "Resize", "Clip", "Relu")


def kept_in_float(network: Network) -> frozenset[str]:
    """Names of the convolutions that are not quantised."""
    convolutions = [node.name for node in network.nodes if node.op_type == "Conv"]
    return network.last | set(convolutions[:STEM])


def quantised_nodes(network: Network) -> list[onnx.NodeProto]:
    """The nodes that are computed in int8."""
    kept = kept_in_float(network)
    return [node for node in network.nodes if node.op_type in QUANTISED and node.name not in kept]


def to_int8(
    model: onnx.ModelProto, network: Network, ranges: Mapping[str, Range]
) -> onnx.ModelProto:
    """The same graph with its network quantised.

    `ranges` holds those of every float tensor into and out of `quantised_nodes`.
    """
    extremes = {
        name: (np.array(low, np.float32), np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, extremes),
        nodes_to_quantize=[node.name for node in quantised_nodes(network)],
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTISED),
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    answer: onnx.ModelProto = quantizer.model.model
    # Its notes to itself, and shapes that hold for a batch as long as `image_sizes` only.
    del answer.metadata_props[:]
    answer.metadata_props.extend(model.metadata_props)
    answer.producer_name = model.producer_name
    del answer.graph.value_info[:]
    onnx.checker.check_model(answer, full_check=True)
    return answer
