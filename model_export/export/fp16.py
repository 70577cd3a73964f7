"""The network of a model file in float16, for GPUs.

Batch norms are part of the convolutions by then, folded in float32 by the exporter. What sums
squares or exponentials stays in float32, between casts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from model_export.export.precision import Network, Range, element_types
from service.errors import DataError

LARGEST: Final = float(np.finfo(np.float16).max)

HEADROOM: Final = 4.0
"""Other images may reach higher than those that were tried."""

_IN_HALF: Final = frozenset(
    ("Add", "Clip", "Concat", "Conv", "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize")
)
# Resize's region of interest and scales are float32 whatever it resizes.
_FLOAT_INPUTS: Final = {"Resize": (1, 2)}


def check_fits(ranges: Mapping[str, Range]) -> None:
    """Raise DataError if an activation comes too near to float16's largest number."""
    for name, extremes in ranges.items():
        reach = float(np.abs(extremes).max())
        # Written so that nan is refused as well.
        if not reach * HEADROOM <= LARGEST:
            raise DataError(
                f"{name} reaches {reach:.3g}, too near to float16's largest number {LARGEST:g} "
                f"({HEADROOM:g}-fold headroom is asked for); export with --precision fp32"
            )


def to_half(model: onnx.ModelProto, network: Network) -> onnx.ModelProto:
    """The same graph with its network in float16. Raises DataError if a weight does not fit."""
    answer = onnx.ModelProto()
    answer.CopyFrom(model)
    graph = answer.graph
    inside = {node.output[0] for node in network.nodes if node.op_type in _IN_HALF}
    types = element_types(model)
    caster = _Caster(
        {name for name, kind in types.items() if kind == TensorProto.FLOAT},
        {each.name: each for each in graph.initializer},
    )
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        half = node.output[0] in inside
        kept = _FLOAT_INPUTS.get(node.op_type, ())
        for position, name in enumerate(node.input):
            wanted = TensorProto.FLOAT16 if half and position not in kept else TensorProto.FLOAT
            node.input[position] = caster.as_type(name, wanted)
        graph.node.extend(caster.take_casts())
        graph.node.append(node)
        if half:
            caster.in_half.update(node.output)
    graph.initializer.extend(caster.constants.values())
    _drop_unused(graph)
    onnx.checker.check_model(answer, full_check=True)
    return answer


class _Caster:
    """Gives float tensors the type that a node wants, each only once."""

    def __init__(
        self, floats: Collection[str], initializers: Mapping[str, onnx.TensorProto]
    ) -> None:
        self._floats = floats
        self._initializers = initializers
        self.in_half: set[str] = set()
        """Tensors that were computed in float16."""
        self.constants: dict[str, onnx.TensorProto] = {}
        self._cast: set[str] = set()
        self._casts: list[onnx.NodeProto] = []

    def as_type(self, name: str, wanted: int) -> str:
        """The name of a tensor's copy in the wanted type; other than float tensors stay."""
        if name not in self._floats:
            return name
        given = TensorProto.FLOAT16 if name in self.in_half else TensorProto.FLOAT
        if given == wanted:
            return name
        copy = f"{name}_half" if wanted == TensorProto.FLOAT16 else f"{name}_float"
        if name in self._initializers:
            if copy not in self.constants:
                self.constants[copy] = _half_constant(self._initializers[name], copy)
        elif copy not in self._cast:
            self._cast.add(copy)
            self._casts.append(
                onnx.helper.make_node("Cast", [name], [copy], name=f"cast_{copy}", to=wanted)
            )
        return copy

    def take_casts(self) -> list[onnx.NodeProto]:
        """The casts asked for since the last call."""
        casts, self._casts = self._casts, []
        return casts


def _half_constant(initializer: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = onnx.numpy_helper.to_array(initializer)
    if not np.abs(values).max(initial=0.0) <= LARGEST:
        raise DataError(
            f"{initializer.name} holds a number beyond float16's largest, {LARGEST:g}; export "
            "with --precision fp32"
        )
    return onnx.numpy_helper.from_array(values.astype(np.float16), name)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    used.update(value.name for value in graph.input)
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
