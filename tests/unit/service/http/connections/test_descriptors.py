"""Connections when file descriptors run short."""

from __future__ import annotations

import logging
import resource
from dataclasses import dataclass
from typing import Any, cast

import pytest

from service.http.connections import descriptors as module
from service.http.connections.descriptors import DescriptorLimit, ask_for_descriptors


@dataclass
class Connection:
    """One that is idle, or not."""

    idle_since: float | None
    there: bool = True

    def abort(self) -> None:
        self.there = False


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> DescriptorLimit:
    """Of a process that may have 1024 file descriptors."""
    monkeypatch.setattr(module, "descriptors", lambda: 1024)
    return DescriptorLimit(cast(Any, None))


def test_connections_are_kept_while_descriptors_are_left(limit: DescriptorLimit) -> None:
    others = [Connection(1.0)]
    assert limit.has_room(1024 - 65, others)
    assert others[0].there


def test_longest_idle_connections_are_closed(
    limit: DescriptorLimit, caplog: pytest.LogCaptureFixture
) -> None:
    others = [Connection(None), *(Connection(float(since)) for since in range(10, 0, -1))]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert limit.has_room(1024 - 64, [each for each in others if each.there])
    assert [each.idle_since for each in others if each.there] == [None, 10.0, 9.0]
    assert caplog.text.count("file descriptors") == 1, "and it is said once"


def test_more_connections_are_closed_where_many_are_idle(limit: DescriptorLimit) -> None:
    others = [Connection(float(since)) for since in range(6400)]
    assert limit.has_room(1024 - 64, others)
    assert sum(not each.there for each in others) == 100


def test_last_descriptors_are_for_probes(limit: DescriptorLimit) -> None:
    others = [Connection(None), Connection(1.0)]
    assert not limit.has_room(1024 - 32, others)
    assert not others[1].there
    assert not limit.has_room(1024 - 64, [Connection(None)]), "no connection is idle"


def test_a_quarter_of_few_descriptors_is_spared(
    limit: DescriptorLimit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "descriptors", lambda: 64)
    assert limit.has_room(64 - 17, [])
    assert not limit.has_room(64 - 16, [])


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ((1024, 4096), (4096, 4096)),
        ((1024, 1 << 20), (8192, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), (8192, resource.RLIM_INFINITY)),
        ((8192, 1 << 20), None),
        ((160, 160), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_descriptor_limit_is_raised(
    before: tuple[int, int], asked: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    ask_for_descriptors()
    assert limits == ([] if asked is None else [asked])
