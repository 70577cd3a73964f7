"""Model files whose inputs have no defaults, as `export --inputs required` writes them."""

from __future__ import annotations

import onnx

from model_export.export.nms import require_inputs


def without_defaults(content: bytes) -> bytes:
    """The same model file with every input required."""
    model = onnx.load_model_from_string(content)
    require_inputs(model)
    return bytes(model.SerializeToString())
