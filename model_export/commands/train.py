"""`retinaserve train`: train on a labelled folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import yaml
from tqdm import tqdm

from model_export.checkpoints import Checkpoint, fetch_imagenet, load_checkpoint
from model_export.commands.labelled_data import as_options, load
from model_export.commands.options import DEFAULT_RECIPE
from model_export.config import DataConfig, TrainConfig, dump_config, load_config
from model_export.data.account import account
from model_export.data.datasets import Dataset
from model_export.data.folder import LabelledFolder
from model_export.data.report import summarise
from model_export.download import CACHE
from model_export.provenance import provenance, resumed
from model_export.retinanet.backbones import BACKBONES
from model_export.training.callbacks import METRICS
from model_export.training.distributed import launch, this_command, world
from model_export.training.hardware import accelerator_for
from model_export.training.recommendation import recommend
from model_export.training.speed import BUDGET_MS, ENOUGH_EPOCHS, time_step, within
from model_export.training.trainer import BEST, CONFIG, LAST, train
from service.errors import DataError
from service.filenames import refuse_to_replace
from service.runtime.artifact import MODEL_FILE
from service.settings import bundled_models
from service.system.memory import keep_freed_memory

IMAGENET: Final = "imagenet"
BUNDLED: Final = "bundled"


def run(
    *,
    data: Path,
    labels: Mapping[str, Any],
    output: Path,
    config_file: Path | None,
    settings: Sequence[str],
    anchors: str | None,
    budget_ms: float | None,
    weights: str | None,
    init: str | None,
    resume: bool,
    device: str,
    devices: int | None,
    licences: Sequence[str],
    backbone: str | None,
    **given: Any,
) -> None:
    """Check everything, print a summary of the data, then train. Raises RetinaserveError.

    `given` are settings of the same names.
    """
    if weights is not None and init is not None:
        raise click.UsageError("--weights and --init exclude each other: --init brings a backbone")
    given = {"model.backbone": backbone, **given}
    overrides = dict(map(parse_setting, settings))
    overrides |= {key: value for key, value in given.items() if value is not None}
    overrides |= {f"data.{key}": value for key, value in labels.items()}
    fit_anchors = anchors == "auto"
    _check_folder(output, resume=resume, config_file=config_file, weights=weights, init=init)
    # The other processes of the run may look after the first one has begun to write.
    if not resume and world().is_first:
        sources = [Path(each) for each in (data, config_file, init, weights) if each is not None]
        refuse_to_replace((output / name for name in (BEST, CONFIG, METRICS)), sources)
    if resume or init is not None:
        for option, value in (("--anchors", anchors), ("--budget-ms", budget_ms)):
            if value is not None:
                raise DataError(
                    f"{option} goes with a new network only: the checkpoint has canvas and anchors"
                )
    if devices is not None and devices != world().local_size:
        _start_processes(devices, device)
        return
    if accelerator_for(device, world().local_size)[0] == "cpu":
        keep_freed_memory(activations=True)
    started_from = _load_init(init)
    config = load_config(output / CONFIG if resume else config_file or DEFAULT_RECIPE, overrides)
    if started_from is not None:
        given_model = config_file is not None or any(key.startswith("model") for key in overrides)
        config = adopt(config, started_from, given_model=given_model)
    known = load_checkpoint(output / LAST) if resume else started_from
    if resume and known is not None:
        _check_unchanged(config, known)
    folder = LabelledFolder(data)
    training = _training_data(folder, config.data, known, resume=resume)
    validation = load(folder, "val", config.data, classes=training.classes)
    if not resume and started_from is None:
        config = _fitted(config, training, anchors=fit_anchors, budget_ms=budget_ms, device=device)
    if world().size == 1 and not resume:
        _say_speed(config, training, device)
    _report(config, folder, training, validation)
    imagenet = backbone_weights(weights, config)
    origin = _provenance(config, training, imagenet, started_from, licences)
    if resume and known is not None:
        origin = resumed(known.description.provenance, config.model_dump(mode="json"))
    output.mkdir(parents=True, exist_ok=True)
    if world().is_first:
        dump_config(config, output / CONFIG)
    with messages():
        best = train(
            config,
            training,
            validation,
            output,
            weights=imagenet,
            init=started_from,
            resume=resume,
            device=device,
            provenance=origin,
        )
    result = "best.ckpt is of the last epoch" if best is None else f"best AP {best:.4f}"
    _say(
        f"{result}; next:\n  retinaserve export {output / BEST} --data {data} "
        f"{as_options(config.data)}--output models/{output.name}/1/{MODEL_FILE}"
    )


def _start_processes(count: int, device: str) -> None:
    """Run this command as `count` processes that train together."""
    if world().size > 1:
        raise DataError(
            f"--devices {count}: torchrun has started {world().local_size} processes on this "
            "machine; leave the option out"
        )
    accelerator_for(device, count)
    # Processes that each use all cores slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    launch(count, this_command())


def _say(text: str) -> None:
    """Print in the first process only."""
    if world().is_first:
        click.echo(text)


def _fitted(
    config: TrainConfig,
    training: Dataset,
    *,
    anchors: bool,
    budget_ms: float | None,
    device: str,
) -> TrainConfig:
    """Return the config with canvas and anchors that fit the data, where it names none.

    With `anchors` they replace those that it names, too.
    """
    canvas_named = "canvas" in config.model_fields_set
    keep = "anchors" in config.model.model_fields_set and not anchors
    if canvas_named and budget_ms is not None:
        raise DataError(
            "--budget-ms limits the canvas that is chosen for the data, and the settings name "
            "one; leave one of the two out"
        )
    if canvas_named and keep:
        return config
    if budget_ms is None and accelerator_for(device, 1)[0] == "cpu":
        budget_ms = BUDGET_MS
    limit = within(config.model, len(training.classes), budget_ms)
    advice = recommend(training, config, limit=limit, keep_anchors=keep)
    # Several processes would each measure another time.
    if config.max_minutes is not None and not canvas_named and world().size == 1:
        step = time_step(config, len(training.classes), advice.after.canvas.largest(), device)
        in_time = step.limit(len(training.samples), config.max_minutes)
        if advice.after.canvas.largest().area > in_time.area:
            advice = recommend(training, config, limit=in_time, keep_anchors=keep)
    _say(f"{advice}\n")
    return advice.apply(config)


def _say_speed(config: TrainConfig, training: Dataset, device: str) -> None:
    """Print the time of a training step, and the number of epochs that fit into the time."""
    canvas = config.canvas.largest()
    step = time_step(config, len(training.classes), canvas, device)
    epoch = step.epoch_seconds(len(training.samples), canvas.area)
    text = (
        f"a training step takes {step.seconds:.2g} s an image at {canvas.height}x{canvas.width}, "
        f"{1 / step.seconds:.2g} images/s; an epoch takes {epoch / 60:.2g} min"
    )
    if config.max_minutes is None:
        _say(
            f"{text}, all {config.epochs} {config.epochs * epoch / 60:.2g} min; --max-minutes "
            "fits the schedule to your time\n"
        )
        return
    fit = int(config.max_minutes * 60 / epoch)
    _say(f"{text}, so that about {min(fit, config.epochs)} fit into {config.max_minutes:g} min")
    if fit < ENOUGH_EPOCHS:
        _say(
            f"note: fewer than {ENOUGH_EPOCHS} epochs learn little; give more --max-minutes, or a "
            "smaller canvas"
        )
    _say("")


def _provenance(
    config: TrainConfig,
    training: Dataset,
    backbone: Path | None,
    started_from: Checkpoint | None,
    licences: Sequence[str],
) -> dict[str, Any]:
    return provenance(
        config=config.model_dump(mode="json"),
        data=training,
        weights=backbone,
        init=None if started_from is None else started_from.path,
        licences=licences,
    )


def adopt(config: TrainConfig, checkpoint: Checkpoint, *, given_model: bool) -> TrainConfig:
    """Return the config with the checkpoint's network, and its canvas if the config names none.

    Raises DataError if the config asks for another network; with `given_model` false it was not
    the user who did.
    """
    model = checkpoint.description.model
    asked = config.model
    if "anchors" not in asked.model_fields_set:
        asked = asked.model_copy(update={"anchors": model.anchors})
    if given_model and "model" in config.model_fields_set and asked != model:
        raise DataError(
            f"{checkpoint.path}: its network is {model.backbone} with heads of "
            f"{model.head_depth} x {model.head_width}, the config asks for another, or for other "
            "anchors; leave `model` and --backbone out with --init"
        )
    update: dict[str, Any] = {"model": model}
    if "canvas" not in config.model_fields_set:
        update["canvas"] = checkpoint.description.canvas
    return config.model_copy(update=update)


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE of --set, the value as YAML. Raises click.BadParameter."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise click.BadParameter(f"{text!r}: expected KEY=VALUE, such as optimiser.lr=0.005")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise click.BadParameter(f"{text!r}: the value is not YAML") from error


def _check_folder(
    output: Path,
    *,
    resume: bool,
    config_file: Path | None,
    weights: str | None,
    init: str | None,
) -> None:
    last = output / LAST
    if not resume:
        if last.exists():
            raise DataError(
                f"{output}: holds a run already; go on with --resume or name another folder"
            )
        return
    if not last.exists():
        raise DataError(f"{last}: nothing to resume; start the run without --resume")
    for option, value in (("--config", config_file), ("--weights", weights), ("--init", init)):
        if value is not None:
            raise DataError(f"{option} does not go with --resume: the run goes on as it began")


def _check_unchanged(config: TrainConfig, last: Checkpoint) -> None:
    """Raise DataError if a run cannot go on by its settings, before they are written down."""
    began = last.description
    noted = began.provenance.get("config", {}).get("optimiser", {})
    for name, differs in (
        ("model", config.model != began.model),
        ("canvas", config.canvas != began.canvas),
        ("optimiser.name", config.optimiser.name != noted.get("name", config.optimiser.name)),
    ):
        if differs:
            raise DataError(
                f"{last.path}: the run began with another `{name}` than the settings name; leave "
                f"it out with --resume, or begin a new run by --init {last.path}"
            )


def _load_init(init: str | None) -> Checkpoint | None:
    if init is None:
        return None
    return load_checkpoint(bundled_checkpoint() if init == BUNDLED else Path(init))


def bundled_checkpoint() -> Path:
    """Return the checkpoint of the bundled model."""
    found = sorted(bundled_models().glob("*/*/*.safetensors"))
    if not found:
        raise DataError(f"no checkpoint is bundled below {bundled_models()}; name a file")
    return found[-1]


def _training_data(
    data: LabelledFolder, used: DataConfig, known: Checkpoint | None, *, resume: bool
) -> Dataset:
    """Read the train split, in the class order of a checkpoint that has the same classes."""
    training = load(data, "train", used)
    if known is None or training.classes == known.description.classes:
        return training
    if set(training.classes) == set(known.description.classes):
        return load(data, "train", used, classes=known.description.classes)
    if resume:
        raise DataError(
            f"{data.root}: its classes are {', '.join(training.classes)}, but the run began with "
            f"{', '.join(known.description.classes)}; resume it on the same data"
        )
    return training


def backbone_weights(weights: str | None, config: TrainConfig) -> Path | None:
    """Return the file that --weights means, for the backbone of a config. Raises DataError."""
    if weights is None:
        return None
    if weights == IMAGENET:
        backbone, eps = config.model.backbone, config.model.norm_eps
        trained_with = BACKBONES[backbone].norm_eps
        if eps != trained_with:
            raise DataError(
                f"model.norm_eps {eps:g}: the ImageNet weights of {backbone} were trained with "
                f"{trained_with:g}; set that, or leave it out"
            )
        return fetch_imagenet(backbone, CACHE)
    if not Path(weights).is_file():
        raise DataError(f"--weights {weights}: no such file; name one, or say imagenet")
    return Path(weights)


def _report(
    config: TrainConfig, folder: LabelledFolder, training: Dataset, validation: Dataset
) -> None:
    for dataset in (training, validation):
        _say(f"{summarise(dataset, config.canvas, config.model.anchors, config.matching)}\n")
    for count in account(folder, (training, validation), format=config.data.format):
        _say(str(count))
    if not any(len(sample.boxes) for sample in validation.samples):
        _say(
            "note: the val split holds no object, so there is no AP and best.ckpt follows the last "
            "epoch; label objects in val images to measure the run\n"
        )


class _BesideBars(logging.Handler):
    """Writes messages above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def messages() -> Iterator[None]:
    """Show the project's log messages on stderr, and only warnings of Lightning's."""
    handler = _BesideBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("model_export")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
