"""The loss family behind its one interface: each against numbers by hand and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_export.retinanet.anchors import AnchorConfig, canvas_anchors
from model_export.retinanet.box_coding import encode
from model_export.retinanet.hard_examples import hard_examples
from model_export.retinanet.losses import (
    L1,
    BalancedCrossEntropy,
    BoxLoss,
    ClassificationLoss,
    CrossEntropy,
    Focal,
    FocalStar,
    GIoU,
    Hinge,
    Ohem,
    OhemRatio,
    SmoothL1,
    focal_loss,
    giou_loss,
)
from model_export.retinanet.matching import box_iou

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def focal_at(p_t: float, gamma: float) -> float:
    """Loss of a one that is seen with probability `p_t`, without alpha."""
    x = torch.tensor([logit(p_t)], dtype=torch.float64)
    return focal_loss(x, torch.ones(1), alpha=None, gamma=gamma).item()


# --- the family ----------------------------------------------------------------------------------

DENSE = (
    CrossEntropy(),
    BalancedCrossEntropy(),
    *(Focal(gamma=gamma) for gamma in GAMMAS),
    Focal(alpha=None),
    FocalStar(),
    FocalStar(gamma=5.0, beta=0.0),
    Hinge(),
)
FAMILY = (*DENSE, Ohem(), OhemRatio())


def name(loss: ClassificationLoss) -> str:
    return " ".join(str(value) for value in loss.model_dump().values())


@pytest.mark.parametrize("loss", FAMILY, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_every_loss_is_finite_for_any_logit_of_any_type(
    loss: ClassificationLoss, dtype: torch.dtype, target: float
) -> None:
    x = torch.tensor([-1e4, -300, -90, -20, 0, 20, 90, 300, 1e4], dtype=dtype)[:, None]
    x.requires_grad_()
    found = loss.elements(x, torch.full((9, 1), target))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found >= 0).all()
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # No loss ever pulls a logit away from its target.
    assert (x.grad * (2 * target - 1) <= 0).all()


@pytest.mark.parametrize("loss", FAMILY, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_is_finite_under_autocast(loss: ClassificationLoss, dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e4, 0.5, 1e4]], requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        logits = x @ torch.eye(3)
        assert logits.dtype == dtype
        found = loss.elements(logits, torch.tensor([[1.0, 0.0, 0.0]])).sum()
    assert found.dtype == torch.float32
    found.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("loss", DENSE, ids=name)
def test_every_gradient_is_the_slope_of_its_loss(loss: ClassificationLoss) -> None:
    # Between the points lies the corner of the hinge, at 0 for a margin of 0.5.
    x = torch.linspace(-3.9, 3.9, 14).repeat(2)[:, None].requires_grad_()
    targets = torch.cat([torch.zeros(14, 1), torch.ones(14, 1)])
    loss.elements(x, targets).sum().backward()
    step = 2**-6
    with torch.no_grad():
        high, low = (loss.elements(x + sign * step, targets).double() for sign in (1, -1))
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), (high - low) / (2 * step), rtol=1e-3, atol=2e-4)


@given(st.floats(0.001, 0.5), st.floats(0.5, 5))
def test_what_is_misclassified_keeps_its_loss(p_t: float, gamma: float) -> None:
    """The factor is (1 - p_t)^gamma: near 1 for small p_t, at least 2^-gamma up to p_t = .5."""
    ratio = focal_at(p_t, gamma) / focal_at(p_t, 0.0)
    assert ratio == pytest.approx((1 - p_t) ** gamma, rel=1e-3)
    assert ratio >= 0.5**gamma * 0.999
    if p_t < 0.01:
        assert ratio > 0.95


@given(st.floats(0.5, 5), st.floats(0, 10))
def test_the_factor_goes_to_zero_as_an_example_gets_easier(gamma: float, x: float) -> None:
    one = torch.ones(2)
    at = torch.tensor([x, x + 2], dtype=torch.float64)
    factor = focal_loss(at, one, alpha=None, gamma=gamma) / focal_loss(
        at, one, alpha=None, gamma=0.0
    )
    assert factor[1] < factor[0] <= 1
    far = torch.tensor([40.0])
    assert focal_loss(far, torch.ones(1), alpha=None, gamma=gamma).item() < 1e-20


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_plain_and_balanced_cross_entropy_are_torch_s(target: float) -> None:
    x = torch.linspace(-20, 20, 41)[:, None]
    targets = torch.full((41, 1), target)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, targets, reduction="none")
    assert torch.allclose(CrossEntropy().elements(x, targets), expected, atol=1e-6)
    alpha_t = 0.9 if target else 0.1
    found = BalancedCrossEntropy(alpha=0.9).elements(x, targets)
    assert torch.allclose(found, alpha_t * expected, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "target", "gamma", "beta", "expected"),
    [
        # log(1 + exp(-(gamma x_t + beta))) / gamma by hand.
        (0.0, 1.0, 2.0, 1.0, 0.1566308),
        (0.0, 0.0, 2.0, 1.0, 0.1566308),
        (1.0, 1.0, 2.0, 1.0, 0.0242937),
        (1.0, 0.0, 2.0, 1.0, 0.6566308),
        (0.0, 1.0, 4.0, 0.0, 0.1732868),
    ],
)
def test_focal_star_by_hand(
    x: float, target: float, gamma: float, beta: float, expected: float
) -> None:
    found = FocalStar(gamma=gamma, beta=beta).elements(
        torch.tensor([[x]]), torch.tensor([[target]])
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_focal_star_with_gamma_1_and_beta_0_is_cross_entropy() -> None:
    x = torch.linspace(-8, 8, 33)[:, None]
    targets = (torch.arange(33) % 2).float()[:, None]
    found = FocalStar(gamma=1.0, beta=0.0).elements(x, targets)
    assert torch.allclose(found, CrossEntropy().elements(x, targets))


def test_the_hinge_ignores_what_is_beyond_its_margin() -> None:
    """p_t of sigmoid(0), sigmoid(2) = .88, sigmoid(-2) = .12; a margin of .6."""
    x = torch.tensor([[0.0], [2.0], [-2.0]], requires_grad=True)
    found = Hinge(margin=0.6).elements(x, torch.ones(3, 1))
    assert found.flatten().tolist() == pytest.approx([0.1, 0.0, 0.4807971], abs=1e-6)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad[1].item() == 0
    assert x.grad[0].item() == pytest.approx(-0.25)


def test_alpha_and_gamma_interact() -> None:
    """The more gamma, the larger the foreground's share of the loss: a smaller alpha is enough."""
    # 10,000 easy negatives at p_t .98 and ten hard positives at p_t .3.
    x = torch.cat([torch.full((10_000,), -logit(0.98)), torch.full((10,), logit(0.3))])
    targets = torch.cat([torch.zeros(10_000), torch.ones(10)])
    shares = []
    for gamma in GAMMAS:
        loss = focal_loss(x, targets, alpha=None, gamma=gamma)
        shares.append((loss[10_000:].sum() / loss.sum()).item())
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert shares[-1] > 0.99


# --- mining --------------------------------------------------------------------------------------

# Three anchors on one another, two apart; losses by cross entropy of one class.
ROW = torch.tensor(
    [[0.0, 0, 10, 10], [1.0, 0, 11, 10], [2.0, 0, 12, 10], [50.0, 0, 60, 10], [90.0, 0, 100, 10]]
)


def counted(loss: Ohem | OhemRatio, losses: list[float], ones: list[int], used: str) -> list[int]:
    targets = torch.zeros(5, 1)
    targets[ones] = 1
    mask = loss.counted(
        torch.tensor(losses)[:, None], targets, ROW, torch.tensor([c == "1" for c in used])
    )
    return [index for index in range(5) if mask[index]]


@pytest.mark.parametrize(
    ("losses", "used", "keep", "nms_iou", "expected"),
    [
        # IoU of neighbours 9 / 11 = .82, of the outer two 8 / 12 = .67.
        ([3, 5, 4, 2, 1], "11111", 2, 0.7, [1, 3]),
        ([5, 3, 4, 2, 1], "11111", 2, 0.7, [0, 2]),
        ([5, 3, 4, 2, 1], "11111", 2, 0.6, [0, 3]),
        ([3, 5, 4, 2, 1], "11111", 2, None, [1, 2]),
        ([3, 5, 4, 2, 1], "10111", 2, 0.6, [2, 3]),
        ([3, 5, 4, 2, 1], "11111", 9, 0.7, [1, 3, 4]),
        ([3, 5, 4, 2, 1], "00000", 2, 0.7, []),
    ],
)
def test_ohem_keeps_the_hardest_that_no_harder_one_overlaps(
    losses: list[float], used: str, keep: int, nms_iou: float | None, expected: list[int]
) -> None:
    assert counted(Ohem(keep=keep, nms_iou=nms_iou), losses, [0], used) == expected


@pytest.mark.parametrize(
    ("losses", "ones", "negatives", "keep", "expected"),
    [
        # One foreground anchor, and as many background anchors as the ratio says.
        ([0.1, 5, 4, 3, 2], [0], 1.0, 128, [0, 1]),
        ([0.1, 5, 4, 3, 2], [0], 3.0, 128, [0, 1, 2, 3]),
        # Foreground takes part however easy it is; of two the harder one where one has a place.
        ([0.1, 5, 4, 3, 0.2], [0, 4], 1.0, 2, [1, 4]),
        # No object: as many as beside a single one.
        ([0.1, 5, 4, 3, 2], [], 2.0, 128, [1, 2]),
    ],
)
def test_ohem_ratio(
    losses: list[float], ones: list[int], negatives: float, keep: int, expected: list[int]
) -> None:
    loss = OhemRatio(negatives=negatives, keep=keep, nms_iou=None)
    assert counted(loss, losses, ones, "11111") == expected


def test_the_pool_is_all_that_is_looked_at() -> None:
    """Two in the pool, one of which suppresses the other: one is left, not a third one."""
    assert counted(Ohem(keep=2, pool=2), [3, 5, 4, 2, 1], [], "11111") == [1]
    with pytest.raises(ValueError, match="pool 2 must not be below keep 3"):
        Ohem(keep=3, pool=2)


def test_background_has_a_pool_of_its_own_beside_foreground() -> None:
    """Hard foreground must not crowd the background out of what is looked at."""
    loss = OhemRatio(keep=2, pool=2, negatives=1.0, nms_iou=None)
    assert counted(loss, [9, 8, 7, 1, 2], [0, 1, 2], "11111") == [0, 4]


def test_suppression_is_felt_among_real_anchors() -> None:
    """With every anchor as hard as its neighbours, suppression leaves far less than there are."""
    anchors = canvas_anchors(AnchorConfig(), 128, 128)
    losses = torch.linspace(1, 2, len(anchors))
    used = torch.ones(len(anchors), dtype=torch.bool)
    kept = hard_examples(losses, anchors, used, pool=512, nms_iou=Ohem().nms_iou)
    assert len(kept) < 256
    overlap = box_iou(anchors[kept], anchors[kept]).fill_diagonal_(0)
    assert overlap.max().item() <= 0.5


# --- GIoU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ((0, 0, 2, 2), 0.0),
        # Half of it: IoU 1/2, nothing around.
        ((0, 0, 1, 2), 0.5),
        # Beside it: IoU 0, around 4 x 2 = union.
        ((2, 0, 4, 2), 1.0),
        # Apart: IoU 0, around 6 x 2 of which 8 are the union.
        ((4, 0, 6, 2), 1 + 4 / 12),
        # Across a corner: 1 of 7; around 9.
        ((1, 1, 3, 3), 1 - 1 / 7 + 2 / 9),
        # No area, inside.
        ((1, 1, 1, 1), 1.0),
    ],
)
def test_giou_by_hand(predicted: tuple[float, ...], expected: float) -> None:
    target = torch.tensor([[0.0, 0, 2, 2]])
    found = giou_loss(torch.tensor([predicted], dtype=torch.float32), target)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_giou_pulls_a_box_that_is_apart() -> None:
    box = torch.tensor([[10.0, 0, 12, 2]], requires_grad=True)
    giou_loss(box, torch.tensor([[0.0, 0, 2, 2]])).backward()
    assert box.grad is not None
    # Down the slope the left edge goes left.
    assert box.grad[0, 0] > 0


def test_giou_brings_back_a_box_that_has_grown_beyond_the_clamp() -> None:
    deltas = torch.tensor([[0.0, 0, 12, 12]], requires_grad=True)
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    GIoU()(deltas, anchors, anchors).sum().backward()
    assert deltas.grad is not None
    assert (deltas.grad[0, 2:] > 0).all()


@given(st.floats(4.2, 2000))
def test_giou_s_way_back_is_never_closed_by_rounding(scale: float) -> None:
    deltas = torch.tensor([[0.0, 0, scale, scale]], requires_grad=True)
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    GIoU()(deltas, anchors, anchors).sum().backward()
    assert deltas.grad is not None
    assert (deltas.grad[0, 2:] > 0).all()


def test_giou_is_that_of_the_decoded_box_however_far_it_is() -> None:
    """Ten widths to the right: IoU 0, around 220 x 20, the union 800."""
    deltas, anchors = torch.tensor([[10.0, 0, 0, 0]]), torch.tensor([[0.0, 0, 20, 20]])
    expected = 1 + (220 * 20 - 800) / (220 * 20)
    assert GIoU()(deltas, anchors, anchors).item() == pytest.approx(expected)


@pytest.mark.parametrize("box_loss", [SmoothL1(), SmoothL1(beta=1.0), L1(), GIoU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [0.0, 1.0, -60.0, 60.0, 1e4, -1e4])
def test_box_losses_are_finite_whatever_is_predicted(
    box_loss: BoxLoss, dtype: torch.dtype, delta: float
) -> None:
    deltas = torch.full((2, 4), delta, dtype=dtype, requires_grad=True)
    anchors = torch.tensor([[0.0, 0, 16, 16], [500.0, 500, 1000, 1000]])
    objects = torch.tensor([[1.0, 1, 12, 14], [400.0, 400, 900, 800]])
    loss = box_loss(deltas, anchors, objects)
    assert loss.shape == (2,)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("box_loss", [SmoothL1(), L1(), GIoU()], ids=str)
def test_box_losses_are_zero_at_the_truth_and_fall_on_the_way_there(box_loss: BoxLoss) -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    objects = torch.tensor([[4.0, 2, 24, 12]])
    truth = encode(objects, anchors)
    losses = [box_loss(truth * share, anchors, objects).item() for share in (0, 0.5, 0.9, 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-6)
