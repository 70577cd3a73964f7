"""What a network must cost at least: its arithmetic and its memory traffic, against the machine's.

The arithmetic is what convolutions and matrix products do, counted from the model file with the
shapes of a real run. The traffic is every weight read once, and each of these nodes' inputs and
outputs once: less is possible only where caches hold what one leaves for the next. The peaks are
measured on the same cores: a large matrix product by onnxruntime and by numpy, the better of both,
and copying arrays that no cache holds, one in each thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from service.runtime.devices import Device, session_options
from service.system.cpus import cpu_count

SIDE = 2048
"""Of the matrices."""
COPIED_BYTES = 256 << 20
"""By each thread; several times as much as its caches hold."""
COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FLOAT_BYTES = 4


class Demand(NamedTuple):
    """What one image asks for."""

    operations: float
    """Floating-point; a multiplication and its addition are two."""
    activation_bytes: float
    weight_bytes: float
    """Whatever the batch, these are read once."""


class Peak(NamedTuple):
    """What the machine can do."""

    operations: float
    """A second."""
    bytes: float
    """A second, read and written."""

    def seconds(self, demand: Demand, batch: int) -> tuple[float, float]:
        """The least time for a batch: by arithmetic, by memory."""
        moved = batch * demand.activation_bytes + demand.weight_bytes
        return batch * demand.operations / self.operations, moved / self.bytes


def count(content: bytes, inputs: dict[str, Any]) -> Demand:
    """The demand of an image, by a run with `inputs` of a batch of one."""
    model = onnx.load_model_from_string(content)
    nodes = [node for node in model.graph.node if node.op_type in COUNTED]
    known = {each.name: tuple(each.dims) for each in model.graph.initializer}
    wanted = {name for node in nodes for name in (*node.input, node.output[0]) if name}
    wanted -= known.keys() | inputs.keys()
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    options = session_options(Device("cpu"))
    # Fused nodes would no longer have what is asked for.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    given = {each.name for each in (*session.get_inputs(), *session.get_overridable_initializers())}
    values = session.run(names, {name: each for name, each in inputs.items() if name in given})
    shapes = known | {name: each.shape for name, each in inputs.items()}
    shapes |= {name: each.shape for name, each in zip(names, values, strict=True)}
    weights = {name for node in nodes for name in node.input if name in known}
    return Demand(
        operations=sum(_operations(node, shapes) for node in nodes),
        activation_bytes=FLOAT_BYTES
        * sum(
            math.prod(shapes[name])
            for node in nodes
            for name in (*node.input, node.output[0])
            if name and name not in known
        ),
        weight_bytes=FLOAT_BYTES * sum(math.prod(known[name]) for name in weights),
    )


def _operations(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> float:
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    made = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        # Of the weights, one filter makes one value: (out, in / groups, height, width).
        return 2.0 * made * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return 2.0 * math.prod(first) * math.prod(second[1:])
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return 2.0 * made * (first[0] if transposed else first[-1])


def measure() -> Peak:
    """The machine's peaks, with the cores that the service may use."""
    return Peak(operations=max(_matmul(_numpy()), _matmul(_onnxruntime())), bytes=_copying())


def _matmul(product: Callable[[], object]) -> float:
    return 2.0 * SIDE**3 / _best(product)


def _best(work: Callable[[], object], times: int = 7) -> float:
    """Seconds of the fastest run, after one that warms up."""
    work()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _matrices() -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    return dice.random((SIDE, SIDE), np.float32), dice.random((SIDE, SIDE), np.float32)


def _numpy() -> Callable[[], object]:
    a, b = _matrices()
    return lambda: a @ b


def _onnxruntime() -> Callable[[], object]:
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        product (float[{SIDE}, {SIDE}] a, float[{SIDE}, {SIDE}] b) => (float[{SIDE}, {SIDE}] c)
        {{ c = MatMul (a, b) }}
        """
    )
    session = ort.InferenceSession(
        model.SerializeToString(),
        session_options(Device("cpu")),
        providers=["CPUExecutionProvider"],
    )
    a, b = _matrices()
    return lambda: session.run(None, {"a": a, "b": b})


def _copying() -> float:
    threads = cpu_count()
    pairs = [(np.ones(COPIED_BYTES // 8), np.empty(COPIED_BYTES // 8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        # numpy copies without the interpreter's lock.
        seconds = _best(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return threads * 2 * COPIED_BYTES / seconds
