"""The queue: order, equal keys, expiry, delay, bounds, many threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from service.engine.batch_queue import URGENT_TURNS, BatchQueue, Policy, Urgency

FAR = float("inf")


@dataclass(eq=False)
class Item:
    number: int
    key: str = "a"
    deadline: float = FAR
    abandoned: bool = False
    urgency: Urgency = Urgency.INTERACTIVE
    seconds: float = 0.0


def numbers(batch: list[Item]) -> list[int]:
    return [item.number for item in batch]


def drained(queue: BatchQueue[Item]) -> list[list[Item]]:
    queue.close()
    batches = []
    while batch := queue.take():
        batches.append(batch)
    return batches


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_queue_batches_equal_keys_oldest_first() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=3))
    for number, key in enumerate("abababaab"):
        queue.push(Item(number, key))
    assert [numbers(queue.take()) for _ in range(4)] == [[0, 2, 4], [1, 3, 5], [6, 7], [8]]
    assert len(queue) == 0


def test_queue_with_batch_size_one_is_fifo() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    for number, key in enumerate("abcabc"):
        queue.push(Item(number, key))
    assert [numbers(batch) for batch in drained(queue)] == [[0], [1], [2], [3], [4], [5]]


def test_queue_drops_expired_and_cancelled_items() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=8))
    now = time.monotonic()
    queue.push(Item(0, deadline=now - 1))
    queue.push(Item(1))
    queue.push(Item(2, abandoned=True))
    queue.push(Item(3, deadline=now + 60))
    queue.push(Item(4, key="b", deadline=now - 1))
    queue.push(Item(5, key="c"))
    assert numbers(queue.take()) == [1, 3]
    assert numbers(queue.take()) == [5], "a lane of nothing but expired items is no batch"
    assert len(queue) == 0


def test_queue_expired_items_take_no_batch_places() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=2))
    for number in range(4):
        queue.push(Item(number, deadline=FAR if number % 2 else 0.0))
    assert numbers(queue.take()) == [1, 3]


def test_queue_cancel_during_take_is_not_the_end() -> None:
    class Flickering(Item):
        """Abandoned from the second look on, as when its client goes just then."""

        looks = 0

        def __getattribute__(self, name: str) -> object:
            if name != "abandoned":
                return super().__getattribute__(name)
            self.looks += 1
            return self.looks > 1

    queue: BatchQueue[Item] = BatchQueue(Policy())
    queue.push(Flickering(0))
    queue.push(Item(1))
    assert numbers(queue.take()) == [1]


def test_queue_remove_takes_only_waiting_items() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=8))
    items = [Item(number) for number in range(3)]
    for item in items:
        queue.push(item)
    assert queue.remove(items[1])
    assert not queue.remove(items[1])
    assert not queue.remove(Item(9, key="never seen"))
    assert len(queue) == 2
    assert numbers(queue.take()) == [0, 2]
    assert not queue.remove(items[0])


def test_queue_without_delay_never_waits() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=8, max_delay=0.0))
    queue.push(Item(0))
    started = time.monotonic()
    assert numbers(queue.take()) == [0]
    assert time.monotonic() - started < 0.5


def test_queue_delay_fills_or_releases_a_batch() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=3, max_delay=0.2))
    started = time.monotonic()
    queue.push(Item(0))
    batches: list[list[Item]] = []
    taker = in_thread(lambda: batches.append(queue.take()))
    time.sleep(0.05)
    queue.push(Item(1))
    taker.join(10)
    assert numbers(batches[0]) == [0, 1]
    assert time.monotonic() - started >= 0.2
    for number in range(3):
        queue.push(Item(number))
    started = time.monotonic()
    assert numbers(queue.take()) == [0, 1, 2]
    assert time.monotonic() - started < 0.15, "a full batch does not wait"


def test_queue_delay_full_lane_overtakes_a_waiting_one() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=2, max_delay=30.0))
    queue.push(Item(0, "slow"))
    queue.push(Item(1, "full"))
    queue.push(Item(2, "full"))
    assert numbers(queue.take()) == [1, 2]
    assert [numbers(batch) for batch in drained(queue)] == [[0]], "closing ends the wait"


def test_queue_close_wakes_takers_and_refuses_items() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    results: list[list[Item]] = []
    takers = [in_thread(lambda: results.append(queue.take())) for _ in range(3)]
    queue.close()
    for taker in takers:
        taker.join(10)
    assert results == [[], [], []]
    queue.push(Item(0))
    assert len(queue) == 0
    assert queue.take() == []


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40),
    st.integers(1, 5),
    st.sets(st.integers(0, 39)),
)
def test_queue_returns_every_live_item_once_in_order(
    arrivals: list[tuple[str, bool]], size: int, removed: set[int]
) -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=size))
    items = [Item(number, key, FAR if live else 0.0) for number, (key, live) in enumerate(arrivals)]
    for item in items:
        queue.push(item)
    for item in items:
        if item.number in removed:
            assert queue.remove(item)
    batches = drained(queue)
    assert all(1 <= len(batch) <= size for batch in batches)
    assert all(len({item.key for item in batch}) == 1 for batch in batches)
    out = [item.number for batch in batches for item in batch]
    live = [item for item in items if item.deadline == FAR and item.number not in removed]
    assert sorted(out) == [item.number for item in live]
    for key in "abc":
        of_key = [item.number for batch in batches for item in batch if item.key == key]
        assert of_key == sorted(of_key), "first in, first out within a key"
    heads = [batch[0].number for batch in batches]
    assert heads == sorted(heads), "the oldest of all goes first"
    assert len(queue) == 0


def test_queue_is_thread_safe() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=4))
    taken: Counter[int] = Counter()
    removed: Counter[int] = Counter()
    lock = threading.Lock()

    def take() -> None:
        while batch := queue.take():
            with lock:
                taken.update(numbers(batch))

    def produce(first: int) -> None:
        for number in range(first, first + 300):
            item = Item(number, key="abc"[number % 3])
            queue.push(item)
            if number % 7 == 0 and queue.remove(item):
                with lock:
                    removed[number] += 1

    takers = [in_thread(take) for _ in range(3)]
    producers = [in_thread(lambda first=first: produce(first)) for first in range(0, 1200, 300)]
    for thread in producers:
        thread.join(30)
    queue.close()
    for thread in takers:
        thread.join(30)
    assert taken + removed == Counter(range(1200))


def bulk(number: int, key: str = "a") -> Item:
    return Item(number, key, urgency=Urgency.BULK)


def test_queue_interactive_overtakes_bulk() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    for item in (bulk(0), bulk(1), Item(2), Item(3)):
        queue.push(item)
    assert [numbers(batch) for batch in drained(queue)] == [[2], [3], [0], [1]]


def test_queue_bulk_is_not_starved() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    queue.push(bulk(-1))
    queue.push(bulk(-2))
    taken = []
    for number in range(3 * (URGENT_TURNS + 1)):
        queue.push(Item(number))
        taken += numbers(queue.take())
    turns = [place for place, number in enumerate(taken) if number < 0]
    assert turns == [URGENT_TURNS, 2 * URGENT_TURNS + 1]


def test_queue_bulk_earns_no_turns_while_absent() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    for number in range(3 * URGENT_TURNS):
        queue.push(Item(number))
        queue.take()
    for item in (bulk(-1), Item(100), Item(101)):
        queue.push(item)
    assert [numbers(batch) for batch in drained(queue)] == [[100], [101], [-1]]


def test_queue_fills_batches_with_bulk() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=3))
    for item in (bulk(0), bulk(1, "b"), Item(2), bulk(3), bulk(4)):
        queue.push(item)
    assert [numbers(batch) for batch in drained(queue)] == [[2, 0, 3], [1], [4]]


def test_queue_lanes_report_waiting_items() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    for item in (bulk(0), Item(1, seconds=0.5), Item(2, seconds=0.25), Item(3, "b")):
        queue.push(item)
    assert sorted(queue.lanes()) == [
        ("a", Urgency.INTERACTIVE, 2, 0.75),
        ("a", Urgency.BULK, 1, 0.0),
        ("b", Urgency.INTERACTIVE, 1, 0.0),
    ]


def test_queue_short_taker_leaves_long_items() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(), takes_long=lambda key: key == "long")
    short, both = [], []

    def take(into: list[int], *, short_only: bool) -> None:
        while batch := queue.take(short_only=short_only):
            into.extend(numbers(batch))

    threads = [
        in_thread(lambda: take(short, short_only=True)),
        in_thread(lambda: take(both, short_only=False)),
    ]
    for number in range(200):
        queue.push(Item(number, "long" if number % 3 else "a"))
    queue.close()
    for thread in threads:
        thread.join(30)
    assert sorted(short + both) == list(range(200)), "a wake-up was lost"
    assert all(number % 3 == 0 for number in short)


def test_queue_long_item_does_not_block_short_ones() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(), takes_long=lambda key: key == "long")
    for number, key in enumerate(("long", "long", "a")):
        queue.push(Item(number, key))
    assert numbers(queue.take(short_only=True)) == [2]
    assert numbers(queue.take()) == [0]


def test_queue_sizing_gets_count_and_oldest_age() -> None:
    asked = []

    def two(key: object, waiting: int, left: float) -> int:
        asked.append((key, waiting, round(left)))
        return 2

    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=4), two)
    for number in range(3):
        queue.push(Item(number, deadline=time.monotonic() + 60))
    queue.push(bulk(3))
    assert [numbers(batch) for batch in drained(queue)] == [[0, 1], [2, 3]]
    assert asked == [("a", 4, 60), ("a", 2, 60)]


def test_queue_sizing_is_clamped_to_the_policy() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=2), lambda *_: 0)
    queue.push(Item(0))
    assert numbers(queue.take()) == [0]
    queue = BatchQueue(Policy(max_batch_size=2), lambda *_: 9)
    for number in range(3):
        queue.push(Item(number))
    assert numbers(queue.take()) == [0, 1]


def test_queue_places_bound_concurrent_batches() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(), places=1)
    for number in range(3):
        queue.push(Item(number))
    assert numbers(queue.take()) == [0]
    taken: list[int] = []
    taker = in_thread(lambda: taken.extend(numbers(queue.take())))
    time.sleep(0.02)
    assert taken == []
    queue.done()
    taker.join(60)
    assert taken == [1]


def test_queue_offer_runs_inline_when_idle() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=2), places=1)
    assert queue.offer(Item(0))
    assert not queue.offer(Item(1))
    assert not queue.offer(Item(2))
    # In the place of the first, and together as they may be.
    assert numbers(queue.done_for()) == [1, 2]
    assert queue.done_for() == []
    queue.push(Item(3))
    # Whoever waits goes first, though a place is free.
    assert not queue.offer(Item(4))
    assert numbers(queue.take()) == [3, 4]


def test_queue_offer_respects_delay_and_close() -> None:
    slow: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=2, max_delay=60.0), places=1)
    assert not slow.offer(Item(0))
    assert not slow.offer(Item(1))
    assert numbers(slow.take()) == [0, 1]
    closed: BatchQueue[Item] = BatchQueue(Policy(), places=1)
    closed.close()
    assert not closed.offer(Item(0))
    assert closed.take() == []


def test_queue_without_places_uses_takers_only() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy())
    assert not queue.offer(Item(0))
    assert numbers(queue.take()) == [0]


def test_queue_inline_and_takers_are_thread_safe() -> None:
    queue: BatchQueue[Item] = BatchQueue(Policy(max_batch_size=3), places=2)
    done: list[int] = []
    out, most, lock = 0, 0, threading.Lock()

    def work(batch: list[Item]) -> None:
        nonlocal out, most
        with lock:
            out += 1
            most = max(most, out)
        time.sleep(0.0002)
        with lock:
            out -= 1
            done.extend(numbers(batch))

    def produce(first: int) -> None:
        for number in range(first, first + 200):
            item = Item(number)
            batch = [item] if queue.offer(item) else []
            while batch:
                work(batch)
                batch = queue.done_for()

    def take() -> None:
        while batch := queue.take():
            work(batch)
            queue.done()

    takers = [in_thread(take) for _ in range(2)]
    producers = [in_thread(lambda first=first: produce(first)) for first in (0, 200, 400)]
    for producer in producers:
        producer.join(60)
    queue.close()
    for taker in takers:
        taker.join(60)
    assert sorted(done) == list(range(600))
    assert most == 2
