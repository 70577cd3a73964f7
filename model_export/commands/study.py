"""`retinaserve study`: the exhibits of the paper, each as figure, CSV and text."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import click
import torch

from model_export.checkpoints import load_checkpoint
from model_export.commands.labelled_data import load
from model_export.commands.train import backbone_weights, messages, parse_setting
from model_export.config import TrainConfig, apply_overrides
from model_export.data.batches import CanvasCache
from model_export.study import (
    ablation,
    ablation_report,
    loss_curves,
    loss_distribution,
)
from model_export.training.hardware import accelerator_for
from service.errors import DataError
from service.system.memory import keep_freed_memory


def curves(output: Path) -> None:
    """Write figure 1 and FL*."""
    for path in loss_curves.write(loss_curves.compute(), output):
        click.echo(f"wrote {path}")
    for line in loss_curves.describe():
        click.echo(line)


def cdf(
    checkpoint_file: Path, *, data: Path, split: str, output: Path, merge: bool, device: str
) -> None:
    """Write figure 4. Raises RetinaserveError."""
    chosen = torch.device(accelerator_for(device, 1)[0])
    checkpoint = load_checkpoint(checkpoint_file)
    description = checkpoint.description
    trained = _trained_with(description.provenance)
    if merge:
        count = len(description.classes)
        if count != 1:
            raise DataError(f"--merge-classes: {checkpoint_file} has {count} classes, not one")
        dataset = ablation.merge_classes(load(data, split, trained.data), description.classes[0])
    else:
        dataset = load(data, split, trained.data, classes=description.classes)
    examples = CanvasCache(dataset.samples, description.canvas, title=f"{split} images")
    foreground, background = loss_distribution.collect(
        checkpoint.build().to(chosen), examples, matcher=trained.matching, device=chosen
    )
    if not foreground.examples:
        raise DataError(f"{data}: no object in the split {split!r}; a split with objects is needed")
    try:
        found = {
            name: [loss_distribution.distribution(each, g) for g in loss_distribution.GAMMAS]
            for name, each in (("foreground", foreground), ("background", background))
        }
    except ValueError as error:
        raise DataError(f"{checkpoint_file} on {data}: {error}") from error
    for path in loss_distribution.write(found["foreground"], found["background"], output):
        click.echo(f"wrote {path}")
    click.echo(
        f"{len(examples)} images, {foreground.examples} foreground and {background.examples} "
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
    weights: str | None,
    settings: Sequence[str],
    only: Sequence[str],
    jobs: int,
    device: str,
) -> None:
    """Execute the unfinished runs of a study, `jobs` at once, and write its table.

    Raises RetinaserveError.
    """
    if accelerator_for(device, 1)[0] == "cpu":
        keep_freed_memory(activations=True)
    study = ablation.load_study(config_file)
    runs = ablation.plan(study, output, dict(map(parse_setting, settings)))
    chosen = [
        dataclasses.replace(run, weights=backbone_weights(weights, run.config))
        for run in _choose(runs, only)
    ]
    choice = runs[0].config.data
    training = load(data, "train", choice)
    validation = load(data, "val", choice, classes=training.classes)
    training, validation = (
        ablation.merge_classes(
            ablation.subset(dataset, images, seed=study.subset_seed), study.merge_classes
        )
        for dataset, images in (
            (training, study.pictures),
            (validation, study.validation_pictures),
        )
    )
    if not any(len(sample.boxes) for sample in validation.samples):
        raise DataError(f"{data}: no object in the val images that were chosen; choose more")
    for run in chosen:
        ablation.check_folder(run, ablation.run_inputs(run, training, validation))
    click.echo(
        f"{study.title}: {len(chosen)} runs on {len(training.samples)} images, measured on "
        f"{len(validation.samples)}"
    )
    execution = ablation.Execution(training, validation, device)
    with messages():
        for number, (run, result, before) in enumerate(_results(chosen, execution, jobs), start=1):
            click.echo(
                f"[{number}/{len(chosen)}] {run.row.name}, seed {run.seed}: AP "
                f"{100 * result.ap:.1f}, {result.minutes:.1f} min{' (done before)' * before}"
                + (f"; diverged: {result.diverged}" if result.diverged else "")
            )
            summaries = _write(study, runs, output)
    click.echo(f"wrote {output}/ablation.csv, .md and .png")
    for line in ablation_report.table(summaries):
        click.echo(line)


def _results(
    runs: Sequence[ablation.Run], execution: ablation.Execution, jobs: int
) -> Iterator[tuple[ablation.Run, ablation.Result, bool]]:
    """Yield each run with its result, and whether it was there before; those that were, first."""
    results = [(run, ablation.finished(run)) for run in runs]
    yield from ((run, result, True) for run, result in results if result is not None)
    unfinished = [run for run, result in results if result is None]
    if jobs == 1:
        yield from ((run, execution(run), False) for run in unfinished)
        return
    # Spawned: a fork would copy torch's locks, but not its threads.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin) as pool:
        running = {pool.submit(execution, run): run for run in unfinished}
        try:
            for done in as_completed(running):
                yield running[done], done.result(), False
        except BrokenProcessPool as error:
            raise DataError(
                f"a process of --jobs {jobs} was killed, perhaps for memory; the finished runs "
                "are kept: run the command again to continue"
            ) from error


def _begin() -> None:
    """Prepare a process of --jobs: one thread for torch, and an end with its parent."""
    torch.set_num_threads(1)
    keep_freed_memory(activations=True)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        # The run goes on from its last epoch; two processes must not write to one folder.
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _choose(runs: Sequence[ablation.Run], only: Sequence[str]) -> list[ablation.Run]:
    names = list(dict.fromkeys(run.row.name for run in runs))
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise DataError(f"--row {unknown[0]!r}: no such row; the rows are {', '.join(names)}")
    return [run for run in runs if not only or run.row.name in only]


def _write(
    study: ablation.StudyConfig, runs: Sequence[ablation.Run], output: Path
) -> list[ablation_report.Summary]:
    """Write the table of all finished runs; called after every run, as the next may be killed."""
    results = [result for run in runs if (result := ablation.finished(run)) is not None]
    summaries = ablation_report.summarise(ablation.expand(study.rows, study.reference), results)
    ablation_report.write_results(results, output / "ablation.csv")
    lines = ablation_report.table(summaries)
    ablation.replace_file(output / "ablation.md", "\n".join(lines) + "\n")
    ablation_report.write_plot(study.title, summaries, results, output / "ablation.png")
    return summaries


def _trained_with(provenance: Mapping[str, Any]) -> TrainConfig:
    """Return matching and classes of a checkpoint's own run, or the defaults."""
    config = provenance.get("config", {})
    known = {key: config[key] for key in ("matching", "data") if key in config}
    if "matching" not in known:
        click.echo("the checkpoint does not say how anchors were matched: by the defaults, then")
    return apply_overrides(known, {})
