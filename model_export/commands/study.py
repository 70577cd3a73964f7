"""`retinaserve study`: the exhibits of the paper, each a figure, a CSV and a line of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from model_export.commands.data import load
from model_export.commands.train import messages
from model_export.study import ablation


def ablate(
    *,
    config_file: Path,
    data: Path,
    output: Path,
    weights: Path | None,
    overrides: Mapping[str, Any],
    only: Sequence[str],
    device: str,
) -> None:
    """Run what is left of a study, then write its table. Raises RetinaserveError."""
    study = ablation.load_study(config_file)
    runs = ablation.plan(study, output, overrides)
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
    for line in lines:
        click.echo(line)
