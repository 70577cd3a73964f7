"""What the training loop does about norms and about gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from model_export.checkpoints import Description
from model_export.config import TrainConfig
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.training.lightning_module import RetinaNetModule
from service.imaging.canvas import Buckets, Size

MODEL = ModelConfig(backbone="mobilenet_v2", fpn_channels=8, head_width=8, head_depth=1)
CANVAS = Buckets(sizes=(Size(64, 64),))


def module(*, freeze_norms: bool = True, pretrained: bool = True) -> RetinaNetModule:
    config = TrainConfig(model=MODEL, canvas=CANVAS, freeze_norms=freeze_norms)
    description = Description(classes=("a",), model=MODEL, canvas=CANVAS)
    made = RetinaNetModule(RetinaNet(MODEL, classes=1), config, description, pretrained=pretrained)
    made.train()
    return made


def norms_learn_statistics(made: RetinaNetModule) -> bool:
    made.on_train_epoch_start()
    states = {m.training for m in made.network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(states) == 1
    assert not made.average.training
    return states.pop()


@pytest.mark.parametrize("freeze", [True, False])
def test_norms_are_frozen_where_weights_brought_statistics(freeze: bool) -> None:
    assert norms_learn_statistics(module(freeze_norms=freeze)) is not freeze


def test_a_fresh_network_has_no_statistics_worth_keeping() -> None:
    """Frozen at mean 0 and variance 1, a random ResNet-101 explodes in its first step and a random
    MobileNetV2 gives next to nothing."""
    assert norms_learn_statistics(module(pretrained=False))


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_resumed_run_goes_on_as_it_began(pretrained: bool) -> None:
    checkpoint: dict[str, Any] = {}
    module(pretrained=pretrained).on_save_checkpoint(checkpoint)
    # Resuming gives no weights: they are in the checkpoint.
    resumed = module(pretrained=False)
    resumed.on_load_checkpoint(checkpoint)
    assert norms_learn_statistics(resumed) is not pretrained


def test_statistics_of_norms_are_averaged_with_the_weights() -> None:
    """Those of the last batches alone are of other weights, and change AP by points."""
    made = module(freeze_norms=False)

    def norms(network: nn.Module) -> nn.BatchNorm2d:
        return next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))

    made.average.update_parameters(made.network)
    for mean in (10.0, -10.0) * 5:
        norms(made.network).running_mean.fill_(mean)  # type: ignore[union-attr]
        norms(made.network).num_batches_tracked.add_(1)  # type: ignore[union-attr]
        made.average.update_parameters(made.network)
    assert -10 < norms(made.average.module).running_mean[0] < 10  # type: ignore[index]
    assert norms(made.average.module).num_batches_tracked == 10


def test_large_gradients_are_clipped() -> None:
    made = module()
    optimiser = made.configure_optimizers()
    for parameter in made.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.on_before_optimizer_step(optimiser)
    grads = [p.grad for p in made.network.parameters() if p.grad is not None]
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(
        made.config.optimiser.gradient_clip, rel=1e-3
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    """Clipping alone would turn one infinite gradient into NaN in every weight and the average."""
    made = module()
    optimiser = made.configure_optimizers()
    before = {k: v.clone() for k, v in made.network.state_dict().items()}
    for parameter in made.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    grad = next(made.network.parameters()).grad
    assert grad is not None
    grad.view(-1)[0] = bad
    made.on_before_optimizer_step(optimiser)
    optimiser.step()
    for key, value in made.network.state_dict().items():
        assert torch.equal(value, before[key]), key
