"""Training: a Lightning loop around the network, with averaged weights and a schedule in time."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from model_export.checkpoints import (
    DESCRIPTION_KEY,
    Checkpoint,
    Description,
    initialise_from,
    load_backbone,
)
from model_export.config import OptimiserConfig, TrainConfig
from model_export.curves import training_curves
from model_export.datasets import Dataset, Sample
from model_export.evaluation import Evaluation, coco_metrics
from model_export.objective import detection_loss
from model_export.retinanet.model import RetinaNet, freeze_norms
from model_export.retinanet.postprocess import candidates, suppress
from model_export.transforms import (
    Batch,
    CanvasBatchSampler,
    CanvasCache,
    Example,
    TrainingBatches,
    collate,
)
from service.canvas import Letterbox
from service.detector import Detections
from service.errors import DataError, RetinaserveError

LAST, BEST, METRICS, CONFIG = "last.ckpt", "best.ckpt", "metrics.csv", "config.yaml"

_VALIDATION_SCORE = 0.01
_VALIDATION_IOU = 0.5
_VALIDATION_DETECTIONS = 300
_PATIENCE_NOT_FINITE = 20
"""Steps in a row with a loss that is not finite before the run gives up."""

_log = logging.getLogger(__name__)


class TrainingError(RetinaserveError):
    """Training cannot go on."""

    title = "Training failed"


class Trainee(lightning.LightningModule):
    """The network, its running average, the optimiser and the schedule."""

    def __init__(self, network: RetinaNet, config: TrainConfig, description: Description) -> None:
        super().__init__()
        self.network = network
        self.average = AveragedModel(
            network, avg_fn=_warmed_average(config.ema_decay), use_buffers=False
        )
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
        """Lightning has just put everything into training mode."""
        self.average.eval()
        if self.config.freeze_norms:
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
            self._not_finite += 1
            if self._not_finite >= _PATIENCE_NOT_FINITE:
                raise TrainingError(
                    f"the loss was not finite in {self._not_finite} steps in a row; "
                    "try a lower optimiser.lr"
                )
            return None
        self._not_finite = 0
        self.sums["steps"] += 1
        self.sums["classification"] += losses.classification.item()
        self.sums["regression"] += losses.regression.item()
        self.log("loss", total.detach(), prog_bar=True, batch_size=len(batch.boxes))
        return total

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
        checkpoint["progress"] = {"minutes": self.minutes(), "best_ap": self.best_ap}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the run stopped."""
        self._minutes_before = float(checkpoint["progress"]["minutes"])
        self.best_ap = float(checkpoint["progress"]["best_ap"])


class Recorder(lightning.Callback):
    """After each epoch: validate if it is due, write metrics and curves, save checkpoints."""

    def __init__(self, output: Path, samples: Sequence[Sample], examples: Sequence[Example]):
        self._output = output
        self._samples = samples
        self._examples = examples

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Validate the averaged weights, not the current ones: they are what is kept."""
        trainee: Trainee = pl_module
        if not trainer.is_global_zero:
            return
        config = trainee.config
        epoch = trainer.current_epoch + 1
        final = epoch == config.epochs or trainer.should_stop
        evaluation: Evaluation | None = None
        if final or epoch % config.validate_every == 0:
            evaluation = validate(
                trainee.average.module,
                self._samples,
                self._examples,
                trainee.description,
                device=trainee.device,
            )
        self._record(trainee, epoch, evaluation)
        best = evaluation is not None and (evaluation.ap or 0.0) > trainee.best_ap
        if evaluation is not None and best:
            trainee.best_ap = evaluation.ap or 0.0
        trainer.save_checkpoint(self._output / LAST)
        if best:
            trainer.save_checkpoint(self._output / BEST)

    def _record(self, trainee: Trainee, epoch: int, evaluation: Evaluation | None) -> None:
        steps = max(trainee.sums["steps"], 1.0)
        row: dict[str, Any] = {
            "epoch": epoch,
            "minutes": round(trainee.minutes(), 3),
            "lr": trainee.trainer.optimizers[0].param_groups[-1]["lr"],
            "classification_loss": round(trainee.sums["classification"] / steps, 5),
            "regression_loss": round(trainee.sums["regression"] / steps, 5),
            "ap": "" if evaluation is None else evaluation.ap,
            "ap50": "" if evaluation is None else evaluation.ap50,
        }
        path = self._output / METRICS
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        training_curves(path, self._output)
        if evaluation is not None:
            _log.info(
                "epoch %d, %.1f min: AP %.4f, AP50 %.4f",
                epoch,
                trainee.minutes(),
                evaluation.ap or 0.0,
                evaluation.ap50 or 0.0,
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill never leaves half a checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save to `path`."""
        partial = f"{path}.part"
        super().save_checkpoint(checkpoint, partial, storage_options)
        Path(partial).replace(path)


def train(
    config: TrainConfig,
    training: Dataset,
    validation: Dataset,
    output: Path,
    *,
    weights: Path | None = None,
    init: Checkpoint | None = None,
    resume: bool = False,
    device: str = "auto",
    provenance: dict[str, Any] | None = None,
) -> float:
    """Train and write last.ckpt, best.ckpt, metrics.csv and plots into `output`; the best AP.

    `weights` is a backbone's ImageNet file, `init` a checkpoint of ours to fine-tune. With
    `resume` the run goes on from `output`/last.ckpt, exactly where its last epoch ended.
    """
    lightning.seed_everything(config.seed, verbose=False)
    last = output / LAST
    if resume and not last.exists():
        raise DataError(f"{last}: nothing to resume; start the run without --resume")
    output.mkdir(parents=True, exist_ok=True)
    network = RetinaNet(config.model, classes=len(training.classes))
    if init is not None:
        initialise_from(network, init, training.classes)
    elif weights is not None:
        load_backbone(network, weights)
    description = Description(
        classes=training.classes,
        model=config.model,
        canvas=config.canvas,
        provenance=provenance or {},
    )
    trainee = Trainee(network, config, description)
    examples = CanvasCache(training.samples, config.canvas, title="train pictures")
    held_out = CanvasCache(validation.samples, config.canvas, title="val pictures")
    accelerator = _accelerator(device)
    loader: DataLoader[Batch] = DataLoader(
        TrainingBatches(examples, config.augmentation, seed=config.seed),
        sampler=CanvasBatchSampler(
            examples.canvases, batch_size=config.batch_size, seed=config.seed, drop_last=True
        ),
        batch_size=None,
        num_workers=_workers(config.workers, accelerator),
        pin_memory=accelerator != "cpu",
    )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices="auto" if accelerator != "cpu" else 1,
        precision=_precision(config.precision, accelerator),
        max_epochs=config.epochs,
        gradient_clip_val=config.optimiser.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Recorder(output, validation.samples, held_out)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=output,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        # Lightning advises worker processes; on a CPU they would only take cores from the network.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning's way to walk a batch; it is for Lightning to follow torch there.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        trainer.fit(trainee, loader, ckpt_path=last if resume else None, weights_only=True)
    return trainee.best_ap


def validate(
    network: torch.nn.Module,
    samples: Sequence[Sample],
    examples: Sequence[Example],
    description: Description,
    *,
    device: torch.device,
) -> Evaluation:
    """COCO metrics of a network as it stands, in torch, at score 0.01 and 300 detections."""
    network.eval()
    found = [
        detect_example(network, example, description.canvas.fit(sample.size), device=device)
        for example, sample in zip(examples, samples, strict=True)
    ]
    return coco_metrics(samples, found, description.classes)


@torch.no_grad()
def detect_example(
    network: torch.nn.Module, example: Example, placed: Letterbox, *, device: torch.device
) -> Detections:
    """One picture's detections in original pixels, by torch alone."""
    batch = collate([example])
    sizes = batch.image_sizes.to(device)
    boxes, scores, labels = (
        part[0].cpu() for part in candidates(network(batch.images.to(device), sizes), sizes)
    )
    kept = suppress(
        boxes,
        scores,
        labels,
        score_threshold=_VALIDATION_SCORE,
        iou_threshold=_VALIDATION_IOU,
        max_detections=_VALIDATION_DETECTIONS,
    )
    return Detections(
        placed.to_original(boxes[kept].numpy()),
        scores[kept].numpy(),
        labels[kept].numpy(),
    )


def schedule(settings: OptimiserConfig, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up by step, half a cosine by progress."""
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


def _warmed_average(decay: float) -> Any:
    """An exponential average that forgets its random start quickly: the decay rises to `decay`."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        number = float(count)
        warm = min(decay, (1 + number) / (10 + number))
        return averaged + (current - averaged) * (1 - warm)

    return average


def _accelerator(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    return "cuda" if device.startswith("cuda") else "cpu"


def _precision(asked: str, accelerator: str) -> Any:
    if asked == "auto":
        if accelerator == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        asked = "bf16" if fast else "32"
    return {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[asked]


def _workers(asked: int | None, accelerator: str) -> int:
    if asked is not None:
        return asked
    return 0 if accelerator == "cpu" else min(8, os.cpu_count() or 1)
