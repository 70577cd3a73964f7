"""What the model file does around its network, against what torch does there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model_export.export.decoding import PIXELS, map_names, surround
from model_export.export.graph import OPSET
from model_export.retinanet.anchors import AnchorConfig, level_shapes
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.retinanet.postprocess import MANY_CLASSES, TOP_K, CandidateNetwork
from service.runtime.detector import SEAM

CHANNELS = 8
TOLERANCE = 1e-3
"""Pixels, where torch and onnxruntime round differently."""
CONFIGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "one anchor": {"sizes": [[24], [36], [48], [96], [192]], "ratios": [1.0]},
    "from the corner": {"offset": 0.0},
    "torchvision's": {"offset": 0.0, "stride": "canvas", "round_corners": True},
}


class Given(nn.Module):
    """Stands for the convolutions: whatever it is asked, it answers the same."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.features


def network(config: dict[str, Any], classes: int) -> RetinaNet:
    made = RetinaNet(
        ModelConfig(
            backbone="resnet18",
            fpn_channels=CHANNELS,
            head_width=CHANNELS,
            head_depth=1,
            anchors=AnchorConfig.model_validate(config),
        ),
        classes=classes,
    ).eval()
    for head in (made.classification_head, made.regression_head):
        nn.init.normal_(head.out.weight, std=0.1)
    made.backbone = nn.Identity()
    return made


def session(made: RetinaNet, classes: int) -> ort.InferenceSession:
    """A graph without a network: its maps are inputs."""
    kind, info = onnx.TensorProto, onnx.helper.make_tensor_value_info
    inputs = [
        info("images", kind.UINT8, ["batch", "height", "width", 3]),
        info("image_sizes", kind.INT64, ["sizes", 2]),
        *(info(name, kind.FLOAT, ["batch", None, None, None]) for name in map_names()),
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([], "none", inputs, []),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    surround(model, made, classes=classes)
    model.graph.output.append(info(PIXELS, kind.FLOAT, ["batch", 3, "height", "width"]))
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@torch.no_grad()
def both(
    made: RetinaNet, classes: int, canvas: tuple[int, int], sizes: list[list[int]], batch: int = 2
) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Candidates and pixels by the file, and by torch."""
    images = torch.randint(0, 256, (batch, *canvas, 3), dtype=torch.uint8)
    features = [torch.randn(batch, CHANNELS, *shape) for shape in level_shapes(*canvas)]
    made.fpn = Given(features)  # type: ignore[assignment]
    image_sizes = torch.tensor(sizes)
    maps = made.maps(images)
    given = {name: each.numpy() for name, each in zip(map_names(), maps, strict=True)}
    found = session(made, classes).run(
        [*SEAM, PIXELS],
        {"images": images.numpy(), "image_sizes": image_sizes.numpy(), **given},
    )
    whole = torch.where(image_sizes > 0, image_sizes, torch.tensor(canvas))
    expected = [*CandidateNetwork(made)(images, image_sizes), made._normalise(images, whole)]
    return found, [each.numpy() for each in expected]


def assert_same(found: list[NDArray[Any]], expected: list[NDArray[Any]]) -> None:
    """The same candidates in the same order; of two with equal logits either may come first."""
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    for boxes, labels, their_boxes, their_labels in zip(
        found[0], found[2], expected[0], expected[2], strict=True
    ):
        mine = np.column_stack([labels, boxes])
        theirs = np.column_stack([their_labels, their_boxes])
        swapped = (np.abs(mine - theirs) > TOLERANCE).any(axis=1)
        assert swapped.mean() < 0.01
        in_order = [rows[swapped][np.lexsort(rows[swapped].T)] for rows in (mine, theirs)]
        np.testing.assert_allclose(*in_order, atol=TOLERANCE)


@pytest.mark.parametrize("classes", [1, 3, MANY_CLASSES, 40])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_candidates_are_torch_s(config: dict[str, Any], classes: int) -> None:
    torch.manual_seed(classes)
    # The coarsest levels do not divide this canvas.
    sizes = [[160, 224], [97, 131]]
    found, expected = both(network(config, classes), classes, (160, 224), sizes)
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        assert mine.shape == theirs.shape
    assert_same(found, expected)
    boxes = found[0]
    assert (boxes[1, :, 0::2] <= 131).all()
    assert (boxes[1, :, 1::2] <= 97).all()


def test_no_more_candidates_than_asked_for_and_no_more_than_there_are() -> None:
    found, expected = both(network({}, 3), 3, (160, 224), [[0, 0]])
    levels = [9 * 3 * rows * columns for rows, columns in level_shapes(160, 224)]
    assert levels[0] > TOP_K > levels[-1]
    assert found[1].shape == expected[1].shape == (2, sum(min(TOP_K, each) for each in levels))


@pytest.mark.parametrize("sizes", [[[0, 0]], [[0, 40], [96, 0]], [[1, 1], [96, 64]]])
def test_pixels_outside_of_the_image_are_nothing(sizes: list[list[int]]) -> None:
    found, expected = both(network({}, 1), 1, (96, 64), sizes)
    np.testing.assert_allclose(found[3], expected[3], atol=1e-6)
    height, width = sizes[0][0] or 96, sizes[0][1] or 64
    assert not found[3][0, :, height:].any()
    assert not found[3][0, :, :, width:].any()


def test_the_smallest_canvas() -> None:
    assert_same(*both(network({}, 2), 2, (32, 32), [[32, 32]], batch=1))


def test_a_box_may_grow_so_far_and_no_further() -> None:
    made = network({}, 1)
    assert made.regression_head.out.bias is not None
    nn.init.constant_(made.regression_head.out.bias, 50.0)
    found, expected = both(made, 1, (64, 64), [[64, 64]])
    assert np.isfinite(found[0]).all()
    assert_same(found, expected)
