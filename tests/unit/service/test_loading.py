"""The loader's thread, and what a load leaves behind."""

from __future__ import annotations

import logging
import threading

import pytest

from service.detector import batch_buckets
from service.loading import Loader

SECONDS = 60.0


def test_a_job_that_fails_keeps_no_other_from_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    order: list[int] = []
    done = threading.Event()
    loader = Loader()
    loader.submit(lambda: order.append(1))
    loader.submit(lambda: order.append(2 // 0))
    loader.submit(lambda: order.append(3))
    loader.submit(done.set)
    with caplog.at_level(logging.ERROR):
        loader.start()
        assert done.wait(SECONDS)
    loader.close(SECONDS)
    assert order == [1, 3]
    assert "ZeroDivisionError" in caplog.text


def test_closing_does_not_wait_for_ever() -> None:
    go = threading.Event()
    loader = Loader()
    loader.start()
    loader.submit(lambda: assert_waited(go))
    loader.close(0.01)
    go.set()
    loader.close(SECONDS)


def assert_waited(go: threading.Event) -> None:
    assert go.wait(SECONDS)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_batches_to_warm(largest: int, sizes: list[int]) -> None:
    assert batch_buckets(largest) == sizes
