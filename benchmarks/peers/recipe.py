"""What every peer does with an image, so that only the serving differs.

The service's own decoding, letterbox, session options and choice of detections, in one call that
takes a JPEG and gives JSON. A peer calls it from as many threads or processes as suit it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime as ort
import orjson

from service.engine import postprocessing as results
from service.imaging.canvas import Size
from service.imaging.decode import Prepared, prepare
from service.runtime import devices
from service.runtime.artifact import MAX_DETECTIONS_CAP, read_artifact
from service.runtime.detector import INPUTS, OUTPUTS, Detections

ROUTE = "/v1/detect"


@dataclass(frozen=True)
class Choice:
    """How a peer is set up; `benchmarks/peers.py` sets the environment that it is read from."""

    model: Path
    port: int
    workers: int
    """Processes that hold a model."""
    threads: int
    """Threads of one process that answer at the same time."""
    session_threads: int
    """Threads of one onnxruntime session."""
    batch: int
    """Most images that go through the network together."""
    style: str
    """Which of several ways to write the same app, where there is more than one."""

    @classmethod
    def read(cls) -> Choice:
        """From the environment."""
        return cls(
            model=Path(os.environ["PEER_MODEL"]),
            port=int(os.environ["PEER_PORT"]),
            workers=int(os.environ["PEER_WORKERS"]),
            threads=int(os.environ["PEER_THREADS"]),
            session_threads=int(os.environ["PEER_SESSION_THREADS"]),
            batch=int(os.environ["PEER_BATCH"]),
            style=os.environ["PEER_STYLE"],
        )


class Recipe:
    """A loaded model. Any number of threads may call it."""

    def __init__(self, choice: Choice) -> None:
        artifact = read_artifact(choice.model)
        device = devices.Device("cpu")
        options = devices.session_options(device)
        options.intra_op_num_threads = choice.session_threads
        self._session = ort.InferenceSession(
            artifact.content, sess_options=options, providers=devices.providers(device)
        )
        self._metadata = artifact.metadata
        self._selection = results.resolve(artifact.metadata)
        for canvas in artifact.metadata.canvas.all_canvases():
            self._run(np.zeros((1, *canvas, 3), dtype=np.uint8), [canvas])

    def answer(self, image: bytes) -> bytes:
        """JSON for one JPEG."""
        prepared = prepare(image, self._metadata.canvas)
        found = self._run(prepared.canvas[np.newaxis], [prepared.letterbox.resized])
        return self._write(prepared, found[0])

    def answers(self, images: Sequence[bytes]) -> list[bytes]:
        """JSON for each; images on the same canvas go through the network together."""
        prepared = [prepare(image, self._metadata.canvas) for image in images]
        groups: dict[Size, list[int]] = {}
        for index, each in enumerate(prepared):
            groups.setdefault(each.letterbox.canvas, []).append(index)
        written = [b""] * len(prepared)
        for members in groups.values():
            canvases = np.stack([prepared[index].canvas for index in members])
            sizes = [prepared[index].letterbox.resized for index in members]
            for index, found in zip(members, self._run(canvases, sizes), strict=True):
                written[index] = self._write(prepared[index], found)
        return written

    def _run(self, canvases: np.ndarray, sizes: Sequence[Size]) -> list[Detections]:
        values = (
            canvases,
            np.array(sizes, dtype=np.int64),
            np.array([self._selection.lowest_score], dtype=np.float32),
            np.array([self._selection.iou], dtype=np.float32),
            np.array([MAX_DETECTIONS_CAP], dtype=np.int64),
        )
        index, boxes, scores, labels = self._session.run(
            OUTPUTS, dict(zip(INPUTS, values, strict=True))
        )
        edges = np.searchsorted(index, np.arange(len(canvases) + 1))
        return [Detections(boxes[a:b], scores[a:b], labels[a:b]) for a, b in pairwise(edges)]

    def _write(self, prepared: Prepared, raw: Detections) -> bytes:
        found = results.select(raw, prepared.letterbox, self._selection)
        return orjson.dumps(
            {
                "image": results.image(prepared.letterbox.original),
                "detections": results.native(found, self._metadata.classes),
            }
        )
