"""Loss and gradient of one example against p_t (Focal Loss, figure 1), and FL* beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from model_export.retinanet.losses import focal_loss, focal_star_loss
from model_export.study.figures import panels, save, write_columns

GAMMAS: Final = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Those of the paper's figure 1; 0 is cross entropy."""

STARS: Final = ((2.0, 1.0), (4.0, 0.0))
"""(gamma, beta) of FL* in the paper's table 3."""

_POINTS: Final = 999


@dataclass(frozen=True, slots=True)
class Curve:
    """One loss over the points of `Curves`."""

    name: str
    loss: Tensor
    gradient: Tensor
    """With respect to x_t, from the loss by automatic differentiation; never positive."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses of an example whose true answer has the logit x_t."""

    x_t: Tensor
    p_t: Tensor
    """sigmoid(x_t), evenly spaced."""
    curves: tuple[Curve, ...]


def compute(
    gammas: Sequence[float] = GAMMAS, stars: Sequence[tuple[float, float]] = STARS
) -> Curves:
    """Focal losses for `gammas` and FL* for the pairs (gamma, beta), without alpha."""
    p_t = torch.linspace(0.001, 0.999, _POINTS, dtype=torch.float64)
    x_t = p_t.logit().float()
    found = [
        _curve(
            f"FL gamma {gamma:g}" if gamma else "CE",
            x_t,
            partial(focal_loss, alpha=None, gamma=gamma),
        )
        for gamma in gammas
    ]
    found += [
        _curve(
            f"FL* gamma {gamma:g} beta {beta:g}",
            x_t,
            partial(focal_star_loss, alpha=None, gamma=gamma, beta=beta),
        )
        for gamma, beta in stars
    ]
    return Curves(x_t, p_t.float(), tuple(found))


def describe(gamma: float = 2.0) -> Iterator[str]:
    """Return the paper's statements about gamma in numbers that are computed here."""
    for p_t in (0.1, 0.5, 0.9, 0.968):
        x = torch.tensor([p_t], dtype=torch.float64).logit()
        one = torch.ones(1)
        plain = focal_loss(x, one, alpha=None, gamma=0.0)
        ratio = (plain / focal_loss(x, one, alpha=None, gamma=gamma)).item()
        yield f"at p_t {p_t:g} gamma {gamma:g} makes the loss {ratio:.3g} times smaller than CE"


def write(found: Curves, output: Path) -> list[Path]:
    """Write loss-curves.png and loss-curves.csv into `output`; their paths."""
    figure, (losses, gradients, stars) = panels(3)
    for curve in found.curves:
        star = curve.name.startswith("FL*")
        style = "--" if star else "-"
        if not star:
            losses.plot(found.p_t, curve.loss, style, label=curve.name)
            gradients.plot(found.p_t, curve.gradient, style, label=curve.name)
        if star or curve.name in ("CE", "FL gamma 2"):
            stars.plot(found.x_t, curve.loss, style, label=curve.name)
    losses.set(title="Loss (figure 1)", xlabel="p_t", ylabel="loss", ylim=(0, 5))
    gradients.set(title="Gradient", xlabel="p_t", ylabel="d loss / d x_t")
    stars.set(title="FL* (appendix)", xlabel="x_t", ylabel="loss", xlim=(-5, 5), ylim=(0, 5))
    for axes in (losses, gradients, stars):
        axes.legend()
    columns: dict[str, list[float]] = {"x_t": found.x_t.tolist(), "p_t": found.p_t.tolist()}
    for curve in found.curves:
        columns[f"loss of {curve.name}"] = curve.loss.tolist()
        columns[f"gradient of {curve.name}"] = curve.gradient.tolist()
    return [
        save(figure, output / "loss-curves.png"),
        write_columns(output / "loss-curves.csv", columns),
    ]


def _curve(name: str, x_t: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Curve:
    at = x_t.clone().requires_grad_()
    loss = function(at, torch.ones_like(at))
    (gradient,) = torch.autograd.grad(loss.sum(), at)
    return Curve(name, loss.detach(), gradient)
