"""Training: a Lightning loop around what learns, on one device or on many."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from model_export.checkpoints import Checkpoint, Description, initialise_from, load_backbone
from model_export.config import TrainConfig
from model_export.datasets import Dataset, Sample
from model_export.distributed import World, lost_processes_named, share, share_norms, world
from model_export.recording import BEST, LAST, AtomicCheckpointIO, Recorder, ResumedOrder
from model_export.retinanet.model import RetinaNet
from model_export.trainee import Trainee
from model_export.transforms import (
    DEFAULT_CACHE_BYTES,
    Batch,
    CanvasBatchSampler,
    CanvasCache,
    TrainingBatches,
)
from service.errors import DataError, DeviceError

__all__ = ["BEST", "CONFIG", "LAST", "check_device", "train"]

CONFIG: Final = "config.yaml"

_DEVICE: Final = re.compile(r"cpu|cuda(?::(\d+))?")
_PATIENCE: Final = timedelta(minutes=30)
"""How long a process waits for the others, which may still be decoding or validating."""

_log = logging.getLogger(__name__)


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

    In a process that torchrun started, it is one of those that train together: each takes its
    share of every batch, and the first one writes.
    """
    place = world()
    accelerator, devices = _accelerator(device, place.local_size)
    precision = _precision(config.precision, accelerator)
    if config.batch_size < place.size:
        raise DataError(
            f"batch_size {config.batch_size} cannot be shared by {place.size} processes: "
            "it counts the pictures of all of them"
        )
    last = output / LAST
    if resume and not last.exists():
        raise DataError(f"{last}: nothing to resume; start the run without --resume")
    lightning.seed_everything(config.seed, verbose=False)
    output.mkdir(parents=True, exist_ok=True)
    network = _network(config, training.classes, weights=weights, init=init)
    if place.size > 1:
        share_norms(network, cuda=accelerator == "cuda")
    description = Description(
        classes=training.classes,
        model=config.model,
        canvas=config.canvas,
        provenance=provenance or {},
    )
    pretrained = init is not None or weights is not None
    trainee = Trainee(network, config, description, pretrained=pretrained)
    if config.compile and _compiler_works(accelerator):
        network.compile()
    sampler, loader = _batches(config, training, place, accelerator)
    held_out = _cache(share(validation.samples), config, place, title="val pictures")
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=place.nodes,
        strategy=_strategy(accelerator) if place.size > 1 else "auto",
        # The batches know the processes themselves.
        use_distributed_sampler=False,
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
    with _expected_warnings(), lost_processes_named():
        trainer.fit(trainee, loader, ckpt_path=last if resume else None, weights_only=True)
    return trainee.best_ap


def check_device(device: str, count: int) -> None:
    """See whether `count` processes of this machine can train on it. Raises DeviceError."""
    _accelerator(device, count)


def _network(
    config: TrainConfig, classes: tuple[str, ...], *, weights: Path | None, init: Checkpoint | None
) -> RetinaNet:
    network = RetinaNet(config.model, classes=len(classes))
    if init is not None:
        initialise_from(network, init, classes)
    elif weights is not None:
        load_backbone(network, weights)
    if config.channels_last is not False:
        network.to(memory_format=torch.channels_last)
    return network


def _batches(
    config: TrainConfig, training: Dataset, place: World, accelerator: str
) -> tuple[CanvasBatchSampler, DataLoader[Batch]]:
    """All processes walk the same batches, and each makes its own share of them."""
    examples = _cache(training.samples, config, place, title="train pictures")
    sampler = CanvasBatchSampler(
        examples.canvases, batch_size=config.batch_size, seed=config.seed, drop_last=True
    )
    workers = _workers(config.workers, accelerator, place.local_size)
    loader: DataLoader[Batch] = DataLoader(
        TrainingBatches(
            examples,
            config.augmentation,
            seed=config.seed,
            rank=place.rank,
            processes=place.size,
        ),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        # Starting them again for each epoch takes seconds.
        persistent_workers=workers > 0,
        pin_memory=accelerator != "cpu",
    )
    return sampler, loader


def _cache(
    samples: Sequence[Sample], config: TrainConfig, place: World, *, title: str
) -> CanvasCache:
    return CanvasCache(
        samples,
        config.canvas,
        # The processes of a machine share its memory.
        memory_bytes=DEFAULT_CACHE_BYTES // place.local_size,
        progress=place.is_first,
        title=title,
    )


@contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Lightning advises worker processes; on a CPU they would only take cores from the network.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning's way to walk a batch; it is for Lightning to follow torch there.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


def _strategy(accelerator: str) -> DDPStrategy:
    return DDPStrategy(
        process_group_backend="nccl" if accelerator == "cuda" else "gloo",
        timeout=_PATIENCE,
        gradient_as_bucket_view=True,
    )


def _compiler_works(accelerator: str) -> bool:
    """Whether torch.compile gets anywhere here; says so if not."""
    try:
        torch.compile(torch.add)(torch.ones(8, device=accelerator), 1)
    except Exception as error:
        # Without a compiler or with a broken one, anything may come.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _log.warning("compile: torch.compile does not work here, goes on without it (%s)", reason)
        return False
    return True


def _accelerator(device: str, count: int) -> tuple[str, int | list[int]]:
    """Lightning's accelerator, and the devices of `count` processes on this machine."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = _DEVICE.fullmatch(device)
    if known is None:
        raise DeviceError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return "cpu", count
    if known[1] is not None and count > 1:
        raise DeviceError(f"--device {device} is one GPU, but {count} processes want one each")
    found = torch.cuda.device_count()
    first = int(known[1] or 0)
    if first + count > found:
        seen = "no CUDA device" if found == 0 else f"{found} CUDA device(s)"
        wanted = "" if count == 1 else f" for {count} processes"
        raise DeviceError(
            f"--device {device}{wanted}: this torch sees {seen}; use --device cpu or auto"
        )
    return "cuda", list(range(first, first + count))


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


def _workers(asked: int | None, accelerator: str, processes: int) -> int:
    if asked is not None:
        return asked
    return 0 if accelerator == "cpu" else min(8, max(1, (os.cpu_count() or 1) // processes))
