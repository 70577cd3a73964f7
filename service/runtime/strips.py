"""The first convolutions of a network on a CPU, one strip of the image after the other.

The first maps are the largest and do not fit into a core's cache, where a convolution waits for
memory. Of a strip through a chain of convolutions more stays there. It needs some rows of its
neighbours, which are computed twice. (Lin et al., "MCUNetV2", 2021, do so to need less memory.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import GraphProto, NodeProto

from service.imaging.canvas import MULTIPLE, Size
from service.runtime.graphs import GraphWriter, consumers_of

PREFIX: Final = "strips/"
_ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
_CACHED: Final = 4_000_000
"""Bytes below which a strip's largest map gains nothing more, with 1 MB of second-level cache."""


def compute_in_strips(graph: GraphProto, canvas: Size) -> int:
    """Rewrite the chain of convolutions that the image goes through first; return its strips.

    Their number is for `canvas`, the largest; canvases of any size are answered. 0: nothing is
    rewritten.
    """
    places, steps = _first_chain(graph)
    stride = math.prod(step.stride for step in steps)
    if MULTIPLE % stride or not all(step.divides_evenly for step in steps):
        return 0
    # The rows that a strip needs beyond those of the image that its share of the last map covers.
    above, below = 0, 0
    for step in reversed(steps):
        above = above * step.stride + step.top
        below = below * step.stride + step.kernel - step.stride - step.top
    # On the lowest canvas, too, no strip but the first and last needs rows beyond the image.
    most = MULTIPLE // (math.ceil(max(above, below, 1) / stride) * stride)
    count = min(math.ceil(_largest_map(steps, canvas) / _CACHED), most)
    if count < 2:
        return 0
    nodes = list(graph.node)
    write = GraphWriter(PREFIX)
    _write(write, [nodes[place] for place in places], count, stride, (above, below))
    kept = [node for place, node in enumerate(nodes[: places[-1]]) if place not in places]
    after = nodes[places[-1] + 1 :]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*kept, *write.nodes, *after])
    graph.initializer.extend(write.constants.values())
    return count


@dataclass(frozen=True, slots=True)
class _Step:
    """A convolution: what it makes of rows."""

    kernel: int
    stride: int
    top: int
    bottom: int
    filters: int

    @property
    def divides_evenly(self) -> bool:
        """Whether of stride * n rows it makes n."""
        return -self.stride <= self.top + self.bottom - self.kernel < 0


def _first_chain(graph: GraphProto) -> tuple[list[int], list[_Step]]:
    """(places of the nodes from the first convolution to the first fork, their convolutions)."""
    filters = {each.name: list(each.dims) for each in graph.initializer}
    consumers = consumers_of(graph)
    first = next((place for place, node in enumerate(graph.node) if node.op_type == "Conv"), None)
    if first is None or filters.get(graph.node[first].input[1], [])[1:2] != [3]:
        # Not of an image's three channels, so perhaps not of all its rows.
        return [], []
    source = graph.node[first].input[0]
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


def _step(node: NodeProto, filters: Mapping[str, list[int]]) -> _Step | None:
    """Return what a convolution makes of rows; None where that is not known, or not the same."""
    given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    dims = filters.get(node.input[1], [])
    if len(dims) != 4 or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    top, _, bottom, _ = given.get("pads", [0] * 4)
    stride, across = given.get("strides", [1, 1])
    if stride != across or given.get("dilations", [1, 1]) != [1, 1]:
        return None
    return _Step(dims[2], stride, top, bottom, dims[0])


def _largest_map(steps: Sequence[_Step], canvas: Size) -> int:
    """Return the bytes of the largest map that one convolution of the chain leaves to the next."""
    area, sizes = canvas.area, [0]
    for step in steps[:-1]:
        area //= step.stride**2
        sizes.append(4 * area * step.filters)
    return max(sizes)


def _write(
    write: GraphWriter, chain: Sequence[NodeProto], count: int, stride: int, reach: tuple[int, int]
) -> None:
    """Write a chain in strips, each with `reach` rows of its neighbours (above, below)."""
    source = chain[0].input[0]
    height = write("Slice", write("Shape", source), [2], [3])
    shares = write("Mul", write("Div", height, [stride]), range(1, count))
    # The image's row at which a strip begins, but for the first.
    seams = write("Mul", write("Div", shares, [count]), [stride])
    starts = write("Concat", [0], write("Sub", seams, [reach[0]]), axis=0)
    ends = write("Concat", write("Add", seams, [reach[1]]), height, axis=0)
    strips = []
    for strip in range(count):
        bounds = [write("Gather", each, [strip]) for each in (starts, ends)]
        value = write("Slice", source, *bounds, [2])
        for node in chain:
            value = write.copy(node, value)
            for attribute in write.nodes[-1].attribute:
                if attribute.name == "pads":
                    attribute.ints[0] *= strip == 0
                    attribute.ints[2] *= strip == count - 1
        strips.append(value)
    write("Concat", *strips, axis=2, output=chain[-1].output[0])
