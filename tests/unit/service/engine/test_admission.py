"""Who is let in: places, bytes, deadlines, and how careful predictions become."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from service.engine.admission import Caution, Places, refuse_late
from service.engine.batch_queue import Urgency
from service.errors import Unavailable


def test_admission_counts_and_frees_places() -> None:
    places = Places(2)
    with places.slot(), places.slot():
        assert places.held == 2
        with pytest.raises(Unavailable, match="2 images") as refused, places.slot():
            pytest.fail("there was no room")
        assert refused.value.reason == "queue-full"
        assert refused.value.retry_after > 0
    with pytest.raises(ZeroDivisionError), places.slot():
        raise ZeroDivisionError
    assert places.held == 0
    places.check()


def test_admission_counts_and_frees_bytes() -> None:
    places = Places(10, bytes_limit=100)
    with places.slot(60):
        with places.slot(40):
            assert places.bytes_held == 100
            with pytest.raises(Unavailable, match="100 bytes") as refused, places.slot(1):
                pytest.fail("there was no room")
            assert refused.value.reason == "queue-bytes"
        with places.slot(40):
            pass
    assert (places.held, places.bytes_held) == (0, 0)


def test_admission_lets_one_oversized_image_pass() -> None:
    places = Places(10, bytes_limit=100)
    with places.slot(500), pytest.raises(Unavailable), places.slot(1):
        pytest.fail("there was no room")


def test_admission_refusal_has_retry_after() -> None:
    places = Places(1, pause=lambda: 7.5)
    with places.slot(), pytest.raises(Unavailable) as refused, places.slot():
        pytest.fail("there was no room")
    assert refused.value.retry_after == 7.5


def test_admission_accepts_requests_that_meet_their_deadline() -> None:
    refuse_late(finish=1.0, left=1.0, alone=0.5)


def test_admission_refuses_late_requests_with_retry_after() -> None:
    with pytest.raises(Unavailable, match="expected in 3500 ms") as refused:
        refuse_late(finish=3.5, left=1.0, alone=0.5)
    assert refused.value.reason == "deadline"
    assert refused.value.retry_after == 2.5, "by then so much of the queue is done"


def test_admission_names_a_feasible_deadline() -> None:
    with pytest.raises(Unavailable, match="takes at least 500 ms here") as refused:
        refuse_late(finish=0.5, left=0.2, alone=0.5)
    assert refused.value.reason == "deadline-too-short"


def test_admission_caution_converges() -> None:
    caution, dice = Caution(), random.Random(0)
    late = 0
    for turn in range(40_000):
        # Long enough for the seconds that make short work no pattern to make no difference.
        actual = dice.uniform(50.0, 200.0)
        if turn >= 2_000:
            late += actual > caution.stretch(100.0)
        caution.observe(predicted=100.0, actual=actual)
    assert late / 38_000 < 0.004
    assert caution.ratio < 2.2, "and no more careful than that takes"


def test_admission_caution_decreases_within_bounds() -> None:
    caution = Caution()
    for _ in range(100):
        caution.observe(predicted=1.0, actual=100.0)
    assert caution.ratio == 4.0
    for _ in range(100_000):
        caution.observe(predicted=1.0, actual=0.1)
    assert caution.ratio == 1.0


def test_admission_caution_ignores_short_hiccups() -> None:
    caution = Caution()
    caution.observe(predicted=0.001, actual=0.005)
    assert caution.ratio < 1.1


def test_admission_bulk_leaves_places_for_single_images() -> None:
    places = Places(8)
    with ExitStack() as held:
        for _ in range(6):
            held.enter_context(places.slot(urgency=Urgency.BULK))
        with pytest.raises(Unavailable, match="6 of 8") as refused:
            held.enter_context(places.slot(urgency=Urgency.BULK))
        assert refused.value.reason == "queue-full"
        places.check()
        for _ in range(2):
            held.enter_context(places.slot())
        with pytest.raises(Unavailable, match="8 images"):
            places.check()
    for urgency in Urgency:
        places.check(urgency=urgency)


def test_admission_bulk_fits_the_smallest_queue() -> None:
    places = Places(1)
    with places.slot(urgency=Urgency.BULK), pytest.raises(Unavailable):
        places.check()
    assert places.held == 0


def test_admission_counts_request_bytes_until_it_ends() -> None:
    places = Places(10, bytes_limit=100)
    with places.body(70):
        assert (places.held, places.bytes_held) == (0, 70)
        with pytest.raises(Unavailable) as refused, places.body(40):
            pytest.fail("there was no room")
        assert refused.value.reason == "queue-bytes"
        with pytest.raises(Unavailable), places.slot(40):
            pytest.fail("there was no room")
        with places.slot(30):
            pass
    with places.body(500), places.slot():
        assert places.held == 1, "its own images have been counted"
    assert (places.held, places.bytes_held) == (0, 0)
