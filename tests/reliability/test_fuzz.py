"""A short run of benchmarks/fuzz.py: requests of every kind, valid and broken, each by its seed."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.reliability.conftest import ROOT, Serve
from tests.reliability.test_grpc import free_port


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fuzz")


def test_cases_are_repeatable(fuzz: ModuleType) -> None:
    # The same whatever was made before: no case changes what another is made of.
    several = list(fuzz.cases(1, 0, 120, model="tiny"))
    for number in range(100, 120):
        assert list(fuzz.cases(1, number, 1, model="tiny")) == [several[number]]
    assert several[17] != next(fuzz.cases(2, 17, 1, model="tiny"))


def test_no_request_fails_the_server_or_takes_its_memory(
    fuzz: ModuleType, serve: Serve, quick_models: Path, tmp_path: Path
) -> None:
    grpc_port = free_port()
    process = serve(quick_models, grpc_port=grpc_port, decode_memory_bytes=fuzz.DECODE_MEMORY_BYTES)
    idle = process.resident()
    report = asyncio.run(
        fuzz.run(
            f"http://127.0.0.1:{process.port}",
            fuzz.cases(1, 0, 1200, model="tiny"),
            grpc_address=f"127.0.0.1:{grpc_port}",
            clients=4,
            keep=tmp_path / "kept",
        )
    )
    assert report.findings == []
    assert sum(report.statuses.values()) == 1200
    assert {"200", "400", "404", "413", "415", "422", "431"} <= report.statuses.keys()
    assert {"gRPC OK", "gRPC INVALID_ARGUMENT", "gRPC NOT_FOUND"} <= report.statuses.keys()
    assert fuzz.peak_bytes(process.popen.pid) - idle < fuzz.PEAK_BYTES
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "unhandled exception" not in log
