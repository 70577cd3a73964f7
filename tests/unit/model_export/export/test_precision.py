"""Smaller precisions: what changes in the graph, what must not, and when a file is refused."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader

from model_export.export.comparison import Row, check_loss, side_by_side, table
from model_export.export.precision import (
    STEM,
    Precision,
    activation_ranges,
    check_fits,
    element_types,
    find_network,
    float_tensors,
    to_fp16,
    write_reduced,
)
from model_export.export.verify import VerificationError, verify, verify_reduced
from service.errors import DataError
from service.imaging.decode import prepare
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import read_artifact, scan_repository
from service.runtime.detector import INPUTS, OUTPUTS, Detector
from service.runtime.gpu.graph_split import split
from service.settings import bundled_models
from tests.required_inputs import without_defaults
from tests.unit.model_export import random_model
from tests.unit.model_export.random_model import CANVAS, MODEL, RandomModel

# Two convolutions with what lies between, and values on both sides that are no part of it.
_SMALL = """
<ir_version: 8, opset_import: ["" : 18]>
small (uint8[b, h, w, 3] images, int64[n, 2] image_sizes) => (float[b, 2, h2, w2] out) <
  float[2, 3, 1, 1] first = {1, 0, 0, 0, 1, 0}, float[2] first_bias = {-1, 0},
  float[2, 2, 1, 1] second = {2, 0, 0, -2}, float[4] double = {1, 1, 2, 2}, float low = {0}
> {
  pixels = Cast <to = 1> (images)
  planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
  a = Conv (planes, first, first_bias)
  b = Clip (a, low)
  twice = Resize <mode = "nearest"> (b, , double)
  c = Conv (twice, second)
  out = Sigmoid (c)
}
"""


@pytest.fixture
def small() -> onnx.ModelProto:
    model = onnx.parser.parse_model(_SMALL)
    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
    return model


class Pixels(CalibrationDataReader):  # type: ignore[misc]
    """Feeds images of one row of pixels each."""

    def __init__(self, *rows: tuple[tuple[int, int, int], ...]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        if row is None:
            return None
        images = np.array(row, np.uint8).reshape(1, 1, -1, 3)
        return {"images": images, "image_sizes": np.zeros((1, 2), np.int64)}


# --- the graph -----------------------------------------------------------------------------------


def test_the_network_is_what_convolutions_enclose(small: onnx.ModelProto) -> None:
    part = find_network(small)
    assert [node.op_type for node in part.nodes] == ["Conv", "Clip", "Resize", "Conv"]
    assert part.last == {"node_5"}
    assert float_tensors(small, part.nodes) == ["planes", "a", "b", "twice", "c"]


def test_the_network_of_a_model_file(exported: RandomModel) -> None:
    part = find_network(onnx.load(exported.path))
    kinds = Counter(node.op_type for node in part.nodes)
    # Five levels, two heads.
    assert len(part.last) == 10
    assert kinds.keys() <= {"Conv", "Relu", "Add", "MaxPool", "Resize"}
    # Batch norms are in the convolutions: 20 of ResNet-18, 8 of the pyramid, 4 on each level.
    assert kinds["Conv"] == 20 + 8 + 5 * 4


def test_ranges_by_hand(small: onnx.ModelProto) -> None:
    reader = Pixels(((3, 9, 0), (0, 2, 0)), ((7, 4, 255),))
    found = activation_ranges(small, find_network(small), reader)
    wanted = {"a": (-1.0, 9.0), "b": (0.0, 9.0), "c": (-18.0, 12.0)}
    assert {name: found[name] for name in wanted} == wanted


def test_half_by_hand(small: onnx.ModelProto) -> None:
    model = to_fp16(small, find_network(small))
    types = element_types(model)
    assert {types[name] for name in ("a", "b", "twice", "c")} == {TensorProto.FLOAT16}
    assert types["out"] == types["double"] == TensorProto.FLOAT
    casts = [n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"]
    # Of the image, into the network and out of it.
    assert casts == [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT]
    stored = {each.name: each.data_type for each in model.graph.initializer}
    assert stored.pop("double") == TensorProto.FLOAT
    assert set(stored.values()) == {TensorProto.FLOAT16}


def test_numbers_beyond_float16_are_refused(small: onnx.ModelProto) -> None:
    check_fits({"a": (-10_000.0, 16_000.0)})
    for reach in ((0.0, 17_000.0), (-17_000.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(DataError, match=r"b reaches .* --precision fp32"):
            check_fits({"a": (0.0, 1.0), "b": reach})
    weight = next(each for each in small.graph.initializer if each.name == "second")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full((2, 2, 1, 1), 7e4, np.float32), "second"))
    with pytest.raises(DataError, match="second holds a number"):
        to_fp16(small, find_network(small))


# --- the files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    answer = []
    for seed in range(5):
        file = io.BytesIO()
        width, height = ((160, 120), (120, 160))[seed % 2]
        draw_smear(seed, width=width, height=height)[0].save(file, "PNG")
        answer.append(file.getvalue())
    return answer


@pytest.fixture(scope="module")
def files(
    exported: RandomModel, images: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[Precision, Path]:
    """The same network in each precision."""
    folder = tmp_path_factory.mktemp("reduced")
    answer = {Precision.FP32: exported.path}
    for precision in (Precision.FP16, Precision.INT8):
        answer[precision] = folder / precision / "model.onnx"
        write_reduced(exported.path, answer[precision], precision, images)
    return answer


@pytest.fixture(params=[Precision.FP16, Precision.INT8])
def reduced(request: pytest.FixtureRequest, files: dict[Precision, Path]) -> tuple[Precision, Path]:
    return request.param, files[request.param]


def opened(path: Path) -> Detector:
    return devices.open_detector(read_artifact(path), devices.Device("cpu"))


def test_inputs_outputs_and_seam_stay(
    reduced: tuple[Precision, Path], exported: RandomModel
) -> None:
    before, after = onnx.load(exported.path), onnx.load(reduced[1])
    for part in ("input", "output"):
        assert list(getattr(after.graph, part)) == list(getattr(before.graph, part))
    defaults = {each.name: each for each in after.graph.initializer}
    for each in before.graph.initializer:
        if each.name in INPUTS:
            assert defaults[each.name] == each
    types = element_types(after)
    for name in ("candidate_boxes", "candidate_scores"):
        assert types[name] == TensorProto.FLOAT
    # Decoding works on float32: exponentials, sigmoids and what goes into them.
    for node in after.graph.node:
        if node.op_type in ("Exp", "Sigmoid", "TopK", "NonMaxSuppression"):
            assert types[node.input[0]] in (TensorProto.FLOAT, TensorProto.INT64)
    assert [o.name for o in after.graph.output] == list(OUTPUTS)
    assert after.producer_name == before.producer_name


def test_a_reduced_file_of_required_inputs_has_the_same_network(
    reduced: tuple[Precision, Path], exported: RandomModel, images: list[bytes], tmp_path: Path
) -> None:
    precision, expected = reduced
    source, target = tmp_path / "required.onnx", tmp_path / "model.onnx"
    source.write_bytes(without_defaults(exported.path.read_bytes()))
    write_reduced(source, target, precision, images)
    wanted = onnx.load_model_from_string(without_defaults(expected.read_bytes()))
    assert onnx.load(target) == wanted


def test_the_description_says_which_precision(
    reduced: tuple[Precision, Path], exported: RandomModel
) -> None:
    metadata = read_artifact(reduced[1]).metadata
    assert metadata.provenance == {**exported.metadata.provenance, "precision": reduced[0].value}
    assert metadata.model_copy(update={"provenance": exported.metadata.provenance}) == (
        exported.metadata
    )


def weights(path: Path) -> list[NDArray[Any]]:
    """Of every convolution, in the type that it is stored in."""
    graph = onnx.load(path).graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    dequantised = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return [
        constants[dequantised.get(node.input[1], node.input[1])]
        for node in graph.node
        if node.op_type == "Conv"
    ]


def test_all_of_the_network_is_in_half(files: dict[Precision, Path]) -> None:
    assert {each.dtype for each in weights(files[Precision.FP16])} == {np.dtype(np.float16)}


def test_fp16_converts_the_bundled_model(tmp_path: Path, images: list[bytes]) -> None:
    """Its activations share the constant 0 with what stays in float32."""
    source, target = scan_repository(bundled_models())[-1].path, tmp_path / "model.onnx"
    write_reduced(source, target, Precision.FP16, images[:1])
    full, half = (candidate_scores(path, images[0]) for path in (source, target))
    assert np.abs(full - half).max() < 0.01


def test_int8_leaves_the_first_and_the_last_convolutions(files: dict[Precision, Path]) -> None:
    found = weights(files[Precision.INT8])
    kinds = Counter(each.dtype for each in found)
    assert kinds == {np.dtype(np.int8): len(found) - STEM - 10, np.dtype(np.float32): STEM + 10}
    # 7 bits: two products of 8 would overflow the 16 bits of an x86 without VNNI.
    assert max(np.abs(each.astype(int)).max() for each in found if each.dtype == np.int8) <= 64
    graph = onnx.load(files[Precision.INT8]).graph
    axes = [
        attribute.i
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "axis"
    ]
    # The first one of each convolution's output channels: a scale for each of these.
    assert axes
    assert set(axes) == {0}
    names = {node.name for node in find_network(onnx.load(files[Precision.FP32])).in_int8}
    assert not names & find_network(onnx.load(files[Precision.FP32])).last


def candidate_scores(path: Path, image: bytes) -> NDArray[np.float32]:
    """(N,) of one image, each level's in falling order."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("candidate_scores", TensorProto.FLOAT, None)
    )
    device = devices.Device("cpu")
    session = ort.InferenceSession(
        model.SerializeToString(), devices.session_options(device), devices.providers(device)
    )
    answer: NDArray[np.float32] = session.run(
        None, {"images": prepare(image, CANVAS).canvas[None]}
    )[0][0]
    return answer


def test_what_is_found_stays_near(files: dict[Precision, Path], images: list[bytes]) -> None:
    exact, half, whole = (candidate_scores(file, images[0]) for file in files.values())
    assert 1e-6 < np.abs(half - exact).max() < 0.005
    assert 1e-3 < np.abs(whole - exact).max() < 0.2
    report = verify_reduced(
        opened(files[Precision.FP32]), opened(files[Precision.FP16]), images, CANVAS
    )
    assert report.against.detections > 200
    assert report.against.boxes < 0.5
    assert report.against.unpaired == 0
    assert "file against fp32:" in str(report)


def test_company_does_not_matter_to_int8(files: dict[Precision, Path], images: list[bytes]) -> None:
    report = verify_reduced(
        opened(files[Precision.FP32]), opened(files[Precision.INT8]), images, CANVAS
    )
    assert report.in_company.detections > 1000
    assert report.in_company.agrees


def test_a_file_that_finds_other_things_is_refused(
    files: dict[Precision, Path], images: list[bytes], tmp_path: Path
) -> None:
    model = onnx.load(files[Precision.FP16])
    for each in model.graph.initializer:
        if "classification_head.out.bias" in each.name:
            bias = onnx.numpy_helper.to_array(each)
            each.CopyFrom(onnx.numpy_helper.from_array(bias - np.float16(20), each.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="finds other things"):
        verify_reduced(
            opened(files[Precision.FP32]), opened(tmp_path / "model.onnx"), images, CANVAS
        )


def test_rows_side_by_side(files: dict[Precision, Path], images: list[bytes]) -> None:
    rows, measured = side_by_side(files, None, images[:2])
    assert measured == {}
    assert [row.precision for row in rows] == ["fp32", "fp16", "int8"]
    sizes = [row.megabytes for row in rows]
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.32 * sizes[0]
    assert all(row.session > 0 and row.core > 0 for row in rows)
    lines = list(table(rows))
    assert lines[0].split() == ["AP", "AP50", "MB", "session", "ms", "core", "ms"]
    assert lines[3].split()[:3] == ["int8", "-", "-"]


def test_a_loss_beyond_what_is_accepted() -> None:
    def row(precision: Precision, ap: float | None) -> Row:
        return Row(precision, 1.0, 1.0, 1.0, ap, ap)

    full = row(Precision.FP32, 0.6)
    check_loss(full, row(Precision.FP16, 0.5951))
    check_loss(full, row(Precision.INT8, 0.5851))
    check_loss(full, row(Precision.INT8, None))
    with pytest.raises(VerificationError, match=r"fp16 loses 0.60 points of AP .* --max-loss"):
        check_loss(full, row(Precision.FP16, 0.594))
    with pytest.raises(VerificationError, match=r"60.00 to 58.40.* at most 1.5"):
        check_loss(full, row(Precision.INT8, 0.584))
    check_loss(full, row(Precision.INT8, 0.58), 2.5)
    with pytest.raises(VerificationError, match="at most 0 are"):
        check_loss(full, row(Precision.INT8, 0.5999), 0.0)


@pytest.mark.slow
def test_an_efficientnet_is_the_same_in_every_file(
    untraced_exporter: None, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 5x5 and its asymmetrically padded convolutions, plain, rewritten for CPUs and reduced."""
    monkeypatch.setattr(devices, "has_wide_vectors", lambda: False)
    config = MODEL.model_copy(
        update={"backbone": "efficientnet_lite0", "fpn_channels": 128, "head_width": 128}
    )
    made = random_model.make(tmp_path / "fp32.onnx", config)
    artifact = read_artifact(made.path)
    cpu = devices.Device("cpu")
    assert devices.fitted(artifact, cpu).weights, "no convolution is rewritten"
    for device in (cpu, replace(cpu, winograd=False)):
        report = verify(
            made.checkpoint.build(), devices.open_detector(artifact, device), images, CANVAS
        )
        assert report.against.detections > 200
    for precision in (Precision.FP16, Precision.INT8):
        write_reduced(made.path, tmp_path / f"{precision}.onnx", precision, images)
        detector = opened(tmp_path / f"{precision}.onnx")
        assert verify_reduced(opened(made.path), detector, images, CANVAS).in_company.agrees


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_can_be_split_for_a_gpu(
    files: dict[Precision, Path], precision: Precision
) -> None:
    parts = split(files[precision].read_bytes())
    assert parts is not None
    network = onnx.load_model_from_string(parts.network)
    operators = {node.op_type for node in network.graph.node}
    # What would be placed on the CPU, or must not be replayed, keeps a CUDA graph from being made.
    assert not operators & {"GatherND", "NonMaxSuppression", "Range", "Shape"}
    assert parts.canvas is not None
    assert len(parts.canvas) < 100_000, "it holds no weights"
