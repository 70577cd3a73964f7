"""The network as a whole: its start, its padding, batches without objects, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model_export.config import LossConfig
from model_export.retinanet.anchors import AnchorConfig, canvas_anchors
from model_export.retinanet.backbones import BACKBONES
from model_export.retinanet.box_coding import decode, encode
from model_export.retinanet.losses import (
    CrossEntropy,
    FocalStar,
    GIoU,
    Hinge,
    Ohem,
    OhemRatio,
)
from model_export.retinanet.matching import BACKGROUND, box_iou, match
from model_export.retinanet.model import ModelConfig, RetinaNet, freeze_norms
from model_export.retinanet.postprocess import candidates, suppress
from tests.unit.model_export.losses import detection_loss

NAN, INF = math.nan, math.inf

SMALL = AnchorConfig(sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,)))


def network(
    *, backbone: str = "resnet18", classes: int = 2, anchors: AnchorConfig = SMALL, width: int = 16
) -> RetinaNet:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=backbone, fpn_channels=width, head_width=width, head_depth=1, anchors=anchors
    )
    return RetinaNet(config, classes=classes)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator)


def whole(images: Tensor) -> Tensor:
    return torch.tensor([images.shape[1:3]] * len(images))


# --- shapes and start ----------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [(64, 96), (96, 64), (32, 32), (448, 448), (384, 512)])
def test_predictions_line_up_with_the_anchors(canvas: tuple[int, int]) -> None:
    height, width = canvas
    model = network(classes=3).eval()
    if height > 100:
        # Shapes alone: nothing is computed on "meta".
        model = model.to("meta")
    with torch.no_grad():
        levels = model(
            torch.zeros(2, height, width, 3, dtype=torch.uint8, device=model.mean.device),
            torch.tensor([[height, width]] * 2, device=model.mean.device),
        )
    expected = canvas_anchors(SMALL, height, width)
    assert sum(level.anchors.shape[0] for level in levels) == len(expected)
    for level in levels:
        count = level.anchors.shape[0]
        assert level.logits.shape == (2, count, 3)
        assert level.deltas.shape == (2, count, 4)
    if model.mean.device.type != "meta":
        assert torch.allclose(torch.cat([level.anchors for level in levels]), expected)


@torch.no_grad()
@pytest.mark.parametrize("width", [16, 64, 256])
def test_a_random_image_is_1_percent_object_everywhere(width: int) -> None:
    model = network(width=width).train()
    images = noise(2, 64, 64)
    levels = model(images, whole(images))
    p = torch.cat([level.logits.flatten() for level in levels]).sigmoid()
    assert p.mean().item() == pytest.approx(0.01, rel=0.1)
    assert p.min().item() > 0.0005
    assert p.max().item() < 0.1
    deltas = torch.cat([level.deltas.flatten() for level in levels])
    assert deltas.abs().max().item() < 2


@torch.no_grad()
def test_the_first_loss_is_what_the_prior_makes_it() -> None:
    """Every background pair costs 0.75 * 0.01^2 * -log 0.99. At p = 0.5 it would be 172,000 times
    as much."""
    model = network(width=256).train()
    images = noise(1, 64, 64)
    levels = model(images, whole(images))
    pairs = sum(level.logits.numel() for level in levels)
    losses = detection_loss(
        levels,
        [torch.zeros(0, 4)],
        [torch.zeros(0, dtype=torch.int64)],
        loss=LossConfig(),
    )
    expected = pairs * 0.75 * 0.01**2 * -math.log(0.99)
    assert losses.classification.item() == pytest.approx(expected, rel=0.5)


def test_the_state_dict_holds_what_is_learned_and_nothing_else() -> None:
    model = network()
    keys = set(model.state_dict())
    assert {key.split(".")[0] for key in keys} == {
        "backbone",
        "fpn",
        "classification_head",
        "regression_head",
    }
    heads = {key for key in keys if "head" in key}
    assert heads == {
        f"{head}.{part}.{kind}"
        for head in ("classification_head", "regression_head")
        for part in ("conv.0", "out")
        for kind in ("weight", "bias")
    }
    # Class-agnostic: 4 outputs per anchor whatever the classes.
    assert model.state_dict()["regression_head.out.weight"].shape[0] == 4 * 3
    assert model.state_dict()["classification_head.out.weight"].shape[0] == 2 * 3


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"backbone": "vgg"}, "backbone"),
        ({"fpn_channels": 4}, "fpn_channels"),
        ({"head_depth": -1}, "head_depth"),
        ({"depth": 3}, "depth"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"p6_from": "c4"}, "p6_from"),
        ({"head_norm": "layer"}, "head_norm"),
        ({"head_norm": "group", "head_width": 32}, "set head_groups, to 4 for example"),
        ({"head_norm": "group", "head_width": 100}, "head_width 100"),
        ({"head_norm": "group", "head_width": 60, "head_groups": 8}, "8 equal groups"),
        ({"head_norm": "group", "head_width": 64, "head_groups": 0}, "head_groups"),
    ],
)
def test_models_that_make_no_sense_are_refused(wrong: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        ModelConfig.model_validate(wrong)


def test_what_a_config_leaves_out_means_what_it_always_did() -> None:
    """Checkpoints written before a setting existed do not have it."""
    written = {
        "backbone": "resnet18", "fpn_channels": 16, "head_width": 16, "head_depth": 1,
        "anchors": {"sizes": [[16.0]] * 5, "ratios": [1.0], "offset": 0.5},
    }  # fmt: skip
    config = ModelConfig.model_validate(written)
    assert (config.norm_eps, config.p6_from, config.head_norm) == (1e-5, "c5", "none")
    assert (config.anchors.stride, config.anchors.round_corners) == ("level", False)
    assert config.prior == 0.01


def test_norm_eps_is_that_of_every_batch_norm() -> None:
    config = ModelConfig(backbone="resnet18", fpn_channels=8, head_width=8, norm_eps=0.0)
    with torch.device("meta"):
        modules = list(RetinaNet(config, classes=1).modules())
    norms = [module.eps for module in modules if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == [0.0] * 20


# --- padding and normalisation -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2_tf"])
def test_what_lies_in_the_padding_does_not_matter(backbone: str) -> None:
    model = network(backbone=backbone).eval()
    images = noise(2, 64, 96)
    sizes = torch.tensor([[40, 96], [64, 50]])
    other = images.clone()
    other[0, 40:] = 255
    other[1, :, 50:] = 7
    for found, expected in zip(model(images, sizes), model(other, sizes), strict=True):
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.deltas, expected.deltas)


@torch.no_grad()
def test_a_grey_of_the_mean_is_what_padding_is() -> None:
    """Padding is 0 after normalisation: an image of the mean colour looks the same all over."""
    model = network(backbone="mobilenet_v2_tf")
    model.mean.fill_(127.0)
    images = torch.full((1, 64, 64, 3), 127, dtype=torch.uint8)
    small = model(images, torch.tensor([[10, 20]]))
    for found, expected in zip(small, model(images, whole(images)), strict=True):
        assert torch.equal(found.logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize(("backbone", "low", "high"), [
    ("mobilenet_v2_tf", (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)),
    # (0 - 0.485) / 0.229 and so on, in torchvision's order red, green, blue.
    ("resnet18", (-2.1179, -2.0357, -1.8044), (2.2489, 2.4286, 2.6400)),
])  # fmt: skip
def test_normalisation_is_what_the_weights_expect(
    backbone: str, low: tuple[float, ...], high: tuple[float, ...]
) -> None:
    spec = BACKBONES[backbone]
    for value, expected in ((0.0, low), (255.0, high)):
        found = (torch.tensor([value] * 3) - torch.tensor(spec.mean)) / torch.tensor(spec.std)
        assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    model = network(backbone=backbone)
    assert model.mean.flatten().tolist() == pytest.approx(spec.mean)
    assert model.std.flatten().tolist() == pytest.approx(spec.std)


@torch.no_grad()
def test_a_image_s_predictions_do_not_depend_on_its_companions() -> None:
    model = network().eval()
    images, sizes = noise(3, 64, 64), torch.tensor([[64, 64], [50, 64], [64, 30]])
    together = model(images, sizes)
    for index in range(3):
        one = slice(index, index + 1)
        for found, expected in zip(model(images[one], sizes[one]), together, strict=True):
            assert torch.allclose(found.logits, expected.logits[one], atol=1e-4)
            assert torch.allclose(found.deltas, expected.deltas[one], atol=1e-4)


# --- training ------------------------------------------------------------------------------------


def step(
    model: RetinaNet,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    boxes: list[Tensor],
    labels: list[Tensor],
    *,
    loss: LossConfig | None = None,
) -> float:
    losses = detection_loss(
        model(images, whole(images)),
        boxes,
        labels,
        loss=loss or LossConfig(),
    )
    total = losses.classification + losses.regression
    optimiser.zero_grad()
    total.backward()
    optimiser.step()
    return total.item()


BATCHES = {
    "no objects": ([], []),
    "one image without": ([(4.0, 4, 30, 30)], []),
    "NaN": ([(NAN, NAN, NAN, NAN)], [(4.0, 4, 30, 30)]),
    "inf": ([(0.0, 0, INF, INF)], [(-INF, -INF, INF, INF)]),
    "zero area": ([(5.0, 5, 5, 5)], [(5.0, 5, 40, 5)]),
    "outside": ([(500.0, 500, 600, 600)], [(4.0, 4, 30, 30)]),
    "tiny": ([(5.0, 5, 5.001, 5.001)], [(4.0, 4, 30, 30)]),
    "whole and more": ([(-1e6, -1e6, 1e6, 1e6)], [(0.0, 0, 64, 64)]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_no_batch_trains_to_nan(name: str) -> None:
    model = network().train()
    freeze_norms(model.modules())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    boxes = [torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in BATCHES[name]]
    labels = [torch.zeros(len(rows), dtype=torch.int64) for rows in boxes]
    for images in (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), noise(2, 64, 64)):
        assert math.isfinite(step(model, optimiser, images, boxes, labels))
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        assert parameter.grad is not None, key


def test_every_parameter_learns() -> None:
    model = network().train()
    images = noise(2, 64, 64)
    boxes = [torch.tensor([[4.0, 4, 24, 24]])] * 2
    labels = [torch.tensor([1])] * 2
    step(model, torch.optim.SGD(model.parameters(), lr=0.01), images, boxes, labels)
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == []


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """A bright and a dark rectangle on grey, with their boxes and labels."""
    image = torch.full((1, 64, 64, 3), 110, dtype=torch.uint8)
    boxes = torch.tensor([[6.0, 8, 26, 30], [34.0, 30, 60, 48]])
    for (x1, y1, x2, y2), colour in zip(
        boxes.int().tolist(), ((240, 200, 60), (20, 30, 120)), strict=True
    ):
        image[0, y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.uint8)
    return image, boxes, torch.tensor([0, 1])


FAMILY: dict[str, LossConfig] = {
    "default": LossConfig(),
    **{
        loss.name: LossConfig(classification=loss)
        for loss in (
            CrossEntropy(),
            FocalStar(),
            Hinge(),
            Ohem(),
            OhemRatio(),
        )
    },
    "giou": LossConfig(box=GIoU()),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name != "default" else []) for name in FAMILY],
)
def test_every_loss_overfits_one_image(name: str) -> None:
    loss = FAMILY[name]
    model = network().train()
    images, boxes, labels = drawn()
    # Long steps at the start can blow boxes up to where GIoU hardly slopes.
    lr = 5e-4 if name == "giou" else 2e-3
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    first = step(model, optimiser, images, [boxes], [labels], loss=loss)
    for _ in range(30):
        last = step(model, optimiser, images, [boxes], [labels], loss=loss)
    assert last < first / 2
    with torch.no_grad():
        levels = model(images, whole(images))
    anchors, logits, deltas = (
        torch.cat([level.anchors for level in levels]),
        torch.cat([level.logits for level in levels], dim=1)[0],
        torch.cat([level.deltas for level in levels], dim=1)[0],
    )
    overlap = box_iou(boxes, anchors)
    matched = match(overlap)
    foreground = matched >= 0
    p = logits.sigmoid()
    own = p[foreground, labels[matched[foreground]]]
    assert own.mean().item() > 0.3
    assert p[matched == BACKGROUND].mean().item() < 0.1
    learned = box_iou(decode(deltas[foreground], anchors[foreground]), boxes)
    right = learned[torch.arange(len(learned)), matched[foreground]]
    assert right.mean().item() > 0.5


def test_the_anchor_that_matches_best_decodes_to_its_object() -> None:
    """Matching, coding and the order of anchors and predictions agree: predictions that are set
    to what `encode` asks of each anchor give back the boxes."""
    model = network().eval()
    images, boxes, labels = drawn()
    with torch.no_grad():
        levels = model(images, whole(images))
        reached = box_iou(boxes, canvas_anchors(SMALL, 64, 64)).amax(dim=1)
        assert (reached > 0.4).all()
        for level in levels:
            overlap = box_iou(boxes, level.anchors)
            best = overlap.argmax(dim=0)
            level.deltas.copy_(encode(boxes[best], level.anchors)[None])
            level.logits.fill_(-10)
            for index, label in enumerate(labels.tolist()):
                level.logits[0, overlap[index] == reached[index], label] = 3.0
    corners, scores, classes = (part[0] for part in candidates(levels, whole(images)))
    kept = suppress(
        corners, scores, classes, score_threshold=0.5, iou_threshold=0.5, max_detections=10
    )
    assert classes[kept].sort().values.tolist() == [0, 1]
    order = classes[kept].argsort()
    assert torch.allclose(corners[kept][order], boxes, atol=1e-3)
