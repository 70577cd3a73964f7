"""Weights and images made of nothing but names and numbers, the same everywhere.

Golden numbers of another implementation are only of use with the weights that they came from. These
are not stored but made again: every value follows from its key, by the raw output of a bit
generator, which numpy promises never to change.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

VARIANCE = 1e-3
"""Typical running variance: small enough that an eps of 1e-5 instead of 0 shows at once."""


def uniform(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Values in [-1, 1) that depend on `name` alone."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count // 4 + 1)
    values = raw.astype("<u8").view("<i2")[:count].astype(np.float32) / np.float32(2**15)
    return values.reshape(shape)


def tensor(key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The weights that belong to a key of torchvision's state dict."""
    kind = key.rsplit(".", 1)[1]
    if kind == "num_batches_tracked":
        return np.array(1000, dtype=np.int64)
    values = uniform(key, shape)
    if kind == "running_var":
        return np.float32(VARIANCE) * (1 + values / 2)
    if kind == "running_mean":
        return values / 4
    if kind == "bias":
        return values / 4 + _centre(key, len(values))
    if len(shape) == 1:
        return (1 + values / 2) * np.float32(_norm_scale(key))
    # Without their mean, so that what tells one place from another is not lost on the way.
    values -= values.mean(axis=(1, 2, 3), keepdims=True)
    return values * np.float32(_gain(key) * np.sqrt(6 / np.prod(shape[1:])))


def image(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3): patches of all sizes, so that every pyramid level sees something."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for side in (4, 16, 64, 256):
        rows, columns = -(-height // side), -(-width // side)
        # The seed of the recorded numbers: another word draws other images.
        patches = uniform(f"picture {seed} {side}", (rows, columns, 3))
        total += np.kron(patches, np.ones((side, side, 1), dtype=np.float32))[:height, :width]
    return np.clip(128 + 48 * total, 0, 255).astype(np.uint8)


def _centre(key: str, count: int) -> NDArray[np.float32]:
    if "cls_logits" in key:
        # Few enough anchors score above 0.05 that suppression is quick.
        return np.full(count, -6, dtype=np.float32)
    if "bbox_reg" in key:
        # Boxes of about a third of their anchors: the largest ones, too, end inside the image.
        return np.tile(np.array([0, 0, -1, -1], dtype=np.float32), count // 4)
    return np.zeros(count, dtype=np.float32)


def _norm_scale(key: str) -> float:
    if key.startswith("head."):
        return 1.0
    # The last norm of a residual block: sixteen blocks are not to blow up what they pass on.
    return float(np.sqrt(VARIANCE)) * (0.5 if ".bn3." in key else 1.0)


def _gain(key: str) -> float:
    """What keeps every level's logits about as wide as P3's."""
    gains = {"inner_blocks": 0.35, "p6": 1.5, "p7": 1.0, "cls_logits": 1.6, "bbox_reg": 0.4}
    return next((gain for part, gain in gains.items() if part in key), 1.0)
