"""The loss family of Focal Loss (arXiv 1708.02002): for classes and for boxes.

A classification loss of a config is one of `ClassificationLoss`, a box loss one of `BoxLoss`; all
of a kind are called in the same way. Below them are the formulas as plain functions. Every loss is
computed in float32 and in log space, whatever the logits' type, so that value and gradient stay
finite for any finite logit.

p_t is the probability that an example's true answer gets: sigmoid(x_t), where x_t is the logit of
a one and minus the logit of a zero.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from torch import Tensor

from model_export.retinanet.box_coding import MAX_LOG_SCALE, decode, encode
from model_export.retinanet.choice import by_name
from model_export.retinanet.hard_examples import hard_examples

Alpha = Annotated[float, Field(ge=0, le=1)]

# --- formulas ------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float | None, gamma: float) -> Tensor:
    """Focal loss, -alpha_t (1 - p_t)^gamma log p_t, element by element (eq. 4 and 5).

    `targets` holds 0 and 1 in the shape of `logits`. alpha in [0, 1] weighs the ones, 1 - alpha
    the zeros; None weighs neither. gamma >= 0, and 0 gives (balanced) cross entropy.

    >>> focal_loss(torch.zeros(1), torch.ones(1), alpha=0.25, gamma=2.0)  # 0.25 * 0.5**2 * log 2
    tensor([0.0433])
    """
    x_t = _true_logits(logits, targets)
    # (1 - p_t)^gamma = sigmoid(-x_t)^gamma, as a power of a logarithm that cannot underflow to 0:
    # the gradient of u^gamma at u = 0 is infinite for gamma < 1.
    modulation = (gamma * F.logsigmoid(-x_t)).exp()
    return _balance(-modulation * F.logsigmoid(x_t), targets, alpha)


def focal_star_loss(
    logits: Tensor, targets: Tensor, *, alpha: float | None, gamma: float, beta: float
) -> Tensor:
    """FL*, -log(sigmoid(gamma x_t + beta)) / gamma, element by element (appendix A); gamma > 0.

    >>> focal_star_loss(torch.zeros(1), torch.ones(1), alpha=None, gamma=2.0, beta=1.0)
    tensor([0.1566])
    """
    x_t = _true_logits(logits, targets)
    return _balance(-F.logsigmoid(gamma * x_t + beta) / gamma, targets, alpha)


def hinge_loss(logits: Tensor, targets: Tensor, *, margin: float) -> Tensor:
    """max(0, margin - p_t), element by element: nothing is lost on p_t above the margin.

    >>> hinge_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0]), margin=0.75)
    tensor([0.2500, 0.0000])
    """
    return (margin - _true_logits(logits, targets).sigmoid()).clamp(min=0)


def smooth_l1_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """0.5 x^2 / beta where |x| < beta, else |x| - 0.5 beta, element by element; beta = 0 is L1.

    >>> smooth_l1_loss(torch.tensor([0.05, 2.0]), torch.zeros(2), beta=0.1)
    tensor([0.0125, 1.9500])
    """
    distance = (predicted.float() - target.float()).abs()
    if beta == 0:
        return distance
    return torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta)


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """(N,) 1 - generalised IoU of boxes (N, 4) with boxes (N, 4), in [0, 2] (arXiv 1902.09630).

    >>> giou_loss(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[2.0, 0, 4, 2]]))
    tensor([1.])
    """
    predicted, target = predicted.float(), target.float()
    shared = _area(
        torch.maximum(predicted[:, :2], target[:, :2]),
        torch.minimum(predicted[:, 2:], target[:, 2:]),
    )
    around = _area(
        torch.minimum(predicted[:, :2], target[:, :2]),
        torch.maximum(predicted[:, 2:], target[:, 2:]),
    )
    union = _area(predicted[:, :2], predicted[:, 2:]) + _area(target[:, :2], target[:, 2:]) - shared
    return 1 - shared / union + (around - union) / around


def _true_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float() * (2 * targets.float() - 1)


def _balance(loss: Tensor, targets: Tensor, alpha: float | None) -> Tensor:
    if alpha is None:
        return loss
    targets = targets.float()
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(dim=1)


# --- losses of classes ---------------------------------------------------------------------------


class _Loss(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _DenseLoss(_Loss):
    """A loss of every anchor."""

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(A, K) float32 loss of each logit (A, K) with targets (A, K) of 0 and 1."""
        raise TypeError(f"{type(self).__name__} does not define elements")

    def counted(self, elements: Tensor, targets: Tensor, anchors: Tensor, used: Tensor) -> Tensor:
        """(A,) bool: the anchors whose `elements` (A, K) are summed, out of those `used` (A,)."""
        return used


class CrossEntropy(_DenseLoss):
    """-log p_t."""

    name: Literal["ce"] = "ce"

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See the base class."""
        return focal_loss(logits, targets, alpha=None, gamma=0.0)


class BalancedCrossEntropy(_DenseLoss):
    """-alpha_t log p_t."""

    name: Literal["balanced_ce"] = "balanced_ce"
    alpha: Alpha = 0.75

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See the base class."""
        return focal_loss(logits, targets, alpha=self.alpha, gamma=0.0)


class Focal(_DenseLoss):
    """-alpha_t (1 - p_t)^gamma log p_t; `alpha: null` leaves alpha_t out."""

    name: Literal["focal"] = "focal"
    alpha: Alpha | None = 0.25
    gamma: float = Field(default=2.0, ge=0)

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See the base class."""
        return focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)


class FocalStar(_DenseLoss):
    """-log(sigmoid(gamma x_t + beta)) / gamma, times alpha_t unless `alpha: null`."""

    name: Literal["focal_star"] = "focal_star"
    alpha: Alpha | None = None
    gamma: float = Field(default=2.0, gt=0)
    beta: float = 1.0

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See the base class."""
        return focal_star_loss(logits, targets, alpha=self.alpha, gamma=self.gamma, beta=self.beta)


class Hinge(_DenseLoss):
    """max(0, margin - p_t)."""

    name: Literal["hinge"] = "hinge"
    margin: float = Field(default=0.5, gt=0, le=1)

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See the base class."""
        return hinge_loss(logits, targets, margin=self.margin)


class _Mining(_Loss):
    keep: int = Field(default=128, ge=1)
    """Anchors of each image that learn."""
    nms_iou: float | None = Field(default=0.5, gt=0, le=1)
    """An anchor goes when a harder one overlaps it by more; null: none does.

    Anchors of neighbouring sizes overlap by 0.63, those of neighbouring cells by
    (size - stride) / (size + stride): where anchors are small, a high value suppresses nothing.
    """
    pool: int = Field(default=512, ge=1)
    """This many anchors of highest loss take part in the suppression, of which `keep` are kept."""

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool < self.keep:
            raise ValueError(f"pool {self.pool} must not be below keep {self.keep}")
        return self

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return focal_loss(logits, targets, alpha=None, gamma=0.0)


class Ohem(_Mining):
    """Cross entropy on the hardest anchors of each image only (arXiv 1604.03540)."""

    name: Literal["ohem"] = "ohem"

    def counted(self, elements: Tensor, targets: Tensor, anchors: Tensor, used: Tensor) -> Tensor:
        """See `_DenseLoss`."""
        losses = elements.sum(dim=1)
        hard = hard_examples(losses, anchors, used, pool=self.pool, nms_iou=self.nms_iou)
        return _mask(hard[: self.keep], used)


class OhemRatio(_Mining):
    """The same with a fixed number of background anchors to each foreground anchor."""

    name: Literal["ohem_ratio"] = "ohem_ratio"
    negatives: float = Field(default=3.0, gt=0)
    """Background anchors for each foreground anchor."""

    def counted(self, elements: Tensor, targets: Tensor, anchors: Tensor, used: Tensor) -> Tensor:
        """See `_DenseLoss`."""
        losses = elements.sum(dim=1)
        foreground = targets.any(dim=1)
        # Foreground is rare and need not be hard: all of it takes part beside the pool.
        hard = hard_examples(
            losses,
            anchors,
            used & ~foreground,
            pool=self.pool,
            nms_iou=self.nms_iou,
            always=used & foreground,
        )
        positive = hard[foreground[hard]][: max(1, round(self.keep / (1 + self.negatives)))]
        # An image without objects teaches as much as one with a single foreground anchor.
        wanted = round(max(1, len(positive)) * self.negatives)
        return _mask(torch.cat([positive, hard[~foreground[hard]][:wanted]]), used)


def _mask(chosen: Tensor, used: Tensor) -> Tensor:
    mask = torch.zeros_like(used)
    mask[chosen] = True
    return mask


# --- losses of boxes -----------------------------------------------------------------------------


class SmoothL1(_Loss):
    """Smooth L1 of the four deltas."""

    name: Literal["smooth_l1"] = "smooth_l1"
    beta: float = Field(default=0.1, ge=0)

    def __call__(self, deltas: Tensor, anchors: Tensor, objects: Tensor) -> Tensor:
        """(F,) loss of deltas (F, 4) at anchors (F, 4) that learn objects (F, 4)."""
        return smooth_l1_loss(deltas, encode(objects, anchors), beta=self.beta).sum(dim=1)


class L1(_Loss):
    """Absolute difference of the four deltas."""

    name: Literal["l1"] = "l1"

    def __call__(self, deltas: Tensor, anchors: Tensor, objects: Tensor) -> Tensor:
        """(F,) loss of deltas (F, 4) at anchors (F, 4) that learn objects (F, 4)."""
        return smooth_l1_loss(deltas, encode(objects, anchors), beta=0.0).sum(dim=1)


class GIoU(_Loss):
    """1 - generalised IoU of the decoded boxes."""

    name: Literal["giou"] = "giou"

    def __call__(self, deltas: Tensor, anchors: Tensor, objects: Tensor) -> Tensor:
        """(F,) loss of deltas (F, 4) at anchors (F, 4) that learn objects (F, 4)."""
        shift, scale = deltas[:, :2].float(), deltas[:, 2:].float()
        # `decode` clamps the scale, and there the gradient is 0: a box that has grown beyond would
        # never come back. Clamped here in value only (the difference is exactly 0), it keeps the
        # gradient of the clamp's edge.
        scale = scale.detach().clamp(max=MAX_LOG_SCALE) + (scale - scale.detach())
        return giou_loss(decode(torch.cat([shift, scale], dim=1), anchors), objects)


# --- choice in a config --------------------------------------------------------------------------


ClassificationLoss = Annotated[
    Annotated[CrossEntropy, Tag("ce")]
    | Annotated[BalancedCrossEntropy, Tag("balanced_ce")]
    | Annotated[Focal, Tag("focal")]
    | Annotated[FocalStar, Tag("focal_star")]
    | Annotated[Hinge, Tag("hinge")]
    | Annotated[Ohem, Tag("ohem")]
    | Annotated[OhemRatio, Tag("ohem_ratio")],
    by_name("focal", "ce", "balanced_ce", "focal_star", "hinge", "ohem", "ohem_ratio"),
]
BoxLoss = Annotated[
    Annotated[SmoothL1, Tag("smooth_l1")] | Annotated[L1, Tag("l1")] | Annotated[GIoU, Tag("giou")],
    by_name("smooth_l1", "l1", "giou"),
]
