"""Conversion of torchvision's RetinaNet checkpoints.

What torchvision does differently is settings of the model (`ARCHITECTURES`); what is left is to
give each tensor its name here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from model_export.checkpoints import Checkpoint, Description, few_keys
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.contents import is_lfs_pointer
from service.errors import DataError
from service.imaging.canvas import CanvasRule

ANCHORS: Final = AnchorConfig(
    sizes=((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)),
    ratios=(0.5, 1.0, 2.0),
    offset=0.0,
    stride="canvas",
    round_corners=True,
)
"""torchvision's anchors: octaves cut to whole pixels."""

ARCHITECTURES: Final[Mapping[str, ModelConfig]] = {
    "retinanet_resnet50_fpn": ModelConfig(backbone="resnet50", p6_from="p5", anchors=ANCHORS),
    "retinanet_resnet50_fpn_v2": ModelConfig(
        backbone="resnet50", head_norm="group", anchors=ANCHORS
    ),
}
"""torchvision's builders by name; `norm_eps` is the checkpoint's own, see `norm_eps`."""

_COCO: Final = (
    "__background__,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,"
    "fire hydrant,,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,"
    "zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,laptop,"
    "mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,"
    "vase,scissors,teddy bear,hair drier,toothbrush"
)
# Index 0 is the background's. Numbers that COCO leaves out become names like those of unknown
# classes, since the names of a model's classes are unique.
COCO_CLASSES: Final = tuple(name or f"class_{index}" for index, name in enumerate(_COCO.split(",")))
"""Names of the 91 classes of the published checkpoints."""

FROZEN_NORM_EPS: Final = 0.0
"""torchvision sets it for its COCO checkpoints, whose batch norms are frozen."""
_NORM_EPS: Final = 1e-5

PARTS: Final = ("backbone", "fpn", "classification_head", "regression_head")
_CLASSIFIER: Final = "classification_head.out.weight"
_REGRESSOR: Final = "regression_head.out.weight"
_COUNT: Final = "num_batches_tracked"
_LISTED: Final = 3

# Ours, by torchvision's: in turn, each on what the one before has made of a key.
_RENAMED: Final = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # An ImageNet classifier is a backbone alone.
        (r"^(conv1|bn1|layer[1-4])\.", r"backbone.\1."),
        (r"^backbone\.body\.", "backbone."),
        (r"^backbone\.fpn\.", "fpn."),
        (r"^fpn\.extra_blocks\.", "fpn."),
        (r"^head\.(classification_head|regression_head)\.", r"\1."),
        (r"^classification_head\.cls_logits\.", "classification_head.out."),
        (r"^regression_head\.bbox_reg\.", "regression_head.out."),
        # A block around one convolution; older releases have none.
        (r"^(fpn\.(?:inner|layer)_blocks\.\d+)\.0\.", r"\1."),
    )
)
_BLOCK: Final = re.compile(r"(\w+_head\.conv)\.(\d+)\.([01])\.(\w+)")


@dataclass(frozen=True, slots=True)
class Imported:
    """A converted state dict."""

    architecture: str
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    """Remarks for the user, a sentence each."""


def convert(
    state: Mapping[Any, Any],
    *,
    path: Path,
    architecture: str | None,
    labels: Sequence[str] | None,
    eps: float | None,
    canvas: CanvasRule,
    provenance: Mapping[str, Any],
) -> Imported:
    """Return a checkpoint of ours from a state dict that was read from `path`.

    Left open, `architecture` and `eps` are detected from the keys. Where there is nothing but a
    backbone, the rest starts fresh. Raises DataError if the state dict is not what it should be.
    """
    _refuse_strangers(state, path)
    renamed = rename(state)
    present = _parts(renamed)
    if "backbone" not in present:
        raise DataError(
            f"{path}: no weights of a RetinaNet of torchvision's: no key begins with "
            f"backbone.body; its keys are {few_keys(state)}"
        )
    count = _class_count(renamed, labels, path)
    name = _architecture(renamed, architecture, count, path)
    found_eps = norm_eps(state) if eps is None else eps
    model = ARCHITECTURES[name].model_copy(update={"norm_eps": found_eps})
    weights = _counted(renamed)
    notes = []
    if len(present) < len(PARTS):
        weights = _fresh_weights(model, count) | weights
        notes.append(
            f"the file has {' and '.join(present)} alone; the rest starts fresh and has yet to "
            "learn: retinaserve train --init"
        )
    if eps is None and found_eps == FROZEN_NORM_EPS:
        notes.append(
            "frozen batch norms: eps 0, as torchvision's COCO checkpoints have it; a model that "
            f"began with an ImageNet backbone wants --norm-eps {_NORM_EPS:g}"
        )
    description = Description(
        classes=class_names(count, labels),
        model=model,
        canvas=canvas,
        provenance={**provenance, "architecture": f"torchvision {name}"},
    )
    return Imported(name, Checkpoint(path, description, weights), tuple(notes))


def rename(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors under our keys; the classifier of an ImageNet network is left out."""
    normed = any(re.search(r"_head\.conv\.\d\.1\.", key) for key in state)
    renamed = {}
    for key, value in state.items():
        if key.startswith("fc."):
            continue
        name = key
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        renamed[_BLOCK.sub(lambda found: _flat(found, normed=normed), name)] = value
    return renamed


def norm_eps(state: Iterable[str]) -> float:
    """Return the eps of the batch norms of a state dict, by its keys.

    Frozen norms count no batches. Those of an ImageNet classifier are ordinary ones, even where
    an old file lacks the count.
    """
    keys = list(state)
    counted = any(key.endswith(_COUNT) for key in keys)
    classifier = any(key.startswith("layer1.") for key in keys)
    return _NORM_EPS if counted or classifier else FROZEN_NORM_EPS


def class_names(count: int, labels: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of `count` classes: `labels`, or COCO's if there are 91, or numbers."""
    if labels is not None:
        return tuple(labels)
    if count == len(COCO_CLASSES):
        return COCO_CLASSES
    return tuple(f"class_{index}" for index in range(count))


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names, one a line; "N/A", torchvision's unused class, becomes class_<i>.

    Raises DataError that names the line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    if lines and is_lfs_pointer(lines[0].encode()):
        raise DataError(f"{path}: a Git LFS pointer, not the names: run `git lfs pull`")
    while lines and not lines[-1]:
        lines.pop()
    lines = [f"class_{i}" if line == "N/A" else line for i, line in enumerate(lines)]
    if not lines:
        raise DataError(f"{path}: holds no names; one a line is expected")
    for number, line in enumerate(lines, start=1):
        if not line:
            raise DataError(f"{path}:{number}: empty; the line names class {number - 1}")
        if line in lines[: number - 1]:
            raise DataError(
                f"{path}:{number}: {line!r} stands in line {lines.index(line) + 1} already; "
                "every class needs a name of its own"
            )
    return tuple(lines)


def _flat(found: re.Match[str], *, normed: bool) -> str:
    """Return the key in a flat sequence for one in blocks of convolution (and norm) and ReLU."""
    block, part = int(found[2]), int(found[3])
    return f"{found[1]}.{block * (3 if normed else 2) + part}.{found[4]}"


def _class_count(state: Mapping[str, Tensor], labels: Sequence[str] | None, path: Path) -> int:
    """Return the number of the classifier's classes, the background included."""
    if _CLASSIFIER not in state:
        return len(COCO_CLASSES) if labels is None else len(labels)
    per_cell = ANCHORS.per_cell
    outputs = sum(state[_CLASSIFIER].shape[:1])
    boxes = sum(state[_REGRESSOR].shape[:1]) if _REGRESSOR in state else 4 * per_cell
    if boxes != 4 * per_cell or outputs % per_cell or not outputs:
        raise DataError(
            f"{path}: {boxes} box and {outputs} class outputs are not those of {per_cell} anchors "
            "per cell; a state dict does not hold other anchors than torchvision's own"
        )
    count = outputs // per_cell
    if labels is not None and len(labels) != count:
        raise DataError(
            f"{path}: has {count} classes, but there are {len(labels)} labels; the first one "
            "names class 0, which torchvision's own models keep for the background"
        )
    return count


def _architecture(state: Mapping[str, Tensor], asked: str | None, count: int, path: Path) -> str:
    """Return the architecture that a state dict is of."""
    wrong = {name: _differences(state, model, count) for name, model in ARCHITECTURES.items()}
    fitting = [name for name in ARCHITECTURES if not wrong[name]]
    if asked is None and len(fitting) > 1:
        raise DataError(f"{path}: fits {' and '.join(fitting)}; choose by --arch")
    name = asked or min(wrong, key=lambda name: len(wrong[name]))
    if wrong[name]:
        reason = (
            f"it is {fitting[0]}; give --arch {fitting[0]}"
            if fitting
            else "; ".join(wrong[name][:_LISTED])
        )
        raise DataError(f"{path}: not a state dict of {name}: {reason}")
    return name


def _differences(state: Mapping[str, Tensor], model: ModelConfig, count: int) -> list[str]:
    """Return the reasons for which a state dict, or the parts that it has, does not fit."""
    with torch.device("meta"):
        wanted = RetinaNet(model, classes=count).state_dict()
    parts = _parts(state)
    found = []
    for key in sorted(state.keys() | wanted.keys()):
        if key not in wanted:
            found.append(f"{key} is unexpected")
        elif key not in state:
            if key.partition(".")[0] in parts and not key.endswith(_COUNT):
                found.append(f"{key} is missing")
        elif state[key].shape != wanted[key].shape:
            found.append(
                f"{key} has shape {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
            )
    return found


def _counted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in float32, with the batch counts that frozen norms lack."""
    weights = {
        key.replace("running_var", _COUNT): torch.tensor(0)
        for key in state
        if key.endswith("running_var")
    }
    return weights | {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }


def _fresh_weights(model: ModelConfig, count: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        # The same answer for the same file, also where something starts fresh.
        torch.manual_seed(0)
        return RetinaNet(model, classes=count).state_dict()


def _parts(state: Iterable[str]) -> list[str]:
    """Return the parts of the network that occur in a state dict under our keys."""
    keys = {key.partition(".")[0] for key in state}
    return [part for part in PARTS if part in keys]


def _refuse_strangers(state: Mapping[Any, Any], path: Path) -> None:
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path}: not a state dict: {key!r} is {type(value).__name__}; save one by "
                "torch.save(model.state_dict(), PATH)"
            )
