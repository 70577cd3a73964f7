"""Inference on tensors or compressed images, for REST and gRPC."""

from __future__ import annotations

import asyncio
import difflib
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.engine.batch_queue import Urgency
from service.engine.detection import detect
from service.engine.pipeline import look_at
from service.engine.postprocessing import resolve
from service.engine.prediction import Price
from service.engine.request import DetectRequest
from service.engine.service import Service
from service.engine.work import Estimate, Servable, as_it_is
from service.errors import MalformedRequest, RetinaserveError, UnknownModel, shown
from service.http.oip.tensors import OUTPUT_NAMES, Buffer, Limits
from service.imaging.canvas import Letterbox, Size
from service.imaging.decode import Prepared
from service.runtime import artifact
from service.runtime.artifact import MAX_DETECTIONS_CAP
from service.runtime.detector import Detections

Job = Callable[[], Coroutine[None, None, Detections]]

TIMEOUT: Final = "timeout"
"""Parameter: microseconds until a response is too late."""
_THRESHOLDS: Final = ("score_threshold", "iou_threshold", "max_detections")
_MAX_PARAMETERS: Final = 64
_MAX_NUMBER: Final = 32
_MAX_ID: Final = 1024


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed request; `inputs` has numbers only."""

    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    images: tuple[Buffer, ...] = ()
    """Compressed, instead of the input `images`."""
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Thresholds:
    score: float | None
    iou: float | None
    max_detections: int | None


def find_model(service: Service, name: str, version: str = "") -> Servable:
    """Return the model that a request names; without a version its highest that is ready.

    Raises UnknownModel or Unavailable.
    """
    return service.registry.get(name, parse_version(name, version))


def parse_version(name: str, version: str) -> int | None:
    """Return the number of a version; None for "". Raises UnknownModel."""
    if version == "":
        return None
    number = artifact.parse_version(version)
    if number is None:
        raise UnknownModel(
            f"model {shown(name)} has no version {shown(version)}; {artifact.VERSION_RULE}"
        )
    return number


def limits_of(service: Service, model: Servable) -> Limits:
    """Return the limits of a request to a model."""
    return Limits(
        batch=service.settings.max_batch_images,
        area=model.metadata.canvas.largest().area,
    )


def check_outputs(names: Sequence[object]) -> tuple[str, ...]:
    """Return the outputs that a request selects, by default all. Raises MalformedRequest."""
    for name in names:
        if name not in OUTPUT_NAMES:
            raise MalformedRequest(
                f"unknown output {shown(name)}; there is {', '.join(OUTPUT_NAMES)}"
            )
        if names.count(name) > 1:
            raise MalformedRequest(f"the output {name} is asked for more than once")
    return tuple(str(name) for name in names) or OUTPUT_NAMES


def check_id(given: object) -> str | None:
    """Return the id of a request, which its response repeats. Raises MalformedRequest."""
    if given is None or (isinstance(given, str) and len(given) <= _MAX_ID):
        return given
    raise MalformedRequest(f"id is {shown(given)}; it is a string of at most {_MAX_ID} characters")


def short_parameters(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return a request's parameters without values that are too long to mean anything here.

    They are kept until the response, and a string may take four times its bytes.
    """
    return {
        name: value
        if isinstance(value, bool | int | float)
        else value[: _MAX_NUMBER + 1]
        if isinstance(value, str)
        else None
        for name, value in islice(parameters.items(), _MAX_PARAMETERS + 1)
    }


def earlier(limit: float, parameters: Mapping[str, object], *, arrived: float) -> float:
    """Return `limit`, or the end of the parameter `timeout` if earlier. Raises MalformedRequest.

    As in Triton: microseconds from the arrival; 0 for no timeout.
    """
    microseconds = _number(parameters.get(TIMEOUT, 0), TIMEOUT)
    if not microseconds >= 0 or microseconds % 1:
        raise MalformedRequest(
            f"the parameter {TIMEOUT} is {microseconds:g}; it is a whole number of microseconds"
        )
    return limit if microseconds == 0 else min(limit, arrived + microseconds / 1e6)


async def infer(
    service: Service, model: Servable, request: InferRequest, limit: float
) -> dict[str, NDArray[Any]]:
    """Return every output, in the order and with the dtypes of the model file.

    The request holds one place in `service.places`; those for further images are taken here, all
    or none. Canvases get what the file itself answers, images what /v1/detect answers.
    `limit` is when a response is too late. Raises MalformedRequest and what `detect` raises.
    """
    thresholds = _thresholds(request)
    if request.images:
        estimates = await _estimates(service, model, request.images)
        jobs = _image_jobs(service, model, request.images, estimates, thresholds, limit)
        canvases = [each.canvas for each in estimates if each.canvas is not None]
        largest = max(canvases, key=attrgetter("area"), default=None)
        seconds = [each.seconds for each in estimates]
        decode = max(*seconds, sum(seconds) / service.pipeline.decode_threads, 0.0)
        price = Price(largest, decode=decode, long=any(each.long for each in estimates))
        urgency = _urgency(len(jobs))
    else:
        jobs = _canvas_jobs(service, model, request.inputs, thresholds, limit)
        price, urgency = Price(Size(*request.inputs["images"].shape[1:3])), Urgency.INTERACTIVE
    # No more at a time than of a batch's images: other requests come in between.
    window = min(len(jobs), service.batch_window)
    price = price._replace(canvases=len(jobs), window=window)
    with (
        service.admission.promise(model, limit, price, urgency),
        service.places.more(window - 1),
    ):
        return _outputs(await _all(jobs, window))


async def _estimates(service: Service, model: Servable, images: Sequence[Buffer]) -> list[Estimate]:
    most = service.settings.max_image_pixels
    headers = [await look_at(image, most) for image in images]
    rule = model.metadata.canvas
    return [service.pipeline.decoding(header, rule, most) for header in headers]


def _image_jobs(
    service: Service,
    model: Servable,
    images: Sequence[Buffer],
    estimates: Sequence[Estimate],
    thresholds: _Thresholds,
    limit: float,
) -> list[Job]:
    selection = resolve(
        model.metadata,
        score_threshold=thresholds.score,
        iou_threshold=thresholds.iou,
        max_detections=thresholds.max_detections,
    )
    urgency = _urgency(len(images))

    async def one(index: int, image: Buffer, estimate: Estimate) -> Detections:
        request = DetectRequest(image, model, selection, limit, urgency=urgency, estimate=estimate)
        try:
            answer = await detect(service, request)
        except RetinaserveError as error:
            if len(images) > 1:
                error.args = (f"encoded_images[{index}]: {error}",)
            raise
        return answer.found

    return [
        partial(one, index, image, estimate)
        for index, (image, estimate) in enumerate(zip(images, estimates, strict=True))
    ]


def _urgency(images: int) -> Urgency:
    """Return BULK for several images in one request, which yield to other requests."""
    return Urgency.BULK if images > 1 else Urgency.INTERACTIVE


def _canvas_jobs(
    service: Service,
    model: Servable,
    inputs: Mapping[str, NDArray[Any]],
    thresholds: _Thresholds,
    limit: float,
) -> list[Job]:
    defaults = model.metadata.thresholds
    # In float32, as the graph compares.
    score = float(np.float32(defaults.score if thresholds.score is None else thresholds.score))
    iou = defaults.iou if thresholds.iou is None else thresholds.iou
    most = thresholds.max_detections or defaults.max_detections

    async def one(prepared: Prepared) -> Detections:
        with service.metrics.image(model) as watched:
            outcome = await service.pipeline.detect_canvas(
                lambda: prepared,
                model,
                score=score,
                iou=iou,
                deadline=limit,
                finish=as_it_is,
                estimate=Estimate(prepared.letterbox.canvas),
            )
            # The batch may have run with the lower threshold of another request.
            raw = outcome.detections
            found = raw.pick(raw.scores > np.float32(score)).pick(slice(most))
            size = prepared.letterbox.original
            watched.answered(found, outcome.timing, size, outcome.passage)
        return found

    return [partial(one, prepared) for prepared in _canvases(inputs)]


def _canvases(inputs: Mapping[str, NDArray[Any]]) -> list[Prepared]:
    images = inputs["images"]
    canvas = Size(*images.shape[1:3])
    given = inputs.get("image_sizes", np.zeros((1, 2), dtype=np.int64))
    prepared = []
    for image, row in zip(images, np.broadcast_to(given, (len(images), 2)).tolist(), strict=True):
        # As in the model file, 0 is the whole side.
        size = Size(row[0] or canvas.height, row[1] or canvas.width)
        if not (0 < size.height <= canvas.height and 0 < size.width <= canvas.width):
            raise MalformedRequest(
                f"image_sizes: {row} does not lie on a canvas of {list(canvas)} (height, width)"
            )
        prepared.append(Prepared(canvas=image, letterbox=Letterbox(size, size, canvas)))
    return prepared


def _thresholds(request: InferRequest) -> _Thresholds:
    if len(request.parameters) > _MAX_PARAMETERS:
        raise MalformedRequest(f"more than {_MAX_PARAMETERS} parameters")
    for name in request.parameters:
        # A misspelt parameter would be ignored without an error.
        meant = difflib.get_close_matches(name[:80], _THRESHOLDS, n=1, cutoff=0.8)
        if meant and name not in _THRESHOLDS:
            raise MalformedRequest(f"unknown parameter {shown(name)}; do you mean {meant[0]}?")
    most = _bounded(request, "max_detections", 1, MAX_DETECTIONS_CAP)
    if most is not None and most % 1:
        raise MalformedRequest(f"max_detections: {most:g} is not a whole number")
    return _Thresholds(
        score=_bounded(request, "score_threshold", 0, 1),
        iou=_bounded(request, "iou_threshold", 0, 1),
        max_detections=None if most is None else int(most),
    )


def _bounded(request: InferRequest, name: str, least: int, most: int) -> float | None:
    """Return a threshold, from a tensor or from a parameter."""
    if name in request.inputs and name in request.parameters:
        raise MalformedRequest(f"{name} is given twice: as an input and as a parameter")
    if name in request.inputs:
        value = float(request.inputs[name][0])
    elif name in request.parameters:
        value = _number(request.parameters[name], name)
    else:
        return None
    if not least <= value <= most:
        raise MalformedRequest(f"{name}: {value:g} is not in {least}..{most}")
    return value


def _number(value: object, name: str) -> float:
    # Also as text: not every gRPC client has floating-point parameters.
    if isinstance(value, str) and len(value) <= _MAX_NUMBER:
        try:
            value = float(value)
        except ValueError:
            value = None
    # A bool is an int in Python.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedRequest(f"the parameter {name} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise MalformedRequest(f"the parameter {name} must be a finite number")
    return number


async def _all(jobs: Sequence[Job], window: int) -> list[Detections]:
    """Run `window` jobs at a time, and return results in order; the first failure cancels all."""
    if len(jobs) == 1:
        return [await jobs[0]()]
    room = asyncio.Semaphore(window)

    async def one(job: Job) -> Detections:
        async with room:
            return await job()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in jobs]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _outputs(found: Sequence[Detections]) -> dict[str, NDArray[Any]]:
    counts = [len(each) for each in found]
    return {
        "image_index": np.repeat(np.arange(len(found), dtype=np.int64), counts),
        "boxes": np.concatenate([each.boxes for each in found]),
        "scores": np.concatenate([each.scores for each in found]),
        "labels": np.concatenate([each.labels for each in found]),
    }
