"""Training with Lightning, on one device or on several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
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
from model_export.data.batches import (
    DEFAULT_CACHE_BYTES,
    Batch,
    CanvasBatchSampler,
    CanvasCache,
    TrainingBatches,
)
from model_export.data.datasets import Dataset, Sample
from model_export.retinanet.model import RetinaNet
from model_export.training.callbacks import (
    BEST,
    LAST,
    AtomicCheckpointIO,
    EpochRecorder,
    ResumeSamplerEpoch,
)
from model_export.training.distributed import (
    World,
    lost_processes_named,
    share,
    world,
)
from model_export.training.hardware import (
    accelerator_for,
    compiler_works,
    precision_for,
    workers_for,
)
from model_export.training.lightning_module import RetinaNetModule
from service.errors import DataError

__all__ = ["BEST", "CONFIG", "LAST", "train"]

CONFIG: Final = "config.yaml"

_PATIENCE: Final = timedelta(minutes=30)
"""Timeout of collectives: the other processes may still be decoding or validating."""

# The recorder keeps what Lightning would, and the batches know the processes themselves.
_QUIET: Final[dict[str, Any]] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
}


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
) -> float | None:
    """Train and write last.ckpt, best.ckpt, metrics.csv and plots into `output`; the best AP.

    Where `validation` holds no object there is no AP, and best.ckpt is of the last epoch.
    `weights` is a backbone's ImageNet file, `init` a checkpoint of ours to fine-tune. With
    `resume` the run goes on from `output`/last.ckpt, exactly where its last epoch ended.

    In a process that torchrun started, it is one of those that train together: each takes its
    share of every batch, and the first one writes.
    """
    place = world()
    accelerator, devices = accelerator_for(device, place.local_size)
    precision = precision_for(config.precision, accelerator)
    last = output / LAST
    if resume and not last.exists():
        raise DataError(f"{last}: nothing to resume; start the run without --resume")
    if config.batch_size < place.size:
        raise DataError(
            f"batch_size {config.batch_size} cannot be shared by {place.size} processes: "
            "it counts the images of all of them"
        )
    lightning.seed_everything(config.seed, verbose=False)
    output.mkdir(parents=True, exist_ok=True)
    network = _network(config, training.classes, weights=weights, init=init)
    if place.size > 1 and accelerator == "cuda":
        # torch's synchronised norms do not run on CPUs, where each process learns its own.
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    description = Description(
        classes=training.classes,
        model=config.model,
        canvas=config.canvas,
        provenance=provenance or {},
    )
    pretrained = init is not None or weights is not None
    module = RetinaNetModule(network, config, description, pretrained=pretrained)
    if config.compile and compiler_works(accelerator):
        network.compile()
    sampler, loader = _batches(config, training, place, accelerator, progress=module.progress)
    held_out = _cache(share(validation.samples), config, place, title="val images")
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        max_epochs=config.epochs,
        callbacks=[
            EpochRecorder(output, validation.samples, held_out),
            ResumeSamplerEpoch(sampler),
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=output,
        **_together(place, accelerator),
        **_QUIET,
    )
    with _expected_warnings(), lost_processes_named():
        trainer.fit(module, loader, ckpt_path=last if resume else None, weights_only=True)
    return None if module.best_ap < 0 else module.best_ap


def _together(place: World, accelerator: str) -> dict[str, Any]:
    """Return Lightning's settings for the processes of a run."""
    if place.size == 1:
        return {}
    strategy = DDPStrategy(
        process_group_backend="nccl" if accelerator == "cuda" else "gloo",
        timeout=_PATIENCE,
        gradient_as_bucket_view=True,
    )
    return {"strategy": strategy, "num_nodes": place.nodes}


def _network(
    config: TrainConfig, classes: tuple[str, ...], *, weights: Path | None, init: Checkpoint | None
) -> RetinaNet:
    network = RetinaNet(config.model, classes=len(classes))
    if init is not None:
        initialise_from(network, init, classes)
    elif weights is not None:
        load_backbone(network, weights)
    if config.channels_last:
        # torch's own annotations leave this form of `to` out.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _batches(
    config: TrainConfig,
    training: Dataset,
    place: World,
    accelerator: str,
    *,
    progress: Callable[[float], float],
) -> tuple[CanvasBatchSampler, DataLoader[Batch]]:
    """Return the batch sampler, the same in all processes, and this process's loader."""
    examples = _cache(training.samples, config, place, title="train images")
    sampler = CanvasBatchSampler(
        examples.canvases, batch_size=config.batch_size, seed=config.seed, progress=progress
    )
    workers = workers_for(config.workers, accelerator, place.local_size)
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
