"""The rate limit, and who is told apart from whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import DataError, RateLimited, Unauthorized
from service.http.auth import rate_limit
from service.http.auth.gate import Gate
from service.http.auth.keys import Key, KeyStore, new_key
from service.http.auth.rate_limit import RateLimiter


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The limiter's clock; its only entry is the time."""
    now = [1e6]
    monkeypatch.setattr(rate_limit.time, "monotonic", lambda: now[0])
    return now


def passed(limiter: RateLimiter, caller: str, calls: int) -> int:
    count = 0
    for _ in range(calls):
        try:
            limiter.take(caller)
        except RateLimited:
            continue
        count += 1
    return count


@pytest.mark.parametrize(
    ("rate", "worth", "period"), [("3/s", 3, 1), ("10/s", 10, 1), ("7/m", 7, 60), ("1/h", 1, 3600)]
)
def test_rate_limit_allows_a_period_at_once_then_the_rate(
    seconds: list[float], rate: str, worth: int, period: float
) -> None:
    limiter = RateLimiter(rate)
    assert passed(limiter, "a", worth + 5) == worth
    seconds[0] += period / worth
    assert passed(limiter, "a", 5) == 1
    seconds[0] += period * 10
    assert passed(limiter, "a", worth + 5) == worth, "a bucket holds no more than one period"


def test_rate_limit_allows_a_request_after_retry_after(seconds: list[float]) -> None:
    limiter = RateLimiter("2/m")
    assert passed(limiter, "a", 2) == 2
    seconds[0] += 7
    with pytest.raises(RateLimited, match="2/m") as raised:
        limiter.take("a")
    wait = raised.value.retry_after
    assert wait == pytest.approx(23)
    seconds[0] += wait - 0.1
    assert passed(limiter, "a", 1) == 0
    seconds[0] += 0.1
    assert passed(limiter, "a", 2) == 1


def test_rate_limit_is_for_each_client(seconds: list[float]) -> None:
    limiter = RateLimiter("2/s")
    assert passed(limiter, "a", 9) == 2
    assert passed(limiter, "b", 9) == 2


def test_rate_limit_drops_the_least_recent_client(seconds: list[float]) -> None:
    limiter = RateLimiter("2/h")
    assert passed(limiter, "busy", 2) == 2
    for number in range(30_000):
        limiter.take(str(number))
        if number % 5000 == 0:
            assert passed(limiter, "busy", 1) == 0
    assert len(limiter) == 10_000


@pytest.mark.parametrize("rate", ["", "5", "5/", "/s", "0/s", "-1/s", "5/d", "5 / s", "5/s\n"])
def test_rate_limit_rejects_malformed_rates(rate: str) -> None:
    with pytest.raises(DataError, match="100/s"):
        RateLimiter(rate)


def test_gate_without_keys_accepts_every_request() -> None:
    assert Gate(None, None).enter([], "192.0.2.1") is None


def test_gate_without_keys_limits_by_address(seconds: list[float]) -> None:
    gate = Gate(None, "1/h")
    for address in ("192.0.2.1", "192.0.2.2", "2001:db8:0:1::1", "2001:db8:0:2::1", ""):
        gate.enter([], address)
    for same in (
        "192.0.2.1",
        "::ffff:192.0.2.2",
        "2001:db8:0:1:ffff::7",
        "2001:db8:0:2::1%eth0",
        "no address",
    ):
        with pytest.raises(RateLimited):
            gate.enter(["unused"], same)


def test_gate_with_keys_ignores_addresses(tmp_path: Path, seconds: list[float]) -> None:
    path = tmp_path / "keys.json"
    camera, robot = (new_key(path, name, admin=False) for name in ("camera", "robot"))
    gate = Gate(KeyStore(path), "1/h")
    with pytest.raises(Unauthorized, match="Authorization: Bearer KEY"):
        gate.enter([], "192.0.2.1")
    for _ in range(50):
        with pytest.raises(Unauthorized, match="none of this service's"):
            gate.enter(["rs_wrong"], "192.0.2.1")
    assert gate.enter([camera], "192.0.2.1") == Key("camera", admin=False)
    assert gate.enter(["rs_wrong", robot], "192.0.2.1") == Key("robot", admin=False)
    with pytest.raises(RateLimited):
        gate.enter([camera], "192.0.2.2")
