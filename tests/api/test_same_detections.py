"""One image, one answer: by every way in, alone and in company, over HTTP and offline."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from service import cli
from service.imaging.samples import draw_smear
from service.settings import bundled_models
from tests.api.conftest import Start
from tests.images import encoded
from tests.required_inputs import without_defaults

Detections = list[dict[str, Any]]


def assert_same(one: Detections, other: Detections, *, score_threshold: float) -> None:
    """Boxes within 0.5 px and scores within 1e-3, detections at the threshold aside."""
    one, other = (
        [each for each in found if each["score"] > score_threshold + 1e-3] for found in (one, other)
    )
    assert [each["label"] for each in one] == [each["label"] for each in other]
    for a, b in zip(one, other, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-3)
        assert list(a["box"].values()) == pytest.approx(list(b["box"].values()), abs=0.5)


async def all_ways(client: httpx.AsyncClient, contents: list[bytes]) -> list[list[Detections]]:
    """For each way, the detections of every image."""
    query = {"score_threshold": 0.3}
    raw, form, as_json = [], [], []
    for content in contents:
        text = base64.b64encode(content).decode()
        for found, options in (
            (raw, {"content": content}),
            (form, {"files": {"file": content}}),
            (as_json, {"json": {"image": text}}),
        ):
            answer = await client.post("/v1/detect", params=query, **options)  # type: ignore[arg-type]
            found.append(answer.json()["detections"])
    files = [("files", content) for content in contents]
    answer = await client.post("/v1/detect/batch", params=query, files=files)
    batch = [each["detections"] for each in answer.json()["results"]]
    answer = await client.post(
        "/v1/detect/batch", params=query, files=files, headers={"Accept": "application/x-ndjson"}
    )
    lines = sorted(map(json.loads, answer.text.splitlines()), key=lambda line: line["index"])
    return [raw, form, as_json, batch, [line["detections"] for line in lines]]


def offline(contents: list[bytes], models: Path, folder: Path) -> list[Detections]:
    for number, content in enumerate(contents):
        (folder / f"{number:03}.jpg").write_bytes(content)
    result = CliRunner().invoke(
        cli.retinaserve,
        ["detect", str(folder), "--score-threshold", "0.3", "--device", "cpu"],
        env={"RETINASERVE_MODELS_DIR": str(models)},
    )
    assert result.exit_code == 0, result.output
    return [each["detections"] for each in json.loads(result.stdout)["results"]]


async def check(
    contents: list[bytes], start: Start, models: Path, folder: Path
) -> list[Detections]:
    # Batches on purpose: on a CPU the default would be one image at a time.
    async with start(models_dir=models, max_batch_size=4, max_queue_delay_ms=20) as client:
        ways = await all_ways(client, contents)
    ways.append(offline(contents, models, folder))
    assert any(ways[0]), "nothing was found anywhere, so nothing was compared"
    for way in ways[1:]:
        for one, other in zip(ways[0], way, strict=True):
            assert_same(one, other, score_threshold=0.3)
    return ways[0]


async def test_every_route_gives_the_same_detections_on_drawn_images(
    start: Start, tmp_path: Path
) -> None:
    sizes = [(640, 480), (480, 640), (640, 480), (500, 500), (1280, 960)]
    contents = [
        encoded(draw_smear(seed, width=width, height=height)[0], "JPEG", quality=90)
        for seed, (width, height) in enumerate(sizes)
    ]
    await check(contents, start, bundled_models(), tmp_path)


async def test_a_file_of_required_inputs_gives_the_same_detections(
    start: Start, tmp_path: Path
) -> None:
    contents = [encoded(draw_smear(1, width=500, height=400)[0]), encoded(draw_smear(2)[0])]
    (bundled,) = bundled_models().glob("*/*/model.onnx")
    required = tmp_path / "models" / "blood-cells" / "1" / "model.onnx"
    required.parent.mkdir(parents=True)
    required.write_bytes(without_defaults(bundled.read_bytes()))
    (tmp_path / "images").mkdir()
    found = await check(contents, start, tmp_path / "models", tmp_path / "images")
    expected = await check(contents, start, bundled_models(), tmp_path / "images")
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, score_threshold=0.3)


async def test_every_route_gives_the_same_detections_on_real_images(
    start: Start, bccd: Path, tmp_path: Path
) -> None:
    paths = sorted((bccd / "JPEGImages").glob("*.jpg"))[:6]
    await check([path.read_bytes() for path in paths], start, bundled_models(), tmp_path)
