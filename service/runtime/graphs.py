"""ONNX graphs: who reads a value, and new nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

Consumers = Mapping[str, Sequence[int | None]]
"""By a value's name, the places of the nodes that read it; None for the caller and subgraphs."""


def consumers_of(graph: GraphProto) -> Consumers:
    """Return the nodes that read each value of a graph."""
    found: dict[str, list[int | None]] = defaultdict(list)
    for place, node in enumerate(graph.node):
        for name in node.input:
            found[name].append(place)
        for name in _read_inside(node):
            found[name].append(None)
    for value in graph.output:
        found[value.name].append(None)
    return found


def _read_inside(node: NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            continue
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from _read_inside(inner)
            yield from (value.name for value in graph.output)


class GraphWriter:
    """Writes nodes, one after the other, with names of their own."""

    def __init__(self, prefix: str) -> None:
        """`prefix` begins the names."""
        self._prefix = prefix
        self.nodes: list[NodeProto] = []
        self.constants: dict[tuple[object, ...], TensorProto] = {}

    def __call__(
        self, operator: str, *inputs: str | ArrayLike, output: str | None = None, **given: Any
    ) -> str:
        """Add a node; its inputs are names of values, or constants. Return its output's name."""
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        output = output or f"{self._prefix}value/{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, names, [output], **given))
        return output

    def copy(self, node: NodeProto, source: str) -> str:
        """Add the same node for another first input."""
        output = f"{self._prefix}value/{len(self.nodes)}"
        copied = NodeProto()
        copied.CopyFrom(node)
        copied.name, copied.input[0], copied.output[0] = output, source, output
        self.nodes.append(copied)
        return output

    def constant(self, value: ArrayLike) -> str:
        """Return the name of an initializer; equal ones share it."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"{self._prefix}constant/{len(self.constants)}"
            self.constants[key] = onnx.numpy_helper.from_array(array, name)
        return self.constants[key].name
