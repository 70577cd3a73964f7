"""The LightningModule: the network, its running average, the optimiser and the schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from model_export.checkpoints import DESCRIPTION_KEY, Description
from model_export.config import OptimiserConfig, TrainConfig
from model_export.data.batches import Batch
from model_export.retinanet.anchors import level_anchors
from model_export.retinanet.matching import IGNORED
from model_export.retinanet.model import RetinaNet, freeze_norms
from model_export.training.detection_loss import assign, assigned_loss, normaliser
from model_export.training.distributed import all_reduce_sum, processes
from service.errors import DataError, RetinaserveError

PATIENCE: Final = 20
"""Steps in a row with a loss or gradient that is not finite before the run gives up."""
_KEPT_CANVASES: Final = 16
"""Canvas sizes whose anchors stay in memory."""

Tensors = tuple[Tensor, ...] | list[Tensor]


class TrainingError(RetinaserveError):
    """Training cannot continue."""

    title = "Training failed"


class RetinaNetModule(lightning.LightningModule):
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
        # Gradients of several backward passes make one step; see training_step.
        self.automatic_optimization = False
        # A fresh network's statistics are no more than mean 0 and variance 1: frozen at these,
        # deep networks explode or go silent.
        self._norms_frozen = config.freeze_norms and pretrained
        self.network = network
        # Averaged weights want averaged statistics: those of the last few batches are of others.
        average = averaging(config.ema_decay)
        self.average = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self.average.requires_grad_(False)
        self.config = config
        self.description = description
        self.best_ap = -1.0
        self.sums: dict[str, float] = {}
        self._steps = 0
        self._minutes_before = 0.0
        self._started = time.monotonic()
        self._first_minutes = 0.0
        self._finite = True
        self._not_finite = 0
        self._anchors: dict[torch.Size, list[Tensor]] = {}

    def minutes(self) -> float:
        """Return the minutes spent on this run, over all its resumptions."""
        return self._minutes_before + (time.monotonic() - self._started) / 60

    def progress(self, epochs: float) -> float:
        """Return the share of the schedule that is done: by epochs or by time, the larger one.

        `epochs` counts parts, too: 2.5 is the middle of the third.
        """
        done = epochs / self.config.epochs
        if self.config.max_minutes is not None:
            done = max(done, self._agreed_minutes() / self.config.max_minutes)
        return min(done, 1.0)

    def on_fit_start(self) -> None:
        """Start the clock when the work starts. Raises DataError for norms that cannot learn."""
        if self.config.model.norm_eps == 0 and not self._norms_frozen:
            raise DataError(
                "model.norm_eps 0 divides by the bare variance, which only frozen norms may: keep "
                "freeze_norms with --init or --weights, or set model.norm_eps to 1e-5"
            )
        self._started = time.monotonic()
        self._first_minutes = self._minutes_before

    def on_train_epoch_start(self) -> None:
        """Set the modes of the modules again, which validation has changed."""
        self.network.train()
        self.average.eval()
        if self._norms_frozen:
            freeze_norms(self.network.backbone.modules())
        self.sums = {"steps": 0.0, "classification": 0.0, "regression": 0.0}

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy from page-locked memory while the device still works on the step before."""
        return batch.to(device, non_blocking=device.type != "cpu")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of the optimiser on this process's share of a batch.

        What the batch's loss is divided by is known before the first backward pass, so that all
        parts of all shares add up to the gradient of the whole.
        """
        optimiser = self.optimizers()
        assert isinstance(optimiser, LightningOptimizer)
        progress = self.progress(self._steps / self.trainer.num_training_batches)
        share = schedule(self.config.optimiser, self._steps, progress)
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * share
        optimiser.zero_grad()
        classification, regression = self._share_figures(self._backward(batch))
        self._finite = math.isfinite(classification + regression)
        if self._finite:
            self.sums["steps"] += 1
            self.sums["classification"] += classification
            self.sums["regression"] += regression
            self.log("loss", classification + regression, prog_bar=True, batch_size=len(batch))
        optimiser.step()
        self._steps += 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's norm; drop a gradient that is not finite, which skips the step."""
        learning = [p for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learning, self.config.optimiser.gradient_clip)
        if self._finite and torch.isfinite(norm):
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
        if limit is not None and self._agreed_minutes() >= limit:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or AdamW; no weight decay on biases and norms, a rate of its own for the backbone."""
        settings = self.config.optimiser
        groups = parameter_groups(self.network, settings, batch_size=self.config.batch_size)
        if settings.name == "adamw":
            return torch.optim.AdamW(groups, lr=settings.lr)
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)

    def _agreed_minutes(self) -> float:
        """Return the first process's `minutes`, so that all have the same learning rate."""
        return self.minutes() if processes() == 1 else self._first_minutes

    def _backward(self, batch: Batch) -> Tensor:
        """Add up the gradients of all parts; (2,) this process's part of both losses."""
        assigned = assign(self._anchors_of(batch), batch.boxes, batch.labels, self.config.matching)
        if not batch.counted:
            assigned = [torch.full_like(matched, IGNORED) for matched in assigned]
        scale = normaliser(assigned)
        parts = batch.split(self.config.accumulate)
        figures = torch.zeros(2, device=batch.images.device)
        done = 0
        for part in parts:
            last = part is parts[-1]
            with nullcontext() if last else self._unshared():
                losses = assigned_loss(
                    self.network(part.images, part.image_sizes),
                    assigned[done : done + len(part)],
                    part.boxes,
                    part.labels,
                    loss=self.config.loss,
                    scale=scale,
                )
                self.manual_backward(losses.classification + losses.regression)
            figures += torch.stack([losses.classification, losses.regression]).detach()
            done += len(part)
        return figures

    def _unshared(self) -> AbstractContextManager[None]:
        """Return a context without gradient exchange, which happens once for all parts."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def _share_figures(self, figures: Tensor) -> list[float]:
        """Return both losses of the whole batch, and share the first process's clock."""
        if processes() == 1:
            return figures.tolist()
        clock = self.minutes() if dist.get_rank() == 0 else 0.0
        shared = torch.cat([figures.double(), figures.new_tensor([clock], dtype=torch.float64)])
        *losses, self._first_minutes = all_reduce_sum(shared).tolist()
        return [each / processes() for each in losses]

    def _anchors_of(self, batch: Batch) -> list[Tensor]:
        """(cells, A, 4) anchors of each level of the batch's canvas."""
        size = batch.images.shape[1:3]
        if size not in self._anchors:
            if len(self._anchors) >= _KEPT_CANVASES:
                self._anchors.clear()
            anchors = level_anchors(self.description.model.anchors, *size)
            self._anchors[size] = [level.to(batch.images.device) for level in anchors]
        return self._anchors[size]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description and the progress of the run."""
        checkpoint[DESCRIPTION_KEY] = self.description.model_dump(mode="json")
        checkpoint["progress"] = {
            "minutes": self.minutes(),
            "steps": self._steps,
            "best_ap": self.best_ap,
            "norms_frozen": self._norms_frozen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the progress of the run."""
        progress = checkpoint["progress"]
        self._minutes_before = float(progress["minutes"])
        # Older checkpoints leave the count to Lightning.
        self._steps = int(progress["steps"] if "steps" in progress else checkpoint["global_step"])
        self.best_ap = float(progress["best_ap"])
        self._norms_frozen = bool(progress["norms_frozen"])

    def _count_not_finite(self) -> None:
        self._not_finite += 1
        if self._not_finite >= PATIENCE:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self._not_finite} steps in a row; "
                "try a lower optimiser.lr"
            )


def schedule(settings: OptimiserConfig, step: int, progress: float) -> float:
    """Return the share of the peak rate: linear warm-up by step, half a cosine by progress.

    >>> settings = OptimiserConfig(warmup_steps=4, final_lr_share=0.0)
    >>> [schedule(settings, step, progress) for step, progress in ((0, 0.0), (3, 0.0), (9, 0.5))]
    [0.25, 1.0, 0.5]
    """
    floor = settings.final_lr_share
    cosine = floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / max(settings.warmup_steps, 1))


def peak_rate(settings: OptimiserConfig, *, batch_size: int) -> float:
    """Return the peak learning rate: `lr`, in proportion to the batch with `lr_batch`.

    As in "Accurate, Large Minibatch SGD", arXiv 1706.02677, section 2.1.

    >>> peak_rate(OptimiserConfig(lr=0.01, lr_batch=16), batch_size=64)
    0.04
    """
    return settings.lr * (1.0 if settings.lr_batch is None else batch_size / settings.lr_batch)


def parameter_groups(
    network: RetinaNet, settings: OptimiserConfig, *, batch_size: int
) -> list[dict[str, Any]]:
    """Optimiser groups: (backbone or not) x (decayed or not), each with its peak rate."""
    peak = peak_rate(settings, batch_size=batch_size)
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        key = (name.startswith("backbone."), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "peak_lr": peak * (settings.backbone_lr_share if backbone else 1.0),
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in sorted(groups.items(), reverse=True)
    ]


def averaging(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Return an exponential average whose decay rises to `decay`: it forgets its start.

    It is taken of all weights at once: on a GPU one by one would cost more than the step. Counts of
    batches, which are integers, are copied.
    """

    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, current)
            return
        number = float(count)
        warm = min(decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(averaged, current, 1 - warm)

    return average
