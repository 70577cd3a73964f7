"""A file of required inputs under OpenVINO, which makes constants of inputs with a default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino
import pytest
from numpy.typing import NDArray

from model_export.export.verify import compare
from service.imaging.canvas import Buckets
from service.imaging.decode import Prepared, prepare
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import read_artifact, scan_repository
from service.runtime.detector import INPUTS, OUTPUTS, by_image, thresholds
from service.settings import bundled_models
from tests.images import encoded
from tests.required_inputs import without_defaults
from tests.unit.model_export.random_model import RandomModel

Run = Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]


@pytest.fixture(scope="module", params=["fresh", "bundled"])
def file(
    request: pytest.FixtureRequest, exported: RandomModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = exported.path if request.param == "fresh" else scan_repository(bundled_models())[0].path
    required = tmp_path_factory.mktemp("required") / "model.onnx"
    required.write_bytes(without_defaults(path.read_bytes()))
    return required


@pytest.fixture(scope="module")
def prepared(file: Path) -> list[Prepared]:
    """Images on one canvas: padded at the right, padded below, and filling it."""
    canvas = Buckets(sizes=tuple(read_artifact(file).metadata.canvas.all_canvases())[:1])
    return [
        prepare(encoded(draw_smear(seed, width=width, height=height)[0]), canvas)
        for seed, (width, height) in enumerate([(500, 460), (608, 300), (640, 480)])
    ]


@pytest.fixture(scope="module")
def run_onnxruntime(file: Path) -> Run:
    cpu = devices.Device("cpu")
    session = ort.InferenceSession(file, devices.session_options(cpu), devices.providers(cpu))
    return lambda inputs: list(session.run(OUTPUTS, inputs))


@pytest.fixture(scope="module")
def run_openvino(file: Path) -> Run:
    model = openvino.Core().compile_model(
        file, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    assert [each.get_any_name() for each in model.inputs] == list(INPUTS)

    def run(inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found = model(inputs)
        return [found[name] for name in OUTPUTS]

    return run


@pytest.mark.parametrize(("score", "iou", "most"), [(0.2, 0.3, 1000), (0.1, 0.6, 7), (1.0, 0.5, 9)])
@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 2]], ids=["right", "below", "batch"])
def test_openvino_detects_what_onnxruntime_detects(
    run_onnxruntime: Run,
    run_openvino: Run,
    prepared: list[Prepared],
    chosen: list[int],
    score: float,
    iou: float,
    most: int,
) -> None:
    inputs: dict[str, NDArray[Any]] = {
        "images": np.stack([prepared[i].canvas for i in chosen]),
        "image_sizes": np.array([prepared[i].letterbox.resized for i in chosen]),
        **thresholds(score, iou, most),
    }
    expected, found = (
        by_image(run(inputs), len(chosen)) for run in (run_onnxruntime, run_openvino)
    )
    for one, other in zip(expected, found, strict=True):
        assert len(one) == len(other)
        assert len(one) > 0 or score == 1.0, "the case says something"
        difference = compare(one, other)
        assert difference.boxes <= 0.01
        assert difference.scores <= 1e-5
        assert (difference.detections, difference.unpaired) == (len(one), 0)


def test_openvino_masks_padding(run_openvino: Run, prepared: list[Prepared]) -> None:
    canvas = prepared[0].canvas[np.newaxis]
    inside, whole = (
        run_openvino({"images": canvas, "image_sizes": sizes, **thresholds(0.2, 0.5, 300)})
        for sizes in (np.array([prepared[0].letterbox.resized]), np.zeros((1, 2), np.int64))
    )
    assert not np.array_equal(inside[2], whole[2])
