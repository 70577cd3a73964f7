"""Lightning callbacks: metrics, training curves and checkpoints after each epoch."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from matplotlib.figure import Figure

from model_export.checkpoints import Description
from model_export.data.batches import CanvasBatchSampler, Example, collate
from model_export.data.datasets import Sample
from model_export.evaluation.coco_metrics import (
    KEPT_DETECTIONS,
    SCORE,
    Evaluation,
    coco_metrics,
)
from model_export.retinanet.postprocess import candidates, suppress
from model_export.training.distributed import broadcast, gather, share
from model_export.training.lightning_module import RetinaNetModule
from service.imaging.canvas import Letterbox
from service.runtime.detector import Detections

LAST: Final = "last.ckpt"
BEST: Final = "best.ckpt"
METRICS: Final = "metrics.csv"

_IOU: Final = 0.5

_log = logging.getLogger(__name__)


class EpochRecorder(lightning.Callback):
    """After each epoch: validate if it is due, write metrics and curves, save checkpoints.

    Every process validates its share of the images; the first one writes.
    """

    def __init__(self, output: Path, samples: Sequence[Sample], examples: Sequence[Example]):
        """`samples` is the whole split, `examples` this process's share of it."""
        self._output = output
        self._samples = samples
        self._examples = examples

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Validate the averaged weights, which are the ones that are saved."""
        module: RetinaNetModule = pl_module
        config = module.config
        epoch = trainer.current_epoch + 1
        final = epoch == config.epochs or trainer.should_stop
        evaluation: Evaluation | None = None
        due = final or epoch % config.validate_every == 0
        if due:
            evaluation = validate(
                module.average.module,
                self._samples,
                self._examples,
                module.description,
                device=module.device,
            )
        if trainer.is_global_zero:
            self._record(module, epoch, evaluation)
        ap = broadcast(evaluation.ap if evaluation else None) if due else None
        # Where val holds no object there is no AP, and the best epoch known is the last one.
        best = due and (module.best_ap < 0 if ap is None else ap > module.best_ap)
        if ap is not None and best:
            module.best_ap = ap
        # A run that is killed in between goes on from the older `last` and finds the best again.
        if best:
            trainer.save_checkpoint(self._output / BEST)
        trainer.save_checkpoint(self._output / LAST)

    def _record(self, module: RetinaNetModule, epoch: int, evaluation: Evaluation | None) -> None:
        steps = module.sums["steps"] or math.nan
        row: dict[str, Any] = {
            "epoch": epoch,
            "minutes": round(module.minutes(), 3),
            "lr": module.trainer.optimizers[0].param_groups[-1]["lr"],
            "classification_loss": round(module.sums["classification"] / steps, 5),
            "regression_loss": round(module.sums["regression"] / steps, 5),
            "ap": "" if evaluation is None else evaluation.ap,
            "ap50": "" if evaluation is None else evaluation.ap50,
        }
        path = self._output / METRICS
        write_row(path, row)
        training_curves(path, self._output)
        if evaluation is not None:
            figures = (("AP", evaluation.ap), ("AP50", evaluation.ap50))
            known = [f"{name} {value:.4f}" for name, value in figures if value is not None]
            measured = ", ".join(known) or "no AP"
            _log.info("epoch %d, %.1f min: %s", epoch, module.minutes(), measured)


class ResumeSamplerEpoch(lightning.Callback):
    """Sets the sampler's epoch in a resumed run.

    Lightning begins to iterate over the loader before it tells the sampler the epoch, and after
    a resume it does not begin again: the first epoch would repeat the order of epoch 0.
    """

    def __init__(self, sampler: CanvasBatchSampler) -> None:
        self._sampler = sampler

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Continue with the epoch after the checkpoint's."""
        self._sampler.set_epoch(int(checkpoint["epoch"]) + 1)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill never leaves half a checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save to `path`."""
        partial = f"{path}.part"
        super().save_checkpoint(checkpoint, partial, storage_options)
        Path(partial).replace(path)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Add an epoch's row to a CSV file, in place of rows of that epoch and of later ones.

    These are left by a run that was killed between its row and its checkpoint.
    """
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, row)
    writer.writeheader()
    writer.writerows([*rows, row])
    partial = path.with_name(path.name + ".part")
    partial.write_text(text.getvalue(), newline="")
    partial.replace(path)


def validate(
    network: torch.nn.Module,
    samples: Sequence[Sample],
    examples: Sequence[Example],
    description: Description,
    *,
    device: torch.device,
) -> Evaluation | None:
    """Return COCO metrics of a network, run in torch, at score 0.01 and 300 detections.

    `examples` is this process's `share`; the first process gets the metrics, the others None.
    """
    network.eval()
    found = [
        detect_example(network, example, description.canvas.fit(sample.size), device=device)
        for example, sample in zip(examples, share(samples), strict=True)
    ]
    shares = gather(found)
    if shares is None:
        return None
    ordered = [shares[index % len(shares)][index // len(shares)] for index in range(len(samples))]
    return coco_metrics(samples, ordered, description.classes)


@torch.no_grad()
def detect_example(
    network: torch.nn.Module, example: Example, placed: Letterbox, *, device: torch.device
) -> Detections:
    """Return one image's detections in original pixels, computed in torch."""
    batch = collate([example])
    sizes = batch.image_sizes.to(device)
    boxes, scores, labels = (
        part[0].cpu() for part in candidates(network(batch.images.to(device), sizes), sizes)
    )
    kept = suppress(
        boxes,
        scores,
        labels,
        score_threshold=SCORE,
        iou_threshold=_IOU,
        max_detections=KEPT_DETECTIONS,
    )
    return Detections(
        placed.to_original(boxes[kept].numpy()),
        scores[kept].numpy(),
        labels[kept].numpy(),
    )


def training_curves(metrics: Path, output: Path) -> None:
    """Draw losses, learning rate and AP over epochs into `output`/curves.png."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    losses, rates, metric = figure.subplots(1, 3)
    for name in ("classification_loss", "regression_loss"):
        losses.plot(epochs, [float(row[name]) for row in rows], label=name.replace("_", " "))
    losses.set_yscale("log")
    losses.legend(loc="upper right")
    rates.plot(epochs, [float(row["lr"]) for row in rows])
    rates.set_title("learning rate", fontsize=10)
    for name in ("ap", "ap50"):
        points = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        metric.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=name)
    if metric.lines and len(metric.lines[0].get_xdata()):
        metric.legend(loc="lower right")
    metric.set_title("validation", fontsize=10)
    for axes in (losses, rates, metric):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(output / "curves.png", dpi=110)
