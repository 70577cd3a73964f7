"""Batch norms inside convolutions: the same answers, and nothing folded that others read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from service.runtime.norms import fold_norms

_HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
head (float[b, 3, h, w] fine, float[b, 3, i, j] coarse INPUTS)
    => (float[b, 4, h, w] x, float[b, 4, i, j] y OUTPUTS)
{
    a = Conv <pads = [1, 1, 1, 1]> (fine, weight BIAS)
    x = BatchNormalization <epsilon = 0.001> (a, scale, shift, mean, variance)
    b = Conv <pads = [1, 1, 1, 1]> (coarse, weight BIAS)
    normed = BatchNormalization (b, shift, scale, scale, variance)
    y = Relu (normed)
}
"""


def head(*, bias: bool = False, inputs: str = "", outputs: str = "") -> ModelProto:
    """Two levels that share a convolution and have norms of their own."""
    text = _HEAD.replace("INPUTS", inputs).replace("OUTPUTS", outputs)
    model = onnx.parser.parse_model(text.replace("BIAS", ", bias" if bias else ""))
    rng = np.random.default_rng(0)
    values = {"weight": rng.normal(size=(4, 3, 3, 3)), "bias": rng.normal(size=4)}
    values |= {name: rng.normal(size=4) for name in ("scale", "shift", "mean")}
    values["variance"] = rng.uniform(0.1, 3, 4)
    for name, value in values.items():
        if name != "bias" or bias:
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto) -> list[NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    rng = np.random.default_rng(1)
    session = ort.InferenceSession(model.SerializeToString(), options)
    feeds = {name: rng.normal(size=(2, 3, 5, 7)).astype(np.float32) for name in ("fine", "coarse")}
    found: list[NDArray[np.float32]] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_shared_convolutions_take_their_own_norms(bias: bool) -> None:
    model = head(bias=bias)
    before = run(model)
    assert fold_norms(model) == 2
    assert [node.op_type for node in model.graph.node] == ["Conv", "Conv", "Relu"]
    onnx.checker.check_model(model, full_check=True)
    for mine, theirs in zip(run(model), before, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    # What nothing reads any more is gone.
    used = {name for node in model.graph.node for name in node.input}
    assert {each.name for each in model.graph.initializer} <= used
    assert fold_norms(model) == 0


def test_a_convolution_that_others_read_stays() -> None:
    model = head(outputs=", float[b, 4, h, w] a")
    before = run(model)
    assert fold_norms(model) == 1
    for mine, theirs in zip(run(model), before, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_weights_that_a_caller_may_replace_stay() -> None:
    model = head(inputs=", float[4] scale")
    # Of both norms, one has it as scale and one as shift.
    assert fold_norms(model) == 0
    model = head(inputs=", float[4] mean")
    assert fold_norms(model) == 1
    assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1
