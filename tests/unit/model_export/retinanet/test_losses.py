"""The losses, against the paper's numbers and its formula of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_export.retinanet.losses import focal_loss, smooth_l1_loss

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def focal_at(p_t: float, gamma: float) -> float:
    """Loss of a one that is seen with probability `p_t`, without alpha."""
    x = torch.tensor([logit(p_t)], dtype=torch.float64)
    return focal_loss(x, torch.ones(1), alpha=1.0, gamma=gamma).item()


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_t", "gamma", "expected"),
    [
        # -(1 - p_t)^gamma log p_t by hand.
        (0.5, 0.0, 0.6931472),
        (0.5, 1.0, 0.3465736),
        (0.5, 2.0, 0.1732868),
        (0.5, 5.0, 0.0216608),
        (0.9, 0.0, 0.1053605),
        (0.9, 0.5, 0.0333179),
        (0.9, 2.0, 0.0010536),
        (0.968, 2.0, 3.3303e-5),
        (0.1, 0.0, 2.3025851),
        (0.1, 2.0, 1.8650939),
        (0.01, 2.0, 4.5134876),
    ],
)
def test_values(p_t: float, gamma: float, expected: float) -> None:
    assert focal_at(p_t, gamma) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("p_t", "least", "most"),
    [(0.9, 99.9, 100.1), (0.968, 970, 980), (0.5, 3.99, 4.01), (0.4, 2.7, 2.8), (0.01, 1.0, 1.03)],
)
def test_how_much_less_than_cross_entropy_at_gamma_2(p_t: float, least: float, most: float) -> None:
    """The paper's 100x at .9, about 1000x at .968, at most 4x for what is misclassified."""
    assert least <= focal_at(p_t, 0.0) / focal_at(p_t, 2.0) <= most


def test_alpha_weighs_ones_and_its_complement_zeros() -> None:
    logits = torch.tensor([0.0, 0.0, 2.0, 2.0])
    targets = torch.tensor([1.0, 0.0, 1.0, 0.0])
    plain = focal_loss(logits, targets, alpha=0.5, gamma=2.0) / 0.5
    weighed = focal_loss(logits, targets, alpha=0.25, gamma=2.0)
    assert torch.allclose(weighed / plain, torch.tensor([0.25, 0.75, 0.25, 0.75]))


def test_gamma_0_is_balanced_cross_entropy() -> None:
    logits = torch.linspace(-8, 8, 33)
    targets = (torch.arange(33) % 2).float()
    x_t = logits.double() * (2 * targets - 1)
    expected = -x_t.sigmoid().log() * torch.where(targets == 1, 0.3, 0.7)
    found = focal_loss(logits, targets, alpha=0.3, gamma=0.0)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_a_zero_is_a_one_seen_in_a_mirror() -> None:
    logits = torch.linspace(-30, 30, 61)
    ones = focal_loss(logits, torch.ones(61), alpha=0.5, gamma=2.0)
    zeros = focal_loss(-logits, torch.zeros(61), alpha=0.5, gamma=2.0)
    assert torch.equal(ones, zeros)


def test_targets_of_any_type_and_shape() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = (logits > 0).long()
    loss = focal_loss(logits, targets, alpha=0.25, gamma=2.0)
    assert loss.shape == (2, 3, 4)
    assert torch.equal(loss, focal_loss(logits, targets.float(), alpha=0.25, gamma=2.0))
    assert focal_loss(torch.zeros(0), torch.zeros(0), alpha=0.25, gamma=2.0).shape == (0,)


# --- gradients -----------------------------------------------------------------------------------


def gradient(logits: torch.Tensor, targets: torch.Tensor, *, gamma: float) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    focal_loss(logits, targets, alpha=0.5, gamma=gamma).sum().backward()
    assert logits.grad is not None
    return logits.grad / 0.5


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_is_the_paper_s(gamma: float, target: float) -> None:
    """dFL/dx = y (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1), Focal Loss, appendix B."""
    x = torch.linspace(-12, 12, 97)
    y = 2 * target - 1
    p_t = (y * x.double()).sigmoid()
    expected = y * (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)
    found = gradient(x, torch.full_like(x, target), gamma=gamma)
    assert torch.allclose(found.double(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_is_the_slope_of_the_loss(gamma: float) -> None:
    """The loss computes in float32, so the step and the tolerance are float32's."""
    x = torch.linspace(-4, 4, 17)
    targets = (torch.arange(17) % 2).float()
    step = 2**-6

    def loss(at: torch.Tensor) -> torch.Tensor:
        return focal_loss(at, targets, alpha=0.5, gamma=gamma).double() / 0.5

    slope = (loss(x + step) - loss(x - step)) / (2 * step)
    found = gradient(x, targets, gamma=gamma).double()
    assert torch.allclose(found, slope, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_finite_for_any_logit_of_any_type(dtype: torch.dtype, gamma: float, target: float) -> None:
    x = torch.tensor([-1e4, -300, -90, -20, 0, 20, 90, 300, 1e4], dtype=dtype, requires_grad=True)
    loss = focal_loss(x, torch.full((9,), target), alpha=0.25, gamma=gamma)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    # A wrong example pulls at full strength however wrong it is, a right one does not pull.
    alpha_t = 0.25 if target else 0.75
    wrong, right = (0, -1) if target else (-1, 0)
    assert x.grad[wrong].abs().item() == pytest.approx(alpha_t)
    assert x.grad[right].abs().item() < 1e-6
    assert loss[wrong].item() == pytest.approx(alpha_t * 1e4, rel=0.01)


def test_finite_at_the_end_of_float32() -> None:
    x = torch.tensor([3e38, -3e38], requires_grad=True)
    loss = focal_loss(x, torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2.0).sum()
    loss = loss + focal_loss(x, torch.tensor([0.0, 1.0]), alpha=0.25, gamma=2.0).mean() * 1e-3
    loss.backward()
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_under_autocast(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e4, 0.5, 1e4]], requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        logits = x @ torch.eye(3)
        assert logits.dtype == dtype
        loss = focal_loss(logits, torch.tensor([[1.0, 0.0, 0.0]]), alpha=0.25, gamma=0.5).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@given(st.floats(-50, 50), st.floats(0, 5), st.floats(0.01, 5))
def test_more_gamma_is_never_more_loss(x: float, gamma: float, more: float) -> None:
    one = torch.ones(1)
    at = torch.tensor([x])
    less = focal_loss(at, one, alpha=1.0, gamma=gamma + more)
    assert less <= focal_loss(at, one, alpha=1.0, gamma=gamma)


# --- smooth L1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "distance", "expected"),
    [
        (1.0, 0.5, 0.125),
        (1.0, 1.0, 0.5),
        (1.0, 3.0, 2.5),
        (0.1, 0.05, 0.0125),
        (0.1, 0.1, 0.05),
        (0.1, 2.0, 1.95),
        (0.0, 0.05, 0.05),
        (0.0, 0.0, 0.0),
        (0.1, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_smooth_l1_values(beta: float, distance: float, expected: float, sign: int) -> None:
    loss = smooth_l1_loss(torch.tensor([1.0 + sign * distance]), torch.tensor([1.0]), beta=beta)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@given(st.floats(1e-3, 2), st.floats(-5, 5))
def test_smooth_l1_is_torch_s(beta: float, x: float) -> None:
    at, zero = torch.tensor([x]), torch.zeros(1)
    expected = torch.nn.functional.smooth_l1_loss(at, zero, beta=beta)
    assert smooth_l1_loss(at, zero, beta=beta).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("beta", [1 / 9, 0.1, 1.0])
def test_smooth_l1_and_its_slope_are_continuous_at_beta(beta: float) -> None:
    around = torch.tensor([beta * (1 - 1e-4), beta * (1 + 1e-4)], requires_grad=True)
    loss = smooth_l1_loss(around, torch.zeros(2), beta=beta)
    assert (loss[1] - loss[0]).abs().item() < 1e-3 * beta
    loss.sum().backward()
    assert around.grad is not None
    assert torch.allclose(around.grad, torch.ones(2), atol=2e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smooth_l1_of_far_boxes_pulls_with_strength_1(beta: float, dtype: torch.dtype) -> None:
    x = torch.tensor([6e4, -6e4, 0.0], dtype=dtype, requires_grad=True)
    loss = smooth_l1_loss(x, torch.zeros(3), beta=beta)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, -1.0, 0.0]
