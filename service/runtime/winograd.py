"""3 x 3 convolutions on a CPU with a quarter of the multiplications.

onnxruntime's CPU convolutions do nine multiplications for each output, input channel and filter,
near the peak of the cores: only fewer of them are faster. Winograd's minimal filtering takes a tile
of 6 x 6 pixels, transforms it, multiplies position by position and transforms back to a tile of
4 x 4: 36 multiplications for 16 outputs. The transforms are products with small constant matrices
and cost the more, the fewer the channels; only where the whole is cheaper is a convolution
rewritten, into standard operators. Sums are rounded in another order, so that answers differ in the
sixth digit or so. (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.)

A value is either a *map*, (N, C, H, W) as ONNX has it, or *rows*, (pixels, C), in which a gather
finds whole pixels. The rows of a rewritten convolution are in the order of its tiles and stay so
until something else wants the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto

from service.imaging.canvas import Size
from service.runtime.graphs import Consumers, GraphWriter, consumers_of

_INPUT_TRANSFORM: Final = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FILTER_TRANSFORM: Final = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT_TRANSFORM: Final = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)
"""For the points 0, 1, -1, 2, -2 and infinity, in one dimension; in two it is taken twice."""

_OUT: Final = 4
"""Pixels of a tile's side that come out."""
_IN: Final = 6
"""Pixels of a tile's side that go in: one more on each side."""
PREFIX: Final = "winograd/"
_ACTIVATIONS: Final = frozenset({"Relu", "Clip"})
"""What does the same to rows as to a map."""

# What a step costs for each pixel and channel, in multiplications of a direct convolution: measured
# with AVX2.
_DIRECT: Final = 9.0
_PRODUCT: Final = 2.75
_INTO_TILES: Final = 135.0
_OUT_OF_TILES: Final = 80.0
_FROM_MAP: Final = 30.0
_TO_MAP: Final = 40.0
_WEIGHTS: Final = 400.0
"""For each channel and filter: four times the weights come from memory."""
_NODES: Final = 2e6
"""For the convolution as a whole: a dozen small operators in place of one."""
_PRICE_BESIDE_WIDE: Final = 2.0
"""Transforms wait for memory, and the threads of a session for each other after each one. So where
products take half as long, transforms are twice as dear: with AVX-512 and 1.0 the bundled model, of
64 channels, took 1.2 to 1.3 times as long on two threads, but 0.94 on one thread beside another. A
ResNet-50 took 0.77 with either."""


def multiply_less(
    graph: GraphProto, canvas: Size, *, dear: bool = False
) -> tuple[dict[str, NDArray[np.float32]], int]:
    """Rewrite the convolutions of a graph that gain; (the transformed filters by name, how many).

    The filters are inputs of the graph then, so that all its sessions share them. On canvases of
    other sizes than `canvas` it answers as well; the gain is reckoned for this one. `dear`:
    products cost less than they are reckoned with, on vectors wider than AVX2's, and several
    threads share them.
    """
    consumers = consumers_of(graph)
    chosen = _choose(graph, consumers, canvas, _PRICE_BESIDE_WIDE if dear else 1.0)
    return (_Rewriter(graph, consumers, chosen).rewrite() if chosen else {}), len(chosen)


@dataclass(frozen=True, slots=True)
class _Convolution:
    """A convolution to rewrite, and the activation that alone reads its output, if any."""

    source: str
    weight: TensorProto
    bias: str | None
    activation: int | None
    """Its place among the nodes."""
    output: str
    """Of the activation, if there is one."""


def _choose(
    graph: GraphProto, consumers: Consumers, canvas: Size, price: float
) -> dict[int, _Convolution]:
    """Return the convolutions that gain, by their index among the nodes."""
    # A caller may give an input with a default another value.
    inputs = {value.name for value in graph.input}
    constants = {each.name: each for each in graph.initializer if each.name not in inputs}
    steps = _steps(graph)
    eligible = {
        place: _convolution(graph, node, constants, consumers)
        for place, node in enumerate(graph.node)
        if _is_eligible(node, constants)
    }
    sources = {each.source for each in eligible.values()}
    chosen: dict[int, _Convolution] = {}
    rows: set[str] = set()
    for place, each in eligible.items():
        step = steps.get(each.source)
        if step is None:
            continue
        pixels = canvas.area / step**2
        if _gains(
            each, pixels, price, from_rows=each.source in rows, to_rows=each.output in sources
        ):
            chosen[place] = each
            rows.add(each.output)
    return chosen


def _is_eligible(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Return whether a node is a dense 3 x 3 float32 convolution that keeps the size."""
    if node.op_type != "Conv" or node.domain:
        return False
    weight = constants.get(node.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT or list(weight.dims[2:]) != [3, 3]:
        return False
    given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return (
        given.get("auto_pad", b"NOTSET") == b"NOTSET"
        and given.get("group", 1) == 1
        and given.get("pads") == [1, 1, 1, 1]
        and given.get("strides", [1, 1]) == [1, 1]
        and given.get("dilations", [1, 1]) == [1, 1]
    )


def _convolution(
    graph: GraphProto,
    node: NodeProto,
    constants: Mapping[str, TensorProto],
    consumers: Consumers,
) -> _Convolution:
    output, activation = node.output[0], None
    match consumers.get(output):
        case [int(only)] if _is_activation(graph.node[only], output, constants):
            output, activation = graph.node[only].output[0], only
    return _Convolution(
        source=node.input[0],
        weight=constants[node.input[1]],
        bias=node.input[2] if len(node.input) > 2 and node.input[2] else None,
        activation=activation,
        output=output,
    )


def _is_activation(node: NodeProto, source: str, constants: Mapping[str, TensorProto]) -> bool:
    """Return whether a node maps every value of `source` alike and needs no later value."""
    first, *others = node.input
    return (
        node.op_type in _ACTIVATIONS
        and not node.domain
        and first == source
        and all(not name or name in constants for name in others)
    )


def _gains(
    convolution: _Convolution, pixels: float, price: float, *, from_rows: bool, to_rows: bool
) -> bool:
    filters, channels = convolution.weight.dims[:2]
    transforms = _INTO_TILES * channels + _OUT_OF_TILES * filters
    if not to_rows:
        transforms += _TO_MAP * filters
    # Had it stayed as it was, the rows would have to be made a map for it.
    transforms += -_TO_MAP * channels if from_rows else _FROM_MAP * channels
    cost = pixels * (_PRODUCT * channels * filters + price * transforms)
    cost += _WEIGHTS * channels * filters + price * _NODES
    # onnxruntime computes filters in blocks of eight.
    direct = pixels * _DIRECT * channels * (-(-filters // 8) * 8)
    return bool(cost < direct)


def _steps(graph: GraphProto) -> dict[str, int]:
    """Return the strides of feature maps, in pixels of the canvas, where they are known.

    A guess for values that are no maps, which does no harm: no convolution reads them.
    """
    steps = {value.name: 1 for value in graph.input}
    for node in graph.node:
        # What is enlarged is added to a map whose step is known.
        known = [steps[name] for name in node.input if name in steps]
        if not known or node.op_type in ("Resize", "Upsample", "ConvTranspose"):
            continue
        stride = next((each.ints[0] for each in node.attribute if each.name == "strides"), 1)
        steps.update(dict.fromkeys(node.output, known[0] * stride))
    return steps


class _Rewriter:
    """Replaces the chosen convolutions of a graph."""

    def __init__(
        self, graph: GraphProto, consumers: Consumers, chosen: Mapping[int, _Convolution]
    ) -> None:
        self._graph = graph
        self._consumers = consumers
        self._chosen = chosen
        self._writer = GraphWriter(PREFIX)
        self._weights: dict[str, NDArray[np.float32]] = {}
        self._rows: dict[str, str] = {}
        """By the value's name, in the order of tiles."""
        self._transformed: dict[str, str] = {}
        self._tilings: dict[str, _Tiling] = {}
        """By the name of a map of that size; convolutions of one size after the other share one."""

    def rewrite(self) -> dict[str, NDArray[np.float32]]:
        """Rewrite the graph. Return its new inputs by name."""
        graph = self._graph
        nodes = self._writer.nodes
        absorbed = {each.activation for each in self._chosen.values()}
        for place, node in enumerate(graph.node):
            if place in self._chosen:
                self._write(self._chosen[place])
            elif place not in absorbed:
                nodes.append(node)
        self._drop_filters()
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self._writer.constants.values())
        graph.input.extend(
            onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape)
            for name, weight in self._weights.items()
        )
        return self._weights

    def _drop_filters(self) -> None:
        """Remove the filters that no node reads any more."""
        replaced = {each.weight.name for each in self._chosen.values()}
        unread = {
            name
            for name in replaced
            if all(reader in self._chosen for reader in self._consumers[name])
        }
        # One by one: to write the list anew would copy all that stay.
        initializers = self._graph.initializer
        for place in reversed(range(len(initializers))):
            if initializers[place].name in unread:
                del initializers[place]

    def _write(self, convolution: _Convolution) -> None:
        write = self._writer
        weight = convolution.weight
        filters, channels = weight.dims[:2]
        tiling = self._tilings.setdefault(convolution.source, _Tiling(write, convolution.source))
        tiles = self._tiles(convolution.source, tiling, channels)
        products = write("MatMul", tiles, self._weight(weight))
        back = _in_both_directions(write, _OUTPUT_TRANSFORM, products)
        rows = write("Reshape", back, [-1, filters])
        if convolution.bias is not None:
            rows = write("Add", rows, convolution.bias)
        if convolution.activation is not None:
            rows = write.copy(self._graph.node[convolution.activation], rows)
        output = convolution.output
        self._rows[output] = rows
        self._tilings[output] = tiling
        if any(reader not in self._chosen for reader in self._consumers.get(output, ())):
            pixels = write("Gather", rows, tiling.pixels, axis=0)
            write("Transpose", pixels, output=output, perm=[0, 3, 1, 2])

    def _tiles(self, source: str, tiling: _Tiling, channels: int) -> str:
        """(36, tiles, channels): what stands at each place of the transformed tiles."""
        if source not in self._transformed:
            write = self._writer
            if source in self._rows:
                rows, places = self._rows[source], tiling.places_in_tiles
            else:
                pixels = write("Transpose", source, perm=[0, 2, 3, 1])
                rows, places = write("Reshape", pixels, [-1, channels]), tiling.places_in_map
            # What the tables call the row behind the last: the padding.
            padded = write("Concat", rows, np.zeros((1, channels), np.float32), axis=0)
            tiles = write("Gather", padded, places, axis=0)
            transformed = _in_both_directions(write, _INPUT_TRANSFORM, tiles)
            self._transformed[source] = write("Reshape", transformed, [_IN**2, -1, channels])
        return self._transformed[source]

    def _weight(self, weight: TensorProto) -> str:
        name = f"{PREFIX}filters/{weight.name}"
        if name not in self._weights:
            filters, channels = weight.dims[:2]
            kernels = onnx.numpy_helper.to_array(weight).transpose(2, 3, 1, 0).reshape(9, -1)
            across = _squared(_FILTER_TRANSFORM) @ kernels
            self._weights[name] = across.reshape(_IN**2, channels, filters)
        return name


class _Tiling:
    """The tiles of maps of one size, and tables of which row is which pixel."""

    def __init__(self, write: GraphWriter, like: str) -> None:
        self._write = write
        self._like = like

    @cached_property
    def pixels(self) -> str:
        """(N, H, W): the row of each pixel in the order of tiles."""
        write = self._write
        whole = write("Concat", self._count, self._reach, axis=0)
        split = write("Reshape", self._range(self._split_rows), self._split)
        joined = write("Reshape", write("Transpose", split, perm=[2, 3, 0, 4, 1]), whole)
        return write("Slice", joined, [0, 0], self._sides, [1, 2])

    @cached_property
    def places_in_tiles(self) -> str:
        """Return the row of each pixel of a tile, by place in the tile, then by tile."""
        return self._places(self.pixels, self._split_rows)

    @cached_property
    def places_in_map(self) -> str:
        """The same for rows in the order of a map's pixels."""
        shape = self._write("Concat", self._count, self._sides, axis=0)
        rows = self._product(shape)
        return self._places(self._write("Reshape", self._range(rows), shape), rows)

    @cached_property
    def _shape(self) -> str:
        return self._write("Shape", self._like)

    @cached_property
    def _count(self) -> str:
        return self._write("Slice", self._shape, [0], [1])

    @cached_property
    def _sides(self) -> str:
        return self._write("Slice", self._shape, [2], [4])

    @cached_property
    def _tiles(self) -> str:
        """Down and across."""
        return self._write("Div", self._write("Add", self._sides, [_OUT - 1]), [_OUT])

    @cached_property
    def _split(self) -> str:
        """Of the rows in the order of tiles: place in the tile (2), map, tile (2)."""
        return self._write("Concat", [_OUT, _OUT], self._count, self._tiles, axis=0)

    @cached_property
    def _split_rows(self) -> str:
        return self._product(self._split)

    @cached_property
    def _reach(self) -> str:
        """Down and across: pixels up to the end of the last tile, which may be beyond the map."""
        return self._write("Mul", self._tiles, [_OUT])

    @cached_property
    def _windows(self) -> tuple[str, str]:
        """(6, tiles) down and across: the pixel of the padded map at each place of each tile."""
        write = self._write
        offsets = np.arange(_IN)[:, np.newaxis]
        down, across = (
            write(
                "Add",
                write(
                    "Range",
                    np.int64(0),
                    write("Gather", self._reach, np.int64(side)),
                    np.int64(_OUT),
                ),
                offsets,
            )
            for side in (0, 1)
        )
        return down, across

    @cached_property
    def _padding(self) -> str:
        """One pixel around, and up to whole tiles."""
        write = self._write
        beyond = write("Sub", write("Add", self._reach, [1]), self._sides)
        return write("Concat", [0, 1, 1, 0], beyond, axis=0)

    def _product(self, shape: str) -> str:
        return self._write("ReduceProd", shape, keepdims=0)

    def _range(self, rows: str) -> str:
        return self._write("Range", np.int64(0), rows, np.int64(1))

    def _places(self, rows: str, behind_last: str) -> str:
        write = self._write
        padded = write("Pad", rows, self._padding, behind_last)
        down, across = self._windows
        windows = write("Gather", write("Gather", padded, down, axis=1), across, axis=3)
        return write("Reshape", write("Transpose", windows, perm=[1, 3, 0, 2, 4]), [-1])


def _in_both_directions(write: GraphWriter, transform: NDArray[np.floating], tiles: str) -> str:
    """Transform tiles, (36, tiles, channels), down and then across.

    Both at once, by one matrix of 36 columns, is two to three times the multiplications.
    """
    out, into = transform.shape
    matrix = write.constant(transform.astype(np.float32))
    down = write("MatMul", matrix, write("Reshape", tiles, [into, -1]))
    return write("MatMul", matrix, write("Reshape", down, [out, into, -1]))


def _squared(transform: NDArray[np.floating]) -> NDArray[np.float32]:
    """What a one-dimensional transform does in two dimensions, row by row of a tile."""
    return np.kron(transform, transform).astype(np.float32)
