"""Large images with small objects: overlapping tiles, a canvas for each, one answer for all.

An image that must shrink a lot to fit its canvas loses its small objects. Cut into tiles that keep
its resolution it does not, but the tiles' borders cut objects. Three rules put that right:

- Tiles overlap, so what is smaller than the overlap lies in some tile whole. A box at an inner
  border is dropped where another tile sees the same place cut on fewer sides.
- The whole image is one more view, for objects larger than the overlap. Of its boxes those are
  dropped that some tile sees uncut, at its finer resolution.
- A box that is still cut yields to a larger one of its class that covers most of it.

What is left goes through class-wise NMS. Coordinates are pixels of the original image, upright.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.engine.batch_queue import Urgency
from service.engine.pipeline import Pipeline
from service.engine.postprocessing import Selection, select
from service.engine.prediction import Booking
from service.engine.work import Outcome, Servable, as_it_is
from service.errors import InvalidParameter, TooLarge, shown
from service.imaging.canvas import Buckets, Letterbox, ShortSide, Size
from service.imaging.decode import Opened, Prepared, cut
from service.runtime.artifact import MAX_DETECTIONS_CAP
from service.runtime.detector import Detections

Tile = Literal["off", "auto"] | int
"""off: one canvas; auto: tiles of the canvas's own size, where they gain something; a number: the
longer side of a tile in pixels of the image, scaled onto the canvas."""

MIN_TILE: Final = 32
MAX_TILE: Final = 65535
"""No accepted image format has a longer side."""
MAX_VIEWS: Final = 128
"""Canvases that the service gives to one image: a 4K frame takes 49 of 480 x 640."""

OVERLAP: Final = 0.25
"""Least share of a tile's side that it has in common with the next tile."""
_WORTH: Final = 2.0
"""auto tiles images that would shrink to less than one half: a detector that learned from
images of varied scale loses little up to there, and tiles cost at least five times as much."""
_MARGIN: Final = 8.0
"""A box that ends within this many canvas pixels of an inner border is taken to be cut by it: one
step of the finest pyramid level, about as exact as boxes are."""
_UNSEEN: Final = 5
"""More sides than a box can be cut on."""
_COVERED: Final = 0.5
"""A cut box is a part of a larger one that has more than this share of it ..."""
_CREDIBLE: Final = 0.5
"""... and at least this share of its score, so that no faint box erases a clear one."""
_CANDIDATES: Final = 5 * MAX_DETECTIONS_CAP
"""Best boxes that NMS looks at. Each view had its own NMS, and a place is seen by at most four
tiles and the whole image, so this many hold all that an answer may have."""
_CHUNK: Final = 256

_Boxes = NDArray[np.float64]
_Mask = NDArray[np.bool_]


class View(NamedTuple):
    """A part of the image on its canvas."""

    corner: tuple[int, int]
    """x, y of its top-left pixel in the image."""
    letterbox: Letterbox
    """`original` is the size of the part."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an image is looked at: whole, and tile by tile. Made by `plan`."""

    whole: Letterbox
    tile: Letterbox
    """All tiles are alike, so they share batches. Without tiles it is `whole`."""
    tiled: bool

    @property
    def count(self) -> int:
        """Views; 1 when the image goes onto one canvas as a whole."""
        if not self.tiled:
            return 1
        image, tile = self.whole.original, self.tile.original
        return _number(image.height, tile.height) * _number(image.width, tile.width) + 1

    @property
    def columns(self) -> tuple[int, ...]:
        """x of each column of tiles."""
        return starts(self.whole.original.width, self.tile.original.width) if self.tiled else ()

    @property
    def rows(self) -> tuple[int, ...]:
        """y of each row of tiles."""
        return starts(self.whole.original.height, self.tile.original.height) if self.tiled else ()

    @property
    def views(self) -> tuple[View, ...]:
        """The tiles row by row, then the whole image."""
        tiles = [View((x, y), self.tile) for y in self.rows for x in self.columns]
        return (*tiles, View((0, 0), self.whole))


@dataclass(frozen=True, slots=True)
class Canvases:
    """A decoded image, laid out by a plan. Made by `lay_out`."""

    plan: Plan
    makers: tuple[Callable[[], Prepared], ...]
    """One for each view; they may run in any thread, each when its canvas is needed."""


def parse_tile(text: object) -> Tile:
    """What a user wrote. Raises InvalidParameter."""
    if text in ("off", "auto"):
        return "off" if text == "off" else "auto"
    written = str(text)
    plain = written.isascii() and written.isdecimal() and len(written) <= len(str(MAX_TILE))
    if not (plain and MIN_TILE <= int(written) <= MAX_TILE):
        raise InvalidParameter(
            f"tile={shown(text)} is neither off nor auto nor the longer side of a tile in pixels, "
            f"{MIN_TILE} to {MAX_TILE}"
        )
    return int(written)


def plan(image: Size, rule: Buckets | ShortSide, tile: Tile, *, limit: int | None = None) -> Plan:
    """Decide on the views of an image, from its size alone.

    Raises TooLarge where there would be more than `limit` of them.
    """
    whole = rule.fit(image)
    alone = Plan(whole, whole, tiled=False)
    if tile == "off":
        return alone
    if tile == "auto":
        shrinks = max(image.height / whole.resized.height, image.width / whole.resized.width)
        if shrinks <= _WORTH:
            return alone
    chosen = _grid(image, rule, tile, whole)
    if limit is not None and chosen.count > limit:
        raise TooLarge(
            f"an image of {image.width} x {image.height} pixels takes {chosen.count} canvases "
            f"with tile={tile}; at most {limit} are accepted: send a smaller image"
            f"{_remedy(image, rule, whole, limit)}"
        )
    return chosen


def _remedy(image: Size, rule: Buckets | ShortSide, whole: Letterbox, limit: int) -> str:
    """Names a tile with which there are at most `limit` canvases, if there is one."""
    sides = range(max(max(each.resized) for each in rule.tiles()), MAX_TILE + 1, 32)

    def fits(side: int) -> bool:
        return _grid(image, rule, side, whole).count <= limit

    found = bisect_left(sides, True, key=fits)
    return f", or tile={sides[found]}" if found < len(sides) else ""


def _grid(image: Size, rule: Buckets | ShortSide, tile: int | str, whole: Letterbox) -> Plan:
    """The grid with fewest tiles; the earlier canvas wins a tie."""
    grids = [
        Plan(
            whole,
            _clipped(full if isinstance(tile, str) else _scaled(full, tile), image),
            tiled=True,
        )
        for full in rule.tiles()
    ]
    best = min(grids, key=attrgetter("count"))
    # One tile that holds the image is the whole image once more.
    return Plan(whole, whole, tiled=False) if best.count == 2 else best


def starts(side: int, tile: int) -> tuple[int, ...]:
    """Where tiles of length `tile` begin so that they cover `side`, spread evenly.

    Neighbours share at least OVERLAP of a tile.

    >>> starts(1000, 400)
    (0, 300, 600)
    """
    steps = _number(side, tile) - 1
    return tuple(i * (side - tile) // max(steps, 1) for i in range(steps + 1))


def _number(side: int, tile: int) -> int:
    """How many tiles of length `tile` cover `side`."""
    if side <= tile:
        return 1
    stride = max(1, int(tile * (1 - OVERLAP)))
    return 1 - ((tile - side) // stride)


def _scaled(full: Letterbox, longer: int) -> Letterbox:
    """A tile whose longer side is `longer` pixels of the image."""
    height, width = full.resized
    scale = longer / max(height, width)
    original = Size(max(1, round(height * scale)), max(1, round(width * scale)))
    return replace(full, original=original)


def _clipped(tile: Letterbox, image: Size) -> Letterbox:
    """A tile that is no larger than the image; its scale and its canvas stay."""
    x, y = tile.ratios
    original = Size(min(tile.original.height, image.height), min(tile.original.width, image.width))
    resized = Size(max(1, round(original.height * y)), max(1, round(original.width * x)))
    return replace(tile, original=original, resized=resized)


def lay_out(opened: Opened, chosen: Plan, rule: Buckets | ShortSide) -> Canvases:
    """Decode an image, once, for all of its views. Raises MalformedImage.

    Where there are tiles the image stays in memory as long as the result does, at 4 bytes a
    pixel.
    """
    if chosen.count == 1:
        prepared = opened.prepare(rule)
        return Canvases(chosen, (lambda: prepared,))
    image = opened.decode()
    return Canvases(
        chosen, tuple(partial(cut, image, view.corner, view.letterbox) for view in chosen.views)
    )


def merge(chosen: Plan, found: Sequence[Detections], selection: Selection) -> Detections:
    """One answer out of what the detector found on each view, in canvas pixels.

    Score filter and classes in each view, then the views together, then the cut: a request's
    answer does not depend on the score that the graph was run with.
    """
    if chosen.count == 1:
        return select(found[0], chosen.whole, selection)
    everything = replace(selection, max_detections=MAX_DETECTIONS_CAP)
    views = chosen.views
    parts = [
        select(raw, view.letterbox, everything) for raw, view in zip(found, views, strict=True)
    ]
    view = np.repeat(np.arange(len(views)), [len(part) for part in parts])
    corners = np.array([each.corner * 2 for each in views], dtype=np.float32)
    together = Detections(
        np.concatenate([part.boxes for part in parts]) + corners[view],
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
    best, cut = believed(chosen, together.boxes.astype(np.float64), view)
    order = np.argsort(-together.scores, kind="stable")
    order = order[best[order]][:_CANDIDATES]
    together, cut = together.pick(order), cut[order]
    parted = fragments(together, cut)
    together = together.pick(~parted)
    return together.pick(nms(together, selection.iou, limit=selection.max_when_tiled))


def believed(chosen: Plan, boxes: _Boxes, view: NDArray[np.int64]) -> tuple[_Mask, _Mask]:
    """Which (D, 4) boxes no other view sees better, and which are cut by a border: (D,), (D,).

    `view` (D,) says which view each box comes from.
    """
    tiles = chosen.count - 1
    from_tile = view < tiles
    row, column = np.divmod(np.minimum(view, tiles - 1), len(chosen.columns))
    ratios, (height, width) = chosen.tile.ratios, chosen.whole.original
    sides, least = np.zeros(len(boxes), dtype=np.int64), np.zeros(len(boxes), dtype=np.int64)
    for axis, begins, own, side in (
        (0, chosen.columns, column, width),
        (1, chosen.rows, row, height),
    ):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        length = chosen.tile.original[1 - axis]
        margin = _MARGIN / ratios[axis]
        sides += _cuts(low, high, np.array(begins)[own], length, side, margin)
        fewest = np.full(len(boxes), _UNSEEN, dtype=np.int64)
        for begin in begins:
            fewest = np.minimum(fewest, _cuts(low, high, begin, length, side, margin))
        least += fewest
    return np.where(from_tile, sides <= least, least > 0), from_tile & (sides > 0)


def _cuts(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    begin: NDArray[np.int64] | int,
    length: int,
    side: int,
    margin: float,
) -> NDArray[np.int64]:
    """How many inner borders of a tile each interval ends at; _UNSEEN where it sticks out."""
    end = begin + length
    at_begin = (low < begin + margin) & (np.asarray(begin) > 0)
    at_end = (high > end - margin) & (np.asarray(end) < side)
    outside = (low < begin) | (high > end)
    cuts: NDArray[np.int64] = np.where(outside, _UNSEEN, at_begin.astype(np.int64) + at_end)
    return cuts


def fragments(found: Detections, cut: _Mask) -> _Mask:
    """(D,) which of the `cut` boxes are parts of a larger box of their class.

    By the share of the smaller box, not by IoU, which is low between a part and its whole. Only
    for boxes that a border is known to cut: small objects do lie on larger ones of their class.
    """
    boxes, parted = found.boxes.astype(np.float64), np.zeros(len(found), dtype=bool)
    areas, scores = _areas(boxes), found.scores.astype(np.float64)
    which = np.flatnonzero(cut)
    for chunk in (which[i : i + _CHUNK] for i in range(0, len(which), _CHUNK)):
        whole = (
            (found.labels[chunk, None] == found.labels)
            & (areas[chunk, None] < areas)
            & (scores >= _CREDIBLE * scores[chunk, None])
            & (_shared(boxes[chunk], boxes) > _COVERED * areas[chunk, None])
        )
        parted[chunk] = whole.any(axis=1)
    return parted


def nms(found: Detections, iou: float, *, limit: int) -> NDArray[np.int64]:
    """Indices of the best `limit` boxes, none overlapping a better one of its class above `iou`.

    In falling score, the earlier first on ties; strictly above, as in the model file.
    """
    boxes = found.boxes.astype(np.float64)
    areas = _areas(boxes)
    left = np.argsort(-found.scores, kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) < limit:
        best, left = left[0], left[1:]
        kept.append(int(best))
        shared = _shared(boxes[best, None], boxes[left])[0]
        apart = shared <= iou * (areas[best] + areas[left] - shared)
        left = left[apart | (found.labels[left] != found.labels[best])]
    return np.array(kept, dtype=np.int64)


def _areas(boxes: _Boxes) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return areas


def _shared(one: _Boxes, other: _Boxes) -> NDArray[np.float64]:
    """(M, N) area of the intersection of each of (M, 4) with each of (N, 4) boxes."""
    near = np.maximum(one[:, None, :2], other[None, :, :2])
    far = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared: NDArray[np.float64] = np.clip(far - near, 0, None).prod(axis=2)
    return shared


async def detect_views(
    pipeline: Pipeline,
    canvases: Canvases,
    model: Servable,
    selection: Selection,
    *,
    deadline: float,
    urgency: Urgency,
    window: int,
    booking: Booking | None = None,
) -> list[Outcome]:
    """What each view gives, in their order; at most `window` are in the pipeline at a time.

    A `booking` gets smaller as views are done.

    A request must have been let in before. Raises what `Pipeline.detect_canvas` raises.
    """
    room = asyncio.Semaphore(window)
    views = canvases.plan.views
    share = 0.0 if booking is None else booking.device / len(views)

    async def one(make: Callable[[], Prepared], placed: Letterbox) -> Outcome:
        async with room:
            outcome = await pipeline.detect_canvas(
                make,
                model,
                score=selection.lowest_score,
                iou=selection.iou,
                deadline=deadline,
                finish=as_it_is,
                urgency=urgency,
                estimate=pipeline.estimate("tile", placed.original.area, placed.canvas),
            )
        if booking is not None:
            booking.device -= share
        return outcome

    return await _all(
        [one(make, view.letterbox) for make, view in zip(canvases.makers, views, strict=True)]
    )


async def _all(jobs: Sequence[Coroutine[None, None, Outcome]]) -> list[Outcome]:
    """Every outcome in order; the first failure ends the other jobs and is raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
