"""A RetinaNet as torchvision shapes it, of random weights: it computes what a trained one does."""

from __future__ import annotations

from pathlib import Path

import torch

from model_export.checkpoints import Checkpoint, Description
from model_export.retinanet.model import ModelConfig, RetinaNet
from service.imaging.canvas import Buckets, Size

CLASSES = 91


def random_network(backbone: str, canvas: Size) -> Checkpoint:
    """Random weights that neither vanish nor explode in float16."""
    torch.manual_seed(0)
    small = backbone != "resnet50"
    config = (
        ModelConfig(backbone=backbone, fpn_channels=16, head_width=16, head_depth=1)
        if small
        else ModelConfig(backbone=backbone)
    )
    network = RetinaNet(config, classes=CLASSES).eval()
    for name, module in network.named_modules():
        # Each residual block adds to what goes past it: with norms that were never trained the sum
        # would double from block to block.
        if isinstance(module, torch.nn.BatchNorm2d) and name.endswith(("bn3", "bn2")):
            torch.nn.init.constant_(module.weight, 0.25)
    return Checkpoint(
        path=Path("random.ckpt"),
        description=Description(
            classes=tuple(f"class_{index}" for index in range(CLASSES)),
            model=config,
            canvas=Buckets(sizes=(canvas,)),
            provenance={"command": "benchmarks/random_network.py", "licences": ["CC0"]},
        ),
        weights=network.state_dict(),
    )
