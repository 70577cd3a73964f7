"""What Winograd's transforms cost on this machine, measured once: see `service/winograd.py`.

Where vectors are wider than those the costs were measured with, or memory slower, a direct
convolution gains more than the transforms do, and convolutions of few channels are better left as
they are. A small tower of convolutions, plain and rewritten, shows it in some hundredths of a
second.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from service import winograd
from service.canvas import Size

_log = logging.getLogger("retinaserve.winograd")

_CHANNELS: Final = 64
_DEPTH: Final = 3
_MAP: Final = Size(32, 48)
_TURNS: Final = 5
"""The fastest of each counts: something else may keep the machine busy."""
_BOUNDS: Final = (0.5, 4.0)
"""Nothing outside was ever seen on a machine at rest."""


@cache
def measured_price() -> float:
    """What the transforms cost beside what they are reckoned with; 1 is as much."""
    content = _tower()
    # Free transforms are worth it everywhere.
    rewritten = winograd.rewrite(content, _MAP, lambda: 0.0)
    assert rewritten is not None
    pixels = np.ones((1, _CHANNELS, *_MAP), np.float32)
    plain, tiled = _session(content), _session(rewritten.content)
    direct = transformed = float("inf")
    for _ in range(_TURNS):
        direct = min(direct, _seconds(plain, {"x": pixels}))
        transformed = min(transformed, _seconds(tiled, {"x": pixels, **rewritten.weights}))
    cost = winograd.cost_of(_CHANNELS, _CHANNELS, _MAP.area)
    ratio = transformed / direct
    price = min(
        max((ratio * cost.direct - cost.products) / cost.transforms, _BOUNDS[0]), _BOUNDS[1]
    )
    _log.info(
        "convolutions of %d channels in tiles take %.2f of the time, the transforms %.2f of "
        "what they were reckoned with",
        _CHANNELS,
        ratio,
        price,
    )
    return price


def _tower() -> bytes:
    dice = np.random.default_rng(0)
    shape = (_CHANNELS, _CHANNELS, 3, 3)
    weights = dice.normal(0.0, 1 / (3 * _CHANNELS**0.5), shape).astype(np.float32)
    names = ["x", *(f"y{place}" for place in range(_DEPTH))]
    nodes = []
    for source, target in pairwise(names):
        nodes.append(helper.make_node("Conv", [source, "w", "b"], [target + "a"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [target + "a"], [target]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _CHANNELS, "height", "width"])
        for name in (names[0], names[-1])
    ]
    constants = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.zeros(_CHANNELS, np.float32), "b"),
    ]
    graph = helper.make_graph(nodes, "tower", values[:1], values[1:], constants)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opsets)
    return bytes(model.SerializeToString())


def _session(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_mem_reuse = False
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _seconds(session: ort.InferenceSession, values: dict[str, Any]) -> float:
    # Of this thread alone: while a server starts, others want the core and the interpreter's lock.
    started = time.thread_time()
    session.run(None, values)
    return time.thread_time() - started
