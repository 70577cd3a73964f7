"""Training runs in processes of their own, some of which are killed; test_distributed starts them.

python -m tests.unit.model_export.distributed_runs NAME DATA OUTPUT
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model_export.checkpoints import Checkpoint, Description
from model_export.config import OptimiserConfig, TrainConfig
from model_export.data.batches import Augmentation, Batch, Key, TrainingBatches
from model_export.data.datasets import Dataset
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.training.distributed import world
from model_export.training.trainer import train
from service.imaging.canvas import Buckets, Size
from tests.unit.model_export.voc_folder import load_voc

CONFIG = TrainConfig(
    model=ModelConfig(
        backbone="resnet18",
        fpn_channels=16,
        head_width=16,
        head_depth=1,
        anchors=AnchorConfig(
            sizes=((24.0,), (36.0,), (48.0,), (96.0,), (192.0,)), ratios=(0.5, 1.0, 2.0)
        ),
    ),
    canvas=Buckets(sizes=(Size(64, 96), Size(96, 64))),
    augmentation=Augmentation(
        mosaic=0.5, mosaic_until=0.5, transpose=0.5, canvas_scales=(0.75, 1.0, 1.5)
    ),
    optimiser=OptimiserConfig(lr=0.005, warmup_steps=3),
    epochs=2,
    batch_size=5,
    validate_every=2,
    ema_decay=0.9,
    precision="32",
    workers=0,
    seed=7,
)


def images(folder: Path) -> Dataset:
    """Ten lying images and a single upright one: on two processes, one has no share of it."""
    found = load_voc(folder, "val")
    lying = [s for s in found.samples if s.size.width > s.size.height]
    upright = [s for s in found.samples if s.size.width < s.size.height]
    return dataclasses.replace(found, samples=(*lying, *lying[:3], upright[0]))


def start(classes: tuple[str, ...]) -> Checkpoint:
    """Weights for all runs: frozen norms stand in for those of a trained network."""
    torch.manual_seed(1)
    network = RetinaNet(CONFIG.model, classes=len(classes))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # What a random network has of variance; at 1 it would grow in each block.
            torch.nn.init.constant_(module.weight, 0.5)
    return Checkpoint(
        path=Path("start.ckpt"),
        description=Description(classes=classes, model=CONFIG.model, canvas=CONFIG.canvas),
        weights=network.state_dict(),
    )


def run(data: Path, output: Path, *, resume: bool = False, **changes: Any) -> float:
    """Train in this process, on one thread."""
    torch.set_num_threads(1)
    found = images(data)
    config = CONFIG.model_copy(update=changes)
    init = None if resume else start(found.classes)
    return train(config, found, found, output, init=init, resume=resume, device="cpu")


def die_in_epoch(epoch: int) -> None:
    """From now on this process ends by SIGKILL, in the middle of an epoch."""
    original = TrainingBatches.__getitem__
    made: list[Key] = []

    def deadly(self: TrainingBatches, keys: Sequence[Key]) -> Batch:
        made.extend(key for key in keys[:1] if key.epoch == epoch)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, keys)

    TrainingBatches.__getitem__ = deadly  # type: ignore[method-assign]


def main() -> None:
    """One of the runs."""
    name, data, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if name == "killed":
        die_in_epoch(1)
        run(data, output / name)
    if name == "machines":
        place = world()
        told = {"rank": place.rank, "size": place.size, "nodes": place.nodes}
        (output / f"place-{place.rank}.json").write_text(json.dumps(told))
        run(data, output / name, accumulate=2)
    if name == "two":
        run(data, output / name, accumulate=2)
    if name == "two-killed":
        if world().rank == 1:
            die_in_epoch(1)
        run(data, output / name)


if __name__ == "__main__":
    main()
