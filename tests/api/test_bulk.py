"""What `retinaserve bulk` writes is what POST /v1/detect answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from service import cli
from service.imaging.samples import draw_smear
from service.settings import bundled_models
from tests.api.conftest import Start
from tests.images import BLUE, GREEN, RED, encoded, noise, rotated, sixteen_bit, squares

SQUARES = squares((3, 16, RED), (64, 40, GREEN), (90, 3, BLUE), size=(133, 87))
IMAGES = {
    "plain.png": encoded(SQUARES),
    "lossy.jpg": encoded(SQUARES, "JPEG", quality=60),
    "turned.png": rotated(SQUARES, 6),
    "grey.png": sixteen_bit(SQUARES),
    "large.webp": encoded(SQUARES.resize((399, 261)), "WEBP"),
    "noise.jpg": encoded(noise((300, 200)), "JPEG"),
    "cut.jpg": encoded(noise((300, 200)), "JPEG")[:-900],
    "text.jpg": b"text",
}
QUERIES = [
    {},
    {"score_threshold": "0.2", "iou_threshold": "0.1", "max_detections": "7"},
    {"classes": "green,blue", "tile": "auto"},
]


def compare(start: Start, tmp_path: Path, models: Path, query: dict[str, str]) -> int:
    """How many detections were compared."""
    options = [word for name, value in query.items() for word in (f"--{name}", value)]
    options = [option.replace("_", "-") if option[:2] == "--" else option for option in options]
    given = ["--output", str(tmp_path / "out"), "--device", "cpu", "--models", str(models)]
    result = CliRunner().invoke(
        cli.retinaserve,
        ["bulk", str(tmp_path / "in"), *given, "--part-size", "5", *options],
        env={"RETINASERVE_CPU_INFERENCES": "1"},
    )
    assert result.exit_code == 0, result.output
    rows = pq.read_table(tmp_path / "out").to_pylist()
    contents = [Path(row["path"]).read_bytes() for row in rows]

    async def ask() -> list[httpx.Response]:
        async with start(models_dir=models) as client:
            # As forms: to raw bodies that are no images the route adds how to send one.
            return [
                await client.post("/v1/detect", params=query, files={"file": content})
                for content in contents
            ]

    return sum(map(same, rows, asyncio.run(ask())))


def same(row: dict[str, Any], answer: httpx.Response) -> int:
    """How many detections both have; they are equal."""
    document = answer.json()
    if answer.status_code != 200:
        slug = document["type"].rpartition(":")[2]
        assert row["error"] == f"{slug}: {document['detail']}"
        return 0
    assert row["error"] is None
    assert document["image"]["width"] == row["width"]
    assert document["image"]["height"] == row["height"]
    found = document["detections"]
    assert [each["label"] for each in found] == row["labels"]
    assert [each["class_id"] for each in found] == row["class_ids"]
    scores = np.array([each["score"] for each in found], np.float32)
    assert scores.tolist() == row["scores"]
    boxes = np.array([[*each["box"].values()] for each in found], np.float32)
    assert boxes.tolist() == row["boxes"]
    return len(found)


@pytest.mark.parametrize("query", QUERIES)
def test_bulk_rows_equal_detect_responses(
    start: Start, tmp_path: Path, repository: Path, query: dict[str, str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, content in IMAGES.items():
        (tmp_path / "in" / name).write_bytes(content)
    assert compare(start, tmp_path, repository, query) >= 5


def test_bulk_rows_equal_detect_responses_of_the_bundled_model(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(2):
        draw_smear(seed)[0].save(tmp_path / "in" / f"{seed}.jpg", quality=90)
    assert compare(start, tmp_path, bundled_models(), {}) >= 20
