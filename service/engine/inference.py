"""Run one batch of decoded images on a detector, and deliver the results."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from service.engine.work import Outcome, Work
from service.observability.record import Passage, Timing
from service.runtime.detector import Detector

_log = logging.getLogger("retinaserve.inference")
_DEVICE_ERROR: Final = re.compile(r"(CUDA|CUDNN|CUBLAS)\w* (failure|error) \d+: [^;\n/]{1,200}")


def run_batch(detector: Detector, batch: Sequence[Work], busy: Callable[[], int]) -> list[Outcome]:
    """What is found on each image; `busy` tells how many batches the device works at.

    Raises what the detector raises.
    """
    prepared = [work.prepared for work in batch if work.prepared is not None]
    assert len(prepared) == len(batch), "only decoded images reach a device"
    canvases = [each.canvas for each in prepared]
    sizes = np.array([each.letterbox.resized for each in prepared], dtype=np.int64)
    before = busy()
    started = time.monotonic()
    found = detector(
        canvases,
        sizes,
        score_threshold=min(work.score for work in batch),
        iou_threshold=batch[0].iou,
    )
    seconds = time.monotonic() - started
    # Side by side each batch takes longer; what it costs is its share of the device.
    share = seconds * 2 / (before + busy())
    batch[0].model.costs.observe(prepared[0].letterbox.canvas, len(batch), share)
    return [
        Outcome(
            detections,
            each.letterbox,
            Timing(work.decode_seconds, started - work.arrived - work.decode_seconds, seconds),
            Passage(work.arrived, work.decoding, started, len(batch)),
        )
        for work, each, detections in zip(batch, prepared, found, strict=True)
    ]


def brief(error: Exception) -> str:
    """Return what is wrong with a device, in words that any client may read.

    onnxruntime's own text also tells paths and the name of the host.

    >>> brief(RuntimeError("/src/cuda_call.cc:129 CUDA failure 700: illegal access ; GPU=0 ; ..."))
    'CUDA failure 700: illegal access'
    """
    found = _DEVICE_ERROR.search(str(error))
    return type(error).__name__ if found is None else found[0].strip()


def finished(work: Work, outcome: Outcome) -> Any:
    """What the one who waits wants of it, or the error that came of that."""
    try:
        return work.finish(outcome)
    except Exception as error:
        return error


def deliver(answers: Sequence[tuple[Work, Any]]) -> None:
    """Hand answers over to their event loop, all in one wake-up; an exception is an error."""
    loop = answers[0][0].future.get_loop()
    try:
        loop.call_soon_threadsafe(_settle, answers)
    except RuntimeError:
        # The loop is closed: the server has stopped.
        _log.debug("%d answers came after the server had stopped", len(answers))


def _settle(answers: Sequence[tuple[Work, Any]]) -> None:
    for work, answer in answers:
        if work.future.done():
            continue
        if isinstance(answer, Exception):
            work.future.set_exception(answer)
        else:
            work.future.set_result(answer)
