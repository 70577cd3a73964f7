"""Training: a Lightning loop around what learns, on one device."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, Final

import lightning
import torch
from torch.utils.data import DataLoader

from model_export.checkpoints import Checkpoint, Description, initialise_from, load_backbone
from model_export.config import TrainConfig
from model_export.datasets import Dataset
from model_export.recording import BEST, LAST, AtomicCheckpointIO, Recorder, ResumedOrder
from model_export.retinanet.model import RetinaNet
from model_export.trainee import Trainee
from model_export.transforms import Batch, CanvasBatchSampler, CanvasCache, TrainingBatches
from service.errors import DataError, DeviceError

__all__ = ["BEST", "CONFIG", "LAST", "train"]

CONFIG: Final = "config.yaml"

_DEVICE: Final = re.compile(r"cpu|cuda(?::(\d+))?")


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
    accelerator, devices = _accelerator(device)
    precision = _precision(config.precision, accelerator)
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
    pretrained = init is not None or weights is not None
    trainee = Trainee(network, config, description, pretrained=pretrained)
    examples = CanvasCache(training.samples, config.canvas, title="train pictures")
    held_out = CanvasCache(validation.samples, config.canvas, title="val pictures")
    sampler = CanvasBatchSampler(
        examples.canvases, batch_size=config.batch_size, seed=config.seed, drop_last=True
    )
    loader: DataLoader[Batch] = DataLoader(
        TrainingBatches(examples, config.augmentation, seed=config.seed),
        sampler=sampler,
        batch_size=None,
        num_workers=_workers(config.workers, accelerator),
        pin_memory=accelerator != "cpu",
    )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        max_epochs=config.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Recorder(output, validation.samples, held_out), ResumedOrder(sampler)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=output,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        # Lightning advises worker processes; on a CPU they would only take cores from the network.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning's way to walk a batch; it is for Lightning to follow torch there.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # On purpose: that is how a step is skipped.
        warnings.filterwarnings("ignore", message=".*training_step. returned .None.*")
        trainer.fit(trainee, loader, ckpt_path=last if resume else None, weights_only=True)
    return trainee.best_ap


def _accelerator(device: str) -> tuple[str, int | list[int]]:
    """Lightning's accelerator and devices: always one, the run's folder has one writer."""
    if device == "auto":
        return ("cuda" if torch.cuda.is_available() else "cpu"), 1
    known = _DEVICE.fullmatch(device)
    if known is None:
        raise DeviceError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return "cpu", 1
    count = torch.cuda.device_count()
    number = int(known[1] or 0)
    if number >= count:
        seen = "no CUDA device" if count == 0 else f"{count} CUDA device(s)"
        raise DeviceError(f"--device {device}: this torch sees {seen}; use --device cpu or auto")
    return "cuda", [number]


def _precision(asked: str, accelerator: str) -> Any:
    if asked == "fp16" and accelerator == "cpu":
        raise DataError("precision fp16 needs a GPU; on a CPU use bf16, 32 or auto")
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
