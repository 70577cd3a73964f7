"""What batches cost, learnt from what they took."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.cost import BatchCost, Costs, ThreadCosts
from service.imaging.canvas import Size

SMALL, LARGE = Size(96, 128), Size(960, 1280)


def learnt(per_image: float, per_batch: float, sizes: tuple[int, ...] = (1, 4)) -> BatchCost:
    cost = BatchCost()
    for size in sizes:
        cost.observe(size, per_image * size + per_batch)
    return cost


def test_cost_is_zero_without_observations() -> None:
    cost = BatchCost()
    assert (cost.seconds(5), cost.fastest) == (0.0, 0.0)
    assert cost.best_batch(5, most=8, left=0.1) == 5


def test_cost_line_is_fitted_and_extrapolated() -> None:
    cost = learnt(0.010, 0.030)
    assert cost.per_image == pytest.approx(0.010)
    assert cost.per_batch == pytest.approx(0.030)
    assert cost.seconds(16) == pytest.approx(0.190)


def test_cost_of_one_size_is_a_line_through_the_origin() -> None:
    assert learnt(0.010, 0.030, (4,)).seconds(8) == pytest.approx(0.140)


def test_cost_of_an_observed_size_is_its_own() -> None:
    cost = BatchCost()
    for size, seconds in ((1, 1.0), (2, 1.9), (4, 8.0)):
        cost.observe(size, seconds)
    assert cost.seconds(2) == 1.9


def test_cost_follows_a_slower_device() -> None:
    cost = learnt(0.010, 0.0, (1,))
    for _ in range(60):
        cost.observe(1, 0.030)
    assert cost.seconds(1) == pytest.approx(0.030, rel=0.01)
    assert cost.fastest == pytest.approx(0.010), "a bound from below stays one"


def test_cost_ignores_a_single_pause() -> None:
    cost = learnt(0.010, 0.0, (1,))
    cost.observe(1, 5.0)
    assert cost.seconds(1) < 0.014


@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.floats(1e-6, 100.0)),
        min_size=1,
        max_size=30,
    )
)
def test_cost_is_nonnegative_and_monotonic(
    seen: list[tuple[int, float]],
) -> None:
    cost = BatchCost()
    for size, seconds in seen:
        cost.observe(size, seconds)
    assert cost.per_image >= 0
    assert cost.per_batch >= 0
    assert cost.seconds(65) > 0
    assert cost.seconds(200) >= cost.seconds(65)
    assert 0 < cost.fastest <= min(seconds / size for size, seconds in seen)


def test_batch_size_grows_only_where_it_pays() -> None:
    assert learnt(0.010, 0.030).best_batch(9, most=8, left=9.0) == 8
    assert learnt(0.010, 0.030).best_batch(3, most=8, left=9.0) == 3
    assert learnt(0.040, 0.001).best_batch(9, most=8, left=9.0) == 1


def test_batch_size_respects_the_oldest_deadline() -> None:
    cost = learnt(0.010, 0.030)
    assert cost.best_batch(8, most=8, left=0.075) == 4
    assert cost.best_batch(8, most=8, left=0.001) == 1


def test_batch_size_retries_larger_batches() -> None:
    cost = learnt(0.040, 0.0)
    sizes = [cost.try_batch(9, most=8, left=9.0) for _ in range(200)]
    assert set(sizes) == {1, 8}
    assert 1 <= sizes.count(8) <= 5


def test_cost_of_an_unseen_canvas_is_estimated() -> None:
    costs = Costs()
    assert costs.of(SMALL).seconds(1) == 0.0
    assert costs.fastest == 0.0
    costs.observe(SMALL, 1, 0.01)
    costs.observe(LARGE, 1, 0.10)
    assert costs.of(SMALL).seconds(1) == 0.01
    assert costs.of(Size(32, 32)).seconds(1) == 0.01, "as the smallest that is larger"
    assert costs.of(Size(9600, 9600)).seconds(1) == 0.10, "as the most recent"
    assert costs.of().seconds(1) == 0.10
    assert costs.fastest == 0.01


def test_cost_is_thread_safe() -> None:
    costs = Costs()

    def learn(first: int) -> None:
        for turn in range(500):
            costs.observe(Size(32 * (1 + (first + turn) % 7), 32), 1 + turn % 3, 0.01)
            costs.of().seconds(2)
            assert costs.fastest > 0

    threads = [threading.Thread(target=learn, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert costs.of(Size(32, 32)).seconds(1) == pytest.approx(0.01)


def test_cost_of_many_images_sums_batches() -> None:
    cost = learnt(0.010, 0.030, (1, 8))
    assert cost.lasting(8, most=8) == pytest.approx(0.110), "one batch, and none of no images"
    assert cost.lasting(19, most=8) == pytest.approx(2 * 0.110 + 0.060)
    assert cost.lasting(3, most=1) == pytest.approx(3 * 0.040)
    alone = learnt(0.040, 0.001)
    assert alone.lasting(5, most=8) == pytest.approx(5 * 0.041), "they do not pay"


def test_cost_bound_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs()
    # As when a model is warmed up while others keep the machine busy.
    costs.observe(SMALL, 1, 4.0)
    assert costs.fastest == 4.0
    monkeypatch.setattr("service.engine.cost._STALE_SECONDS", 0.0)
    assert costs.fastest == 0.0
    costs.observe(SMALL, 1, 0.5)
    monkeypatch.undo()
    assert costs.fastest == 0.5


def test_cost_table_is_bounded() -> None:
    costs = Costs()
    for side in range(1, 1001):
        costs.observe(Size(32 * side, 32), 1, 0.001 * side)
    assert len(costs._costs) <= 256
    assert costs.fastest == 0.001, "even when the canvas is forgotten"
    assert costs.of().seconds(1) == 1.0
    assert costs.of(Size(32 * 999, 32)).seconds(1) == pytest.approx(0.999)


def test_work_cost_depends_on_kind_and_size() -> None:
    costs = ThreadCosts()
    for _ in range(50):
        costs.observe("png rgb 8", 980_000, 0.02)
        costs.observe("png rgba 8", 980_000, 0.10)
    assert costs.seconds("png rgb 8", 48_980_000) == pytest.approx(0.98, rel=0.01)
    assert costs.seconds("png rgba 8", 48_980_000) == pytest.approx(4.9, rel=0.01)
    assert costs.seconds("png rgb 8", 0) < 0.001


def test_one_file_does_not_decide_on_all_of_its_kind() -> None:
    costs = ThreadCosts()
    costs.observe("png rgba 8", 256, 1.0)
    assert costs.seconds("png rgba 8", 640 * 480) < 0.1


def test_work_cost_weighs_large_images_more() -> None:
    costs = ThreadCosts()
    for _ in range(50):
        costs.observe("png rgba 8", 1024, 0.0002)
    costs.observe("png rgba 8", 49_000_000, 1.2)
    for _ in range(5):
        costs.observe("png rgba 8", 1024, 0.0002)
    assert costs.seconds("png rgba 8", 49_000_000) == pytest.approx(1.2, rel=0.2)


def test_work_cost_ignores_a_single_pause() -> None:
    costs = ThreadCosts()
    for _ in range(20):
        costs.observe("jpeg 3 1/1", 480_000, 0.005)
    costs.observe("jpeg 3 1/1", 480_000, 5.0)
    assert costs.seconds("jpeg 3 1/1", 480_000) < 0.010


def test_work_cost_fades_without_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = ThreadCosts()
    costs.observe("png grey 16", 1_000_000, 3.0)
    before = costs.seconds("png grey 16", 49_000_000)
    later = time.monotonic() + 300.0
    monkeypatch.setattr("service.engine.cost.time", SimpleNamespace(monotonic=lambda: later))
    assert costs.seconds("png grey 16", 49_000_000) == pytest.approx(before / 10, rel=0.01)


def test_work_cost_has_a_default() -> None:
    costs = ThreadCosts()
    large = 49_000_000
    assert 0.1 < costs.seconds("jpeg 3 1/8", large) < 1.0
    assert 1.0 < costs.seconds("png grey 16", large) < 5.0
    assert costs.seconds("something else", large) > 1.0
