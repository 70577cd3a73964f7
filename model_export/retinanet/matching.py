"""Matching of anchors with objects: by fixed thresholds of IoU, or adaptively (ATSS).

A matcher of a config is one of `Matcher`; both are called with the anchors of each pyramid level,
(cells, A, 4), and an image's boxes, and give the index of each anchor's object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from torch import Tensor

from model_export.retinanet.choice import by_name

BACKGROUND: Final = -1
IGNORED: Final = -2
_AT_ONCE: Final = 128
"""Objects that are compared with all anchors together: thousands would not fit into memory."""


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) intersection over union of boxes (N, 4) and (M, 4); 0 where both are empty.

    >>> box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5.0, 5, 6, 6]]))
    tensor([[0.3333, 0.0000]])
    """
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    union = area_a[:, None] + area_b[None, :] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


def share_inside(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) share of the area of each of (N, 4) boxes that lies inside each of (M, 4) others.

    >>> share_inside(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 9, 9], [5.0, 5, 6, 6]]))
    tensor([[0.5000, 0.0000]])
    """
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    return shared / (a[:, 2:] - a[:, :2]).prod(dim=-1)[:, None]


def match(
    iou: Tensor,
    *,
    foreground: float = 0.5,
    background: float = 0.4,
    low_quality_matches: bool = True,
) -> Tensor:
    """(A,) int64: the index of each anchor's object, or BACKGROUND, or IGNORED.

    `iou` is (objects, A). An anchor takes its best object at IoU >= `foreground`, is background
    below `background` and ignored between (Focal Loss, section 4). With `low_quality_matches`
    each object also claims every anchor that shares its best IoU, if that is above 0; such an
    anchor learns its own best object, which may be another one.

    >>> match(torch.tensor([[0.6, 0.45, 0.1]]), low_quality_matches=False).tolist()
    [0, -2, -1]
    """
    objects, count = iou.shape
    if objects == 0:
        return torch.full((count,), BACKGROUND, dtype=torch.int64, device=iou.device)
    best, matched = iou.max(dim=0)
    chosen = matched.clone()
    chosen[best < foreground] = IGNORED
    chosen[best < background] = BACKGROUND
    if low_quality_matches:
        best_of_object = iou.max(dim=1, keepdim=True).values
        claimed = ((iou == best_of_object) & (best_of_object > 0)).any(dim=0)
        # As in detectron2 and torchvision, a claimed anchor learns its own best object.
        chosen[claimed] = matched[claimed]
    return chosen


def match_adaptively(levels: Sequence[Tensor], boxes: Tensor, *, cells: int = 9) -> Tensor:
    """(A,) int64: the index of each anchor's object, or BACKGROUND: ATSS (arXiv 1912.02424).

    `levels` holds the anchors (cells, A, 4) of each level, `boxes` (N, 4) the objects. Candidates
    of an object are all anchors of the `cells` cells of each level whose centres are nearest to
    its own. Those learn it whose IoU is at least the mean of the candidates' plus their standard
    deviation, and whose centre lies inside it. An object without one takes the anchor of its
    highest IoU. An anchor of several objects learns the one that it overlaps most.

    Three cells of one anchor, an object of 16 px: IoUs of 1, 1/3 and 0, their mean 0.44 plus
    their standard deviation 0.51 is 0.95.

    >>> level = torch.tensor([[[0.0, 0, 16, 16]], [[8.0, 0, 24, 16]], [[16.0, 0, 32, 16]]])
    >>> match_adaptively([level], torch.tensor([[0.0, 0, 16, 16]]), cells=3).tolist()
    [0, -1, -1]
    """
    anchors = torch.cat([level.flatten(0, 1) for level in levels])
    matched = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    most = anchors.new_zeros(len(anchors))
    for first in range(0, len(boxes), _AT_ONCE):
        part = boxes[first : first + _AT_ONCE]
        best, place = _learned(anchors, levels, part, cells).max(dim=0)
        # Of equal overlaps the first object's counts.
        better = best > most
        most = torch.where(better, best, most)
        matched = torch.where(better, place + first, matched)
    return matched


def _learned(anchors: Tensor, levels: Sequence[Tensor], boxes: Tensor, cells: int) -> Tensor:
    """(N, A) IoU of each of (N, 4) objects with the anchors that learn it, 0 with all others."""
    iou = box_iou(boxes, anchors)
    candidates = _nearest(levels, _centres(boxes), cells)
    overlaps = iou.gather(1, candidates)
    threshold = overlaps.mean(dim=1, keepdim=True) + overlaps.std(dim=1, keepdim=True)
    x, y = _centres(anchors)[candidates].unbind(dim=-1)
    inside = (
        (x > boxes[:, None, 0])
        & (x < boxes[:, None, 2])
        & (y > boxes[:, None, 1])
        & (y < boxes[:, None, 3])
    )
    chosen = inside & (overlaps >= threshold) & (overlaps > 0)
    learned = torch.zeros_like(iou).scatter(1, candidates, overlaps.where(chosen, 0.0))
    best, place = iou.max(dim=1, keepdim=True)
    missed = ~chosen.any(dim=1, keepdim=True)
    return torch.where(missed, torch.zeros_like(iou).scatter(1, place, best), learned)


def _nearest(levels: Sequence[Tensor], points: Tensor, cells: int) -> Tensor:
    """(N, C) indices of the anchors of each level's cells nearest to points (N, 2)."""
    found = []
    first = 0
    for level in levels:
        count, per_cell = level.shape[:2]
        apart = torch.cdist(points, _centres(level[:, 0]))
        nearest = apart.topk(min(cells, count), dim=1, largest=False).indices
        own = torch.arange(per_cell, device=level.device)
        found.append((first + nearest[:, :, None] * per_cell + own).flatten(1))
        first += count * per_cell
    return torch.cat(found, dim=1)


def _centres(boxes: Tensor) -> Tensor:
    """(N, 2) x, y of boxes (N, 4)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


class _Matcher(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class IouMatcher(_Matcher):
    """Fixed thresholds of IoU, as in the paper."""

    name: Literal["iou"] = "iou"
    foreground: float = Field(default=0.5, gt=0, le=1)
    background: float = Field(default=0.4, ge=0, le=1)
    low_quality_matches: bool = True
    """Every object also claims its best anchor; without it small objects may learn nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.background > self.foreground:
            raise ValueError(
                f"background {self.background} must not be above foreground {self.foreground}"
            )
        return self

    def __call__(self, levels: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """(A,) targets of anchors [(cells, A, 4)] for boxes (N, 4); see `match`."""
        anchors = torch.cat([level.flatten(0, 1) for level in levels])
        return match(
            torch.cat([box_iou(part, anchors) for part in torch.split(boxes, _AT_ONCE)]),
            foreground=self.foreground,
            background=self.background,
            low_quality_matches=self.low_quality_matches,
        )


class AtssMatcher(_Matcher):
    """Thresholds that follow from each object's own candidates."""

    name: Literal["atss"] = "atss"
    cells: int = Field(default=9, ge=1)
    """Cells of each level whose anchors are candidates."""

    def __call__(self, levels: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """(A,) targets of anchors [(cells, A, 4)] for boxes (N, 4); see `match_adaptively`."""
        return match_adaptively(levels, boxes, cells=self.cells)


Matcher = Annotated[
    Annotated[IouMatcher, Tag("iou")] | Annotated[AtssMatcher, Tag("atss")],
    by_name("iou", "atss"),
]
