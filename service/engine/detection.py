"""One compressed image through the service: as a whole, or tile by tile. For every protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Final, NamedTuple, TypeVar

from service.engine.drawing import draw, encode
from service.engine.pipeline import look_at
from service.engine.postprocessing import select
from service.engine.prediction import Booking, Price
from service.engine.request import DetectRequest
from service.engine.service import Service
from service.engine.tiling import MAX_VIEWS, Canvases, Plan, detect_views, lay_out, merge, plan
from service.engine.work import NOTHING_KNOWN, Estimate, Outcome
from service.errors import DeadlineExceeded
from service.imaging.canvas import Size
from service.imaging.decode import Opened, held_image
from service.imaging.header import Header
from service.observability.record import Passage, Timing
from service.runtime.detector import Detections

_DRAWN_BYTES: Final = 8
"""Of a pixel: the file that a drawn image becomes, and its copies."""

T = TypeVar("T")


class Answer(NamedTuple):
    """What an image holds."""

    image: Size
    """Upright."""
    found: Detections
    """What the request asked for, in pixels of the image."""
    timing: Timing
    canvases: int | None
    """How many the image took; None where tiles were not asked for."""
    passage: Passage | None = None
    """None where several canvases went together."""
    written: bytes | None = None
    """What `write` made of it. None where there is none, or where that is left to the caller."""


Write = Callable[[Answer], bytes | None]
"""From an answer to the body of a response; None: that is too much to do on the way."""


async def detect(service: Service, request: DetectRequest, *, write: Write | None = None) -> Answer:
    """Detect on an image that holds a place in `service.places`, and count it.

    An answer of one canvas is written where it arises (`Pipeline.detect_canvas` says where that
    is). Raises Unavailable, DeadlineExceeded, InferenceFailed, and what decoding raises.
    """
    with service.metrics.image(request.model) as watched:
        whole = request.tile == "off"
        answer = await (_whole(service, request, write) if whole else _tiled(service, request))
        watched.answered(answer.found, answer.timing, answer.image, answer.passage)
    return answer


async def _whole(service: Service, request: DetectRequest, write: Write | None = None) -> Answer:
    """The image as a whole, on one canvas."""
    if request.estimate is not None:
        return await _on_canvas(service, request, request.estimate, write)
    pipeline, most = service.pipeline, service.settings.max_image_pixels
    header = await look_at(request.image, most)
    decode = pipeline.decoding(header, request.model.metadata.canvas, most)
    drawing = _drawing(service, request, header)
    price = Price(
        decode.canvas,
        decode=decode.seconds,
        after=drawing.seconds,
        long=decode.long or drawing.long,
    )
    with service.admission.promise(
        request.model, request.deadline, price, request.urgency
    ) as booking:
        answer = await _on_canvas(service, request, decode, write)
        return await _drawn(service, request, answer, drawing, booking)


async def _on_canvas(
    service: Service, request: DetectRequest, estimate: Estimate, write: Write | None
) -> Answer:
    def finish(outcome: Outcome) -> Answer:
        found = select(outcome.detections, outcome.letterbox, request.selection)
        size = outcome.letterbox.original
        answer = Answer(size, found, outcome.timing, None, outcome.passage)
        return answer if write is None else answer._replace(written=write(answer))

    return await service.pipeline.detect(
        request.image,
        request.model,
        score=request.selection.lowest_score,
        iou=request.selection.iou,
        deadline=request.deadline,
        max_pixels=service.settings.max_image_pixels,
        finish=finish,
        memory=service.decode_memory,
        urgency=request.urgency,
        estimate=estimate,
    )


async def _tiled(service: Service, request: DetectRequest) -> Answer:
    """The image tile by tile, where it is large enough for that."""
    arrived, pipeline = time.monotonic(), service.pipeline
    rule, most = request.model.metadata.canvas, service.settings.max_image_pixels
    header = await look_at(request.image, most)
    # Decoding refuses the rest, with the reason.
    readable = header is not None and header.size.area <= most
    # As stored: upright it may take a few canvases more or less.
    expected = _plan(service, request, header.size) if header and readable else None
    if header is None or expected is None or expected.count == 1:
        return (await _whole(service, request))._replace(canvases=1)
    decode = pipeline.decoding(header, rule, most, whole=True)
    drawing = _drawing(service, request, header)
    price = Price(
        expected.tile.canvas,
        expected.count,
        window=min(expected.count, service.batch_window),
        decode=decode.seconds,
        after=drawing.seconds,
        long=decode.long or drawing.long,
    )
    with (
        service.admission.promise(
            request.model, request.deadline, price, request.urgency
        ) as booking,
        service.places.more(price.window - 1),
    ):
        async with _until(request.deadline), service.decoded_images:
            started = time.monotonic()
            canvases, seconds = await _run(
                service, request, partial(_lay_out, service, request), decode
            )
            found, timing = await _views(service, request, canvases, booking)
        chosen = canvases.plan
        service.metrics.tiles.inc(chosen.count)
        timing = timing._replace(decode=seconds, queue=started - arrived + timing.queue)
        answer = Answer(chosen.whole.original, found, timing, chosen.count)
        return await _drawn(service, request, answer, drawing, booking)


@asynccontextmanager
async def _until(limit: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded from what lasts longer."""
    try:
        async with asyncio.timeout(max(0.0, limit - time.monotonic())):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before every tile was done") from None


async def _run(
    service: Service, request: DetectRequest, function: Callable[[], T], estimate: Estimate
) -> T:
    """Other work of a request, in a decode thread and under its deadline."""
    return await service.pipeline.run(
        function, request.model, estimate, deadline=request.deadline, urgency=request.urgency
    )


def _drawing(service: Service, request: DetectRequest, header: Header | None) -> Estimate:
    """What drawing will take; nothing where nothing is to be drawn."""
    if request.draw_as is None or header is None:
        return NOTHING_KNOWN
    if header.size.area > service.settings.max_image_pixels:
        return NOTHING_KNOWN
    kind = f"drawn {request.draw_as} {header.kind}"
    return service.pipeline.estimate(kind, header.size.area)


async def _drawn(
    service: Service,
    request: DetectRequest,
    answer: Answer,
    drawing: Estimate,
    booking: Booking,
) -> Answer:
    """The answer with the image drawn, where that is wanted."""
    if request.draw_as is None:
        return answer
    booking.thread = 0.0
    draw_found = partial(_draw, service, request, answer.found)
    return answer._replace(written=await _run(service, request, draw_found, drawing))


def _draw(service: Service, request: DetectRequest, found: Detections) -> bytes:
    with _held(service, request, _DRAWN_BYTES) as opened:
        image = draw(opened.decode(), found, request.model.metadata.classes, service.label_font)
        return encode(image, "PNG" if request.draw_as == "image/png" else "JPEG")


def _held(
    service: Service, request: DetectRequest, kept: int = 0
) -> AbstractContextManager[Opened]:
    """The image's header, with the memory held that decoding takes, and `kept` bytes a pixel."""
    return held_image(
        request.image,
        memory=service.decode_memory,
        max_pixels=service.settings.max_image_pixels,
        kept=kept,
    )


def _plan(service: Service, request: DetectRequest, size: Size) -> Plan:
    most = min(MAX_VIEWS, service.settings.max_queue_size)
    return plan(size, request.model.metadata.canvas, request.tile, limit=most)


def _lay_out(service: Service, request: DetectRequest) -> tuple[Canvases, float]:
    """The image decoded and cut by its exact size, and the seconds that took."""
    started = time.monotonic()
    with _held(service, request) as opened:
        chosen = _plan(service, request, opened.size)
        canvases = lay_out(opened, chosen, request.model.metadata.canvas)
    return canvases, time.monotonic() - started


async def _views(
    service: Service, request: DetectRequest, canvases: Canvases, booking: Booking
) -> tuple[Detections, Timing]:
    """Every view through the pipeline, and what they give together."""
    started = time.monotonic()
    outcomes = await detect_views(
        service.pipeline,
        canvases,
        request.model,
        request.selection,
        deadline=request.deadline,
        urgency=request.urgency,
        # No more at a time than of a batch's images: other requests come in between.
        window=service.batch_window,
        booking=booking,
    )
    seconds = time.monotonic() - started
    raw = [outcome.detections for outcome in outcomes]
    found = await _run(
        service,
        request,
        partial(merge, canvases.plan, raw, request.selection),
        service.pipeline.estimate("merge", sum(map(len, raw))),
    )
    # Views take turns, so only the first one's wait is a wait of the image.
    first = min(seconds, *(each.timing.decode + each.timing.queue for each in outcomes))
    return found, Timing(0.0, first, seconds - first)
