"""The training loop: it learns, resumes to the bit, ends in time and survives bad steps."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_export.checkpoints import AVERAGE_PREFIX, load_checkpoint
from model_export.config import LossConfig, MatchingConfig, OptimiserConfig, TrainConfig
from model_export.datasets import Dataset, load_voc
from model_export.objective import Losses
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.model import Level, ModelConfig, RetinaNet
from model_export.trainee import TrainingError, averaging, parameter_groups, schedule
from model_export.training import train
from model_export.transforms import Augmentation, Batch, Key, TrainingBatches
from service.canvas import Buckets, Size
from service.errors import DataError, DeviceError
from tests.unit.model_export import rectangles

MODEL = ModelConfig(
    backbone="mobilenet_v2",
    fpn_channels=16,
    head_width=16,
    head_depth=1,
    anchors=AnchorConfig(
        sizes=((24.0,), (36.0,), (48.0,), (96.0,), (192.0,)), ratios=(0.5, 1.0, 2.0)
    ),
)
CONFIG = TrainConfig(
    model=MODEL,
    canvas=Buckets(sizes=(Size(64, 96), Size(96, 64))),
    optimiser=OptimiserConfig(lr=0.01, warmup_steps=3),
    epochs=4,
    batch_size=2,
    validate_every=2,
    ema_decay=0.9,
    precision="32",
    workers=0,
    seed=7,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rectangles.draw_data(tmp_path_factory.mktemp("training") / "rectangles")


@pytest.fixture(scope="module")
def few(folder: Path) -> Dataset:
    """Six pictures, the last without an object."""
    return load_voc(folder, "train")


@pytest.fixture(scope="module")
def many(folder: Path) -> Dataset:
    """Ten pictures, the last without an object."""
    return load_voc(folder, "val")


def changed(**values: Any) -> TrainConfig:
    return CONFIG.model_copy(update=values)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def saved(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint's content, read as a stranger should: without pickled code."""
    content: dict[str, Any] = torch.load(run / name, map_location="cpu", weights_only=True)
    return content


def watch_batches(
    monkeypatch: pytest.MonkeyPatch, crash_before: int | None = None
) -> list[tuple[Key, ...]]:
    """Notes the keys of every batch that is made; the disk fails in epoch `crash_before`."""
    seen: list[tuple[Key, ...]] = []
    original = TrainingBatches.__getitem__

    def noting(self: TrainingBatches, keys: Sequence[Key]) -> Batch:
        if crash_before is not None and len(seen) > 1 and keys[0].epoch == crash_before:
            raise OSError("the disk is gone")
        seen.append(tuple(keys))
        return original(self, keys)

    monkeypatch.setattr(TrainingBatches, "__getitem__", noting)
    return seen


# --- resuming ------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_in_one_go(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(augmentation=Augmentation(transpose=0.5))
    with monkeypatch.context() as patch:
        order = watch_batches(patch)
        whole = train(config, few, few, tmp_path / "whole", device="cpu")
    steps = len(order) // 4
    assert [keys[0].epoch for keys in order] == [e for e in range(4) for _ in range(steps)]

    with monkeypatch.context() as patch:
        before = watch_batches(patch, crash_before=2)
        with pytest.raises(OSError, match="the disk is gone"):
            train(config, few, few, tmp_path / "parts", device="cpu")
    assert [row["epoch"] for row in rows(tmp_path / "parts")] == ["1", "2"]
    with monkeypatch.context() as patch:
        after = watch_batches(patch)
        parts = train(config, few, few, tmp_path / "parts", device="cpu", resume=True)
    assert before + after == order

    a, b = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], tensor, rtol=0, atol=1e-6)
    assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in one.items() if k != "minutes"} == {
            k: v for k, v in other.items() if k != "minutes"
        }
    minutes = [float(row["minutes"]) for row in rows(tmp_path / "parts")]
    assert minutes == sorted(minutes)
