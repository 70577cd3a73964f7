"""A small network whose random weights find many things, and its model file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model_export.checkpoints import Checkpoint, Description
from model_export.export.graph import export
from model_export.retinanet.anchors import AnchorConfig
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.imaging.canvas import Buckets, Size
from service.runtime.artifact import Metadata, Thresholds, read_artifact

CLASSES = ("red", "green", "blue")
CANVAS = Buckets(sizes=(Size(96, 128), Size(128, 96)))
THRESHOLDS = Thresholds(score=0.45, per_class={"blue": 0.6}, iou=0.55, max_detections=40)
MODEL = ModelConfig(
    backbone="resnet18",
    fpn_channels=16,
    head_width=16,
    head_depth=1,
    anchors=AnchorConfig(
        sizes=((24.0,), (36.0,), (48.0,), (96.0,), (192.0,)), ratios=(0.5, 1.0, 2.0)
    ),
)


@dataclass(frozen=True)
class RandomModel:
    """A checkpoint and the file that was exported from it."""

    checkpoint: Checkpoint
    path: Path
    metadata: Metadata


def make(path: Path, model: ModelConfig = MODEL) -> RandomModel:
    """Export unless the file exists; scores are spread over (0, 1), boxes differ from anchors."""
    torch.manual_seed(0)
    network = RetinaNet(model, classes=len(CLASSES)).eval()
    for head, bias in ((network.classification_head, -1.0), (network.regression_head, 0.0)):
        torch.nn.init.normal_(head.out.weight, std=0.1)
        assert head.out.bias is not None
        torch.nn.init.constant_(head.out.bias, bias)
    checkpoint = Checkpoint(
        path=Path("random.ckpt"),
        description=Description(
            classes=CLASSES,
            model=model,
            canvas=CANVAS,
            provenance={"command": "retinaserve train", "licences": ["CC0"]},
        ),
        weights=network.state_dict(),
    )
    if not path.exists():
        export(checkpoint, path, name="random", thresholds=THRESHOLDS)
    return RandomModel(checkpoint, path, read_artifact(path).metadata)
