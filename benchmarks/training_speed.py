"""Images per second of `retinaserve train` beside a plain torch loop on the same network.

    python benchmarks/training_speed.py --data FOLDER

Both learn the same batches by the same loss and optimiser, turn by turn in one process. The plain
loop finds its batches ready in the device's memory; `train` decodes, varies and moves them, keeps
the averaged weights and watches over every step. A third turn only makes the batches. Prints one
JSON object, and a table on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import torch

from model_export.config import TrainConfig, load_config
from model_export.data.datasets import Dataset, load
from model_export.data.batches import Batch, CanvasBatchSampler, CanvasCache, TrainingBatches
from model_export.retinanet.model import RetinaNet
from model_export.training.hardware import accelerator_for, precision_for
from model_export.training.lightning_module import RetinaNetModule, parameter_groups
from model_export.training.detection_loss import detection_loss
from model_export.training.trainer import train

RECIPES = Path(__file__).resolve().parent.parent / "model_export" / "recipes"


@dataclass
class Steps:
    """Seconds of each step after the first ones, and what of them went by before it began."""

    images: int
    wall: list[float]
    cpu: list[float]
    waiting: list[float]

    def figures(self) -> dict[str, float]:
        step = statistics.median(self.wall)
        return {
            "pictures_per_second": self.images / step,
            "cpu_ms_per_picture": 1e3 * statistics.median(self.cpu) / self.images,
            "waiting_share": statistics.median(self.waiting) / step,
        }


class Watch(lightning.Callback):
    """Notes when each step of a run begins and ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begun: list[float] = []
        self.ended: list[tuple[float, float]] = []

    def begin(self) -> None:
        self.begun.append(time.perf_counter())

    def end(self) -> None:
        synchronise(self._device)
        self.ended.append((time.perf_counter(), time.process_time()))

    def steps(self, images: int, *, skipped: int) -> Steps:
        """A step lasts from the end of the one before, so what lies between counts as well."""
        pairs = list(zip(self.ended, self.ended[1:], strict=False))[skipped:]
        begun = self.begun[1:][skipped:]
        return Steps(
            images,
            wall=[after[0] - before[0] for before, after in pairs],
            cpu=[after[1] - before[1] for before, after in pairs],
            waiting=[at - before[0] for at, (before, _) in zip(begun, pairs, strict=True)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--recipe", default="light", help="one that comes with the package")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, 32, bf16 or fp16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, help="processes that prepare batches")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=8, help="in each turn")
    parser.add_argument("--skipped", type=int, default=2, help="of them, to warm up")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()

    config = load_config(RECIPES / f"{arguments.recipe}.yaml", settings(arguments))
    training = load(arguments.data, "train")
    # One canvas, so that every batch costs the same.
    rule = config.canvas
    canvas = rule.fit(training.samples[0].size).canvas
    alike = [s for s in training.samples if rule.fit(s.size).canvas == canvas]
    count = arguments.batch_size * arguments.steps
    training = replace(training, samples=tuple((alike * count)[:count]))
    runs = {"train": run_train, "plain": run_plain, "data": run_data}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(arguments.turns):
        for name, run in runs.items():
            steps = run(config, training, arguments.device, skipped=arguments.skipped)
            turns[name].append(steps.figures())
    report(config, arguments, (canvas.height, canvas.width), turns)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "workers": arguments.workers,
        "compile": arguments.compile,
        "epochs": 1,
        "augmentation.transpose": 0.0,
    }


def run_train(config: TrainConfig, training: Dataset, device: str, *, skipped: int) -> Steps:
    """One epoch as `retinaserve train` does it; the steps alone are timed."""
    place = place_of(device)
    watch = Watch(place)
    original = RetinaNetModule.on_train_batch_end

    def ended(self: RetinaNetModule, *arguments: Any) -> None:
        original(self, *arguments)
        watch.end()

    def begun(*_: Any) -> None:
        watch.begin()

    few = replace(training, samples=training.samples[:1])
    with (
        tempfile.TemporaryDirectory() as folder,
        silence(),
        mock.patch.object(RetinaNetModule, "on_train_batch_start", begun),
        mock.patch.object(RetinaNetModule, "on_train_batch_end", ended),
    ):
        train(config, training, few, Path(folder), device=device)
    return watch.steps(config.batch_size, skipped=skipped)


def run_plain(config: TrainConfig, training: Dataset, device: str, *, skipped: int) -> Steps:
    """The least that learning these batches can cost."""
    place = place_of(device)
    torch.manual_seed(config.seed)
    network = RetinaNet(config.model, classes=len(training.classes)).to(place).train()
    network.to(memory_format=torch.channels_last)
    if config.compile:
        network.compile()
    groups = parameter_groups(network, config.optimiser, batch_size=config.batch_size)
    optimiser = torch.optim.AdamW(groups, lr=config.optimiser.lr)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(
        precision_for(config.precision, place.type)
    )
    scaler = torch.amp.GradScaler(place.type, enabled=half == torch.float16)
    batches = [batch.to(place) for batch in made_batches(config, training)]
    watch = Watch(place)
    for batch in batches:
        watch.begin()
        optimiser.zero_grad()
        with torch.autocast(place.type, dtype=half, enabled=half is not None):
            losses = detection_loss(
                network(batch.images, batch.image_sizes),
                batch.boxes,
                batch.labels,
                matching=config.matching,
                loss=config.loss,
            )
        scaler.scale(losses.classification + losses.regression).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.gradient_clip)
        scaler.step(optimiser)
        scaler.update()
        watch.end()
    return watch.steps(config.batch_size, skipped=skipped)


def run_data(config: TrainConfig, training: Dataset, device: str, *, skipped: int) -> Steps:
    """One process that only makes batches; `train` may have several of them."""
    watch = Watch(torch.device("cpu"))
    for _ in made_batches(config, training):
        watch.begin()
        watch.end()
    return watch.steps(config.batch_size, skipped=skipped)


def made_batches(config: TrainConfig, training: Dataset) -> Iterator[Batch]:
    """The batches that `train` makes of the same data in its first epoch."""
    cache = CanvasCache(training.samples, config.canvas, progress=False)
    sampler = CanvasBatchSampler(
        cache.canvases, batch_size=config.batch_size, seed=config.seed, drop_last=True
    )
    batches = TrainingBatches(cache, config.augmentation, seed=config.seed)
    for keys in sampler:
        yield batches[keys]


def place_of(device: str) -> torch.device:
    accelerator, _ = accelerator_for(device, 1)
    return torch.device(accelerator)


def synchronise(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def report(
    config: TrainConfig,
    arguments: argparse.Namespace,
    canvas: tuple[int, int],
    turns: dict[str, list[dict[str, float]]],
) -> None:
    def median(name: str, figure: str) -> float:
        return statistics.median(turn[figure] for turn in turns[name])

    ratios = [
        one["pictures_per_second"] / other["pictures_per_second"]
        for one, other in zip(turns["train"], turns["plain"], strict=True)
    ]
    result = {
        "recipe": arguments.recipe,
        "canvas": list(canvas),
        "batch_size": config.batch_size,
        "device": arguments.device,
        "precision": precision_for(config.precision, place_of(arguments.device).type),
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        **{name: {figure: median(name, figure) for figure in turns[name][0]} for name in turns},
        "train_by_plain": statistics.median(ratios),
        "turns": turns,
    }
    print(json.dumps(result))
    print(f"{'':6}{'images/s':>12}{'CPU ms/image':>16}", file=sys.stderr)
    for name in turns:
        speed, cost = median(name, "pictures_per_second"), median(name, "cpu_ms_per_picture")
        print(f"{name:6}{speed:12.2f}{cost:16.1f}", file=sys.stderr)
    print(f"train waits for data: {100 * median('train', 'waiting_share'):.1f} %", file=sys.stderr)
    print(
        f"train / plain: {result['train_by_plain']:.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} turns)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
