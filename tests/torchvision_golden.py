"""Writes the tests' golden files: what torchvision itself makes of given weights and images.

torchvision is no dependency of this project, and needs a torch of its own. In an environment made
for this alone:

    python3 -m venv oracle
    oracle/bin/pip install torchvision==0.27.0 numpy
    oracle/bin/python -m tests.torchvision_golden [small|v1|v1_unpublished|v2 ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
    RetinaNetHead,
    _default_anchorgen,
)
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from tests.unit.model_export.golden import recipe

FOLDER = Path(recipe.__file__).parent


@dataclass(frozen=True)
class Run:
    """One call of the model with images of `sizes`, (height, width) each.

    `short` and `long` are the model's settings that leave images of these sizes as they are.
    """

    sizes: tuple[tuple[int, int], ...]
    short: int
    long: int
    detections: int = 300


COMPANY = Run(sizes=((160, 200), (150, 224)), short=160, long=224)
PADDED = Run(sizes=((800, 1066),), short=800, long=1333)
LARGE = Run(sizes=((800, 1066), (750, 1333)), short=800, long=1333, detections=1000)


def published() -> RetinaNet:
    """As `retinanet_resnet50_fpn(weights=COCO_V1)` builds it, without the download."""
    body = resnet50(norm_layer=FrozenBatchNorm2d)
    pyramid = _resnet_fpn_extractor(
        body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    model = RetinaNet(pyramid, 91)
    overwrite_eps(model, 0.0)
    return model


def small() -> RetinaNet:
    """Everything that is special about either version, in a network for quick tests."""
    body = resnet18(norm_layer=FrozenBatchNorm2d)
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    pyramid = BackboneWithFPN(body, layers, [128, 256, 512], 64, LastLevelP6P7(64, 64))
    head = RetinaNetHead(64, 9, 7, norm_layer=partial(nn.GroupNorm, 32))
    model = RetinaNet(pyramid, 7, anchor_generator=_default_anchorgen(), head=head)
    overwrite_eps(model, 0.0)
    return model


def unpublished() -> RetinaNet:
    """Version 1 as one trains it from scratch: ordinary batch norms, as many classes as wanted."""
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)


def version_2() -> RetinaNet:
    """Version 2 as published."""
    return retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)


CASES: dict[str, tuple[Callable[[], RetinaNet], tuple[Run, ...]]] = {
    "small": (small, (COMPANY, PADDED, LARGE)),
    "v1": (published, (COMPANY, PADDED)),
    "v1_unpublished": (unpublished, (COMPANY,)),
    "v2": (version_2, (COMPANY, PADDED)),
}


@torch.no_grad()
def main() -> None:
    """Write one file per case, or for those that are named."""
    for name in sys.argv[1:] or CASES:
        build, runs = CASES[name]
        model = build().eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        weights = {
            key: torch.from_numpy(np.array(recipe.tensor(key, shape)))
            for key, shape in shapes.items()
        }
        model.load_state_dict(weights)
        arrays: dict[str, np.ndarray] = {}
        for number, run in enumerate(runs):
            model.transform.min_size = (run.short,)
            model.transform.max_size = run.long
            model.detections_per_img = run.detections
            images = [recipe.image(i, *size) for i, size in enumerate(run.sizes)]
            tensors = [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in images]
            for index, found in enumerate(model(tensors)):
                for part, values in found.items():
                    dtype = np.uint8 if part == "labels" else np.float32
                    arrays[f"{number}_{index}_{part}"] = values.numpy().astype(dtype)
        parameters = sum(p.numel() for p in model.parameters())
        about = {
            "torchvision": torchvision.__version__,
            "torch": torch.__version__,
            "parameters": parameters,
            "classes": model.head.classification_head.num_classes,
            "categories": RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"],
            "base_anchors": [base.tolist() for base in model.anchor_generator.cell_anchors],
            "state_dict": shapes,
            "runs": [{"sizes": run.sizes, "detections": run.detections} for run in runs],
        }
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
        counts = [len(array) for key, array in arrays.items() if key.endswith("scores")]
        print(
            f"{path.name}: {len(shapes)} keys, {parameters} parameters, detections {counts}, "
            f"{path.stat().st_size} bytes"
        )


if __name__ == "__main__":
    main()
