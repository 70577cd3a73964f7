"""A rewritten convolution gives the values that the plain one gives, and only gainful ones are."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from itertools import chain

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from service.engine.models.startup import open_models
from service.imaging.canvas import Size
from service.runtime import devices
from service.runtime.artifact import Artifact, read_artifact, scan_repository
from service.runtime.devices import Device, fitted, open_detector, providers, session_options
from service.runtime.rewriting import rewrite
from service.settings import Settings, bundled_models
from service.system.cpus import cpu_count
from tests.canvases import found, noise, sizes_of
from tests.required_inputs import without_defaults
from tests.unit.service.runtime.networks import model

CPU = Device("cpu")
LARGE = Size(800, 1088)
"""What the gain is reckoned for, so that what is run may be small."""
Values = dict[str, NDArray[np.float32]]


def run(content: bytes, values: Values) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(content, session_options(CPU), providers=providers(CPU))
    answer: list[NDArray[np.float32]] = session.run(None, values)
    return answer


def compared(content: bytes, values: Values) -> ModelProto:
    """The rewritten network, once it has given what the plain one gives."""
    rewritten = rewrite(content, LARGE)
    assert rewritten is not None
    expected = run(content, values)
    answer = run(rewritten.content, {**values, **rewritten.weights})
    for mine, theirs in zip(answer, expected, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    return onnx.load_model_from_string(rewritten.content)


def drawn(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def convolutions(network: ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in network.graph.node)


ONE = """
one (float[n, c, h, w] x) => (float[n, k, h, w] y)
{ y = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) }
"""


@pytest.mark.parametrize(
    ("height", "width"), [(8, 12), (13, 9), (1, 1), (2, 7), (4, 5), (3, 16), (17, 4)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_winograd_handles_any_map_size(height: int, width: int, count: int) -> None:
    content = model(ONE, {"w1": (144, 128, 3, 3), "b1": (144,)})

    network = compared(content, {"x": drawn(count, 128, height, width)})

    assert convolutions(network) == 0


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 19, 21])
def test_winograd_handles_every_opset_from_13(opset: int) -> None:
    content = model(ONE, {"w1": (128, 128, 3, 3), "b1": (128,)}, opset=opset)

    assert convolutions(compared(content, {"x": drawn(1, 128, 10, 11)})) == 0


def test_winograd_stays_exact_with_many_channels() -> None:
    content = model(ONE, {"w1": (256, 512, 3, 3), "b1": (256,)})

    compared(content, {"x": 1000 * drawn(1, 512, 9, 9)})


def test_winograd_keeps_tiles_between_convolutions() -> None:
    content = model(
        """
        tower (float[n, c, h, w] x) => (float[n, k, h, w] y)
        <float low = {0.0}, float high = {6.0}>
        {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu (a)
            c = Conv <pads = [1, 1, 1, 1], strides = [1, 1], dilations = [1, 1], group = 1> (b, w2)
            d = Clip (c, low, high)
            e = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (d, w3, b3)
            y = Relu (e)
        }
        """,
        {"w1": (128, 64, 3, 3), "b1": (128,), "w2": (96, 128, 3, 3), "w3": (64, 96, 3, 3)}
        | {"b3": (64,)},
    )

    network = compared(content, {"x": drawn(2, 64, 11, 14)})

    assert convolutions(network) == 0
    # In at the start and out at the end, and one inside the tables.
    assert sum(node.op_type == "Transpose" for node in network.graph.node) == 5


def test_winograd_handles_heads_with_shared_weights() -> None:
    """What a RetinaNet does: two towers on each of several maps, the weights the same on each."""
    content = model(
        """
        heads (float[n, c, h, w] x) => (float[n, k, h, w] classes, float[n, l, h, w] boxes,
                                        float[n, k, i, j] far)
        {
            trunk = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
            a = Conv <pads = [1, 1, 1, 1]> (trunk, w1, b1)
            b = Relu (a)
            classes = Conv <pads = [1, 1, 1, 1]> (b, w2, b2)
            d = Conv <pads = [1, 1, 1, 1]> (trunk, w3)
            e = Relu (d)
            boxes = Conv <pads = [1, 1, 1, 1]> (e, w4)
            down = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (trunk, w0, b0)
            f = Conv <pads = [1, 1, 1, 1]> (down, w1, b1)
            g = Relu (f)
            far = Conv <pads = [1, 1, 1, 1]> (g, w2, b2)
        }
        """,
        {"w0": (128, 128, 3, 3), "b0": (128,), "w1": (128, 128, 3, 3), "b1": (128,)}
        | {"w2": (60, 128, 3, 3), "b2": (60,), "w3": (128, 128, 3, 3), "w4": (36, 128, 3, 3)},
    )

    network = compared(content, {"x": drawn(1, 128, 18, 22)})

    assert convolutions(network) == 1, "the one that halves the map"
    weights = [value.name for value in network.graph.input if value.name != "x"]
    assert len(weights) == 5, "shared ones are there once"


def test_winograd_takes_norms_into_its_filters() -> None:
    content = model(
        """
        level (float[n, c, h, w] x) => (float[n, k, h, w] y)
        <float[128] one = {ONES}>
        {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1)
            b = BatchNormalization <epsilon = 1.0> (a, scale, shift, shift, one)
            y = Relu (b)
        }
        """.replace("ONES", ", ".join(["1.0"] * 128)),
        {"w1": (128, 128, 3, 3), "scale": (128,), "shift": (128,)},
    )

    network = compared(content, {"x": drawn(1, 128, 10, 11)})

    kinds = {node.op_type for node in network.graph.node}
    assert not kinds & {"Conv", "BatchNormalization"}


def test_winograd_keeps_values_read_elsewhere() -> None:
    """An output, another operator, a branch: each finds the map under its name."""
    content = model(
        """
        read (float[n, c, h, w] x) => (float[n, k, h, w] a, float[n, k, h, w] total,
                                       float[1, 1, 1, 1] mean)
        {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu (a)
            c = Conv <pads = [1, 1, 1, 1]> (b, w1, b1)
            total = Add (b, c)
            yes = Constant <value = bool {1}> ()
            d = Conv <pads = [1, 1, 1, 1]> (c, w1, b1)
            mean = If (yes) <
                then_branch = then () => (float[1, 1, 1, 1] m) { m = ReduceMean (d) },
                else_branch = other () => (float[1, 1, 1, 1] l) { l = ReduceMax (c) }
            >
        }
        """,
        {"w1": (128, 128, 3, 3), "b1": (128,)},
    )

    assert convolutions(compared(content, {"x": drawn(2, 128, 7, 10)})) == 0


def test_winograd_handles_activation_bounds_computed_later() -> None:
    content = model(
        """
        late (float[n, c, h, w] x) => (float[n, k, h, w] y)
        {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            low = Constant <value = float {-0.5}> ()
            y = Clip (a, low)
        }
        """,
        {"w1": (128, 128, 3, 3), "b1": (128,)},
    )

    assert convolutions(compared(content, {"x": drawn(1, 128, 6, 6)})) == 0


def test_winograd_rewrite_is_idempotent() -> None:
    content = model(ONE, {"w1": (128, 128, 3, 3), "b1": (128,)})
    once = rewrite(content, LARGE)
    assert once is not None

    assert rewrite(once.content, LARGE) is None


def test_winograd_pads_beyond_the_map_in_every_layer() -> None:
    """A bias reaches into the padding of the tiles, and must not reach the next layer."""
    text = """
    deep (float[n, c, h, w] x) => (float[n, c, h, w] y)
    {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        b = Conv <pads = [1, 1, 1, 1]> (a, w1, b1)
        y = Conv <pads = [1, 1, 1, 1]> (b, w1, b1)
    }
    """
    content = model(text, {"w1": (96, 96, 3, 3), "b1": (96,)})

    compared(content, {"x": np.zeros((1, 96, 5, 6), np.float32)})


@pytest.mark.parametrize(
    "convolution",
    [
        "Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1)",
        "Conv <pads = [1, 1, 1, 1], strides = [1, 2]> (x, w1)",
        "Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (x, w1)",
        "Conv <pads = [1, 1, 1, 1], group = 2> (x, half)",
        "Conv <pads = [0, 1, 0, 1]> (x, w1)",
        "Conv (x, w1)",
        'Conv <auto_pad = "SAME_UPPER"> (x, w1)',
        "Conv <pads = [0, 0, 0, 0]> (x, point)",
        "Conv <pads = [2, 2, 2, 2]> (x, five)",
    ],
)
def test_winograd_keeps_other_convolutions(convolution: str) -> None:
    text = f"""
    other (float[n, c, h, w] x) => (float[n, k, i, j] y)
    {{ unused = Add (w1, w1)  y = {convolution} }}
    """
    shapes = {"w1": (128, 128, 3, 3), "half": (128, 64, 3, 3)}
    shapes |= {"point": (128, 128, 1, 1), "five": (128, 128, 5, 5)}

    assert rewrite(model(text, shapes), LARGE) is None


def test_winograd_keeps_replaceable_weights() -> None:
    text = """
    given (float[n, c, h, w] x, float[k, c, 3, 3] w1) => (float[n, k, h, w] y)
    { y = Conv <pads = [1, 1, 1, 1]> (x, w1) }
    """

    assert rewrite(model(text, {"w1": (128, 128, 3, 3)}), LARGE) is None


def test_winograd_keeps_half_precision_weights() -> None:
    parsed = onnx.load_model_from_string(model(ONE, {"w1": (128, 128, 3, 3), "b1": (128,)}))
    for each in parsed.graph.initializer:
        half = onnx.numpy_helper.to_array(each).astype(np.float16)
        each.CopyFrom(onnx.numpy_helper.from_array(half, each.name))
    for value in chain(parsed.graph.input, parsed.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16

    assert rewrite(parsed.SerializeToString(), LARGE) is None


def test_winograd_keeps_files_with_functions_or_old_opsets() -> None:
    shapes = {"w1": (128, 128, 3, 3), "b1": (128,)}
    old = model(ONE, shapes, opset=12)
    functions = onnx.load_model_from_string(model(ONE, shapes))
    functions.functions.append(
        onnx.parser.parse_function('<opset_import: ["" : 18], domain: "own"> f (a) => (b) '
                                   "{ b = Relu (a) }")
    )  # fmt: skip

    assert rewrite(old, LARGE) is None
    assert rewrite(functions.SerializeToString(), LARGE) is None


@pytest.mark.parametrize(
    ("filters", "channels", "canvas", "worth"),
    [
        (256, 256, LARGE, True),
        (128, 128, Size(96, 96), True),
        # The transforms cost more than they save.
        (32, 32, LARGE, False),
        (8, 256, LARGE, False),
        (256, 16, LARGE, False),
        # The weights alone take longer than so few pixels.
        (512, 512, Size(8, 8), False),
    ],
)
def test_winograd_rewrites_only_what_gains(
    filters: int, channels: int, canvas: Size, worth: bool
) -> None:
    content = model(ONE, {"w1": (filters, channels, 3, 3), "b1": (filters,)})

    assert (rewrite(content, canvas) is not None) == worth


def test_winograd_gain_depends_on_the_map_size() -> None:
    """Strides make it smaller; what was enlarged again has the size of what it is added to."""
    content = model(
        """
        levels (float[n, c, h, w] x) => (float[n, k, i, j] y, float[n, k, l, m] z)
        <float[4] twice = {1.0, 1.0, 2.0, 2.0}>
        {
            a = Conv <strides = [4, 4]> (x, w0)
            b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
            y = Conv <pads = [1, 1, 1, 1]> (b, w1)
            large = Resize <mode = "nearest"> (b, , twice)
            c = Add (large, a)
            z = Conv <pads = [1, 1, 1, 1]> (c, w1)
        }
        """,
        {"w0": (128, 8, 4, 4), "w1": (128, 128, 3, 3)},
    )
    canvas = Size(96, 128)

    rewritten = rewrite(content, canvas)

    assert rewritten is not None
    left = [node.output[0] for node in onnx.load_model_from_string(rewritten.content).graph.node]
    assert "y" in left
    plain, faster = (
        run(each, {"x": drawn(1, 8, *canvas)} | dict(weights))
        for each, weights in ((content, {}), (rewritten.content, rewritten.weights))
    )
    for mine, theirs in zip(faster, plain, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("channels", "worth"), [(64, False), (128, True)])
def test_winograd_keeps_few_channels_with_wide_vectors(channels: int, worth: bool) -> None:
    text = """
    tower (float[n, c, h, w] x) => (float[n, c, h, w] y)
    {
        a = Conv <pads = [1, 1, 1, 1]> (x, w1)
        b = Conv <pads = [1, 1, 1, 1]> (a, w1)
        y = Conv <pads = [1, 1, 1, 1]> (b, w1)
    }
    """
    content = model(text, {"w1": (channels, channels, 3, 3)})

    assert rewrite(content, LARGE) is not None
    assert (rewrite(content, LARGE, dear=True) is not None) == worth


@pytest.fixture(scope="module")
def bundled() -> Artifact:
    return read_artifact(scan_repository(bundled_models())[0].path)


def test_winograd_keeps_detections_of_the_bundled_model(
    bundled: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_wide_vectors", lambda: False)
    faster = open_detector(bundled, CPU)
    plain = open_detector(bundled, replace(CPU, winograd=False))
    for size in bundled.metadata.canvas.all_canvases():
        canvases, sizes = noise(1, 2, size), sizes_of(2, size)

        theirs, mine = (found(each, canvases, sizes, score=0.01) for each in (plain, faster))

        for one, other in zip(mine, theirs, strict=True):
            assert len(one) == len(other) > 0
            # Where scores are almost the same the order may differ.
            apart = np.abs(one.boxes[:, None] - other.boxes).max(axis=2)
            apart[one.labels[:, None] != other.labels] = np.inf
            nearest = apart.argmin(axis=1)
            assert sorted(nearest) == list(range(len(other)))
            np.testing.assert_allclose(one.boxes, other.boxes[nearest], rtol=0, atol=0.01)
            np.testing.assert_allclose(one.scores, other.scores[nearest], rtol=0, atol=1e-5)


def test_winograd_reduces_multiplications_of_the_bundled_model(
    bundled: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "has_wide_vectors", lambda: False)
    with caplog.at_level(logging.INFO):
        made = fitted(bundled, CPU)

    assert made.weights
    assert re.search(r"\d+ convolutions multiply less .* filters take \d+\.\d MB", caplog.text)
    assert fitted(made, CPU) is made, "once, however many sessions there are"
    assert fitted(bundled, Device("cuda")) is bundled
    graph = onnx.load_from_string(made.content).graph
    stored = {each.name for each in graph.initializer if each.raw_data}
    assert stored.isdisjoint(made.weights), "filters are there once"
    assert stored <= {name for node in graph.node for name in node.input}, "and no others"
    assert made.sha256 == bundled.sha256


@pytest.mark.parametrize(("threads", "gains"), [(1, True), (2, False), (None, False)])
def test_winograd_is_dear_for_several_threads_with_wide_vectors(
    bundled: Artifact, monkeypatch: pytest.MonkeyPatch, threads: int | None, gains: bool
) -> None:
    monkeypatch.setattr(devices, "has_wide_vectors", lambda: True)

    assert bool(fitted(bundled, replace(CPU, threads=threads)).weights) == gains


def test_winograd_rewrites_a_file_of_required_inputs_alike(bundled: Artifact) -> None:
    canvas = bundled.metadata.canvas.largest()
    optional = rewrite(bundled.content, canvas)
    required = rewrite(without_defaults(bundled.content), canvas)
    assert optional is not None
    assert required is not None
    assert without_defaults(optional.content) == required.content
    assert optional.weights.keys() == required.weights.keys()


def test_winograd_leaves_a_file_without_gain(
    bundled: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "rewrite", lambda *_, **__: None)

    made = fitted(bundled, CPU)

    assert made.content is bundled.content
    assert fitted(made, CPU) is made, "it is not looked through again"


def test_winograd_can_be_disabled(bundled: Artifact) -> None:
    settings = Settings(device="cpu", cpu_winograd=False)

    assert open_models(settings).hardware.devices == (
        Device("cpu", winograd=False, threads=cpu_count()),
    )
    assert fitted(bundled, replace(CPU, winograd=False)) is bundled
