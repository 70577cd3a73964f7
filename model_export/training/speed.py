"""Speed of a network before it is trained: what an image costs the service, and a training step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from model_export.config import TrainConfig
from model_export.retinanet.anchors import level_anchors
from model_export.retinanet.model import ModelConfig, RetinaNet, freeze_norms
from model_export.training.detection_loss import assign, assigned_loss, normaliser
from model_export.training.hardware import accelerator_for, precision_for
from service.imaging.canvas import Size

GFLOPS: Final = 100.0
"""Floating-point operations, in 10^9 a second, that onnxruntime reaches on two cores."""

BUDGET_MS: Final = 100.0
"""Milliseconds that an image may take unless --budget-ms says otherwise."""

ENOUGH_EPOCHS: Final = 20
"""Epochs below which a larger canvas is not worth its time."""

_COUNTED: Final = Size(512, 512)
_PATIENCE: Final = 5.0
"""Seconds that the timed step of a whole batch may take; above, the step of one image counts."""


def inference_ms(model: ModelConfig, classes: int, area: float) -> float:
    """Return the milliseconds of an image on a canvas of `area` pixels, on two CPU cores.

    Reckoned from the network's operations, so that it is the same on every machine.
    """
    with torch.device("meta"):
        network = RetinaNet(model, classes=classes)
        images = torch.zeros(1, *_COUNTED, 3, dtype=torch.uint8)
        sizes = torch.zeros(1, 2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images, sizes)
    return float(counter.get_total_flops()) * area / _COUNTED.area / GFLOPS / 1e6


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest canvas that is allowed."""

    area: float
    """Pixels."""
    reason: str
    """For people; empty without a limit."""


NO_LIMIT: Final = Limit(math.inf, "")


def within(model: ModelConfig, classes: int, budget_ms: float | None) -> Limit:
    """Return the largest canvas that an image may have within a budget; None is no limit."""
    if budget_ms is None:
        return NO_LIMIT
    area = budget_ms / inference_ms(model, classes, 1.0)
    return Limit(
        area,
        f"{budget_ms:g} ms an image on two cores allow {area:,.0f} pixels (--budget-ms)",
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """A timed training step."""

    canvas: Size
    seconds: float
    """Of one image."""

    def epoch_seconds(self, images: int, area: float) -> float:
        """Return the seconds of an epoch on canvases of `area` pixels, without validation."""
        return images * self.seconds * area / self.canvas.area

    def limit(self, images: int, minutes: float) -> Limit:
        """Return the largest canvas that leaves time for ENOUGH_EPOCHS."""
        area = minutes * 60 / ENOUGH_EPOCHS / self.epoch_seconds(images, 1.0)
        return Limit(
            area,
            f"{ENOUGH_EPOCHS} epochs in {minutes:g} minutes allow {area:,.0f} pixels "
            "(--max-minutes)",
        )


def time_step(config: TrainConfig, classes: int, canvas: Size, device: str) -> StepTime:
    """Time forward and backward pass on noise. Raises DeviceError, DataError."""
    accelerator, _ = accelerator_for(device, 1)
    network = RetinaNet(config.model, classes=classes).to(accelerator)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    if config.freeze_norms:
        freeze_norms(network.backbone.modules())
    count = -(-config.batch_size // config.accumulate)
    single = _seconds(network, config, canvas, 1)
    if single * count > _PATIENCE:
        return StepTime(canvas, single)
    # The first step of a size allocates memory and chooses kernels.
    return StepTime(canvas, min(_seconds(network, config, canvas, count) for _ in range(2)) / count)


def _seconds(network: RetinaNet, config: TrainConfig, canvas: Size, count: int) -> float:
    network.zero_grad()
    started = time.monotonic()
    noise_step(network, config, canvas, count)
    if network.mean.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - started


def noise_step(network: RetinaNet, config: TrainConfig, canvas: Size, count: int) -> None:
    """Forward and backward pass on `count` images of noise, each with an object."""
    device = network.mean.device
    precision: Any = precision_for(config.precision, device.type)
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    images = torch.randint(0, 256, (count, *canvas, 3), dtype=torch.uint8, device=device)
    sizes = torch.tensor([canvas] * count, device=device)
    box = torch.tensor([[0.0, 0.0, canvas.width / 4, canvas.height / 4]], device=device)
    boxes = [box] * count
    labels = [torch.zeros(1, dtype=torch.int64, device=device)] * count
    anchors = [level.to(device) for level in level_anchors(config.model.anchors, *canvas)]
    assigned = assign(anchors, boxes, labels, config.matching)
    with torch.autocast(device.type, kinds.get(precision), enabled=precision in kinds):
        losses = assigned_loss(
            network(images, sizes),
            assigned,
            boxes,
            labels,
            loss=config.loss,
            scale=normaliser(assigned),
        )
    (losses.classification + losses.regression).backward()  # type: ignore[no-untyped-call]
