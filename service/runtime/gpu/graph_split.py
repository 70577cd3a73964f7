"""A model file cut in three, so that a GPU need only do what GPUs do well.

The *network* (pixels to candidate boxes) is what a CUDA graph can hold; *selection* (behind the
seam) is not, since non-maximum suppression on CUDA copies to the host for each class of each
image. What follows from the canvas's shape alone, such as the anchors, is the *canvas* part: it
is computed once, because onnxruntime would place it on the CPU and copy it to the GPU in the middle
of the network, which no CUDA graph may hold. All nodes stay as they are, and so do the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from service.runtime.detector import INPUTS, OUTPUTS, SEAM

_IMAGES, _IMAGE_SIZES = INPUTS[:2]

_ON_HOST: Final[Mapping[str, frozenset[int]]] = {
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "ReduceMax": frozenset({1}),
    "ReduceMean": frozenset({1}),
    "ReduceSum": frozenset({1}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
"""Inputs that onnxruntime's CUDA kernels read in the host's memory: shapes, axes and counts."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A value of the canvas part that the network takes as an input."""

    source: str
    """Output of the canvas part."""
    name: str
    """Input of the network."""
    on_host: bool
    """Whether its one consumer reads it in the host's memory."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Three ONNX files that together compute what the whole file does."""

    canvas: bytes | None
    """`images`, of which only the shape counts, to the sources of `constants`. None: no need."""
    network: bytes
    """`images`, `image_sizes` if it is used, and `constants` to the candidates."""
    selection: bytes
    """The candidates and the thresholds to the file's own outputs."""
    constants: tuple[Constant, ...]
    takes_sizes: bool
    """Whether the network has the input `image_sizes`."""


def split(content: bytes) -> Parts | None:
    """Split a model file at its `candidate_*` values. None if they are missing or not a cut.

    Files of other exporters may lack the names `candidate_*`; they are served whole.
    """
    model = onnx.load_model_from_string(content)
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    if any(name not in producers for name in SEAM):
        return None
    if any(_has_subgraph(node) for node in graph.node):
        return None
    network = _closure(graph, producers, SEAM, stop=())
    selection = _closure(graph, producers, OUTPUTS, stop=SEAM)
    if _reads(network, INPUTS[2:]) or _reads(selection, INPUTS[:2]):
        return None
    canvas_names = _canvas_names(graph, network)
    if canvas_names.intersection(SEAM):
        return None
    types = _types(model)
    canvas_nodes = [node for node in network if canvas_names.intersection(node.output)]
    kept = [node for node in network if not canvas_names.intersection(node.output)]
    nodes, constants = _with_constants(_without_gather_nd(graph, kept), canvas_names)
    if any(each.source not in types for each in constants):
        return None
    return _parts(model, types, canvas_nodes, nodes, selection, constants)


def _parts(
    model: ModelProto,
    types: Mapping[str, ValueInfoProto],
    canvas_nodes: Sequence[NodeProto],
    network: Sequence[NodeProto],
    selection: Sequence[NodeProto],
    constants: Sequence[Constant],
) -> Parts | None:
    if any(name not in types for name in SEAM):
        return None
    takes_sizes = _reads(network, [_IMAGE_SIZES])
    given = [types[_IMAGES], *([types[_IMAGE_SIZES]] if takes_sizes else [])]
    seam = [types[name] for name in SEAM]
    sources = list(dict.fromkeys(each.source for each in constants))
    # Constants that the canvas part needs too are computed there once more.
    everything = _closure(
        model.graph, {n: node for node in model.graph.node for n in node.output}, sources, stop=()
    )
    return Parts(
        canvas=_part(model, everything, given[:1], [types[name] for name in sources])
        if canvas_nodes and sources
        else None,
        network=_part(
            model,
            network,
            [*given, *(_renamed(types[each.source], each.name) for each in constants)],
            seam,
        ),
        selection=_part(
            model,
            selection,
            [*seam, *(types[name] for name in INPUTS[2:])],
            [types[name] for name in OUTPUTS],
        ),
        constants=tuple(constants),
        takes_sizes=takes_sizes,
    )


def _part(
    model: ModelProto,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
) -> bytes:
    """Return some nodes of a model as a model, with the weights that they use."""
    used = {name for node in nodes for name in node.input}
    given = {each.name for each in inputs}
    part = ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name
    part.graph.node.extend(nodes)
    part.graph.input.extend(inputs)
    part.graph.output.extend(outputs)
    part.graph.initializer.extend(
        each for each in model.graph.initializer if each.name in used and each.name not in given
    )
    return bytes(part.SerializeToString())


def _closure(
    graph: GraphProto,
    producers: Mapping[str, NodeProto],
    names: Iterable[str],
    *,
    stop: Iterable[str],
) -> list[NodeProto]:
    """Return the nodes that `names` depend on, in the graph's order, up to `stop`."""
    seen = set(stop)
    pending = [name for name in names if name not in seen]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        node = producers.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        found.update(node.output)
        pending.extend(node.input)
    return [node for node in graph.node if found.intersection(node.output)]


def _canvas_names(graph: GraphProto, network: Sequence[NodeProto]) -> set[str]:
    """Return the values that follow from the shape of `images` and from constants."""
    inputs = {each.name for each in graph.input}
    fixed = {each.name for each in graph.initializer} - inputs
    names: set[str] = set()
    for node in network:
        given = [name for name in node.input if name]
        if node.op_type == "Shape" and given == [_IMAGES]:
            names.update(node.output)
        elif all(name in fixed for name in given):
            fixed.update(node.output)
        elif all(name in fixed or name in names for name in given):
            names.update(node.output)
    return names


def _with_constants(
    nodes: Sequence[NodeProto], canvas_names: set[str]
) -> tuple[list[NodeProto], list[Constant]]:
    """Return the nodes with inputs in place of what the canvas part computes.

    Values that are read both on the host and on the device become two inputs: one would have to
    be copied between the two.
    """
    constants: dict[str, Constant] = {}
    answer = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for position, name in enumerate(node.input):
            if name in canvas_names:
                on_host = position in _ON_HOST.get(node.op_type, ())
                constant = Constant(name, f"{name}/{'host' if on_host else 'device'}", on_host)
                constants[constant.name] = constant
                copy.input[position] = constant.name
        answer.append(copy)
    return answer, list(constants.values())


def _without_gather_nd(graph: GraphProto, nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Return the nodes with GatherND replaced by an equivalent Gather.

    GatherND on CUDA copies from a temporary of the host, and a CUDA graph that is replayed would
    copy from where that temporary once was.
    """
    values = {each.name: each for each in graph.initializer}
    columns: dict[str, str] = {}
    answer = []
    for node in nodes:
        if node.op_type == "Unsqueeze" and node.input[-1] in values:
            axes = onnx.numpy_helper.to_array(values[node.input[-1]]).tolist()
            if axes == [-1]:
                columns[node.output[0]] = node.input[0]
        batch_dims = any(each.name == "batch_dims" and each.i for each in node.attribute)
        if node.op_type != "GatherND" or node.input[1] not in columns or batch_dims:
            answer.append(node)
            continue
        inputs = [node.input[0], columns[node.input[1]]]
        answer.append(
            onnx.helper.make_node("Gather", inputs, list(node.output), name=node.name, axis=0)
        )
    return answer


def _types(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Return the types of values, as far as onnx infers them; of shapes only the rank.

    Lengths noted or inferred there may hold for some batches only.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {each.name: each for each in (*graph.input, *graph.output)}
    for value in graph.value_info:
        if value.type.tensor_type.elem_type:
            types[value.name] = _with_rank_alone(value)
    return types


def _with_rank_alone(value: ValueInfoProto) -> ValueInfoProto:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return value
    dims = tensor.shape.dim
    # The length of a shape is the rank of another value, and that is certain.
    if len(dims) == 1 and tensor.elem_type == onnx.TensorProto.INT64:
        return value
    return onnx.helper.make_tensor_value_info(value.name, tensor.elem_type, [None] * len(dims))


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _reads(nodes: Iterable[NodeProto], names: Iterable[str]) -> bool:
    wanted = set(names)
    return any(wanted.intersection(node.input) for node in nodes)


def _has_subgraph(node: NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
