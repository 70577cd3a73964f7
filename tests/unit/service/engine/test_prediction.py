"""When an image will have its turn, and whether that is in time: sums that were done by hand."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.engine import admission
from service.engine import prediction as module
from service.engine.admission import WAY_BACK, Admission, Places
from service.engine.batch_queue import BatchQueue, Policy, Urgency
from service.engine.prediction import Prediction, Price
from service.engine.work import NOTHING_KNOWN, BatchKey, DecodeKey, Estimate, Servable, Work
from service.engine.workers import Worker
from service.errors import Unavailable
from service.imaging.canvas import Size

ONE = Price()
CANVAS, LARGE = Size(96, 128), Size(960, 1280)
NOW = 1_000.0


@dataclass(eq=False)
class Item:
    """As much of an image's work as predictions look at."""

    key: Any
    model: Servable
    urgency: Urgency = Urgency.INTERACTIVE
    deadline: float = float("inf")
    abandoned: bool = False
    prepared: Any = None
    """What a decode thread made of it."""
    estimate: Estimate = NOTHING_KNOWN
    infers: bool = True

    @property
    def seconds(self) -> float:
        return self.estimate.seconds


@pytest.fixture
def model() -> Servable:
    """10 ms for an image of a batch, 30 ms for the batch."""
    made = Servable("tiny", 1, cast(Any, None), ())
    for images in (1, 8):
        made.costs.observe(CANVAS, images, 0.010 * images + 0.030)
    return made


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (module, admission):
        monkeypatch.setattr(each, "time", SimpleNamespace(monotonic=lambda: NOW))


class Line:
    """The queues and threads of a pipeline, none of them started, and what is predicted of them."""

    def __init__(self, *, devices: int = 1, callers: int = 1, batch: int = 8) -> None:
        self.arrived: BatchQueue[Work] = BatchQueue(Policy())
        self.ready: BatchQueue[Work] = BatchQueue(Policy())
        self.devices = [_idle(f"device-{i}") for i in range(devices * callers)]
        self.decoders = [_idle(f"decode-{i}") for i in range(2)]
        self.prediction = Prediction(
            arrived=self.arrived,
            ready=self.ready,
            decoders=self.decoders,
            devices=self.devices,
            count=devices,
            max_batch_size=batch,
        )
        self.admission = Admission(Places(1000), self.prediction, refuse_if_over=lambda: None)

    def admit(
        self,
        model: Servable,
        deadline: float,
        price: Price = ONE,
        urgency: Urgency = Urgency.INTERACTIVE,
    ) -> float:
        """Let a request in, which then goes away: nothing is learnt. The seconds that it needs."""
        with suppress(_Gone), self.admission.promise(model, deadline, price, urgency):
            raise _Gone
        return self.prediction.forecast(model, price, urgency).needed


class _Gone(Exception):
    pass


def _idle(name: str) -> Worker[Work]:
    return Worker(name, lambda _: None)


def ready(
    line: Line,
    model: Servable,
    count: int,
    urgency: Urgency = Urgency.INTERACTIVE,
    canvas: Size = CANVAS,
) -> None:
    """Images that wait for a device."""
    for _ in range(count):
        line.ready.push(cast(Any, Item(BatchKey(model, canvas, 0.5), model, urgency)))


def arrived(
    line: Line,
    model: Servable,
    count: int,
    *,
    seconds: float = 0.0,
    canvas: Size = CANVAS,
    infers: bool = True,
) -> None:
    """Images that wait for a decode thread."""
    estimate = Estimate(canvas, "png", 1.0, seconds)
    key = DecodeKey(model, canvas, infers, estimate.long)
    for _ in range(count):
        line.arrived.push(cast(Any, Item(key, model, estimate=estimate, infers=infers)))


def decoding(line: Line, thread: int, model: Servable, seconds: float, *, since: float) -> None:
    """An image that a decode thread is at."""
    worker = line.decoders[thread]
    worker.held = [cast(Any, Item(None, model, estimate=Estimate(CANVAS, "png", 1.0, seconds)))]
    worker.since = since


def in_hand(line: Line, device: int, model: Servable, count: int, *, since: float) -> None:
    """A batch that a device is at."""
    worker = line.devices[device]
    worker.held = [cast(Any, Item(BatchKey(model, CANVAS, 0.5), model))] * count
    worker.since = since


def test_wait_is_zero_when_idle() -> None:
    assert Line().prediction.wait() == 0.0
    assert Line(devices=3).prediction.wait(Urgency.BULK) == 0.0


def test_wait_counts_queued_images_in_batches(model: Servable) -> None:
    line = Line()
    ready(line, model, 8)
    assert line.prediction.wait() == pytest.approx(0.110), "one batch of 8, and none of 0"
    ready(line, model, 2)
    assert line.prediction.wait() == pytest.approx(0.110 + 0.050)
    arrived(line, model, 3)
    assert line.prediction.wait() == pytest.approx(0.110 + 0.050 + 0.060)


def test_wait_counts_a_lone_image_once(model: Servable) -> None:
    line = Line(batch=1)
    ready(line, model, 1)
    assert line.prediction.wait() == pytest.approx(0.040)
    ready(line, model, 2)
    assert line.prediction.wait() == pytest.approx(0.120)


def test_wait_uses_the_cost_of_each_canvas(model: Servable) -> None:
    line = Line(batch=1)
    model.costs.observe(LARGE, 1, 1.0)
    ready(line, model, 2)
    ready(line, model, 1, canvas=LARGE)
    assert line.prediction.wait() == pytest.approx(1.080)
    arrived(line, model, 1)
    assert line.prediction.wait() == pytest.approx(1.120), "what waits is priced by its own canvas"
    arrived(line, model, 1, canvas=LARGE)
    assert line.prediction.wait() == pytest.approx(2.120)
    needed = line.admit(model, NOW + 9, Price(Size(64, 64)))
    assert needed == pytest.approx(2.120 + 0.040)


def test_wait_counts_the_rest_of_the_running_batch(model: Servable) -> None:
    line = Line()
    in_hand(line, 0, model, 8, since=NOW - 0.050)
    assert line.prediction.wait() == pytest.approx(0.060)
    ready(line, model, 1)
    assert line.prediction.wait() == pytest.approx(0.100)


def test_wait_grows_with_an_overdue_batch(model: Servable) -> None:
    line = Line()
    in_hand(line, 0, model, 8, since=NOW - 0.510)
    assert line.prediction.wait() == pytest.approx(0.400)
    in_hand(line, 0, model, 8, since=NOW - 5.110)
    with pytest.raises(Unavailable) as refused:
        line.admit(model, NOW + 1.0)
    assert refused.value.reason == "deadline", "it hangs, and who waited would wait in vain"
    in_hand(line, 0, model, 8, since=NOW - 3600.0)
    assert line.prediction.wait() == 30.0, "no more is made of it"


def test_bulk_learns_its_own_caution(model: Servable) -> None:
    line = Line()
    ready(line, model, 8, Urgency.BULK)
    for _ in range(20):
        line.admission._cautions[Urgency.BULK, "single"].observe(predicted=0.1, actual=1.0)
    line.admission.check(0.120, Urgency.INTERACTIVE)
    line.admit(model, NOW + 1.1 * 0.050)
    with pytest.raises(Unavailable):
        line.admission.check(0.120, Urgency.BULK)


def test_wait_is_divided_by_devices(model: Servable) -> None:
    line = Line(devices=2)
    in_hand(line, 0, model, 8, since=NOW)
    ready(line, model, 9)
    assert line.prediction.wait() == pytest.approx((0.110 + 0.110 + 0.040) / 2)


def test_wait_counts_concurrent_batches_of_a_device(model: Servable) -> None:
    line = Line(callers=2)
    in_hand(line, 1, model, 8, since=NOW - 0.050)
    assert line.prediction.wait() == pytest.approx(0.060), "it had the device for itself"
    in_hand(line, 0, model, 8, since=NOW - 0.050)
    assert line.prediction.wait() == pytest.approx(2 * (0.110 - 0.025))
    ready(line, model, 8)
    assert line.prediction.wait() == pytest.approx(2 * (0.110 - 0.025) + 0.110)
    assert Line(callers=2).admit(model, NOW + 9, Price(canvases=3)) == pytest.approx(0.060)


def test_wait_counts_inferring_decode_threads_as_devices(model: Servable) -> None:
    line = Line(callers=2)
    item = Item(BatchKey(model, CANVAS, 0.5), model)
    line.decoders[0].held = [cast(Any, item)]
    line.decoders[0].since = NOW - 0.010
    assert line.prediction.wait() == pytest.approx(0.040), "all of it is still to come"
    item.prepared = object()
    assert line.prediction.wait() == pytest.approx(0.040 - 0.010)
    in_hand(line, 0, model, 1, since=NOW - 0.010)
    assert line.prediction.wait() == pytest.approx(2 * (0.040 - 0.005)), "they share the device"


def test_wait_counts_threads_of_several_devices(model: Servable) -> None:
    line = Line(devices=2, callers=2)
    for number in (0, 1, 3):
        in_hand(line, number, model, 8, since=NOW - 0.050)
    assert line.prediction.wait() == pytest.approx((0.110 - 0.025) + 0.060 / 2)


def test_wait_bounds_the_share_of_bulk(model: Servable) -> None:
    line = Line()
    ready(line, model, 80, Urgency.BULK)
    assert line.prediction.wait() == 0.0, "all of it is overtaken"
    ready(line, model, 16)
    assert line.prediction.wait() == pytest.approx(0.220 + 0.220 / 7)
    assert line.prediction.wait(Urgency.BULK) == pytest.approx(0.220 + 1.100)


def test_wait_counts_little_bulk_as_little(model: Servable) -> None:
    line = Line()
    ready(line, model, 1, Urgency.BULK)
    ready(line, model, 80)
    assert line.prediction.wait() == pytest.approx(1.100 + 0.040)


def test_wait_is_bound_by_decoding(model: Servable) -> None:
    line = Line()
    arrived(line, model, 6, seconds=0.200)
    assert line.prediction.wait() == pytest.approx(6 * 0.200 / 2)
    ready(line, model, 8)
    assert line.prediction.wait() == pytest.approx(6 * 0.200 / 2), "decoded already"


def test_admit_predicts_decode_and_inference(model: Servable) -> None:
    line, price = Line(), Price(CANVAS, decode=0.005)
    assert line.admit(model, NOW + 9, price) == pytest.approx(0.005 + 0.040)
    ready(line, model, 8)
    assert line.admit(model, NOW + 9, price) == pytest.approx(0.110 + 0.005 + 0.040)


def test_wait_of_long_decodes_leaves_short_ones_alone(model: Servable) -> None:
    line = Line()
    decoding(line, 0, model, 5.0, since=NOW - 1.0)
    arrived(line, model, 2, seconds=3.0)
    assert line.prediction.wait() == 0.0, "a thread is left for short work"
    assert line.prediction.wait(long=True) == pytest.approx(4.0 + 2 * 3.0)
    arrived(line, model, 4, seconds=0.1)
    assert line.prediction.wait() == pytest.approx(0.4), "by that one thread"
    long = Price(CANVAS, decode=5.0, long=True)
    with pytest.raises(Unavailable) as refused:
        line.admit(model, NOW + 10.0, long)
    assert refused.value.reason == "deadline"
    line.admit(model, NOW + 60.0, long)
    line.admit(model, NOW + 1.0, Price(CANVAS, decode=0.005))


def test_wait_counts_no_device_for_decoding_alone(model: Servable) -> None:
    line = Line()
    arrived(line, model, 2, seconds=0.1, infers=False)
    assert line.prediction.wait() == pytest.approx(0.1)


def test_idle_service_refuses_impossible_deadline(model: Servable) -> None:
    line, drawn = Line(), Price(CANVAS, decode=0.1, after=16.0, long=True)
    with pytest.raises(Unavailable) as refused:
        line.admit(model, NOW + 9.0, drawn)
    assert refused.value.reason == "deadline-too-short"
    line.admit(model, NOW + 17.0, drawn)


def test_wait_counts_promised_drawing(model: Servable) -> None:
    line, drawn = Line(), Price(CANVAS, after=4.0, long=True)
    line.admit(model, NOW + 9.0, drawn)
    with line.prediction.booked(model, drawn), line.prediction.booked(model, drawn):
        ready(line, model, 1)
        with pytest.raises(Unavailable):
            line.admit(model, NOW + 9.0, drawn)
        line.admit(model, NOW + 9.0, Price(CANVAS))
    line.admit(model, NOW + 9.0, drawn)


def test_wait_shares_devices_between_batches_and_single_images(
    model: Servable,
) -> None:
    line, many = Line(batch=1), Price(CANVAS, canvases=100, window=4)
    alone = 100 * 0.040
    assert line.admit(model, NOW + 99, many) == pytest.approx(alone)
    with line.prediction.booked(model, many):
        assert line.admit(model, NOW + 99, many) == pytest.approx(2 * alone)
        ready(line, model, 4)
        assert line.admit(model, NOW + 99, many) == pytest.approx(0.160 + 2 * alone), (
            "those that wait are the other request's own"
        )
        single = line.admit(model, NOW + 99, Price(CANVAS))
        assert single == pytest.approx(0.160 + 0.040), "a single image waits for no tile to come"
        ready(line, model, 4)
        assert line.admit(model, NOW + 99, many) == pytest.approx(0.320 + 2 * (2 * alone)), (
            "four single images in the pipeline take every second turn"
        )


def test_wait_spreads_batches_over_devices(model: Servable) -> None:
    assert Line().admit(model, NOW + 9, Price(canvases=16)) == pytest.approx(0.220)
    assert Line(devices=2).admit(model, NOW + 9, Price(canvases=16)) == pytest.approx(0.110)
    assert Line(devices=2).admit(model, NOW + 9, Price(canvases=3)) == pytest.approx(0.050)
    assert Line(batch=1).admit(model, NOW + 9, Price(canvases=16)) == pytest.approx(0.640)


def test_late_request_gets_retry_after(model: Servable) -> None:
    line = Line()
    ready(line, model, 8)
    careful = 1.1 * (0.110 + 0.040) + WAY_BACK
    line.admit(model, NOW + careful + 0.001)
    with pytest.raises(Unavailable) as refused:
        line.admit(model, NOW + careful - 0.010)
    assert refused.value.reason == "deadline"
    assert refused.value.retry_after == pytest.approx(0.010)


def test_idle_service_accepts_uncertain_deadline(model: Servable) -> None:
    line = Line()
    line.admit(model, NOW + 0.014)
    with pytest.raises(Unavailable) as refused:
        line.admit(model, NOW + 0.013)
    assert refused.value.reason == "deadline-too-short", "8 images took 110 ms, so one takes 13.75"


def test_idle_service_retries_after_stale_costs(
    model: Servable, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Servable("tiny", 1, cast(Any, None), ())
    slow.costs.observe(CANVAS, 1, 20.0)
    with pytest.raises(Unavailable):
        Line().admit(slow, NOW + 0.5)
    later = time.monotonic() + 60.0
    monkeypatch.setattr("service.engine.cost.time", SimpleNamespace(monotonic=lambda: later))
    Line().admit(slow, NOW + 0.5)


def test_queue_wait_alone_can_refuse(model: Servable) -> None:
    line = Line()
    line.admission.check(0.0, Urgency.INTERACTIVE)
    ready(line, model, 8)
    line.admission.check(0.122, Urgency.INTERACTIVE)
    with pytest.raises(Unavailable):
        line.admission.check(0.120, Urgency.INTERACTIVE)
