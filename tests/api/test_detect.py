"""POST /v1/detect: ways in, ways out, parameters."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from service.http.schemas import (
    AnyAnswer,
    CocoDetection,
    DetectAnswer,
    HuggingFaceDetection,
    RoboflowAnswer,
)
from tests.api.conftest import Start
from tests.images import BLUE, GREEN, RED, encoded, one_red, rotated, squares

RED_BOX = {"x1": 32.0, "y1": 16.0, "x2": 64.0, "y2": 48.0}


def only_box(answer: httpx.Response) -> dict[str, float]:
    assert answer.status_code == 200, answer.text
    (detection,) = answer.json()["detections"]
    assert detection["label"] == "red"
    assert detection["class_id"] == 0
    return detection["box"]


async def test_detect_response_has_documented_schema(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/detect", content=encoded(one_red()))
    assert answer.headers["content-type"] == "application/json"
    parsed = DetectAnswer.model_validate_json(answer.content, strict=True)
    assert parsed.model.name == "tiny"
    assert (parsed.image.width, parsed.image.height) == (128, 96)
    timing = parsed.timing_ms
    assert timing.total >= timing.decode + timing.queue + timing.inference - 0.05
    assert only_box(answer) == RED_BOX


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"]
)
async def test_detect_raw_body_ignores_content_type(
    client: httpx.AsyncClient, content_type: str
) -> None:
    answer = await client.post(
        "/v1/detect", content=encoded(one_red()), headers={"Content-Type": content_type}
    )
    assert only_box(answer) == RED_BOX


async def test_detect_multipart_ignores_other_fields(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/detect", files={"file": ("a.png", encoded(one_red()))}, data={"note": "hello"}
    )
    assert only_box(answer) == RED_BOX


async def test_detect_json_accepts_base64_line_breaks(client: httpx.AsyncClient) -> None:
    content = encoded(one_red())
    for text in (base64.b64encode(content), base64.encodebytes(content)):
        answer = await client.post("/v1/detect", json={"image": text.decode()})
        assert only_box(answer) == RED_BOX


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_detect_accepts_jpeg_png_webp(client: httpx.AsyncClient, kind: str) -> None:
    # Half-covered cells score about 0.5; lossy colours fall on either side of that.
    content = encoded(one_red(), kind, quality=95)
    answer = await client.post("/v1/detect", content=content, params={"score_threshold": 0.8})
    assert only_box(answer) == RED_BOX


async def test_score_threshold_defaults_to_the_model_file(client: httpx.AsyncClient) -> None:
    # The tiny model's file says: score 0.5, but 0.8 for blue.
    content = encoded(squares((0, 0, (0, 0, 180)), (64, 0, (180, 0, 0))))
    answer = await client.post("/v1/detect", content=content, params={"iou_threshold": 0.1})
    assert {detection["label"] for detection in answer.json()["detections"]} == {"red"}
    answer = await client.post(
        "/v1/detect", content=content, params={"iou_threshold": 0.1, "score_threshold": 0.6}
    )
    assert {detection["label"] for detection in answer.json()["detections"]} == {"red", "blue"}


async def test_classes_accepts_repeats_and_comma_lists(client: httpx.AsyncClient) -> None:
    content = encoded(squares((0, 0, RED), (48, 0, GREEN), (96, 0, BLUE)))
    for query in ("classes=red,blue", "classes=red&classes=blue", "classes=red,%20blue"):
        answer = await client.post(f"/v1/detect?{query}", content=content)
        assert {each["label"] for each in answer.json()["detections"]} == {"red", "blue"}


async def test_max_detections_keeps_highest_scores(client: httpx.AsyncClient) -> None:
    content = encoded(squares((0, 0, (200, 0, 0)), (48, 0, RED), (96, 0, (0, 220, 0))))
    answer = await client.post("/v1/detect?max_detections=1", content=content)
    assert [each["score"] for each in answer.json()["detections"]] == [1.0]


async def test_score_threshold_is_strict(client: httpx.AsyncClient) -> None:
    content = encoded(one_red())
    answer = await client.post("/v1/detect?score_threshold=1", content=content)
    assert answer.json()["detections"] == []


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_boxes_follow_exif_orientation(client: httpx.AsyncClient, orientation: int) -> None:
    answer = await client.post("/v1/detect", content=rotated(one_red(), orientation))
    assert answer.json()["image"] == {"width": 128, "height": 96}
    assert only_box(answer) == RED_BOX


async def test_boxes_are_in_original_pixels(client: httpx.AsyncClient) -> None:
    large = one_red().resize((512, 384), Image.Resampling.NEAREST)
    answer = await client.post("/v1/detect", content=encoded(large))
    assert only_box(answer) == {"x1": 128.0, "y1": 64.0, "x2": 256.0, "y2": 192.0}


@pytest.mark.parametrize(
    ("shape", "documented"),
    [
        ("native", DetectAnswer),
        ("coco", list[CocoDetection]),
        ("roboflow", RoboflowAnswer),
        ("hf", list[HuggingFaceDetection]),
    ],
)
async def test_formats_match_their_openapi_schemas(
    shape: str, documented: Any, client: httpx.AsyncClient
) -> None:
    for content in (encoded(one_red()), encoded(Image.new("RGB", (64, 64)))):
        answer = await client.post(f"/v1/detect?format={shape}", content=content)
        # From JSON, where an array is what a tuple is written as.
        assert TypeAdapter(documented).validate_json(answer.content, strict=True) is not None
        TypeAdapter(AnyAnswer).validate_json(answer.content, strict=True)


async def test_supervision_reads_the_roboflow_format(client: httpx.AsyncClient) -> None:
    with warnings.catch_warnings():
        # Without OpenCV it says that it computes with NumPy.
        warnings.filterwarnings("ignore", message="OpenCV")
        from supervision import Detections
    content = encoded(squares((32, 16, RED), (80, 48, GREEN)))
    answer = await client.post("/v1/detect?format=roboflow", content=content)
    found = Detections.from_inference(answer.json())
    expected = (await client.post("/v1/detect", content=content)).json()["detections"]
    assert len(expected) == 2
    assert found.xyxy.tolist() == [list(each["box"].values()) for each in expected]
    assert found.class_id.tolist() == [each["class_id"] for each in expected]
    assert found.data["class_name"].tolist() == [each["label"] for each in expected]
    np.testing.assert_allclose(found.confidence, [each["score"] for each in expected], atol=1e-6)
    none = await client.post("/v1/detect?format=roboflow", content=encoded(squares()))
    assert len(Detections.from_inference(none.json())) == 0


async def test_formats_describe_the_same_detections(client: httpx.AsyncClient) -> None:
    content = encoded(one_red())

    async def ask(shape: str) -> object:
        return (await client.post(f"/v1/detect?format={shape}", content=content)).json()

    assert await ask("coco") == [
        {"image_id": 0, "category_id": 0, "bbox": [32.0, 16.0, 32.0, 32.0], "score": 1.0}
    ]
    assert await ask("roboflow") == {
        "image": {"width": 128, "height": 96},
        "predictions": [
            {
                "x": 48.0,
                "y": 32.0,
                "width": 32.0,
                "height": 32.0,
                "confidence": 1.0,
                "class": "red",
                "class_id": 0,
            }
        ],
    }
    assert await ask("hf") == [
        {
            "label": "red",
            "score": 1.0,
            "box": {"xmin": 32.0, "ymin": 16.0, "xmax": 64.0, "ymax": 48.0},
        }
    ]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
async def test_accept_image_returns_drawn_boxes(client: httpx.AsyncClient, kind: str) -> None:
    answer = await client.post(
        "/v1/detect",
        content=rotated(one_red(), 6),
        headers={"Accept": f"image/{kind}, image/*;q=0.5"},
    )
    assert answer.headers["content-type"] == f"image/{kind}"
    drawn = Image.open(io.BytesIO(answer.content))
    assert (drawn.format, drawn.size) == (kind.upper(), (128, 96))
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(one_red()).astype(int)).sum(axis=2)
    assert changed[30, 32] > 60, "the box's left edge is drawn"
    assert changed[80:, 80:].max() < 30, "far from the box nothing is"


async def test_drawn_names_are_in_the_font_file(client: httpx.AsyncClient, start: Start) -> None:
    serif = Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf")
    given = {"content": encoded(one_red()), "headers": {"Accept": "image/png"}}
    async with start(font_file=serif) as other:
        answers = [await each.post("/v1/detect", **given) for each in (client, other)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content != answers[1].content


async def test_accept_without_preference_returns_json(client: httpx.AsyncClient) -> None:
    for accept in ("*/*", "image/webp", "application/json;q=0.1, image/png", "image/*,*/*;q=0.1"):
        answer = await client.post(
            "/v1/detect", content=encoded(one_red()), headers={"Accept": accept}
        )
        assert answer.headers["content-type"] == "application/json", accept


async def test_detect_returns_a_hundred_detections(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/detect",
        content=encoded(Image.new("RGB", (128, 96), "white")),
        params={"iou_threshold": 1, "score_threshold": 0, "max_detections": 1000},
    )
    # 5 x 7 cells in each of three classes.
    assert len(answer.json()["detections"]) == 105


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("score_threshold=1.01", "score_threshold"),
        ("score_threshold=-0.1", "score_threshold"),
        ("score_threshold=nan", "score_threshold"),
        ("score_threshold=much", "score_threshold"),
        ("score_threshold=0.1&score_threshold=0.2", "score_threshold"),
        ("iou_threshold=2", "iou_threshold"),
        ("max_detections=0", "max_detections"),
        ("max_detections=1001", "max_detections"),
        ("classes=red,grey", "grey"),
        ("format=voc", "format"),
        ("version=0", "version"),
        ("score_treshold=0.5", "score_treshold"),
    ],
)
async def test_detect_rejects_parameter_out_of_range(
    client: httpx.AsyncClient, query: str, named: str
) -> None:
    answer = await client.post(f"/v1/detect?{query}", content=encoded(one_red()))
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert named in answer.json()["detail"]


@pytest.mark.parametrize("query", ["model=none", "version=7", "model=tiny&version=2"])
async def test_detect_rejects_unknown_model(client: httpx.AsyncClient, query: str) -> None:
    answer = await client.post(f"/v1/detect?{query}", content=encoded(one_red()))
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:retinaserve:problem:unknown-model"


async def test_detect_selects_model_and_version(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/detect?model=tiny&version=1", content=encoded(one_red()))
    assert answer.json()["model"] == {"name": "tiny", "version": 1}


async def test_request_id_is_echoed_or_generated(client: httpx.AsyncClient) -> None:
    async def ask(request_id: str | None) -> httpx.Response:
        headers = {} if request_id is None else {"X-Request-Id": request_id}
        return await client.post("/v1/detect", content=b"", headers=headers)

    answer = await ask("job-7.a_B")
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "job-7.a_B"
    seen = {(await ask(bad)).headers["x-request-id"] for bad in (None, "a b", "x" * 129, "<id>")}
    assert len(seen) == 4
    assert all(len(made) == 32 for made in seen)


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "10001", "soon", ""])
async def test_detect_rejects_deadline_out_of_range(client: httpx.AsyncClient, asked: str) -> None:
    answer = await client.post(
        "/v1/detect", content=encoded(one_red()), headers={"X-Deadline-Ms": asked}
    )
    assert answer.status_code == 422
    assert "X-Deadline-Ms" in answer.json()["detail"]


async def test_detect_past_deadline_is_503_or_504(start: Start, tmp_path: object) -> None:
    async with start() as client:
        slow = encoded(Image.new("RGB", (6000, 6000)), "PNG")
        given = {"content": slow, "headers": {"X-Deadline-Ms": "25"}}
        answer = await client.post("/v1/detect", **given)
        assert answer.status_code == 503, "its header tells that it takes longer"
        # Decoding of this kind is believed to cost nothing.
        costs = client._transport.app.state.service.pipeline.prediction.thread_costs  # type: ignore[attr-defined]
        for _ in range(50):
            costs.observe("png rgb 8 sparse", 10_000_000, 0.0)
        answer = await client.post("/v1/detect", **given)
        assert answer.status_code == 504
        assert answer.json()["title"] == "Deadline exceeded"
        answer = await client.post(
            "/v1/detect", content=encoded(one_red()), headers={"X-Deadline-Ms": "9000"}
        )
        assert only_box(answer) == RED_BOX
