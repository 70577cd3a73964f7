"""One ONNX session on one device: canvases in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import ArtifactError
from service.imaging.canvas import Size
from service.runtime.artifact import (
    INPUT_TYPES,
    MAX_DETECTIONS_CAP,
    OUTPUT_TYPES,
    Artifact,
    Metadata,
)

INPUTS: Final = tuple(INPUT_TYPES)
OUTPUTS: Final = tuple(OUTPUT_TYPES)
SEAM: Final = ("candidate_boxes", "candidate_scores", "candidate_labels")
"""Values between the network and non-maximum suppression, where the file can be split."""

Canvases = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""(B, H, W, 3), or B times (H, W, 3): images of one size."""


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections of one image, by falling score."""

    boxes: NDArray[np.float32]
    """(D, 4) x1, y1, x2, y2 in pixels."""
    scores: NDArray[np.float32]
    """(D,) in [0, 1]."""
    labels: NDArray[np.int64]
    """(D,) index into the class list."""

    def __len__(self) -> int:
        return len(self.scores)

    def pick(self, chosen: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Detections:
        """Return the detections at a mask, indices or a slice."""
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


class Detector:
    """A model file loaded on one device. On a CPU several threads may call it at a time."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        providers: Sequence[str | tuple[str, dict[str, str]]],
        options: ort.SessionOptions,
    ) -> None:
        """Create the session. Raises ArtifactError when onnxruntime does not take the file."""
        try:
            # Otherwise Python's wrapper would go on with the CPU where a GPU fails, at the start or
            # in the middle of serving, and say so on stdout.
            self._session = ort.InferenceSession(
                artifact.content,
                sess_options=options,
                providers=list(providers),
                enable_fallback=0,
            )
        except Exception as error:
            # onnxruntime's errors share no base class that it documents.
            raise ArtifactError(f"{artifact.path}: onnxruntime cannot load it: {error}") from error
        self.metadata: Metadata = artifact.metadata
        self._weights = artifact.weights or {}

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, first choice first."""
        return list(self._session.get_providers())

    def suited(self, *, lone: bool) -> Detector:
        """Return the detector to use for a call; `lone`: no other work is waiting."""
        return self

    def __call__(
        self,
        canvases: Canvases,
        image_sizes: NDArray[np.int64],
        *,
        score_threshold: float,
        iou_threshold: float,
        max_detections: int = MAX_DETECTIONS_CAP,
    ) -> list[Detections]:
        """Detect on canvases of images of size (B, 2); boxes in canvas pixels."""
        found = self._session.run(
            OUTPUTS,
            {
                "images": as_batch(canvases),
                "image_sizes": image_sizes,
                **thresholds(score_threshold, iou_threshold, max_detections),
                **self._weights,
            },
        )
        return by_image(found, len(canvases))

    def warm(self, canvas: Size, batch: int = 1) -> None:
        """Run once on empty canvases, so that the first request does not pay for set-up."""
        blank = np.zeros((batch, canvas.height, canvas.width, 3), dtype=np.uint8)
        sizes = np.tile(np.array([canvas], dtype=np.int64), (batch, 1))
        self(blank, sizes, score_threshold=0.5, iou_threshold=0.5)

    def prove(self, canvas: Size, batch: int = 1) -> None:
        """Run once on noise, with thresholds that keep everything, and check the detections.

        Raises ArtifactError for detections that no response can be made of.
        """
        noise = np.random.default_rng(0).integers(0, 256, (1, *canvas, 3), dtype=np.uint8)
        sizes = np.tile(np.array([canvas], dtype=np.int64), (batch, 1))
        found = self(noise.repeat(batch, axis=0), sizes, score_threshold=0.0, iou_threshold=1.0)
        for each in found:
            if problem := _problem(each, self.metadata.classes):
                raise ArtifactError(f"in a trial run, the network's {problem}")


def batch_buckets(largest: int) -> list[int]:
    """Return the batch sizes to warm up: the powers of two up to the largest, and that one.

    >>> batch_buckets(12)
    [1, 2, 4, 8, 12]
    """
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def as_batch(canvases: Canvases) -> NDArray[np.uint8]:
    """Return canvases as one array (B, H, W, 3), copied only if they are several arrays."""
    if isinstance(canvases, np.ndarray):
        return canvases
    return canvases[0][np.newaxis] if len(canvases) == 1 else np.stack(canvases)


def thresholds(score: float, iou: float, most: int) -> dict[str, NDArray[Any]]:
    """Return the file's threshold inputs by name."""
    return {
        "score_threshold": np.array([score], dtype=np.float32),
        "iou_threshold": np.array([iou], dtype=np.float32),
        "max_detections": np.array([most], dtype=np.int64),
    }


def by_image(found: Sequence[NDArray[Any]], count: int) -> list[Detections]:
    """Split the file's outputs by image."""
    index, boxes, scores, labels = found
    if count == 1:
        return [Detections(boxes, scores, labels)]
    # Sorted by image, so each image is one slice.
    edges = np.searchsorted(index, np.arange(count + 1))
    if edges[0] != 0 or edges[-1] != len(index):
        raise ArtifactError(f"image_index is {index.min()} to {index.max()} in a batch of {count}")
    return [Detections(boxes[a:b], scores[a:b], labels[a:b]) for a, b in pairwise(edges)]


def _problem(found: Detections, classes: Sequence[str]) -> str | None:
    """Return why no response can be made of detections; None if one can."""
    lengths = found.boxes.shape, found.scores.shape, found.labels.shape
    count = len(found)
    if lengths != ((count, 4), (count,), (count,)):
        return f"boxes, scores and labels are of shapes {lengths}, expected (D, 4), (D,) and (D,)"
    if not np.isfinite(found.boxes).all():
        return "boxes are not all finite"
    if not ((found.scores >= 0) & (found.scores <= 1)).all():
        return f"scores are {found.scores.min()} to {found.scores.max()}, expected 0 to 1"
    if count and not 0 <= found.labels.min() <= found.labels.max() < len(classes):
        return (
            f"labels are {found.labels.min()} to {found.labels.max()}, but the metadata names "
            f"{len(classes)} classes: 0 to {len(classes) - 1}"
        )
    return None
