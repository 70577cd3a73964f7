"""Decode threads and device threads together: answers, poison, cancellation, deadlines."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.engine import pipeline as module
from service.engine.batch_queue import Policy
from service.engine.pipeline import Pipeline
from service.engine.work import Outcome, Servable, Work, as_it_is
from service.engine.workers import Worker
from service.errors import DeadlineExceeded, InferenceFailed, MalformedImage, Unavailable
from service.imaging.canvas import Letterbox, Size
from service.imaging.decode import Prepared
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections, Detector
from service.runtime.devices import Device, open_detector, providers, session_options
from tests import tiny_model
from tests.images import BLUE, GREEN, RED, encoded, one_red, squares

MAGENTA = (255, 0, 255)
OTHER = encoded(squares((32, 16, RED), (64, 48, GREEN)))
POISON = encoded(Image.new("RGB", (128, 96), MAGENTA))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Servable]:
    def make(**options: object) -> Servable:
        path = tiny_model.save(tmp_path_factory.mktemp("models"), **options)
        artifact = read_artifact(path)
        return Servable("tiny", 1, artifact, (open_detector(artifact, Device("cpu")),))

    return make


@asynccontextmanager
async def started(
    policy: Policy | None = None,
    *,
    decode_threads: int = 2,
    sizes: list[int] | None = None,
    **options: Any,
) -> AsyncIterator[Pipeline]:
    seen = [] if sizes is None else sizes
    line = Pipeline(
        devices=1,
        decode_threads=decode_threads,
        **options,
        policy=policy or Policy(),
        on_batch=lambda _, size: seen.append(size),
    )
    line.start()
    try:
        yield line
    finally:
        line.close()


async def detect(
    line: Pipeline,
    model: Servable,
    data: bytes,
    *,
    seconds: float = 60.0,
    iou: float = 0.5,
    finish: Callable[[Outcome], Any] = as_it_is,
) -> Any:
    return await line.detect(
        data,
        model,
        score=0.5,
        iou=iou,
        deadline=time.monotonic() + seconds,
        max_pixels=50_000_000,
        finish=finish,
    )


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never happened")


async def test_pipeline_returns_detections_and_timing(load: Callable[..., Servable]) -> None:
    async with started() as line:
        outcome = await detect(line, load(), encoded(one_red()))
    assert 0 in outcome.detections.labels
    assert outcome.letterbox.original == (96, 128)
    assert min(outcome.timing) >= 0.0


async def test_pipeline_results_are_batch_invariant(load: Callable[..., Servable]) -> None:
    model = load()
    contents = [
        encoded(squares((16 * place, 16 * row, colour), size=size))
        for place in range(5)
        for row in range(3)
        for colour in (RED, GREEN, BLUE)
        for size in ((128, 96), (96, 128))
    ]
    async with started() as line:
        alone = [await detect(line, model, content) for content in contents]
    sizes: list[int] = []
    async with started(Policy(max_batch_size=8, max_delay=0.05), sizes=sizes) as line:
        together = await asyncio.gather(*(detect(line, model, each) for each in contents))
    assert max(sizes) > 1, "nothing was batched, so nothing was tested"
    assert max(sizes) <= 8
    assert sum(sizes) == len(contents)
    for one, other in zip(alone, together, strict=True):
        assert one.letterbox == other.letterbox
        assert one.detections.boxes.tolist() == other.detections.boxes.tolist()
        assert one.detections.scores.tolist() == other.detections.scores.tolist()
        assert one.detections.labels.tolist() == other.detections.labels.tolist()


async def test_pipeline_batches_by_canvas_and_iou_threshold(
    load: Callable[..., Servable],
) -> None:
    model, sizes = load(), []
    async with started(Policy(max_batch_size=8, max_delay=0.1), sizes=sizes) as line:
        wide, tall = encoded(one_red()), encoded(squares(size=(96, 128)))
        jobs = [(wide, 0.5), (tall, 0.5), (wide, 0.4), (wide, 0.5)]
        await asyncio.gather(*(detect(line, model, data, iou=iou) for data, iou in jobs))
    assert sorted(sizes) == [1, 1, 2]


async def test_pipeline_bad_image_fails_alone(load: Callable[..., Servable]) -> None:
    model = load()
    async with started(Policy(max_batch_size=4, max_delay=0.05)) as line:
        answers = await asyncio.gather(
            *(detect(line, model, each) for each in (encoded(one_red()), b"", encoded(one_red()))),
            return_exceptions=True,
        )
    assert [type(answer) for answer in answers] == [Outcome, MalformedImage, Outcome]


async def test_pipeline_failing_image_of_a_batch_fails_alone(load: Callable[..., Servable]) -> None:
    model, sizes = load(poison=True), []
    good = encoded(one_red())
    async with started(Policy(max_batch_size=4, max_delay=0.2), sizes=sizes) as line:
        answers = await asyncio.gather(
            *(detect(line, model, data) for data in (good, POISON, good, good)),
            return_exceptions=True,
        )
        assert sizes == [4]
        assert [type(each) for each in answers] == [Outcome, InferenceFailed, Outcome, Outcome]
        assert line.fatal is None, "the image is to blame, not the device"
        assert isinstance(await detect(line, model, good), Outcome)


async def test_pipeline_tells_lost_device_from_bad_image(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(poison=True)

    def dead(self: Detector, *args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error 700: an illegal memory access was encountered")

    async with started() as line:
        assert isinstance(await detect(line, model, encoded(one_red())), Outcome)
        monkeypatch.setattr(Detector, "__call__", dead)
        for _ in range(2):
            with pytest.raises(Unavailable, match="CUDA error 700") as refused:
                await detect(line, model, encoded(one_red()))
            assert refused.value.reason == "device-lost"
        assert line.fatal is not None
        assert "CUDA error 700" in line.fatal


async def test_pipeline_drops_late_images_before_inference(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = load(work=60), []
    async with started(sizes=sizes) as line:
        # They are let in, whatever it knows of the batch that runs.
        monkeypatch.setattr(line.prediction, "wait", lambda urgency: 0.0)
        running = asyncio.create_task(detect(line, model, encoded(one_red())))
        await until(lambda: bool(sizes))
        started_at = time.monotonic()
        late = [detect(line, model, encoded(one_red()), seconds=0.02) for _ in range(5)]
        answers = await asyncio.gather(*late, return_exceptions=True)
        assert {type(answer) for answer in answers} == {DeadlineExceeded}
        assert time.monotonic() - started_at < 5.0
        assert line.depth == 0
        await running
        await detect(line, model, encoded(one_red()))
    assert len(sizes) == 2


async def test_pipeline_drops_cancelled_images(load: Callable[..., Servable]) -> None:
    model, sizes = load(work=60), []
    async with started(sizes=sizes) as line:
        running = asyncio.create_task(detect(line, model, encoded(one_red())))
        await until(lambda: bool(sizes))
        tasks = [asyncio.create_task(detect(line, model, encoded(one_red()))) for _ in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert line.depth == 0
        await running
        await detect(line, model, encoded(one_red()))
    # One that was being decoded when it was cancelled may have slipped to the device.
    assert len(sizes) <= 3


async def test_pipeline_uses_both_devices(load: Callable[..., Servable]) -> None:
    alone = load(work=4)
    used: list[int] = []

    class Counting(Detector):
        """A real session that notes whose it is."""

        number: int

        def __call__(self, *args: Any, **kwargs: Any) -> list[Detections]:
            used.append(self.number)
            return super().__call__(*args, **kwargs)

    detectors = []
    for number in range(2):
        device = Device("cpu")
        detector = Counting(
            alone.artifact, providers=providers(device), options=session_options(device)
        )
        detector.number = number
        detectors.append(detector)
    model = Servable("tiny", 1, alone.artifact, tuple(detectors))
    line = Pipeline(devices=2, decode_threads=2, policy=Policy(), on_batch=lambda *_: None)
    line.start()
    try:
        answers = await asyncio.gather(
            *(detect(line, model, encoded(one_red())) for _ in range(20))
        )
    finally:
        line.close()
    assert len({answer.detections.boxes.tobytes() for answer in answers}) == 1
    assert len(used) == 20
    assert set(used) == {0, 1}


async def test_pipeline_callers_share_the_device(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = load()
    model = alone_twice(alone)
    both = threading.Barrier(2)
    real = Detector.__call__

    def meet(self: Detector, *args: Any, **kwargs: Any) -> list[Detections]:
        both.wait(60.0)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Detector, "__call__", meet)
    async with started(callers=2) as line:
        answers = await asyncio.gather(*(detect(line, model, encoded(one_red())) for _ in range(4)))
    assert len({answer.detections.boxes.tobytes() for answer in answers}) == 1
    # Each took the whole time, and half of the device.
    took = min(answer.timing.inference for answer in answers)
    assert 0 < model.costs.fastest < took


async def test_pipeline_replaces_a_dead_caller(load: Callable[..., Servable]) -> None:
    alone = load()
    died = threading.Event()

    class Gone(Detector):
        def __call__(self, *args: Any, **kwargs: Any) -> list[Detections]:
            died.set()
            raise SystemExit

    gone = Gone(
        alone.artifact, providers=providers(Device("cpu")), options=session_options(Device("cpu"))
    )
    model = replace(alone, detectors=(gone, gone))
    async with started(callers=2) as line:
        with pytest.raises(InferenceFailed, match="log says why"):
            await detect(line, model, encoded(one_red()))
        answers = [detect(line, alone_twice(alone), encoded(one_red())) for _ in range(8)]
        assert len(await asyncio.gather(*answers)) == 8


class Where(Detector):
    """A real session that notes in which threads it runs, and first does what `before` says."""

    before: Callable[[], None] = staticmethod(lambda: None)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Detections]:
        self.threads.append(threading.current_thread().name)
        self.before()
        return super().__call__(*args, **kwargs)


def where(model: Servable, before: Callable[[], None] | None = None) -> tuple[Servable, list[str]]:
    device = Device("cpu")
    detector = Where(model.artifact, providers=providers(device), options=session_options(device))
    detector.threads = []
    if before is not None:
        detector.before = before
    return replace(model, detectors=(detector, detector)), detector.threads


async def test_pipeline_cpu_decode_thread_runs_inference(load: Callable[..., Servable]) -> None:
    plain = load()
    model, threads = where(plain)
    async with started() as line:
        expected = [await detect(line, plain, data) for data in (encoded(one_red()), OTHER)]
    async with started(decoders_infer=True) as line:
        answers = await asyncio.gather(
            *(detect(line, model, (encoded(one_red()), OTHER)[turn % 2]) for turn in range(40))
        )
    for turn, answer in enumerate(answers):
        assert np.array_equal(answer.detections.boxes, expected[turn % 2].detections.boxes)
    assert len(threads) == 40
    assert "decode" in {name.partition("-")[0] for name in threads}


@pytest.mark.parametrize("infer", [False, True])
async def test_pipeline_postprocesses_off_the_device_thread(
    load: Callable[..., Servable], infer: bool
) -> None:
    model = alone_twice(load())
    threads: set[str] = set()

    def finish(outcome: Outcome) -> int:
        threads.add(threading.current_thread().name.partition("-")[0])
        return len(outcome.detections)

    async with started(decoders_infer=infer) as line:
        expected = len((await detect(line, model, encoded(one_red()))).detections)
        answers = [detect(line, model, encoded(one_red()), finish=finish) for _ in range(20)]
        assert await asyncio.gather(*answers) == [expected] * 20
    assert expected > 0
    if infer:
        assert threads <= {"decode", "device"}
    else:
        assert threads == {"MainThread"}


@pytest.mark.parametrize("infer", [False, True])
async def test_pipeline_failing_postprocessing_fails_alone(
    load: Callable[..., Servable], infer: bool
) -> None:
    def fail(_: Outcome) -> None:
        raise ZeroDivisionError("of this one")

    model, sizes = load(), []
    policy = Policy(max_batch_size=4, max_delay=0.2)
    async with started(policy, sizes=sizes, decoders_infer=infer) as line:
        good, bad, other = await asyncio.gather(
            *(
                detect(line, model, encoded(one_red()), finish=finish)
                for finish in (as_it_is, fail, as_it_is)
            ),
            return_exceptions=True,
        )
        assert sizes == [3], "they shared an inference"
        assert isinstance(bad, ZeroDivisionError)
        assert [type(good), type(other)] == [Outcome, Outcome]
        assert line.fatal is None
        assert isinstance(await detect(line, model, encoded(one_red())), Outcome)


async def test_pipeline_bounds_concurrent_inferences(load: Callable[..., Servable]) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slow() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    model, _ = where(load(), slow)
    for callers in (1, 2):
        most = 0
        async with started(decode_threads=4, decoders_infer=True, callers=callers) as line:
            await asyncio.gather(*(detect(line, model, encoded(one_red())) for _ in range(40)))
        assert most == callers


async def test_pipeline_dead_decode_thread_frees_its_place(
    load: Callable[..., Servable],
) -> None:
    dying = True

    def die() -> None:
        nonlocal dying
        if dying:
            dying = False
            raise SystemExit

    model, _ = where(load(), die)
    async with started(decoders_infer=True) as line:
        with pytest.raises(InferenceFailed, match="log says why"):
            await detect(line, model, encoded(one_red()))
        answers = [detect(line, model, encoded(one_red())) for _ in range(8)]
        assert len(await asyncio.gather(*answers)) == 8


async def test_pipeline_image_is_lone_only_when_idle(
    load: Callable[..., Servable],
) -> None:
    plain = load()
    told: list[bool] = []

    class Listening(Detector):
        def suited(self, *, lone: bool) -> Detector:
            told.append(lone)
            return plain.detectors[0]

    device = Device("cpu")
    detector = Listening(
        plain.artifact, providers=providers(device), options=session_options(device)
    )
    model = replace(plain, detectors=(detector, detector))
    for infer in (False, True):
        async with started(decoders_infer=infer) as line:
            for _ in range(3):
                await detect(line, model, encoded(one_red()))
            assert told == [True] * 3
            await asyncio.gather(*(detect(line, model, encoded(one_red())) for _ in range(20)))
            # All but the last one, which may find that the others are done.
            assert told[3:].count(True) <= 2
            told.clear()


async def test_pipeline_watchdog_covers_decode_threads(
    load: Callable[..., Servable],
) -> None:
    over = threading.Event()
    model, threads = where(load(), lambda: over.wait(60.0) and None)
    async with started(decoders_infer=True, watchdog_seconds=0.2) as line:
        with pytest.raises(Unavailable, match="has been on the device for"):
            await detect(line, model, encoded(one_red()))
        assert line.fatal is not None
        over.set()
    assert threads


def alone_twice(model: Servable) -> Servable:
    return replace(model, detectors=model.detectors * 2)


async def test_pipeline_is_first_in_first_out(load: Callable[..., Servable]) -> None:
    model = load()
    finished: list[int] = []

    async def one(line: Pipeline, number: int) -> None:
        size = (128, 96) if number % 2 else (96, 128)
        await detect(line, model, encoded(squares(size=size)))
        finished.append(number)

    # One decode thread: with more, the order of arrival at the device is theirs to make.
    async with started(decode_threads=1) as line:
        await asyncio.gather(*(one(line, number) for number in range(40)))
    assert finished == sorted(finished)


@pytest.mark.parametrize("infer", [False, True])
@pytest.mark.parametrize("content", [encoded(one_red()), b"\xff\xd8\xff broken"])
async def test_pipeline_releases_images(
    load: Callable[..., Servable], content: bytes, infer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Work] = weakref.WeakSet()

    class Watched(Work):
        """Work that can be referred to weakly."""

        __slots__ = ("__weakref__",)

        def __post_init__(self) -> None:
            alive.add(self)

    monkeypatch.setattr(module, "Work", Watched)
    model = load()
    async with started(decoders_infer=infer) as line:
        gc.disable()
        try:
            for _ in range(10):
                try:
                    await detect(line, model, content)
                except MalformedImage:
                    continue
            # The device's thread may still be on its way back to the queue.
            await until(lambda: not alive)
        finally:
            gc.enable()


async def test_pipeline_ignores_results_after_close(load: Callable[..., Servable]) -> None:
    model, sizes = load(work=60), []
    async with started(sizes=sizes) as line:
        task = asyncio.create_task(detect(line, model, encoded(one_red())))
        await until(lambda: bool(sizes))
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_pipeline_refuses_requests_after_close(load: Callable[..., Servable]) -> None:
    model = load()
    async with started() as line:
        line.abort("the server stops", "draining")
        with pytest.raises(Unavailable, match="the server stops") as refused:
            line.refuse_if_over()
        assert refused.value.reason == "draining"
        # The next image of a request whose others have just been turned away.
        with pytest.raises(Unavailable, match="the server stops"):
            await line.detect_canvas(
                lambda: pytest.fail("it was begun"),
                model,
                score=0.5,
                iou=0.5,
                deadline=time.monotonic() + 60.0,
                finish=as_it_is,
            )


async def test_pipeline_failing_canvas_is_not_a_lost_device(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, odd = load(), Size(32, 4096)
    run = Detector.__call__

    def picky(self: Detector, canvases: Any, *args: Any, **kwargs: Any) -> list[Detections]:
        if canvases[0].shape[:2] == odd:
            raise RuntimeError("no kernel for this shape")
        return run(self, canvases, *args, **kwargs)

    monkeypatch.setattr(Detector, "__call__", picky)
    blank = Prepared(np.zeros((*odd, 3), dtype=np.uint8), Letterbox(odd, odd, odd))
    async with started() as line:
        with pytest.raises(InferenceFailed):
            await line.detect_canvas(
                lambda: blank,
                model,
                score=0.5,
                iou=0.5,
                deadline=time.monotonic() + 60.0,
                finish=as_it_is,
            )
        assert line.fatal is None
        assert isinstance(await detect(line, model, encoded(one_red())), Outcome)


async def test_pipeline_retries_reset_the_watchdog(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    renew = Worker.renew

    def counted(self: Worker[Any]) -> None:
        steps.append(1)
        renew(self)

    monkeypatch.setattr(Worker, "renew", counted)
    model = load(poison=True)
    async with started(Policy(max_batch_size=3, max_delay=0.2)) as line:
        await asyncio.gather(
            *(detect(line, model, POISON) for _ in range(3)), return_exceptions=True
        )
    # The batch, each image, and after each the question whether the device still works.
    assert len(steps) == 7


async def test_pipeline_lost_device_reason_hides_paths_and_hosts(
    load: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()

    def dead(self: Detector, *args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "Non-zero status code. /onnxruntime_src/core/cuda_call.cc:129 CudaCall CUDA failure "
            "700: an illegal memory access was encountered ; GPU=0 ; hostname=inner ; file=/x.cc"
        )

    async with started() as line:
        monkeypatch.setattr(Detector, "__call__", dead)
        with pytest.raises(Unavailable) as refused:
            await detect(line, model, encoded(one_red()))
    assert "CUDA failure 700: an illegal memory access was encountered" in str(refused.value)
    assert "/" not in str(refused.value)
    assert "inner" not in str(refused.value)
