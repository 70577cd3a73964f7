"""Verification of a model file against its network, alone and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from model_export.retinanet.matching import box_iou
from model_export.retinanet.model import RetinaNet
from model_export.retinanet.postprocess import CandidateNetwork, suppress
from service.errors import RetinaserveError
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.decode import Prepared, prepare
from service.runtime.detector import Detections, Detector

SCORE: Final = 0.05
IOU: Final = 0.5
MAX_DETECTIONS: Final = 300
BATCH_SIZES: Final = (1, 2, 5)

BOX_TOLERANCE: Final = 0.5
"""Canvas pixels."""
SCORE_TOLERANCE: Final = 1e-3
NEAR: Final = 1e-3
"""A score this close to the threshold, or an overlap this close to NMS's, may go either way."""


class VerificationError(RetinaserveError):
    """The written file does not agree with the network it was written from."""

    title = "Verification failed"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two sets of detections of the same images are apart."""

    boxes: float
    """Largest difference of a corner's coordinate in canvas pixels."""
    scores: float
    """Largest difference of a score."""
    detections: int
    """Pairs that were compared."""
    unpaired: int
    """Detections without a counterpart that rounding alone would not have lost."""

    def __or__(self, other: Difference) -> Difference:
        return Difference(
            boxes=max(self.boxes, other.boxes),
            scores=max(self.scores, other.scores),
            detections=self.detections + other.detections,
            unpaired=self.unpaired + other.unpaired,
        )

    @property
    def agrees(self) -> bool:
        """Within the promised tolerance; one detection in a thousand may be lost."""
        return (
            self.boxes <= BOX_TOLERANCE
            and self.scores <= SCORE_TOLERANCE
            and self.unpaired <= self.detections / 1000
        )

    def __str__(self) -> str:
        return (
            f"{self.detections} detections, boxes within {self.boxes:.2g} px, "
            f"scores within {self.scores:.2g}, {self.unpaired} without counterpart"
        )


NO_DIFFERENCE: Final = Difference(boxes=0.0, scores=0.0, detections=0, unpaired=0)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`."""

    against: Difference
    """The file against what it was written from."""
    in_company: Difference
    canvases: tuple[Size, ...]
    images: int
    origin: str = "torch"
    """The source of the file."""

    def __str__(self) -> str:
        canvases = ", ".join(f"{c.height}x{c.width}" for c in self.canvases)
        if not self.against.detections:
            return (
                f"nothing to verify by: on {self.images} images, canvases {canvases}, "
                f"neither file nor {self.origin} found anything above score {SCORE}; "
                "is it trained?"
            )
        return (
            f"verified on {self.images} images, canvases {canvases}, "
            f"batches of {', '.join(map(str, BATCH_SIZES))}\n"
            f"  {f'file against {self.origin}:':<27} {self.against}\n"
            f"  in a batch against alone:   {self.in_company}"
        )


def verify(
    network: RetinaNet,
    detector: Detector,
    images: Sequence[bytes],
    rule: Buckets | ShortSide,
) -> Report:
    """Compare file and network on compressed images, over canvases and batch sizes.

    Every image is tried on every canvas of the rule, so that padding is tried as well.
    Raises VerificationError when they differ by more than the contract allows.
    """
    reference = CandidateNetwork(network.eval())
    report = _compare_all(
        detector, lambda prepared: _run_torch(reference, prepared), images, rule, origin="torch"
    )
    if not (report.against.agrees and report.in_company.agrees):
        raise VerificationError(f"the file does not do what the network does: {report}")
    return report


def verify_reduced(
    full: Detector, reduced: Detector, images: Sequence[bytes], rule: Buckets | ShortSide
) -> Report:
    """Compare a file of smaller precision with the float32 file that it was written from.

    How far the two may differ, AP must say; company must not matter to it either.
    Raises VerificationError when it does, or when the file finds nothing where the other does.
    """
    report = _compare_all(
        reduced, lambda prepared: _run(full, [prepared])[0], images, rule, origin="fp32"
    )
    if not report.in_company.agrees:
        raise VerificationError(f"the file's answer depends on an image's company: {report}")
    if report.against.unpaired > report.against.detections:
        raise VerificationError(
            f"the file finds other things than the float32 file; keep --precision fp32: {report}"
        )
    return report


def _compare_all(
    detector: Detector,
    origin_of: Callable[[Prepared], Detections],
    images: Sequence[bytes],
    rule: Buckets | ShortSide,
    *,
    origin: str,
) -> Report:
    rules: list[Buckets | ShortSide] = [Buckets(sizes=(size,)) for size in rule.all_canvases()]
    rules = rules or [rule]
    against = in_company = NO_DIFFERENCE
    canvases: dict[Size, None] = {}
    for one in rules:
        groups: dict[Size, list[Prepared]] = {}
        for image in images:
            prepared = prepare(image, one)
            groups.setdefault(prepared.letterbox.canvas, []).append(prepared)
        for size, group in groups.items():
            canvases[size] = None
            alone = [_run(detector, [prepared])[0] for prepared in group]
            for found, prepared in zip(alone, group, strict=True):
                against |= compare(found, origin_of(prepared))
            in_company |= _compare_company(detector, group, alone)
    return Report(against, in_company, tuple(canvases), len(images), origin)


def _compare_company(
    detector: Detector, group: Sequence[Prepared], alone: Sequence[Detections]
) -> Difference:
    difference = NO_DIFFERENCE
    for batch in BATCH_SIZES:
        for first in range(0, len(group) - batch + 1, batch):
            together = _run(detector, group[first : first + batch])
            for a, b in zip(together, alone[first : first + batch], strict=True):
                difference |= compare(a, b)
    return difference


def compare(a: Detections, b: Detections) -> Difference:
    """Pair each detection with the unused one of its class whose box is nearest."""
    free = np.ones(len(b), dtype=bool)
    alone = np.zeros(len(a), dtype=bool)
    boxes = scores = 0.0
    for index, (box, score, label) in enumerate(zip(a.boxes, a.scores, a.labels, strict=True)):
        distance = np.abs(b.boxes - box).max(axis=1, initial=0.0)
        distance[~free | (b.labels != label)] = np.inf
        nearest = int(distance.argmin()) if len(distance) else -1
        # Ten times the tolerance: farther apart they are different detections, not a difference.
        if nearest < 0 or distance[nearest] > 10 * BOX_TOLERANCE:
            alone[index] = True
            continue
        free[nearest] = False
        boxes = max(boxes, float(distance[nearest]))
        scores = max(scores, abs(float(b.scores[nearest]) - float(score)))
    only_a, only_b = _above_the_cut(a.pick(alone), b), _above_the_cut(b.pick(free), a)
    tied_a, tied_b = _tied(only_a, b), _tied(only_b, a)
    lost = (~tied_a & ~_let_in_by(only_b.pick(tied_b), only_a)).sum()
    lost += (~tied_b & ~_let_in_by(only_a.pick(tied_a), only_b)).sum()
    return Difference(
        boxes=boxes, scores=scores, detections=len(a) - int(alone.sum()), unpaired=int(lost)
    )


def _above_the_cut(alone: Detections, other: Detections) -> Detections:
    """Return the detections above the score at which the other list may have been cut."""
    full = len(other) >= MAX_DETECTIONS
    cut = max(SCORE, float(other.scores[-1])) if full else SCORE
    return alone.pick(alone.scores > cut + NEAR)


def _tied(alone: Detections, other: Detections) -> NDArray[np.bool_]:
    """Return whether the other list has a box whose overlap is within `NEAR` of NMS's threshold."""
    close = np.abs(_overlaps(alone, other) - IOU) < NEAR
    return np.asarray(close.any(axis=1))


def _let_in_by(missing: Detections, alone: Detections) -> NDArray[np.bool_]:
    """Return whether one of the boxes that the list misses suppresses the detection."""
    return np.asarray((_overlaps(alone, missing) > IOU).any(axis=1))


def _overlaps(a: Detections, b: Detections) -> NDArray[np.float32]:
    """(A, B) IoU, 0 between classes."""
    overlap: NDArray[np.float32] = box_iou(
        torch.from_numpy(a.boxes), torch.from_numpy(b.boxes)
    ).numpy()
    return np.where(a.labels[:, None] == b.labels, overlap, np.float32(0))


def _run(detector: Detector, batch: Sequence[Prepared]) -> list[Detections]:
    return detector(
        np.stack([prepared.canvas for prepared in batch]),
        _sizes(batch),
        score_threshold=SCORE,
        iou_threshold=IOU,
        max_detections=MAX_DETECTIONS,
    )


@torch.no_grad()
def _run_torch(reference: CandidateNetwork, prepared: Prepared) -> Detections:
    images = torch.from_numpy(prepared.canvas[None])
    boxes, scores, labels = (
        part[0] for part in reference(images, torch.from_numpy(_sizes([prepared])))
    )
    kept = suppress(
        boxes,
        scores,
        labels,
        score_threshold=SCORE,
        iou_threshold=IOU,
        max_detections=MAX_DETECTIONS,
    )
    return Detections(boxes[kept].numpy(), scores[kept].numpy(), labels[kept].numpy())


def _sizes(batch: Iterable[Prepared]) -> NDArray[np.int64]:
    return np.array([tuple(prepared.letterbox.resized) for prepared in batch], dtype=np.int64)
