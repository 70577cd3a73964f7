"""`retinaserve study`: the exhibits of the paper, each a figure, a CSV and a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from model_export.checkpoints import load_checkpoint
from model_export.commands.data import load
from model_export.commands.train import messages, parse_setting
from model_export.config import MatchingConfig
from model_export.study import ablation, ablation_plot, loss_curves, loss_distribution
from model_export.transforms import CanvasCache
from service.errors import DataError, DeviceError


def curves(output: Path) -> None:
    """Figure 1 and FL*."""
    for path in loss_curves.write(loss_curves.compute(), output):
        click.echo(f"wrote {path}")
    for line in loss_curves.describe():
        click.echo(line)


def cdf(checkpoint_file: Path, *, data: Path, split: str, output: Path, device: str) -> None:
    """Figure 4. Raises RetinaserveError."""
    chosen = _device(device)
    checkpoint = load_checkpoint(checkpoint_file)
    description = checkpoint.description
    dataset = load(data, split, classes=description.classes)
    examples = CanvasCache(dataset.samples, description.canvas, title=f"{split} pictures")
    foreground, background = loss_distribution.collect(
        checkpoint.build().to(chosen), examples, matching=MatchingConfig(), device=chosen
    )
    if not foreground.examples:
        raise DataError(f"{data}: no object in the split {split!r}; a split with objects is needed")
    found = {
        name: [
            loss_distribution.distribution(histogram, gamma) for gamma in loss_distribution.GAMMAS
        ]
        for name, histogram in (("foreground", foreground), ("background", background))
    }
    for path in loss_distribution.write(found["foreground"], found["background"], output):
        click.echo(f"wrote {path}")
    click.echo(
        f"{len(examples)} pictures, {foreground.examples} foreground and {background.examples} "
        "background examples; share of the loss that the hardest carry:"
    )
    for name, distributions in found.items():
        for one in distributions:
            shares = ", ".join(
                f"hardest {share:.0%}: {one.hardest(share):.1%}"
                for share in loss_distribution.HARDEST
            )
            click.echo(f"  {name}, gamma {one.gamma:g}: {shares}")


def ablate(
    *,
    config_file: Path,
    data: Path,
    output: Path,
    weights: Path | None,
    settings: Sequence[str],
    only: Sequence[str],
    device: str,
) -> None:
    """Run what is left of a study, then write its table. Raises RetinaserveError."""
    study = ablation.load_study(config_file)
    runs = ablation.plan(study, output, dict(map(parse_setting, settings)))
    chosen = _choose(runs, only)
    training = load(data, "train")
    validation = load(data, "val", classes=training.classes)
    training, validation = (
        ablation.merge_classes(
            ablation.subset(dataset, pictures, seed=study.subset_seed), study.merge_classes
        )
        for dataset, pictures in (
            (training, study.pictures),
            (validation, study.validation_pictures),
        )
    )
    click.echo(
        f"{study.title}: {len(chosen)} runs on {len(training.samples)} pictures, measured on "
        f"{len(validation.samples)}"
    )
    with messages():
        for number, run in enumerate(chosen, start=1):
            result = ablation.finished(run)
            done = "" if result is None else " (done before)"
            if result is None:
                result = ablation.execute(run, training, validation, weights=weights, device=device)
            click.echo(
                f"[{number}/{len(chosen)}] {run.row.name}, seed {run.seed}: AP "
                f"{100 * result.ap:.1f}, {result.minutes:.1f} min{done}"
                + (f"; diverged: {result.diverged}" if result.diverged else "")
            )
    _write(study, runs, output)


def _choose(runs: Sequence[ablation.Run], only: Sequence[str]) -> list[ablation.Run]:
    names = list(dict.fromkeys(run.row.name for run in runs))
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise click.BadParameter(
            f"--row {unknown[0]!r}: no such row; the rows are {', '.join(names)}"
        )
    return [run for run in runs if not only or run.row.name in only]


def _write(study: ablation.StudyConfig, runs: Sequence[ablation.Run], output: Path) -> None:
    results = [result for run in runs if (result := ablation.finished(run)) is not None]
    summaries = ablation.summarise(ablation.expand(study.rows), results)
    ablation.write_results(results, output / "ablation.csv")
    lines = list(ablation.table(summaries))
    (output / "ablation.md").write_text("\n".join(lines) + "\n")
    ablation_plot.write(study.title, summaries, results, output / "ablation.png")
    click.echo(f"wrote {output}/ablation.csv, .md and .png")
    for line in lines:
        click.echo(line)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise DeviceError(f"--device {asked}: expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device {asked}: this torch sees no CUDA device; use cpu or auto")
    return device
