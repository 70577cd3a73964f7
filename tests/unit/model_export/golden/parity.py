"""Golden detections, the network they came from, and a fair comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_export.retinanet.model import RetinaNet
from model_export.retinanet.postprocess import CandidateNetwork, suppress
from service.imaging.canvas import MULTIPLE
from service.runtime.detector import Detections
from tests.unit.model_export.golden import recipe

SCORE = 0.05
IOU = 0.5

SCORE_TOLERANCE = 1e-4
IOU_TIE = 1e-4
"""An overlap this close to the threshold may be on either side of it."""


@dataclass(frozen=True)
class Run:
    """Images of one canvas and what torchvision found on them."""

    canvases: NDArray[np.uint8]
    sizes: NDArray[np.int64]
    max_detections: int
    found: tuple[Detections, ...]


@dataclass(frozen=True)
class Golden:
    """One of torchvision's models."""

    about: dict[str, Any]
    runs: tuple[Run, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, made anew."""
        return {
            key: torch.from_numpy(np.array(recipe.tensor(key, tuple(shape))))
            for key, shape in self.about["state_dict"].items()
        }


@dataclass(frozen=True)
class Difference:
    """How far two sets of detections of one image are apart."""

    boxes: float
    """Largest difference of a corner's coordinate in canvas pixels."""
    scores: float
    pairs: int
    ties: int
    """Detections on one side only, because a comparison was too close to call."""
    unexplained: int
    """Detections on one side only, for no such reason."""


@cache
def load(name: str) -> Golden:
    """One of the files beside this one."""
    with np.load(Path(__file__).parent / f"{name}.npz") as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    return Golden(about, tuple(_runs(about["runs"], arrays)))


@torch.no_grad()
def run_network(network: RetinaNet, run: Run) -> list[Detections]:
    """What our network finds."""
    images, sizes = torch.from_numpy(run.canvases), torch.from_numpy(run.sizes)
    found = []
    for boxes, scores, labels in zip(*CandidateNetwork(network)(images, sizes), strict=True):
        kept = suppress(
            boxes,
            scores,
            labels,
            score_threshold=SCORE,
            iou_threshold=IOU,
            max_detections=run.max_detections,
        )
        found.append(Detections(boxes[kept].numpy(), scores[kept].numpy(), labels[kept].numpy()))
    return found


def compare(found: Detections, golden: Detections, *, max_detections: int) -> Difference:
    """Pair what is of one class and nearly one score by the nearest box, each once."""
    free = np.ones(len(found), dtype=bool)
    boxes = scores = 0.0
    alone = []
    for index in range(len(golden)):
        distance = np.abs(found.boxes - golden.boxes[index]).max(axis=1, initial=0.0)
        score = np.abs(found.scores - golden.scores[index])
        other = (found.labels != golden.labels[index]) | (score > 10 * SCORE_TOLERANCE)
        distance[~free | other] = np.inf
        nearest = int(distance.argmin()) if len(distance) else -1
        if nearest < 0 or distance[nearest] > 1:
            alone.append(index)
            continue
        free[nearest] = False
        boxes = max(boxes, float(distance[nearest]))
        scores = max(scores, float(score[nearest]))
    strangers = [(found, golden, index) for index in np.flatnonzero(free).tolist()]
    strangers += [(golden, found, index) for index in alone]
    ties = sum(_is_tie(*stranger, max_detections) for stranger in strangers)
    return Difference(boxes, scores, len(golden) - len(alone), ties, len(strangers) - ties)


def _is_tie(mine: Detections, other: Detections, index: int, max_detections: int) -> bool:
    """Could rounding have lost this detection of `mine` on its way to `other`?"""
    score = float(mine.scores[index])
    cut = float(other.scores[-1]) if len(other) == max_detections else SCORE
    if score < max(cut, SCORE) + SCORE_TOLERANCE:
        return True
    rivals = other.pick(other.labels == mine.labels[index])
    overlap = _overlap(mine.boxes[index], rivals.boxes)
    close = np.abs(overlap - IOU) < IOU_TIE
    equal = (overlap > IOU) & (np.abs(rivals.scores - score) < SCORE_TOLERANCE)
    return bool((close | equal).any())


def _overlap(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    near = np.maximum(others[:, :2], box[:2]).astype(np.float64)
    far = np.minimum(others[:, 2:], box[2:]).astype(np.float64)
    shared = np.clip(far - near, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return np.asarray(shared / np.maximum(areas - shared, 1e-9))


def _runs(about: list[dict[str, Any]], arrays: dict[str, NDArray[Any]]) -> Iterator[Run]:
    for number, run in enumerate(about):
        sizes = np.array(run["sizes"], dtype=np.int64)
        height, width = -(-sizes.max(axis=0) // MULTIPLE) * MULTIPLE
        canvases = np.zeros((len(sizes), height, width, 3), dtype=np.uint8)
        for index, (rows, columns) in enumerate(sizes.tolist()):
            canvases[index, :rows, :columns] = recipe.image(index, rows, columns)
        found = tuple(
            Detections(
                *(arrays[f"{number}_{index}_{part}"] for part in ("boxes", "scores", "labels"))
            )
            for index in range(len(sizes))
        )
        yield Run(canvases, sizes, run["detections"], found)
