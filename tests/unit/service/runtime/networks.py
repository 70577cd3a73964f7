"""Small networks as model files."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.parser


def model(text: str, weights: dict[str, tuple[int, ...]], *, opset: int = 18) -> bytes:
    """A network, of which `weights` says the constants' shapes; drawn so that values keep size."""
    parsed = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    dice = np.random.default_rng(len(text))
    for name, shape in weights.items():
        spread = 1.0 if len(shape) == 1 else float(np.sqrt(2 / np.prod(shape[1:])))
        drawn = dice.normal(0.0, spread, shape).astype(np.float32)
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(drawn, name))
    onnx.checker.check_model(parsed, full_check=True)
    return bytes(parsed.SerializeToString())
