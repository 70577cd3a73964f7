"""Convolutions in strips give the values of whole maps, on every canvas that is named."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from service.imaging.canvas import Size
from service.runtime import strips
from service.runtime.artifact import read_artifact, scan_repository
from service.runtime.devices import Device, fitted, open_detector, providers, session_options
from service.runtime.rewriting import rewrite
from service.settings import bundled_models
from tests.canvases import found, noise, sizes_of
from tests.unit.service.runtime.networks import model

CPU = Device("cpu")
LARGEST = Size(96, 64)
CANVASES = (LARGEST, Size(64, 96), Size(128, 32), Size(32, 96), Size(32, 32))
CHAIN = """mobile (float[n, 3, h, w] x) => (float[n, 8, a, b] y, float[n, 8, a, b] z)
    <float low = {0}, float high = {6}> {
    c0 = Conv <pads = [0, 0, 1, 1], strides = [2, 2]> (x, w0, b0)
    a0 = Clip (c0, low, high)
    c1 = Conv <pads = [1, 1, 1, 1], group = 16> (a0, w1)
    a1 = Relu (c1)
    c2 = Conv (a1, w2)
    c3 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (c2, w3)
    y = Relu (c3)
    z = Conv <pads = [1, 1, 1, 1]> (y, w4)
}"""
WEIGHTS = {
    "w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 1, 3, 3), "w2": (16, 16, 1, 1),
    "w3": (8, 16, 3, 3), "w4": (8, 8, 3, 3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def little_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for a third of the chain's largest map, which has 96 KiB."""
    monkeypatch.setattr(strips, "_CACHED", 33_000)


def in_strips(content: bytes) -> int:
    """In how many strips the first convolutions are; the values on all canvases are compared."""
    made = rewrite(content, LARGEST)
    if made is None:
        return 0
    assert made.count == 0
    onnx.checker.check_model(onnx.load_model_from_string(made.content), full_check=True)
    plain, striped = (
        ort.InferenceSession(each, session_options(CPU), providers=providers(CPU))
        for each in (content, made.content)
    )
    for height, width in CANVASES:
        x = np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32)
        for mine, theirs in zip(
            striped.run(None, {"x": x}), plain.run(None, {"x": x}), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    return made.strips


@pytest.mark.parametrize(
    ("cached", "count"),
    # More than eight would need rows beyond a canvas of 32.
    [(1_000, 8), (17_000, 6), (33_000, 3), (50_000, 2), (98_304, 0)],
)
def test_strips_give_the_values_of_whole_maps(
    cached: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_CACHED", cached)
    assert in_strips(model(CHAIN, WEIGHTS)) == count


@pytest.mark.parametrize(
    ("pads", "kernel", "stride"),
    [
        ([2, 2, 2, 2], 5, 1),
        ([3, 3, 3, 3], 7, 2),
        ([1, 0, 2, 0], 4, 1),
        ([0, 0, 0, 0], 2, 2),
        ([0, 0, 0, 0], 1, 2),
        ([1, 1, 2, 2], 5, 2),
    ],
)
def test_strips_of_any_kernel(pads: list[int], kernel: int, stride: int) -> None:
    text = f"""any (float[n, 3, h, w] x) => (float[n, 16, a, b] y) {{
        c = Conv <pads = [1, 1, 1, 1], strides = [1, 1]> (x, w0)
        y = Conv <pads = {pads}, strides = [{stride}, {stride}]> (c, w1)
    }}"""
    weights = {"w0": (4, 3, 3, 3), "w1": (16, 4, kernel, kernel)}
    assert in_strips(model(text, weights)) == 3


def test_maps_stay_whole_where_steps_are_dear() -> None:
    assert rewrite(model(CHAIN, WEIGHTS), LARGEST, dear=True) is None


def test_strips_are_written_once() -> None:
    made = rewrite(model(CHAIN, WEIGHTS), LARGEST)
    assert made is not None
    assert rewrite(made.content, LARGEST) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("z = Conv", "q = Abs (c0) z = Conv"),
        ("<pads = [1, 1, 1, 1], group = 16> (a0", "<auto_pad = 'SAME_UPPER', group = 16> (a0"),
        (
            "<pads = [1, 1, 1, 1], group = 16> (a0",
            "<pads = [2, 2, 2, 2], dilations = [2, 2], group = 16> (a0",
        ),
        ("a0 = Clip (c0, low, high)", "a0 = Sigmoid (c0)"),
    ],
    ids=["a fork", "padding by rule", "dilation", "another activation"],
)
def test_a_chain_ends_at_what_rows_do_not_pass(old: str, new: str) -> None:
    text = CHAIN.replace(old, new.replace("'", '"'))
    # One convolution is left, which has no map to keep.
    assert text != CHAIN
    assert in_strips(model(text, WEIGHTS)) == 0


# --- the bundled model ---------------------------------------------------------------------------


def test_strips_keep_detections_of_the_bundled_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    bundled = read_artifact(scan_repository(bundled_models())[0].path)
    one = replace(CPU, threads=1)
    with caplog.at_level(logging.INFO):
        made = fitted(bundled, one)
    assert "the first maps are computed in 4 strips" in caplog.text
    plain = open_detector(bundled, replace(one, winograd=False))
    striped = open_detector(made, one)
    # /v2 takes any canvas.
    for size in (*bundled.metadata.canvas.all_canvases(), Size(32, 32), Size(96, 640)):
        canvases, sizes = noise(1, 2, size), sizes_of(2, size)
        for mine, theirs in zip(
            found(striped, canvases, sizes, score=0.01),
            found(plain, canvases, sizes, score=0.01),
            strict=True,
        ):
            assert len(mine) == len(theirs)
            np.testing.assert_allclose(mine.scores, theirs.scores, rtol=0, atol=1e-5)
