"""The training loop: it learns, resumes to the bit, ends in time and survives bad steps."""

from __future__ import annotations

import csv
import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_export.checkpoints import AVERAGE_PREFIX, Checkpoint, Description, load_checkpoint
from model_export.config import OptimiserConfig, TrainConfig
from model_export.data.batches import Augmentation, Batch, Key, TrainingBatches
from model_export.data.datasets import Dataset
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.training import lightning_module
from model_export.training.callbacks import write_row
from model_export.training.detection_loss import Losses, assigned_loss
from model_export.training.lightning_module import (
    TrainingError,
    averaging,
    parameter_groups,
    schedule,
)
from model_export.training.trainer import train
from service.errors import DataError, DeviceError
from service.imaging.canvas import Buckets, Size
from tests.unit.model_export import rectangles
from tests.unit.model_export.voc_folder import load_voc

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
    epochs=3,
    batch_size=2,
    validate_every=3,
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
    """Six images, the last without an object."""
    return load_voc(folder, "train")


@pytest.fixture(scope="module")
def many(folder: Path) -> Dataset:
    """Ten images, the last without an object."""
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


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_learns_its_own_images(many: Dataset, tmp_path: Path) -> None:
    config = changed(
        model=MODEL.model_copy(update={"backbone": "resnet18"}),
        optimiser=OptimiserConfig(name="adamw", lr=2e-3, warmup_steps=5),
        augmentation=Augmentation.none(),
        freeze_norms=False,
        epochs=2,
        batch_size=4,
        validate_every=5,
    )
    # One epoch over repeated images costs less than many epochs.
    training = dataclasses.replace(many, samples=many.samples * 9)
    best = train(config, training, many, tmp_path, device="cpu")
    first, last = rows(tmp_path)
    assert first["ap50"] == ""
    assert float(last["ap50"]) > 0.5
    assert best == pytest.approx(float(last["ap"]))
    assert float(last["classification_loss"]) < float(first["classification_loss"])
    for name in ("last.ckpt", "best.ckpt", "metrics.csv", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    # What a reader gets are the averaged weights, which are not the current ones.
    kept = load_checkpoint(tmp_path / "best.ckpt").weights
    content = saved(tmp_path, "best.ckpt")["state_dict"]
    name = "classification_head.out.weight"
    assert torch.equal(kept[name], content[AVERAGE_PREFIX + name])
    assert not torch.equal(kept[name], content["network." + name])


# --- resuming ------------------------------------------------------------------------------------


def test_a_resumed_run_equals_one_in_one_go(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentation = Augmentation(mosaic=0.5, mosaic_until=0.5, transpose=0.5, canvas_scales=(1, 1.5))
    config = changed(augmentation=augmentation)
    with monkeypatch.context() as patch:
        order = watch_batches(patch)
        whole = train(config, few, few, tmp_path / "whole", device="cpu")
    steps = len(order) // 3
    assert [keys[0].epoch for keys in order] == [0] * steps + [1] * steps + [2] * steps
    done = [step / len(order) for step in range(len(order))]
    assert [keys[0].progress for keys in order] == pytest.approx(done)

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


def test_a_row_replaces_what_a_killed_run_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for epoch, value in ((1, "a"), (2, "b"), (3, "lost"), (2, "again"), (3, "c")):
        write_row(path, {"epoch": epoch, "value": value})
    assert rows(tmp_path) == [
        {"epoch": "1", "value": "a"},
        {"epoch": "2", "value": "again"},
        {"epoch": "3", "value": "c"},
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.csv"]


def test_nothing_to_resume(few: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"last\.ckpt: nothing to resume"):
        train(CONFIG, few, few, tmp_path / "run", resume=True, device="cpu")


# --- time ----------------------------------------------------------------------------------------


def test_the_schedule_ends_with_the_time(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 10_000, 4))
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(lightning_module, "time", clock)
    config = changed(epochs=1000, max_minutes=1.0, validate_every=1000)
    with monkeypatch.context() as patch:
        order = watch_batches(patch)
        train(config, few, few, tmp_path, device="cpu")
    # Mosaics end by it: a batch knows the share of the time that was over when it was drawn.
    progress = [key.progress for keys in order for key in keys]
    assert progress == sorted(progress)
    assert progress[0] < 0.2
    assert 0.8 <= progress[-1] <= 1.0
    history = rows(tmp_path)
    assert len(history) < 10
    assert [row["ap"] != "" for row in history] == [False] * (len(history) - 1) + [True]
    assert 1.0 <= float(history[-1]["minutes"]) < 1.3
    assert float(history[-1]["lr"]) < 0.05 * config.optimiser.lr
    assert (tmp_path / "best.ckpt").exists()
    # The clock goes on where it stopped: there is time for one step, and a last validation.
    train(config, few, few, tmp_path, resume=True, device="cpu")
    assert len(rows(tmp_path)) == len(history) + 1
    assert float(rows(tmp_path)[-1]["minutes"]) > float(history[-1]["minutes"])


# --- what goes wrong -----------------------------------------------------------------------------


def fresh_checkpoint(classes: tuple[str, ...]) -> Checkpoint:
    network = RetinaNet(MODEL, classes=len(classes))
    return Checkpoint(
        path=Path("fresh.ckpt"),
        description=Description(classes=classes, model=MODEL, canvas=CONFIG.canvas),
        weights={name: tensor.clone() for name, tensor in network.state_dict().items()},
    )


def infinite_loss(losses: Losses) -> Losses:
    return Losses(losses.classification * math.inf, losses.regression)


def infinite_gradient(losses: Losses) -> Losses:
    # The root's gradient is infinite at 0, where its value is 0.
    root = torch.sqrt(losses.classification - losses.classification.detach())
    return Losses(losses.classification + root, losses.regression)


def break_losses(
    monkeypatch: pytest.MonkeyPatch, faults: Sequence[Callable[[Losses], Losses]]
) -> list[Losses]:
    """Every loss gets one fault after the other."""
    made: list[Losses] = []

    def broken(*arguments: Any, **options: Any) -> Losses:
        losses = assigned_loss(*arguments, **options)
        made.append(losses)
        return faults[len(made) % len(faults)](losses)

    monkeypatch.setattr(lightning_module, "assigned_loss", broken)
    return made


def test_steps_that_are_not_finite_leave_the_network_as_it_was(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fresh_checkpoint(few.classes)
    made = break_losses(monkeypatch, [infinite_loss, infinite_gradient])
    train(changed(epochs=1), few, few, tmp_path, init=before, device="cpu")
    assert len(made) >= 3
    content = saved(tmp_path)["state_dict"]
    for name, tensor in before.weights.items():
        assert torch.equal(content["network." + name], tensor), name
        torch.testing.assert_close(content[AVERAGE_PREFIX + name], tensor)


def test_a_run_that_is_not_finite_gives_up(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = break_losses(monkeypatch, [infinite_loss])
    with pytest.raises(TrainingError, match=r"20 steps in a row; try a lower optimiser\.lr"):
        train(changed(epochs=30, batch_size=1, validate_every=99), few, few, tmp_path, device="cpu")
    assert len(made) == 20
    # An epoch without a single finite step has no loss, rather than a loss of zero.
    assert rows(tmp_path)[0]["classification_loss"] == "nan"


def test_images_without_objects_train_in_half_precision(few: Dataset, tmp_path: Path) -> None:
    negative = few.samples[-1]
    assert len(negative.boxes) == 0
    training = dataclasses.replace(few, samples=(negative, few.samples[0]))
    train(changed(epochs=1, batch_size=1, precision="bf16"), training, few, tmp_path, device="cpu")
    row = rows(tmp_path)[0]
    assert math.isfinite(float(row["classification_loss"]))
    assert math.isfinite(float(row["regression_loss"]))
    for name, tensor in saved(tmp_path)["state_dict"].items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "expected auto, cpu, cuda or cuda:N"), ("cuda:99", "this torch sees")],
)
def test_devices_that_are_not_there(few: Dataset, tmp_path: Path, device: str, words: str) -> None:
    with pytest.raises(DeviceError, match=f"--device {device}: {words}"):
        train(CONFIG, few, few, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_half_precision_that_a_cpu_lacks(few: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fp16 needs a GPU"):
        train(changed(precision="fp16"), few, few, tmp_path / "run", device="cpu")


def test_no_compiler_is_no_reason_to_stop(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", missing)
    train(changed(epochs=1, compile=True), few, few, tmp_path, device="cpu")
    assert "does not work here (No working C++ compiler found)" in caplog.text
    assert len(rows(tmp_path)) == 1


# --- schedule, groups, average -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "progress", "share"),
    [
        (0, 0.0, 0.1),
        (4, 0.0, 0.5),
        (9, 0.0, 1.0),
        (1000, 0.0, 1.0),
        (1000, 0.25, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),
        (1000, 0.5, 0.6),
        (1000, 1.0, 0.2),
        (1000, 7.0, 0.2),
        # The warm-up counts steps, so it lasts even where time is short.
        (4, 1.0, 0.1),
    ],
)
def test_schedule(step: int, progress: float, share: float) -> None:
    settings = OptimiserConfig(warmup_steps=10, final_lr_share=0.2)
    assert schedule(settings, step, progress) == pytest.approx(share)


def test_no_warm_up() -> None:
    assert schedule(OptimiserConfig(warmup_steps=0), 0, 0.0) == 1.0


@pytest.mark.parametrize(("lr_batch", "rate"), [(None, 0.1), (8, 0.1), (2, 0.4), (32, 0.025)])
def test_the_rate_grows_with_the_batch(lr_batch: int | None, rate: float) -> None:
    settings = OptimiserConfig(lr=0.1, lr_batch=lr_batch, backbone_lr_share=0.5)
    groups = parameter_groups(RetinaNet(MODEL, classes=2), settings, batch_size=8)
    assert sorted({group["peak_lr"] for group in groups}) == pytest.approx([rate / 2, rate])


def test_every_parameter_learns_in_one_group() -> None:
    network = RetinaNet(MODEL, classes=2)
    settings = OptimiserConfig(lr=0.1, backbone_lr_share=0.5, weight_decay=0.01)
    groups = parameter_groups(network, settings, batch_size=8)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in network.parameters())
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        group = group_of[id(parameter)]
        assert group["peak_lr"] == (0.05 if name.startswith("backbone.") else 0.1), name
        assert group["weight_decay"] == (0.01 if name.endswith("weight") and parameter.ndim == 4
                                         else 0.0), name  # fmt: skip
    # Outside of the backbone comes last or first, but always in the same place: resuming
    # matches groups by their order.
    assert [len(g["params"]) for g in groups] == [
        len(g["params"])
        for g in parameter_groups(RetinaNet(MODEL, classes=2), settings, batch_size=8)
    ]


def test_the_average_forgets_its_start() -> None:
    average = averaging(0.999)

    def after(count: Tensor | int, value: float = 0.0) -> float:
        averaged = [torch.full((1,), value)]
        average(averaged, [torch.ones(1)], count)
        return averaged[0].item()

    # Decay 2/11 after one update, (1 + n) / (10 + n) after n, 0.999 at last.
    assert after(1) == pytest.approx(9 / 11)
    assert after(torch.tensor(90)) == pytest.approx(0.09)
    assert after(10**6) == pytest.approx(0.001)
    value = 0.0
    for count in range(1, 30):
        value = after(count, value)
    assert value > 0.99
