"""POST /v1/detect/batch: many images, none of which can fail another."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack

import httpx
import pytest

from service.engine.batch_queue import Urgency
from service.http.schemas import BatchAnswer
from tests.api.conftest import Start
from tests.images import BLUE, GREEN, RED, encoded, one_red, squares

GOOD = encoded(one_red())


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def post_forms(client: httpx.AsyncClient, *contents: bytes, **more: object) -> httpx.Response:
    files = [("files", (f"{i}.png", content)) for i, content in enumerate(contents)]
    return await client.post("/v1/detect/batch", files=files, **more)  # type: ignore[arg-type]


async def test_batch_response_has_documented_schema_and_order(client: httpx.AsyncClient) -> None:
    answer = await post_forms(client, GOOD, b"rubbish", encoded(squares((0, 0, GREEN))), b"")
    assert answer.status_code == 200
    parsed = BatchAnswer.model_validate_json(answer.content, strict=True)
    assert [each.index for each in parsed.results] == [0, 1, 2, 3]
    assert [each.id for each in parsed.results] == ["0.png", "1.png", "2.png", "3.png"]
    assert [each.status for each in parsed.results] == [200, 415, 200, 400]
    bad = parsed.results[1].error
    assert bad is not None
    assert (bad.status, bad.instance) == (415, "/v1/detect/batch")
    assert bad.request_id == answer.headers["x-request-id"]


async def test_batch_results_equal_single_results(client: httpx.AsyncClient) -> None:
    contents = [
        encoded(squares((16 * i, 0, colour), size=size))
        for i in range(3)
        for colour in (RED, GREEN, BLUE)
        for size in ((128, 96), (96, 128), (300, 100))
    ]
    together = (await post_forms(client, *contents)).json()["results"]
    for content, result in zip(contents, together, strict=True):
        alone = (await client.post("/v1/detect", content=content)).json()
        assert result["detections"] == alone["detections"]
        assert result["image"] == alone["image"]


async def test_json_batch_keeps_ids_and_reports_bad_base64(client: httpx.AsyncClient) -> None:
    images = [
        {"id": "a", "image": base64_of(GOOD)},
        {"id": "b", "image": "%%%"},
        {"image": base64_of(GOOD)},
        {"id": 9, "image": base64_of(GOOD)},
    ]
    answer = await client.post("/v1/detect/batch", json={"images": images})
    results = answer.json()["results"]
    assert [each["id"] for each in results] == ["a", "b", "2", "9"]
    assert [each["status"] for each in results] == [200, 400, 200, 200]


async def test_json_batch_item_that_is_no_image_fails_alone(client: httpx.AsyncClient) -> None:
    images = [{"image": 7}, {"id": None}, {"id": "c", "image": base64_of(GOOD)}]
    answer = await client.post("/v1/detect/batch", json={"images": images})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [each["id"] for each in results] == ["0", "1", "c"]
    assert [each["status"] for each in results] == [400, 400, 200]
    assert "base64" in results[0]["error"]["detail"]


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/detect/batch"])
async def test_form_of_near_boundaries_is_refused_early(
    client: httpx.AsyncClient, path: str
) -> None:
    name = "files" if path.endswith("batch") else "file"
    body = (
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + b"\r\n--b-x" * 200_000
        + b"\r\n--b--"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await client.post(path, content=body, headers=headers)
    assert answer.status_code == 400
    assert "malformed" in answer.json()["detail"]


async def test_ndjson_has_one_line_per_image(client: httpx.AsyncClient) -> None:
    answer = await post_forms(
        client, *[GOOD, b"rubbish"] * 8, headers={"Accept": "application/x-ndjson"}
    )
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(16))
    assert {line["index"] for line in lines if line["status"] == 200} == set(range(0, 16, 2))


async def test_batch_accepts_the_most_images_allowed(client: httpx.AsyncClient) -> None:
    answer = await post_forms(client, *[GOOD] * 64)
    assert {each["status"] for each in answer.json()["results"]} == {200}


async def test_batch_larger_than_the_queue_is_served(start: Start) -> None:
    async with start(max_queue_size=2) as client:
        answer = await post_forms(client, *[GOOD] * 64)
        assert {each["status"] for each in answer.json()["results"]} == {200}


async def test_batch_image_refused_by_full_queue_fails_alone(start: Start) -> None:
    async with start(max_queue_size=3) as client:
        service = client._transport.app.state.service  # type: ignore[attr-defined]
        # Two other clients' images, which leaves room for one.
        with service.places.slot(), service.places.slot():
            answer = await post_forms(client, *[GOOD] * 8)
            assert answer.status_code == 200
            results = answer.json()["results"]
            refused = [each["error"] for each in results if each["status"] == 503]
            assert len(refused) + sum(each["status"] == 200 for each in results) == 8
            assert refused
            assert "queue is full" in refused[0]["detail"]
            with service.places.slot():
                answer = await post_forms(client, GOOD)
                assert answer.status_code == 503, "refused before its body was read"
        assert (await post_forms(client, GOOD)).json()["results"][0]["status"] == 200


@pytest.mark.parametrize(("count", "status"), [(64, 200), (65, 422), (90, 422)])
async def test_batch_rejects_too_many_images(
    client: httpx.AsyncClient, count: int, status: int
) -> None:
    tiny = encoded(squares(size=(8, 8)))
    assert (await post_forms(client, *[tiny] * count)).status_code == status
    images = [{"image": base64_of(tiny)}] * count
    answer = await client.post("/v1/detect/batch", json={"images": images})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("document", "status"),
    [
        ({"images": []}, 422),
        ({}, 400),
        ({"images": "x"}, 400),
        ({"images": ["x"]}, 400),
        ({"images": [{"image": "aGk=", "id": []}]}, 400),
    ],
)
async def test_batch_rejects_unparsable_requests(
    client: httpx.AsyncClient, document: object, status: int
) -> None:
    answer = await client.post("/v1/detect/batch", json=document)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


async def test_batch_rejects_raw_body(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/detect/batch", content=GOOD)
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json()["detail"]


async def test_batch_rejects_form_without_files(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/detect/batch", files={"file": GOOD})
    assert answer.status_code == 400
    assert "'files'" in answer.json()["detail"]


async def test_batch_parameters_apply_to_every_image(client: httpx.AsyncClient) -> None:
    content = encoded(squares((0, 0, RED), (64, 0, GREEN)))
    answer = await post_forms(client, content, content, params={"classes": "green"})
    for result in answer.json()["results"]:
        assert {each["label"] for each in result["detections"]} == {"green"}
    answer = await post_forms(client, content, params={"format": "coco"})
    assert answer.status_code == 422, "a batch has one shape"


async def test_batch_reports_deadline_per_image(client: httpx.AsyncClient) -> None:
    slow = encoded(squares(size=(3000, 3000)), "JPEG")
    answer = await post_forms(client, *[slow] * 16, headers={"X-Deadline-Ms": "20"})
    assert answer.status_code == 200
    # Late, or refused as soon as it was clear that they would be.
    assert {each["status"] for each in answer.json()["results"]} & {503, 504}


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
async def test_queue_bytes_count_images_still_waiting(
    start: Start, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    async with start() as client:
        service = client._transport.app.state.service  # type: ignore[attr-defined]
        seen = []
        detect = service.pipeline.detect

        async def watched(*args: object, **options: object) -> object:
            seen.append(service.places.bytes_held)
            return await detect(*args, **options)

        monkeypatch.setattr(service.pipeline, "detect", watched)
        answer = await post_forms(client, *[GOOD] * 40, headers={"Accept": accept})
        assert answer.status_code == 200
        assert len(seen) == 40
        assert min(seen) >= 40 * len(GOOD)
        assert service.places.bytes_held == 0
        with service.places.body(service.settings.max_queue_bytes):
            answer = await post_forms(client, GOOD, headers={"Accept": accept})
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


async def test_batches_leave_queue_places_for_single_images(start: Start) -> None:
    async with start(max_queue_size=4) as client:
        service = client._transport.app.state.service  # type: ignore[attr-defined]
        with ExitStack() as held:
            for _ in range(3):
                held.enter_context(service.places.slot(urgency=Urgency.BULK))
            assert (await post_forms(client, GOOD)).status_code == 503
            assert (await client.post("/v1/detect", content=GOOD)).status_code == 200


async def test_batch_bounds_ids_and_keeps_no_wide_strings(client: httpx.AsyncClient) -> None:
    good = base64.b64encode(encoded(one_red())).decode()
    answer = await client.post(
        "/v1/detect/batch", json={"images": [{"id": "a" * 1025, "image": good}]}
    )
    assert answer.status_code == 400
    assert "at most 1024" in answer.json()["detail"]
    images = [{"image": good + "\U0001f600"}, {"image": good}]
    answer = await client.post("/v1/detect/batch", json={"images": images})
    assert [each["status"] for each in answer.json()["results"]] == [400, 200]
