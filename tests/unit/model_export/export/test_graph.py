"""The model file as a stranger meets it: by onnx and onnxruntime alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from model_export.export.decoding import PIXELS, map_names
from model_export.export.graph import build
from model_export.retinanet.anchors import LEVELS
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.errors import ArtifactError
from service.runtime.artifact import MODEL_FILE, read_artifact
from service.runtime.norms import fold_norms
from service.settings import bundled_models
from tests.required_inputs import without_defaults
from tests.unit.model_export.random_model import CLASSES, THRESHOLDS, RandomModel

Run = Callable[..., dict[str, NDArray[Any]]]

OUTPUTS = ["image_index", "boxes", "scores", "labels"]


def open_session(model: bytes | Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Without a word on every load about the inputs that have defaults.
    options.log_severity_level = 3
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
    )


@pytest.fixture(scope="module")
def run(exported: RandomModel) -> Run:
    """The file's answer to canvases; other inputs by name, as lists."""
    session = open_session(exported.path)
    kinds = {"image_sizes": np.int64, "max_detections": np.int64}

    def call(images: NDArray[np.uint8], **inputs: Any) -> dict[str, NDArray[Any]]:
        given = {name: np.array(v, kinds.get(name, np.float32)) for name, v in inputs.items()}
        return dict(zip(OUTPUTS, session.run(OUTPUTS, {"images": images, **given}), strict=True))

    return call


@pytest.fixture(scope="module", params=["fresh", "bundled"])
def file(request: pytest.FixtureRequest, exported: RandomModel) -> Path:
    """A freshly exported file, and the one that comes with the service."""
    if request.param == "fresh":
        return exported.path
    (path,) = bundled_models().glob(f"*/*/{MODEL_FILE}")
    return path


def noise(batch: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def of_image(found: dict[str, NDArray[Any]], index: int) -> tuple[NDArray[Any], ...]:
    mine = found["image_index"] == index
    return found["boxes"][mine], found["scores"][mine], found["labels"][mine]


def assert_same(a: tuple[NDArray[Any], ...], b: tuple[NDArray[Any], ...]) -> None:
    assert len(a[0]) == len(b[0])
    np.testing.assert_allclose(a[0], b[0], atol=0.01)
    np.testing.assert_allclose(a[1], b[1], atol=1e-5)
    np.testing.assert_array_equal(a[2], b[2])


# --- names, types, shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["optional", "required"])
def test_inputs_and_outputs(file: Path, kind: str) -> None:
    content = file.read_bytes()
    session = open_session(content if kind == "optional" else without_defaults(content))
    required = {i.name: (i.type, i.shape) for i in session.get_inputs()}
    assert required.pop("images") == ("tensor(uint8)", ["batch", "height", "width", 3])
    optional = {i.name: (i.type, i.shape) for i in session.get_overridable_initializers()}
    others, empty = (optional, required) if kind == "optional" else (required, optional)
    assert not empty
    assert others.keys() == {"image_sizes", "score_threshold", "iou_threshold", "max_detections"}
    assert others["image_sizes"][0] == "tensor(int64)"
    assert others["image_sizes"][1][1] == 2
    assert isinstance(others["image_sizes"][1][0], str)
    assert others["score_threshold"] == ("tensor(float)", [1])
    assert others["iou_threshold"] == ("tensor(float)", [1])
    assert others["max_detections"] == ("tensor(int64)", [1])
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("image_index", "tensor(int64)", ["detections"]),
        ("boxes", "tensor(float)", ["detections", 4]),
        ("scores", "tensor(float)", ["detections"]),
        ("labels", "tensor(int64)", ["detections"]),
    ]


def test_images_alone_are_enough(file: Path) -> None:
    index, boxes, scores, labels = open_session(file).run(None, {"images": noise(1, 64, 96)})
    assert boxes.shape == (len(index), 4)
    assert scores.shape == labels.shape == index.shape
    assert (index.dtype, boxes.dtype) == (np.int64, np.float32)
    assert (scores.dtype, labels.dtype) == (np.float32, np.int64)


def test_the_defaults_are_the_description_s(file: Path) -> None:
    model = onnx.load(file)
    text = {p.key: p.value for p in model.metadata_props}["retinaserve"]
    thresholds = json.loads(text)["thresholds"]
    defaults = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert defaults["score_threshold"].tolist() == pytest.approx([thresholds["score"]])
    assert defaults["iou_threshold"].tolist() == pytest.approx([thresholds["iou"]])
    assert defaults["max_detections"].tolist() == [thresholds["max_detections"]]
    assert defaults["image_sizes"].tolist() == [[0, 0]]


def test_the_description(file: Path) -> None:
    model = onnx.load(file)
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties.keys() == {"retinaserve"}
    found = json.loads(properties["retinaserve"])
    assert found.keys() == {
        "schema", "name", "classes", "canvas", "thresholds", "metrics", "calibrated", "provenance",
    }  # fmt: skip
    assert found["schema"] == 1
    assert found["canvas"]["rule"] in ("buckets", "short-side")
    assert all(side % 32 == 0 for size in found["canvas"]["sizes"] for side in size)
    assert found["thresholds"].keys() == {"score", "per_class", "iou", "max_detections"}
    assert set(found["thresholds"]["per_class"]) <= set(found["classes"])


def test_the_description_is_what_was_asked_for(exported: RandomModel) -> None:
    metadata = read_artifact(exported.path).metadata
    assert metadata == exported.metadata
    assert (metadata.name, metadata.classes) == ("random", CLASSES)
    assert metadata.thresholds == THRESHOLDS
    assert metadata.provenance["licences"] == ["CC0"]


def test_one_file_of_plain_operators(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    for tensor in model.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT
    assert {p.name for p in file.parent.iterdir()} >= {"model.onnx", "model.sha256"}
    assert not list(file.parent.glob("*.data"))


def test_nothing_of_the_machine_that_exported(file: Path) -> None:
    content = file.read_bytes()
    for trace in (b"/tmp", b"/home/", b"/root/", b"site-packages", b'.py"', b"Traceback"):
        assert trace not in content, trace
    assert str(Path.cwd()).encode() not in content


def test_the_checksum_beside_it(file: Path) -> None:
    line = (file.parent / "model.sha256").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}  model\.onnx\n", line)
    assert line.split()[0] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_seam_keeps_its_names(file: Path) -> None:
    model = onnx.load(file)
    seam = {"candidate_boxes": 3, "candidate_scores": 2, "candidate_labels": 2}
    kinds = [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]
    for name, kind in zip(seam, kinds, strict=True):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = open_session(model.SerializeToString())
    boxes, scores, labels = session.run(list(seam), {"images": noise(2, 64, 96)})
    assert [boxes.ndim, scores.ndim, labels.ndim] == list(seam.values())
    assert boxes.shape == (2, scores.shape[1], 4)
    assert labels.shape == scores.shape
    # Every level gives its best 1000 pairs at most.
    assert scores.shape[1] <= 5000
    assert ((scores >= 0) & (scores <= 1)).all()


def test_weights_outside_of_the_file_are_refused(exported: RandomModel, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load(exported.path), path, save_as_external_data=True, location="model.onnx.data"
    )
    assert (tmp_path / "model.onnx.data").exists()
    with pytest.raises(ArtifactError, match="outside the file"):
        read_artifact(path)


# --- answers -------------------------------------------------------------------------------------


def test_thresholds_left_out_are_the_defaults(run: Run) -> None:
    images = noise(1, 96, 128)
    explicit = run(images, score_threshold=[0.45], iou_threshold=[0.55], max_detections=[40])
    assert len(explicit["scores"]) == 40
    for name, value in run(images).items():
        np.testing.assert_array_equal(value, explicit[name])


def test_the_default_image_size_is_the_whole_canvas(run: Run) -> None:
    images = noise(3, 64, 96)
    explicit = run(images, image_sizes=[[64, 96]] * 3)
    assert set(explicit["image_index"]) == {0, 1, 2}
    for name, value in run(images).items():
        np.testing.assert_array_equal(value, explicit[name])
    one_row = run(images, image_sizes=[[64, 96]])
    np.testing.assert_array_equal(one_row["boxes"], explicit["boxes"])


def test_nothing_found(run: Run) -> None:
    found = run(noise(2, 64, 96), score_threshold=[1.0])
    assert [found[name].shape for name in OUTPUTS] == [(0,), (0, 4), (0,), (0,)]


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (300, 300), (301, 301), (999, 999)])
def test_max_detections_is_per_image(run: Run, asked: int, given: int) -> None:
    # Nothing overlaps by more than 1: every candidate stays.
    found = run(
        noise(2, 96, 128), score_threshold=[0.0], iou_threshold=[1.0], max_detections=[asked]
    )
    assert Counter(found["image_index"].tolist()) == {0: given, 1: given}


def test_never_more_than_the_cap(run: Run) -> None:
    found = run(
        noise(1, 96, 128), score_threshold=[0.0], iou_threshold=[1.0], max_detections=[5000]
    )
    assert len(found["scores"]) == 1000


def test_max_detections_takes_the_best_over_all_classes(run: Run) -> None:
    images = noise(2, 96, 128)
    every = run(images, score_threshold=[0.1], max_detections=[1000])
    few = run(images, score_threshold=[0.1], max_detections=[7])
    for index in (0, 1):
        boxes, scores, labels = of_image(every, index)
        assert len(scores) > 7
        assert_same(of_image(few, index), (boxes[:7], scores[:7], labels[:7]))


def test_ordered_by_image_then_by_falling_score(run: Run) -> None:
    found = run(noise(4, 96, 128), score_threshold=[0.05], max_detections=[1000])
    assert (np.diff(found["image_index"]) >= 0).all()
    assert set(found["image_index"]) == {0, 1, 2, 3}
    for index in range(4):
        _, scores, labels = of_image(found, index)
        assert (np.diff(scores) <= 0).all()
        assert set(labels) == {0, 1, 2}


def test_scores_are_strictly_above_the_threshold(run: Run) -> None:
    images = noise(1, 96, 128)
    every = run(images, score_threshold=[0.1], max_detections=[1000])["scores"]
    middle = np.sort(every)[len(every) // 2]
    above = run(images, score_threshold=[float(middle)], max_detections=[1000])["scores"]
    np.testing.assert_array_equal(above, every[every > middle])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 160), (160, 32), (448, 448)])
def test_canvases_it_was_not_exported_with(run: Run, height: int, width: int) -> None:
    images = noise(2, height, width)
    found = run(images, score_threshold=[0.05], max_detections=[100])
    assert set(found["image_index"]) == {0, 1}
    boxes = found["boxes"]
    assert (boxes >= 0).all()
    assert (boxes <= [width, height, width, height]).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    alone = run(images[1:], score_threshold=[0.05], max_detections=[100])
    assert_same(of_image(found, 1), of_image(alone, 0))


@pytest.mark.parametrize(
    ("backbone", "norm"), [("mobilenet_v2_tf", "batch"), ("efficientnet_lite0", "group")]
)
def test_the_network_knows_no_size(
    backbone: str, norm: Literal["batch", "group"], untraced_exporter: None
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone, fpn_channels=16, head_width=16, head_depth=1, head_norm=norm,
        head_groups=4,
    )  # fmt: skip
    network = RetinaNet(config, classes=2)
    # Each norm learns other statistics.
    network.train()
    network(torch.randint(0, 256, (2, 128, 128, 3)), torch.tensor([[128, 128], [128, 96]]))
    network.eval()
    model = build(network, classes=2)
    # Heads keep their weights once for all levels, and a norm for each; the backbone's are part of
    # its convolutions, as its padding is.
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Pad"] == 0
    assert kinds["BatchNormalization"] == (10 if norm == "batch" else 0)
    assert len(LEVELS) * 2 == 10
    assert fold_norms(model) == kinds["BatchNormalization"]
    names = [PIXELS, *map_names()]
    for name in names:
        kind = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(kind)
    session = open_session(model.SerializeToString())
    for batch, height, width in ((1, 32, 32), (3, 64, 416), (2, 352, 192)):
        pixels, *maps = session.run(names, {"images": noise(batch, height, width)})
        with torch.no_grad():
            expected = network.maps(torch.from_numpy(pixels))
        for mine, theirs in zip(maps, expected, strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-4)


def test_suppression_knows_classes(run: Run) -> None:
    found = run(
        noise(1, 96, 128), score_threshold=[0.05], iou_threshold=[0.3], max_detections=[1000]
    )
    boxes, _, labels = of_image(found, 0)
    iou = overlaps(boxes)
    np.fill_diagonal(iou, 0)
    same = labels[:, None] == labels
    assert iou[same].max() <= 0.3 + 1e-5
    # One anchor, one box, two classes: both stay.
    assert iou[~same].max() > 0.999


def overlaps(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    low = np.maximum(boxes[:, None, :2], boxes[:, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    total = area[:, None] + area - common
    answer: NDArray[np.float32] = np.divide(
        common, total, out=np.zeros_like(total), where=total > 0
    )
    return answer


def test_company_does_not_matter(run: Run) -> None:
    images = np.concatenate([noise(3, 96, 128, seed=5), np.zeros((1, 96, 128, 3), np.uint8)])
    sizes = [[96, 128], [50, 128], [96, 60], [10, 20]]
    options = {"score_threshold": [0.1], "max_detections": [200]}
    alone = [
        of_image(run(images[i : i + 1], image_sizes=sizes[i : i + 1], **options), 0)
        for i in range(4)
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [2, 0]):
        together = run(images[order], image_sizes=[sizes[i] for i in order], **options)
        for place, index in enumerate(order):
            assert_same(of_image(together, place), alone[index])


def test_what_lies_in_the_padding_does_not_matter(run: Run) -> None:
    clean = noise(1, 96, 128, seed=3)
    clean[:, 50:] = 0
    clean[:, :, 70:] = 0
    dirty = noise(1, 96, 128, seed=4)
    dirty[:, :50, :70] = clean[:, :50, :70]
    options = {"image_sizes": [[50, 70]], "score_threshold": [0.05], "max_detections": [500]}
    a, b = run(clean, **options), run(dirty, **options)
    assert len(a["scores"]) > 20
    for name in OUTPUTS:
        np.testing.assert_array_equal(a[name], b[name])
    assert (a["boxes"] <= [70, 50, 70, 50]).all()
    # The same image without saying so is another one: its padding is black, not nothing.
    whole = run(clean, score_threshold=[0.05], max_detections=[500])
    assert not np.array_equal(whole["scores"], a["scores"])
