"""The views of an image that is cut into tiles, through the pipeline a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from service.engine.batch_queue import Urgency
from service.engine.pipeline import Pipeline
from service.engine.postprocessing import Selection
from service.engine.prediction import Booking
from service.engine.tiling import Canvases
from service.engine.work import Outcome, Servable, as_it_is
from service.imaging.canvas import Letterbox
from service.imaging.decode import Prepared


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
