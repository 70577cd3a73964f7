"""A model file as sessions on a CPU open it: the same detector, computed faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from service.imaging.canvas import Size
from service.runtime import strips, winograd
from service.runtime.norms import fold_norms

_OPSET: Final = 13
"""From here on the axes of Squeeze and the padding of int64 are as the rewriting uses them."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A model file that is computed faster, and what it takes as inputs for that."""

    content: bytes
    weights: Mapping[str, NDArray[np.float32]]
    """Transformed filters: inputs of the file, so that all its sessions share them."""
    count: int
    """Of the convolutions that multiply less."""
    strips: int
    """In which the first convolutions are computed; 0: the whole map at a time."""


def rewrite(content: bytes, canvas: Size, *, dear: bool = False) -> Rewritten | None:
    """Return the same detector, computed faster; None if nothing would be gained.

    `canvas` is the largest; the gain is reckoned for it. `dear`: steps are, since several threads
    with vectors wider than AVX2's share them.
    """
    model = onnx.load_model_from_string(content)
    if not _is_understood(model):
        return None
    fold_norms(model)
    weights, count = winograd.multiply_less(model.graph, canvas, dear=dear)
    parts = 0 if dear else strips.compute_in_strips(model.graph, canvas)
    if not weights and not parts:
        return None
    return Rewritten(model.SerializeToString(), weights, count, parts)


def _is_understood(model: ModelProto) -> bool:
    names = (name for node in model.graph.node for name in node.output)
    opset = next((each.version for each in model.opset_import if not each.domain), 0)
    return (
        opset >= _OPSET
        and not model.functions
        and not any(name.startswith((winograd.PREFIX, strips.PREFIX)) for name in names)
    )
