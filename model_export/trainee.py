"""What learns: the network, its running average, the optimiser and the schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final

import lightning
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from model_export.checkpoints import DESCRIPTION_KEY, Description
from model_export.config import OptimiserConfig, TrainConfig
from model_export.objective import detection_loss
from model_export.retinanet.model import RetinaNet, freeze_norms
from model_export.transforms import Batch
from service.errors import RetinaserveError

PATIENCE: Final = 20
"""Steps in a row with a loss or gradient that is not finite before the run gives up."""


class TrainingError(RetinaserveError):
    """Training cannot go on."""

    title = "Training failed"


class Trainee(lightning.LightningModule):
    """The network, its running average, the optimiser and the schedule."""

    def __init__(
        self,
        network: RetinaNet,
        config: TrainConfig,
        description: Description,
        *,
        pretrained: bool,
    ) -> None:
        """`pretrained`: the backbone's weights, and so its norms' statistics, come from a file."""
        super().__init__()
        # A fresh network's statistics are no more than mean 0 and variance 1: frozen at these,
        # deep networks explode or go silent.
        self._norms_frozen = config.freeze_norms and pretrained
        self.network = network
        self.average = AveragedModel(network, avg_fn=averaging(config.ema_decay), use_buffers=False)
        self.average.requires_grad_(False)
        self.config = config
        self.description = description
        self.best_ap = -1.0
        self.sums: dict[str, float] = {}
        self._minutes_before = 0.0
        self._started = time.monotonic()
        self._not_finite = 0

    def minutes(self) -> float:
        """Time spent on this run, over all its resumptions."""
        return self._minutes_before + (time.monotonic() - self._started) / 60

    def progress(self) -> float:
        """Share of the schedule that is over: by steps or by time, whichever is further."""
        total = self.config.epochs * self.trainer.num_training_batches
        done = self.global_step / total
        if self.config.max_minutes is not None:
            done = max(done, self.minutes() / self.config.max_minutes)
        return min(done, 1.0)

    def on_fit_start(self) -> None:
        """Start the clock when the work starts."""
        self._started = time.monotonic()

    def on_train_epoch_start(self) -> None:
        """Choose the modes anew: validation has left the average as it wants it."""
        self.network.train()
        self.average.eval()
        if self._norms_frozen:
            freeze_norms(self.network.modules())
        self.sums = {"steps": 0.0, "classification": 0.0, "regression": 0.0}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates for this step."""
        share = schedule(self.config.optimiser, self.global_step, self.progress())
        optimiser = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimiser, torch.optim.Optimizer)
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * share

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Loss of one batch; None, which skips the step, if it is not finite."""
        levels = self.network(batch.images, batch.image_sizes)
        losses = detection_loss(
            levels,
            batch.boxes,
            batch.labels,
            matching=self.config.matching,
            loss=self.config.loss,
        )
        total = losses.classification + losses.regression
        if not torch.isfinite(total):
            self._count_not_finite()
            return None
        self.sums["steps"] += 1
        self.sums["classification"] += losses.classification.item()
        self.sums["regression"] += losses.regression.item()
        self.log("loss", total.detach(), prog_bar=True, batch_size=len(batch.boxes))
        return total

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient's norm; drop a gradient that is not finite, which skips the step."""
        learning = [p for p in self.network.parameters() if p.grad is not None]
        if not learning:
            return
        norm = torch.nn.utils.clip_grad_norm_(learning, self.config.optimiser.gradient_clip)
        if torch.isfinite(norm):
            self._not_finite = 0
            return
        # One such step would leave nothing finite in the network or in its average.
        for parameter in learning:
            parameter.grad = None
        self._count_not_finite()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Update the average; stop when the time is over."""
        self.average.update_parameters(self.network)
        limit = self.config.max_minutes
        if limit is not None and self.minutes() >= limit:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or AdamW; no weight decay on biases and norms, a rate of its own for the backbone."""
        settings = self.config.optimiser
        groups = parameter_groups(self.network, settings)
        if settings.name == "adamw":
            return torch.optim.AdamW(groups, lr=settings.lr)
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what a reader of the checkpoint and a resumed run need."""
        checkpoint[DESCRIPTION_KEY] = self.description.model_dump(mode="json")
        checkpoint["progress"] = {
            "minutes": self.minutes(),
            "best_ap": self.best_ap,
            "norms_frozen": self._norms_frozen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the run stopped."""
        self._minutes_before = float(checkpoint["progress"]["minutes"])
        self.best_ap = float(checkpoint["progress"]["best_ap"])
        self._norms_frozen = bool(checkpoint["progress"]["norms_frozen"])

    def _count_not_finite(self) -> None:
        self._not_finite += 1
        if self._not_finite >= PATIENCE:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self._not_finite} steps in a row; "
                "try a lower optimiser.lr"
            )


def schedule(settings: OptimiserConfig, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up by step, half a cosine by progress.

    >>> settings = OptimiserConfig(warmup_steps=4, final_lr_share=0.0)
    >>> [schedule(settings, step, progress) for step, progress in ((0, 0.0), (3, 0.0), (9, 0.5))]
    [0.25, 1.0, 0.5]
    """
    floor = settings.final_lr_share
    cosine = floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / max(settings.warmup_steps, 1))


def parameter_groups(network: RetinaNet, settings: OptimiserConfig) -> list[dict[str, Any]]:
    """Optimiser groups: (backbone or not) x (decayed or not), each with its peak rate."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        key = (name.startswith("backbone."), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "peak_lr": settings.lr * (settings.backbone_lr_share if backbone else 1.0),
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in sorted(groups.items(), reverse=True)
    ]


def averaging(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential average that forgets its random start quickly: the decay rises to `decay`."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        number = float(count)
        warm = min(decay, (1 + number) / (10 + number))
        return averaged + (current - averaged) * (1 - warm)

    return average
