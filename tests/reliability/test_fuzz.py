"""A short run of benchmarks/fuzz.py: mutated pictures and malformed forms, each with its seed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks import fuzz
from tests.reliability.conftest import Serve


def test_bodies_are_repeatable() -> None:
    (alone,) = fuzz.cases(1, 17, 1)
    assert list(fuzz.cases(1, 0, 20))[17] == alone
    assert list(fuzz.cases(2, 17, 1)) != [alone]


def test_no_body_is_answered_with_an_error_of_the_server(
    serve: Serve, quick_models: Path, tmp_path: Path
) -> None:
    process = serve(quick_models)
    chosen = fuzz.cases(1, 0, 250)
    report = asyncio.run(
        fuzz.run(f"http://127.0.0.1:{process.port}", chosen, clients=4, keep=tmp_path / "kept")
    )
    assert report.findings == []
    assert sum(report.statuses.values()) == 250
    assert {200, 400, 415} <= report.statuses.keys(), "some are good, some broken, some no picture"
    log = process.log.read_text()
    assert "Traceback" not in log
    assert "nobody foresaw" not in log
