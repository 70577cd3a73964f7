"""The settings of a training run, as one pydantic model, and their YAML files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from model_export.data.batches import Augmentation
from model_export.data.formats import FormatName
from model_export.retinanet.heads import PAPER_WIDTH
from model_export.retinanet.losses import BoxLoss, ClassificationLoss, Focal, SmoothL1
from model_export.retinanet.matching import IouMatcher, Matcher
from model_export.retinanet.model import ModelConfig
from service.contents import kind_of
from service.errors import DataError
from service.imaging.canvas import Buckets, CanvasRule, Size

DEFAULT_CANVAS = Buckets(sizes=(Size(384, 512), Size(512, 384), Size(448, 448)))


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Config):
    """Format of a labelled folder, and the classes that are used."""

    format: FormatName = "auto"
    classes: tuple[str, ...] | None = None
    """Classes that are used, by their new names, in this order; None: all."""
    remap: dict[str, str] = Field(default_factory=dict)
    """New names of classes by their names in the annotations."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [*(self.classes or ()), *self.remap, *self.remap.values()]
        if self.classes == () or not all(name.strip() for name in names):
            raise ValueError("classes and remap need names that are not empty")
        if len(set(self.classes or ())) != len(self.classes or ()):
            raise ValueError(f"classes names one twice: {', '.join(self.classes or ())}")
        return self


class LossConfig(_Config):
    """The loss: a classification loss plus a box loss."""

    classification: ClassificationLoss = Focal()
    box: BoxLoss = SmoothL1()
    box_weight: float = Field(default=1.0, ge=0)


class OptimiserConfig(_Config):
    """Optimiser and schedule: linear warm-up, then half a cosine down to `final_lr_share`."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    lr_batch: int | None = Field(default=None, ge=1)
    """The batch that `lr` is meant for: a batch of another size learns at a proportional rate.

    Left open, `lr` is taken as it is.
    """
    backbone_lr_share: float = Field(default=1.0, ge=0)
    """The backbone learns at this share of `lr`."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Not applied to biases and norms."""
    warmup_steps: int = Field(default=200, ge=0)
    final_lr_share: float = Field(default=0.01, ge=0, le=1)
    gradient_clip: float = Field(default=10.0, gt=0)
    """Largest norm of the gradient."""


class TrainConfig(_Config):
    """A training run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    canvas: CanvasRule = DEFAULT_CANVAS
    augmentation: Augmentation = Augmentation()
    matching: Matcher = IouMatcher()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    epochs: int = Field(default=60, ge=1)
    max_minutes: float | None = Field(default=None, gt=0)
    """The schedule reaches its end when this time is over, if that is before the last epoch."""
    batch_size: int = Field(default=8, ge=1)
    """Images per step, over all processes together: several share them."""
    accumulate: int = Field(default=1, ge=1)
    """Number of parts in which a process computes its share of a batch: less memory, the same
    gradient."""
    freeze_norms: bool = True
    """Keep batch norm statistics as the weights brought them, which is right for small batches.

    A run that starts from random weights has none to keep, and learns them.
    """
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is validated, saved and exported."""
    validate_every: int = Field(default=5, ge=1)
    """Epochs between two validations."""
    precision: Literal["auto", "32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies it, else 32."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that prepare batches; left open: none on a CPU, up to 8 beside a GPU."""
    channels_last: bool = True
    """Keep each pixel's channels together in memory, the weights' as well as the images'."""
    compile: bool = False
    """Let torch.compile translate the network: minutes at the start, faster steps on GPUs."""
    seed: int = Field(default=0, ge=0, lt=2**32)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return a config from a YAML file (or the defaults) with dotted overrides on top.

    `overrides` maps e.g. "optimiser.lr" to a value. Raises DataError that names the file and the
    field.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            content = path.read_bytes()
            loaded = yaml.safe_load(content.decode())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if loaded is None:
            loaded = {}
        if not isinstance(loaded, dict):
            raise DataError(f"{path}: expected a mapping of settings, found {kind_of(content)}")
        values = loaded
    try:
        return apply_overrides(values, overrides)
    except DataError as error:
        raise DataError(f"{path or 'config'}: {error}") from error


def apply_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> TrainConfig:
    """Return a config from a mapping of settings and dotted overrides; neither is modified.

    Raises DataError that names the field.
    """
    merged = copy.deepcopy(dict(values))
    for key, value in overrides.items():
        _set(merged, key.split("."), copy.deepcopy(value))
    _norm_narrow_heads(merged)
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise DataError(describe(error)) from error


def dump_config(config: TrainConfig, path: Path) -> None:
    """Write a config as YAML that `load_config` reads back."""
    # In one go: other processes of the run may be reading it.
    partial = path.with_name(path.name + ".part")
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    partial.replace(path)


def describe(error: ValidationError) -> str:
    """Return a pydantic error as one line: "optimiser.lr: Input should be greater than 0; …"."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {_message(item)}"
        for item in error.errors()
        # Follows from another error: a default that depends on another field.
        if item["type"] != "default_factory_not_called"
    )


def _message(item: ErrorDetails) -> str:
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"a group of settings is expected, found {item['input']!r}"
    if item["type"] != "union_tag_not_found":
        return item["msg"]
    return f"{item['ctx']['discriminator']} must be given with it, to say what kind it is"


def _norm_narrow_heads(values: dict[str, Any]) -> None:
    """Give heads that are narrower than the paper's a group norm, unless the settings name one.

    Without it they answer each level at another scale and learn slowly: docs/focal-loss-study.md.
    A checkpoint's own description is not changed.
    """
    model = values.get("model")
    width = model.get("head_width") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(width, int) or "head_norm" in model:
        return
    if 8 <= width < PAPER_WIDTH:
        groups = max(each for each in range(1, width // 8 + 1) if width % each == 0)
        model["head_norm"] = "group"
        model.setdefault("head_groups", groups)


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise DataError(f"{'.'.join(keys)}: {key!r} is not a group of settings")
        values = inner
    values[keys[-1]] = value
