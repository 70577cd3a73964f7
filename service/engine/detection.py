"""One compressed image through the service: as a whole, or tile by tile. For every protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Final, Literal, NamedTuple

from service.engine.batch_queue import Urgency
from service.engine.drawing import draw, encode
from service.engine.pipeline import look_at
from service.engine.postprocessing import Selection, select
from service.engine.prediction import Booking, Price
from service.engine.service import Service
from service.engine.tile_views import detect_views
from service.engine.tiling import MAX_VIEWS, Canvases, Plan, Tile, lay_out, merge, plan
from service.engine.work import NOTHING_KNOWN, Estimate, Outcome, Servable
from service.errors import DeadlineExceeded
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.decode import Opened, held_image
from service.imaging.header import Header
from service.observability.record import Passage, Timing
from service.runtime.detector import Detections

ImageType = Literal["image/jpeg", "image/png"]
_DRAWN_BYTES: Final = 8
"""Of a pixel: the file that a drawn image becomes, and its copies."""


class Answer(NamedTuple):
    """What an image holds."""

    image: Size
    """Upright."""
    found: Detections
    """What the request asked for, in pixels of the image."""
    timing: Timing
    canvases: int | None
    """How many the image took; None where nobody asked for tiles."""
    passage: Passage | None = None
    """None where several canvases went together."""
    written: bytes | None = None
    """What `write` made of it. None where there is none, or where that is left to the caller."""


Write = Callable[[Answer], bytes | None]
"""From an answer to the body of a response; None: that is too much to do on the way."""


async def detect_one(
    service: Service,
    image: bytes | memoryview,
    model: Servable,
    selection: Selection,
    limit: float,
    tile: Tile = "off",
    urgency: Urgency = Urgency.INTERACTIVE,
    write: Write | None = None,
    draw_as: ImageType | None = None,
    estimate: Estimate | None = None,
) -> Answer:
    """Detect on an image that holds a place in `service.images`, and count it.

    `limit` is when an answer is too late, on the clock of `time.monotonic`. An answer of one canvas
    is written where it arises (`Pipeline.detect_canvas` says where that is); with `draw_as`, what
    is written is the image with the boxes drawn. With an `estimate` the image has been let in
    already. Raises what `Pipeline.detect` raises; for tiles also TooLarge.
    """
    request = _Request(service, image, model, selection, limit, urgency, draw_as, estimate)
    with service.metrics.image(model) as watched:
        answer = await (_whole(request, write) if tile == "off" else _tiled(request, tile))
        watched.answered(answer.found, answer.timing, answer.image, answer.passage)
    return answer


class _Request(NamedTuple):
    """An image, and what is to be done with it."""

    service: Service
    image: bytes | memoryview
    model: Servable
    selection: Selection
    limit: float
    urgency: Urgency
    draw_as: ImageType | None
    estimate: Estimate | None

    @property
    def rule(self) -> Buckets | ShortSide:
        """Of the model."""
        return self.model.metadata.canvas

    def drawing(self, header: Header | None) -> Estimate:
        """What drawing will take; nothing where nothing is to be drawn."""
        if self.draw_as is None or header is None:
            return NOTHING_KNOWN
        if header.size.area > self.service.settings.max_image_pixels:
            return NOTHING_KNOWN
        kind = f"drawn {self.draw_as} {header.kind}"
        return self.service.pipeline.estimate(kind, header.size.area)

    def held(self, kept: int = 0) -> AbstractContextManager[Opened]:
        """The image's header, with the memory held that decoding takes, and `kept` a pixel."""
        service = self.service
        return held_image(
            self.image,
            memory=service.decode_memory,
            max_pixels=service.settings.max_image_pixels,
            kept=kept,
        )


async def _whole(request: _Request, write: Write | None = None) -> Answer:
    def finish(outcome: Outcome) -> Answer:
        found = select(outcome.detections, outcome.letterbox, request.selection)
        size = outcome.letterbox.original
        answer = Answer(size, found, outcome.timing, None, outcome.passage)
        return answer if write is None else answer._replace(written=write(answer))

    pipeline, most = request.service.pipeline, request.service.settings.max_image_pixels
    detect = partial(
        pipeline.detect,
        request.image,
        request.model,
        score=request.selection.lowest_score,
        iou=request.selection.iou,
        deadline=request.limit,
        max_pixels=most,
        finish=finish,
        memory=request.service.decode_memory,
        urgency=request.urgency,
    )
    if request.draw_as is None:
        return await detect(estimate=request.estimate)
    header = await look_at(request.image, most)
    decode, drawing = pipeline.decoding(header, request.rule, most), request.drawing(header)
    price = Price(
        decode.canvas,
        decode=decode.seconds,
        after=drawing.seconds,
        long=decode.long or drawing.long,
    )
    with pipeline.admitted(request.model, request.limit, price, request.urgency) as booking:
        return await _drawn(request, await detect(estimate=decode), drawing, booking)


async def _tiled(request: _Request, tile: Tile) -> Answer:
    arrived, service = time.monotonic(), request.service
    pipeline, limit = service.pipeline, request.limit
    most = service.settings.max_image_pixels
    header = await look_at(request.image, most)
    # What decoding will refuse is no matter of tiles.
    readable = header is not None and header.size.area <= most
    # As stored: upright it may take a few canvases more or less.
    expected = _plan(service, header.size, request.rule, tile) if header and readable else None
    if header is None or expected is None or expected.count == 1:
        return (await _whole(request))._replace(canvases=1)
    decode = pipeline.decoding(header, request.rule, most, whole=True)
    drawing = request.drawing(header)
    price = Price(
        expected.tile.canvas,
        expected.count,
        window=min(expected.count, service.batch_window),
        decode=decode.seconds,
        after=drawing.seconds,
        long=decode.long or drawing.long,
    )
    with (
        pipeline.admitted(request.model, limit, price, request.urgency) as booking,
        service.images.more(price.window - 1),
    ):
        async with _until(limit), service.decoded_images:
            started = time.monotonic()
            canvases, seconds = await pipeline.run(
                partial(_lay_out, request, tile),
                request.model,
                decode,
                deadline=limit,
                urgency=request.urgency,
            )
            found, timing = await _views(request, canvases, booking)
        chosen = canvases.plan
        service.metrics.tiles.inc(chosen.count)
        timing = timing._replace(decode=seconds, queue=started - arrived + timing.queue)
        answer = Answer(chosen.whole.original, found, timing, chosen.count)
        return await _drawn(request, answer, drawing, booking)


@asynccontextmanager
async def _until(limit: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded from what lasts longer."""
    try:
        async with asyncio.timeout(max(0.0, limit - time.monotonic())):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before every tile was done") from None


async def _drawn(request: _Request, answer: Answer, drawing: Estimate, booking: Booking) -> Answer:
    """The answer with the image drawn, where that is wanted: priced work of a decode thread."""
    if request.draw_as is None:
        return answer
    booking.thread = 0.0
    written = await request.service.pipeline.run(
        partial(_draw, request, answer.found),
        request.model,
        drawing,
        deadline=request.limit,
        urgency=request.urgency,
    )
    return answer._replace(written=written)


def _draw(request: _Request, found: Detections) -> bytes:
    with request.held(_DRAWN_BYTES) as opened:
        image = draw(opened.decode(), found, request.model.metadata.classes)
        return encode(image, "PNG" if request.draw_as == "image/png" else "JPEG")


def _plan(service: Service, size: Size, rule: Buckets | ShortSide, tile: Tile) -> Plan:
    return plan(size, rule, tile, limit=min(MAX_VIEWS, service.settings.max_queue_size))


def _lay_out(request: _Request, tile: Tile) -> tuple[Canvases, float]:
    """The image decoded and cut by its exact size, and the seconds that took."""
    started = time.monotonic()
    with request.held() as opened:
        chosen = _plan(request.service, opened.size, request.rule, tile)
        return lay_out(opened, chosen, request.rule), time.monotonic() - started


async def _views(
    request: _Request, canvases: Canvases, booking: Booking
) -> tuple[Detections, Timing]:
    """Every view through the pipeline, and what they give together."""
    started, service = time.monotonic(), request.service
    outcomes = await detect_views(
        service.pipeline,
        canvases,
        request.model,
        request.selection,
        deadline=request.limit,
        urgency=request.urgency,
        # No more at a time than of a batch's images: other requests come in between.
        window=service.batch_window,
        booking=booking,
    )
    seconds = time.monotonic() - started
    raw = [outcome.detections for outcome in outcomes]
    found = await service.pipeline.run(
        partial(merge, canvases.plan, raw, request.selection),
        request.model,
        service.pipeline.estimate("merge", sum(map(len, raw))),
        deadline=request.limit,
        urgency=request.urgency,
    )
    # Views take turns, so only the first one's wait is a wait of the image.
    first = min(seconds, *(each.timing.decode + each.timing.queue for each in outcomes))
    return found, Timing(0.0, first, seconds - first)
