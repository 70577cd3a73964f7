"""docs/observability.md names what the service exports: all of it, and nothing else."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.http.auth.keys import new_key
from service.observability.logs import JsonFormatter
from tests.api.conftest import Start
from tests.images import encoded, one_red

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "observability.md"
ELSEWHERE = {"trace_id", "span_id", "exception", "code"}
"""Fields of lines that only traces, failures and gRPC write; their own tests see them."""


def rows(columns: int) -> list[list[str]]:
    """The cells of every table row with `columns` columns; a pipe within a cell is escaped."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in cells if len(row) == columns]


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


async def test_observability_page_lists_every_metric(start: Start, tmp_path: Path) -> None:
    async with start() as client:
        await client.post("/v1/detect", content=encoded(one_red()))
        await client.post("/v1/detect", content=b"")
        text = (await client.get("/metrics")).text
    exported = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(("process_", "python_")) or family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        exported[name] = (family.type, labels - {"le"})
    described = {name: (row[1], named(row[2])) for row in rows(5) for name in named(row[0])}
    assert described == exported


def test_observability_page_lists_every_503_reason() -> None:
    sources = (ROOT / "service").rglob("*.py")
    written = {word for path in sources for word in re.findall(r'reason="(\S+)"', path.read_text())}
    (cell,) = [row[3] for row in rows(5) if row[0] == "`retinaserve_refusals_total`"]
    assert written
    assert written <= named(cell)


async def test_observability_page_queries_use_existing_metrics() -> None:
    described = {name for row in rows(5) for name in named(row[0])}
    for row in rows(5):
        used = set(re.findall(r"retinaserve_\w+", row[4]))
        assert used, f"{row[0]} answers no question"
        for name in used:
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            assert {name, plain} & described, f"{row[0]} asks for {name}"


async def test_observability_page_lists_every_log_field(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    headers = {"X-API-Key": new_key(path, "lab", admin=False)}
    with caplog.at_level(logging.INFO, logger="retinaserve.access"):
        async with start(api_keys_file=path) as client:
            await client.post("/v1/detect", content=encoded(one_red()), headers=headers)
            await client.post("/v1/detect", content=b"", headers=headers)
    lines = [
        json.loads(JsonFormatter().format(record))
        for record in caplog.records
        if record.name == "retinaserve.access"
    ]
    written = {name for line in lines for name in line} | ELSEWHERE
    fields = {name for row in rows(2) for name in named(row[0]) if re.fullmatch(r"[a-z_]+", name)}
    spans = {"body", "decode", "queue", "inference", "postprocess"}
    assert fields - spans == written
