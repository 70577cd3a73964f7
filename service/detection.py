"""One compressed picture through the service: as a whole, or tile by tile. For every protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from service.batching import Urgency
from service.canvas import Buckets, ShortSide, Size
from service.context import Service
from service.detector import Detections
from service.errors import DeadlineExceeded
from service.imaging import Opened, held_picture
from service.record import Passage
from service.results import Selection, select
from service.tiling import MAX_VIEWS, Canvases, Plan, Tile, lay_out, merge, plan
from service.views import detect_views
from service.work import Outcome, Servable, Timing


class Answer(NamedTuple):
    """What a picture holds."""

    image: Size
    """Upright."""
    found: Detections
    """What the request asked for, in pixels of the picture."""
    timing: Timing
    canvases: int | None
    """How many the picture took; None where nobody asked for tiles."""
    passage: Passage | None = None
    """None where several canvases went together."""
    written: bytes | None = None
    """What `write` made of it. None where there is none, or where that is left to the caller."""


Write = Callable[[Answer], bytes | None]
"""From an answer to the body of a response; None: that is too much to do on the way."""


async def detect_one(
    service: Service,
    picture: bytes | memoryview,
    model: Servable,
    selection: Selection,
    limit: float,
    tile: Tile = "off",
    urgency: Urgency = Urgency.INTERACTIVE,
    write: Write | None = None,
) -> Answer:
    """Detect on a picture that holds a place in `service.pictures`, and count it.

    `limit` is when an answer is too late, on the clock of `time.monotonic`. An answer of one canvas
    is written where it arises (`Pipeline.detect_canvas` says where that is). Raises what
    `Pipeline.detect` raises; for tiles also TooLarge, or Unavailable where not all find room.
    """
    with service.metrics.picture(model) as watched:
        if tile == "off":
            answer = await _whole(service, picture, model, selection, limit, urgency, write)
        else:
            answer = await _tiled(service, picture, model, selection, limit, tile, urgency)
        watched.answered(answer.found, answer.timing, answer.image, answer.passage)
    return answer


async def _whole(
    service: Service,
    picture: bytes | memoryview,
    model: Servable,
    selection: Selection,
    limit: float,
    urgency: Urgency,
    write: Write | None = None,
) -> Answer:
    def finish(outcome: Outcome) -> Answer:
        found = select(outcome.detections, outcome.letterbox, selection)
        size = outcome.letterbox.original
        answer = Answer(size, found, outcome.timing, None, outcome.passage)
        return answer if write is None else answer._replace(written=write(answer))

    return await service.pipeline.detect(
        picture,
        model,
        score=selection.lowest_score,
        iou=selection.iou,
        deadline=limit,
        max_pixels=service.settings.max_image_pixels,
        finish=finish,
        memory=service.decode_memory,
        urgency=urgency,
    )


async def _tiled(
    service: Service,
    picture: bytes | memoryview,
    model: Servable,
    selection: Selection,
    limit: float,
    tile: Tile,
    urgency: Urgency,
) -> Answer:
    arrived, rule = time.monotonic(), model.metadata.canvas
    try:
        async with asyncio.timeout(max(0.0, limit - arrived)):
            chosen = await service.off_loop(_plan, service, picture, model, tile)
            if chosen.count == 1:
                answer = await _whole(service, picture, model, selection, limit, urgency)
                return answer._replace(canvases=1)
            service.pipeline.admit(model, limit, pictures=chosen.count, urgency=urgency)
            with service.pictures.more(chosen.count - 1):
                async with service.decoded_pictures:
                    started = time.monotonic()
                    canvases = await service.off_loop(_lay_out, service, picture, chosen, rule)
                    decode = time.monotonic() - started
                    found, timing = await _views(
                        service, canvases, model, selection, limit, urgency
                    )
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before every tile was done") from None
    service.metrics.tiles.inc(chosen.count)
    timing = timing._replace(decode=decode, queue=started - arrived + timing.queue)
    return Answer(chosen.whole.original, found, timing, chosen.count)


def _plan(service: Service, picture: bytes | memoryview, model: Servable, tile: Tile) -> Plan:
    settings = service.settings
    most = min(MAX_VIEWS, settings.max_queue_size)
    with _held(service, picture) as opened:
        return plan(opened.size, model.metadata.canvas, tile, limit=most)


def _lay_out(
    service: Service, picture: bytes | memoryview, chosen: Plan, rule: Buckets | ShortSide
) -> Canvases:
    with _held(service, picture) as opened:
        return lay_out(opened, chosen, rule)


def _held(service: Service, picture: bytes | memoryview) -> AbstractContextManager[Opened]:
    return held_picture(
        picture, memory=service.decode_memory, max_pixels=service.settings.max_image_pixels
    )


async def _views(
    service: Service,
    canvases: Canvases,
    model: Servable,
    selection: Selection,
    limit: float,
    urgency: Urgency,
) -> tuple[Detections, Timing]:
    """Every view through the pipeline, and what they give together."""
    started = time.monotonic()
    outcomes = await detect_views(
        service.pipeline,
        canvases,
        model,
        selection,
        deadline=limit,
        urgency=urgency,
        # No more at a time than of a batch's pictures: other requests come in between.
        window=service.batch_window,
    )
    seconds = time.monotonic() - started
    raw = [outcome.detections for outcome in outcomes]
    found = await service.off_loop(merge, canvases.plan, raw, selection)
    # Views take turns, so only the first one's wait is a wait of the picture.
    first = min(seconds, *(each.timing.decode + each.timing.queue for each in outcomes))
    return found, Timing(0.0, first, seconds - first)
