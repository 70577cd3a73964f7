"""The losses of the detector (Focal Loss, arXiv 1708.02002).

Every loss is computed in float32 and in log space, whatever the logits' type, so that value and
gradient stay finite for any finite logit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Alpha-balanced focal loss, -alpha_t (1 - p_t)^gamma log p_t, element by element (eq. 5).

    `targets` holds 0 and 1 in the shape of `logits`. alpha in [0, 1] weighs the ones, 1 - alpha
    the zeros; gamma >= 0, and 0 gives balanced cross entropy.

    >>> focal_loss(torch.zeros(1), torch.ones(1), alpha=0.25, gamma=2.0)  # 0.25 * 0.5**2 * log 2
    tensor([0.0433])
    """
    targets = targets.float()
    # The logit of p_t: x for a one, -x for a zero.
    x_t = logits.float() * (2 * targets - 1)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    # (1 - p_t)^gamma = sigmoid(-x_t)^gamma, as a power of a logarithm that cannot underflow to 0:
    # the gradient of u^gamma at u = 0 is infinite for gamma < 1.
    modulation = (gamma * F.logsigmoid(-x_t)).exp()
    return -alpha_t * modulation * F.logsigmoid(x_t)


def smooth_l1_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """0.5 x^2 / beta where |x| < beta, else |x| - 0.5 beta, element by element; beta = 0 is L1.

    >>> smooth_l1_loss(torch.tensor([0.05, 2.0]), torch.zeros(2), beta=0.1)
    tensor([0.0125, 1.9500])
    """
    distance = (predicted.float() - target.float()).abs()
    if beta == 0:
        return distance
    return torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta)
