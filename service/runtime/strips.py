"""The first convolutions of a network on a CPU, one strip of the image after the other.

The first maps are the largest and do not fit into a core's cache, where a convolution waits for
memory. Strip by strip through a chain of convolutions they do. A strip needs some rows of its
neighbours, which are computed twice. It is for sessions of one thread: several wait for each other
in every strip. (Lin et al., "MCUNetV2", 2021, compute so to need less memory.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, numpy_helper

from service.imaging.canvas import Size
from service.runtime.winograd import Consumers

PREFIX: Final = "strips/"
_ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
_CACHED: Final = 4_000_000
"""Bytes of a strip's largest map: measured with 1 MB of second-level cache a core."""


def compute_in_strips(graph: GraphProto, canvases: Sequence[Size], consumers: Consumers) -> int:
    """Rewrite the chain of convolutions that the image goes through first; return its strips.

    The graph then answers on `canvases` only. 0: nothing is rewritten.
    """
    places, steps = _first_chain(graph, consumers)
    if not steps or not canvases:
        return 0
    count = -(-max(_largest_map(steps, canvas) for canvas in canvases) // _CACHED)
    stride = math.prod(step.stride for step in steps)
    # The rows that a strip needs beyond those of the image that its share of the last map covers.
    above, below = 0, 0
    for step in reversed(steps):
        above = above * step.stride + step.top
        below = below * step.stride + step.kernel - step.stride - step.top
    heights = {canvas.height for canvas in canvases}
    if count < 2 or any(
        _height(steps, height) * stride != height
        or height // stride // count * stride < max(above, below)
        for height in heights
    ):
        return 0
    chain = [graph.node[place] for place in places]
    written = _write(graph, chain, count, stride, (above, below))
    nodes = list(graph.node)
    kept = [node for place, node in enumerate(nodes[: places[-1]]) if place not in places]
    after = nodes[places[-1] + 1 :]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*kept, *written, *after])
    return count


@dataclass(frozen=True, slots=True)
class _Step:
    """A convolution: what it makes of rows."""

    kernel: int
    stride: int
    top: int
    bottom: int
    filters: int


def _first_chain(graph: GraphProto, consumers: Consumers) -> tuple[list[int], list[_Step]]:
    """(places of the nodes from the first convolution to the first fork, their convolutions)."""
    filters = {each.name: each.dims for each in graph.initializer}
    first = next((place for place, node in enumerate(graph.node) if node.op_type == "Conv"), None)
    source = "" if first is None else graph.node[first].input[0]
    places: list[int] = []
    steps: list[_Step] = []
    readers: Sequence[int | None] = [first]
    while len(readers) == 1 and readers[0] is not None:
        node = graph.node[readers[0]]
        if node.domain or node.input[0] != source:
            break
        if node.op_type == "Conv" and (step := _step(node, filters)) is not None:
            steps.append(step)
        elif not steps or node.op_type not in _ACTIVATIONS:
            break
        places.append(readers[0])
        source = node.output[0]
        readers = consumers[source]
    return places, steps


def _step(node: NodeProto, filters: Mapping[str, Sequence[int]]) -> _Step | None:
    """Return what a convolution makes of rows; None where that is not known, or not the same."""
    given = _attributes(node)
    dims = filters.get(node.input[1], ())
    if len(dims) != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    top, _, bottom, _ = given.get("pads", [0] * 4)
    stride, across = given.get("strides", [1, 1])
    if stride != across or given.get("dilations", [1, 1]) != [1, 1]:
        return None
    return _Step(dims[2], stride, top, bottom, dims[0])


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _height(steps: Sequence[_Step], height: int) -> int:
    for step in steps:
        height = (height + step.top + step.bottom - step.kernel) // step.stride + 1
    return height


def _largest_map(steps: Sequence[_Step], canvas: Size) -> int:
    """Return the bytes of the largest map that one convolution of the chain leaves to the next."""
    area, sizes = canvas.area, [0]
    for step in steps[:-1]:
        area //= step.stride**2
        sizes.append(4 * area * step.filters)
    return max(sizes)


def _write(
    graph: GraphProto, chain: Sequence[NodeProto], count: int, stride: int, reach: tuple[int, int]
) -> list[NodeProto]:
    """Return the nodes that compute a chain in strips, and add their constants to the graph."""
    written: list[NodeProto] = []

    def constant(name: str, value: Any) -> str:
        array = np.array(value, dtype=np.int64)
        graph.initializer.append(numpy_helper.from_array(array, PREFIX + name))
        return PREFIX + name

    def node(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        outputs = [PREFIX + name]
        written.append(onnx.helper.make_node(kind, inputs, outputs, outputs[0], **attributes))
        return outputs[0]

    source = chain[0].input[0]
    rows = constant("rows", [2])
    size = constant("stride", stride)
    # The first row of each strip but the first is that of its share of the last map's rows.
    height = node("Gather", [node("Shape", [source], "shape"), rows], "height")
    shares = node(
        "Mul", [node("Div", [height, size], "mapped"), constant("k", range(1, count))], "shares"
    )
    seams = node("Mul", [node("Div", [shares, constant("count", count)], "last"), size], "seams")
    starts = node("Sub", [seams, constant("above", reach[0])], "starts")
    ends = node("Add", [seams, constant("below", reach[1])], "ends")
    zero = constant("zero", [0])
    seam = [constant(f"seam/{index}", [index]) for index in range(count - 1)]
    strips = []
    for strip in range(count):
        is_first, is_last = strip == 0, strip == count - 1
        start, end = zero, height
        if not is_first:
            start = node("Gather", [starts, seam[strip - 1]], f"{strip}/start")
        if not is_last:
            end = node("Gather", [ends, seam[strip]], f"{strip}/end")
        value = node("Slice", [source, start, end, rows], f"{strip}/in")
        for place, each in enumerate(chain):
            copy = NodeProto()
            copy.CopyFrom(each)
            copy.name = copy.output[0] = f"{PREFIX}{strip}/{place}"
            copy.input[0] = value
            value = copy.output[0]
            for attribute in copy.attribute:
                if attribute.name == "pads":
                    attribute.ints[0] *= is_first
                    attribute.ints[2] *= is_last
            written.append(copy)
        strips.append(value)
    written.append(
        onnx.helper.make_node("Concat", strips, chain[-1].output, f"{PREFIX}map", axis=2)
    )
    return written
