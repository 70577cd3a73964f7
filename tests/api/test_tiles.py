"""tile= on the API and --tile of the command: the same answer, bounded, and fair to others."""

from __future__ import annotations

import asyncio
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from service import cli
from service.http.schemas import BatchAnswer, DetectAnswer
from service.imaging.canvas import Size
from service.imaging.samples import Box, draw_smear
from service.runtime.artifact import read_artifact, scan_repository
from service.runtime.detector import Detections
from service.settings import bundled_models
from tests import tiny_model
from tests.api.conftest import Start
from tests.images import GREEN, RED, encoded, one_red, rotated, squares
from tests.matching import found, overlap

# The tiny model sees single squares in cells that it reads 16 pixels apart.
LOOSE = {"score_threshold": 0.25, "iou_threshold": 0.1}
MAGENTA = (255, 0, 255)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A tiny model whose tiles share 64 pixels, enough for a square."""
    root = tmp_path / "models"
    tiny_model.save(root, sizes=(Size(256, 256),))
    return root


def sparse(size: tuple[int, int] = (1000, 700)) -> tuple[Image.Image, set[tuple[int, int]]]:
    """Squares far apart, at odd places, and where they are."""
    places = {(x, y) for x in range(7, size[0] - 40, 137) for y in range(5, size[1] - 40, 101)}
    return squares(*((x, y, RED) for x, y in places), size=size), places


def nearest(answer: dict[str, Any], places: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The square that each box is closest to; its corner is at most 9 pixels away."""
    near = []
    for each in answer["detections"]:
        x, y = each["box"]["x1"], each["box"]["y1"]
        place = min(places, key=lambda at: abs(at[0] - x) + abs(at[1] - y))
        assert max(abs(place[0] - x), abs(place[1] - y)) <= 9
        near.append(place)
    return near


def offline(folder: Path, models: Path, *arguments: object) -> Any:
    result = CliRunner().invoke(
        cli.retinaserve,
        ["detect", str(folder), "--device", "cpu", *map(str, arguments)],
        env={"RETINASERVE_MODELS_DIR": str(models)},
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def samples(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


def service_of(client: httpx.AsyncClient) -> Any:
    return client._transport.app.state.service  # type: ignore[attr-defined]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never happened")


async def test_tiling_finds_small_objects(start: Start, models: Path) -> None:
    image, places = sparse()
    async with start(models_dir=models) as client:
        answer = await client.post("/v1/detect", content=encoded(image), params=LOOSE)
        assert answer.json()["detections"] == [], "four pixels are no square"
        assert "tiles" not in answer.json()["image"]
        answer = await client.post(
            "/v1/detect", content=encoded(image), params={**LOOSE, "tile": "auto"}
        )
    DetectAnswer.model_validate_json(answer.content, strict=True)
    # Columns and rows 192 apart at most: 5 x 4, and the whole.
    assert answer.json()["image"] == {"width": 1000, "height": 700, "tiles": 21}
    assert sorted(nearest(answer.json(), places)) == sorted(places), "each once"


async def test_tiling_leaves_small_images_alone(client: httpx.AsyncClient) -> None:
    for size in ((8, 8), (128, 96), (200, 150), (256, 192)):
        content = encoded(squares((32, 16, RED), (80, 40, GREEN), size=size), "JPEG")
        plain = (await client.post("/v1/detect", content=content)).json()
        for tile in ("auto", 4000):
            tiled = (await client.post(f"/v1/detect?tile={tile}", content=content)).json()
            assert tiled["detections"] == plain["detections"]
            assert tiled["image"] == {**plain["image"], "tiles": 1}


async def test_tiling_is_the_same_on_every_route(
    start: Start, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = [sparse()[0], one_red(), sparse((600, 900))[0], sparse((300, 1400))[0]]
    contents = [encoded(images[0], "JPEG"), *(encoded(image) for image in images[1:3])]
    contents.append(rotated(images[3], 6))
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    query = {"tile": "300", "score_threshold": 0.25}
    async with start(models_dir=models, max_batch_size=4, max_queue_delay_ms=5) as client:
        alone = [
            (await client.post("/v1/detect", content=content, params=query)).json()
            for content in contents
        ]
        files = [("files", content) for content in contents]
        batch = await client.post("/v1/detect/batch", files=files, params=query)
        lines = await client.post(
            "/v1/detect/batch",
            files=files,
            params=query,
            headers={"Accept": "application/x-ndjson"},
        )
    BatchAnswer.model_validate_json(batch.content, strict=True)
    streamed = sorted(map(json.loads, lines.text.splitlines()), key=lambda line: line["index"])
    local = offline(folder, models, "--tile", 300, "--score-threshold", 0.25)["results"]
    assert [each["image"]["tiles"] for each in alone] == [16, 1, 13, 7]
    for one, *others in zip(alone, batch.json()["results"], streamed, local, strict=True):
        assert one["detections"]
        for other in others:
            assert other["image"] == one["image"]
            assert other["detections"] == one["detections"]


def smears(across: int, down: int) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Drawn smears of 640 x 480 pixels side by side, and the boxes of all cells."""
    image, cells = Image.new("RGB", (640 * across, 480 * down)), []
    for number in range(across * down):
        x, y = number % across * 640, number // across * 480
        smear, boxes = draw_smear(number)
        image.paste(smear, (x, y))
        cells += [(name, (a + x, b + y, c + x, d + y)) for name, (a, b, c, d) in boxes]
    return image, cells


def of_json(answer: dict[str, Any]) -> Detections:
    rows = answer["detections"]
    return Detections(
        np.array([list(row["box"].values()) for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row["score"] for row in rows], dtype=np.float32),
        np.array([row["class_id"] for row in rows], dtype=np.int64),
    )


async def test_tiling_counts_cells_of_a_slide(start: Start, tmp_path: Path) -> None:
    image, cells = smears(3, 3)
    content = encoded(image, "JPEG", quality=90)
    path = tmp_path / "slide.jpg"
    path.write_bytes(content)
    models = bundled_models()
    async with start(models_dir=models, request_timeout_ms=120_000) as client:
        plain, tiled = [
            (await client.post(f"/v1/detect?tile={tile}", content=content)).json()
            for tile in ("off", "auto")
        ]
    newest = max(scan_repository(models), key=lambda entry: entry.version)
    classes = read_artifact(newest.path).metadata.classes
    assert tiled["image"] == {"width": 1920, "height": 1440, "tiles": 16}
    assert found(cells, of_json(plain), classes) / len(cells) < 0.2
    hits, seen = found(cells, of_json(tiled), classes), len(tiled["detections"])
    assert hits / len(cells) >= 0.95
    assert hits / seen >= 0.9
    detections = of_json(tiled)
    for name, box in cells:
        of_cell = overlap(box, detections.boxes[detections.labels == classes.index(name)])
        assert (of_cell >= 0.5).sum() <= 1, "a cell is counted twice"
    local = offline(path, models, "--tile", "auto")
    assert local["detections"] == tiled["detections"]
    assert local["image"] == tiled["image"]


async def test_tiling_draws_boxes_on_the_whole_image(start: Start, models: Path) -> None:
    image, _ = sparse()
    async with start(models_dir=models) as client:
        answer = await client.post(
            "/v1/detect",
            content=encoded(image),
            params={**LOOSE, "tile": "auto"},
            headers={"Accept": "image/png"},
        )
    drawn = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    assert np.abs(drawn - np.asarray(image)).sum(axis=2)[600:].max() > 60


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/detect/batch"])
@pytest.mark.parametrize("tile", ["foo", "0", "31", "65536", "-1", "1.5", "", "640x480", "nan"])
async def test_tile_rejects_invalid_value(client: httpx.AsyncClient, path: str, tile: str) -> None:
    answer = await client.post(path, content=encoded(one_red()), params={"tile": tile})
    assert answer.status_code == 422
    assert f"tile={tile!r}" in answer.json()["detail"]
    assert "32 to 65535" in answer.json()["detail"]


async def test_tile_rejects_repeats(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/detect?tile=auto&tile=off", content=encoded(one_red()))
    assert answer.status_code == 422


async def test_too_many_tiles_error_names_a_fitting_size(client: httpx.AsyncClient) -> None:
    content = encoded(squares(size=(20_000, 100)))
    answer = await client.post("/v1/detect?tile=auto", content=content)
    assert answer.status_code == 413
    detail = answer.json()["detail"]
    # Tiles of 128 x 96, 96 apart, in two rows.
    assert "20000 x 100" in detail
    assert "at most 128 are accepted" in detail
    named = detail.rpartition("tile=")[2]
    answer = await client.post(f"/v1/detect?tile={named}", content=content)
    assert answer.status_code == 200
    assert 64 < answer.json()["image"]["tiles"] <= 128
    assert (await client.post("/v1/detect?tile=off", content=content)).status_code == 200


async def test_tiling_rejects_bad_images(client: httpx.AsyncClient) -> None:
    whole = encoded(sparse()[0], "JPEG")
    for content, status in ((b"", 400), (b"GIF89a...", 415), (whole[: len(whole) // 2], 400)):
        answer = await client.post("/v1/detect?tile=auto", content=content)
        assert answer.status_code == status, answer.text
    assert service_of(client).places.held == 0


async def test_tiles_beyond_the_queue_size_are_413(start: Start) -> None:
    async with start(max_queue_size=8) as client:
        content = encoded(sparse()[0])
        answer = await client.post("/v1/detect?tile=auto", content=content)
        assert answer.status_code == 413
        assert "at most 8 are accepted" in answer.json()["detail"]
        named = answer.json()["detail"].rpartition("tile=")[2]
        assert (await client.post(f"/v1/detect?tile={named}", content=content)).status_code == 200


async def test_tiles_are_admitted_together(start: Start, models: Path) -> None:
    content = encoded(sparse()[0])
    async with start(models_dir=models, max_queue_size=21) as client:
        service = service_of(client)
        taken = 21 - service.batch_window + 1
        with service.places.hold(taken, 0):
            answer = await client.post("/v1/detect?tile=auto", content=content)
            assert answer.status_code == 503
            assert "the queue is full" in answer.json()["detail"]
            assert answer.headers["retry-after"] == "1"
            assert service.places.held == taken, "nothing is kept of what was refused"
            assert await samples(client, "retinaserve_batch_size_count") == 0
        answer = await client.post("/v1/detect?tile=auto", content=content)
        assert answer.status_code == 200
        assert service.places.held == 0
        # One image, in 21 inferences.
        assert await samples(client, "retinaserve_tiles_total") == 21
        assert await samples(client, "retinaserve_batch_size_sum") == 21
        assert await samples(client, "retinaserve_stage_seconds_count") == 5


async def test_tiled_batch_images_do_not_refuse_each_other(start: Start, models: Path) -> None:
    large, small = encoded(sparse()[0]), encoded(one_red())
    too_large = encoded(squares(size=(4000, 300)))
    files = [("files", content) for content in (large, small, large, too_large, small, large)]
    async with start(models_dir=models, max_queue_size=21) as client:
        answer = await client.post("/v1/detect/batch", files=files, params={"tile": "auto"})
    results = answer.json()["results"]
    assert [each["status"] for each in results] == [200, 200, 200, 413, 200, 200]
    assert "at most 21" in results[3]["error"]["detail"]


async def test_tiled_image_lets_others_be_served(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(256, 256),), work=4)
    async with start(models_dir=tmp_path, request_timeout_ms=120_000) as client:
        service = service_of(client)
        tiled = asyncio.create_task(
            client.post("/v1/detect?tile=300", content=encoded(sparse((1600, 1600))[0]))
        )
        await until(lambda: service.pipeline.depth > 0)
        assert service.places.held == service.batch_window, "places are for what is under way"
        assert service.pipeline.depth <= service.batch_window
        answers = [await client.post("/v1/detect", content=encoded(one_red())) for _ in range(3)]
        assert not tiled.done(), "three images waited for fifty tiles"
        assert [answer.status_code for answer in answers] == [200] * 3
        assert (await tiled).json()["image"]["tiles"] == 50
        assert service.places.held == 0


async def test_tiles_share_one_deadline(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(256, 256),), work=20)
    async with start(models_dir=tmp_path) as client:
        service = service_of(client)
        # A busy machine knows from the warm-up that it would be late, and would refuse.
        service.registry.get().costs.__init__()  # type: ignore[misc]
        answer = await client.post(
            "/v1/detect?tile=300",
            content=encoded(sparse((2000, 2000))[0]),
            headers={"X-Deadline-Ms": "400"},
        )
        assert answer.status_code == 504
        assert service.places.held == 0
        assert service.pipeline.depth == 0
        assert not service.decoded_images.locked()
        inferences = await samples(client, "retinaserve_batch_size_count")
        assert inferences < 82, "what is late costs no more device time"


async def test_tiled_images_are_decoded_one_at_a_time(
    start: Start, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying: list[int] = []
    counted = Image.Image.crop

    def crop(image: Image.Image, *arguments: Any) -> Image.Image:
        seen.append(weakref.ref(image))
        lying.append(len({id(ref()) for ref in seen} - {id(None)}))
        return counted(image, *arguments)

    seen: list[weakref.ref[Image.Image]] = []
    monkeypatch.setattr(Image.Image, "crop", crop)
    contents = [encoded(sparse()[0], kind) for kind in ("PNG", "JPEG", "WEBP", "PNG", "JPEG")]
    async with start(models_dir=models, request_timeout_ms=60_000) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/detect?tile=auto", content=each) for each in contents)
        )
    assert [answer.status_code for answer in answers] == [200] * 5
    # One in detection and the next; a device's thread may still hold the last tile of one before.
    assert max(lying) <= 3


async def test_failing_tile_fails_its_image_alone(start: Start, tmp_path: Path) -> None:
    tiny_model.save(tmp_path, sizes=(Size(256, 256),), poison=True)
    image, _ = sparse()
    spoilt = image.copy()
    # Where the second tile of the first row begins: 1000 - 256 in four steps.
    spoilt.putpixel((186, 0), MAGENTA)
    async with start(models_dir=tmp_path) as client:
        bad, good = await asyncio.gather(
            *(
                client.post("/v1/detect?tile=auto", content=encoded(each))
                for each in (spoilt, image)
            )
        )
        assert bad.status_code == 500
        assert bad.json()["title"] == "Inference failed"
        assert good.status_code == 200
        assert service_of(client).places.held == 0
        assert not service_of(client).decoded_images.locked()


async def test_tiling_timing_adds_up(start: Start, models: Path) -> None:
    async with start(models_dir=models) as client:
        answer = await client.post("/v1/detect?tile=auto", content=encoded(sparse()[0]))
    timing = answer.json()["timing_ms"]
    assert min(timing.values()) >= 0
    assert timing["total"] >= timing["decode"] + timing["queue"] + timing["inference"] - 0.05
