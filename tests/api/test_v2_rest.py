"""The Open Inference Protocol over REST: what it answers, and what it answers it to."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest

from service.errors import Unavailable
from service.http.oip import rest
from tests import tiny_model
from tests.api.conftest import Start
from tests.api.inference_protocol import (
    HEADER,
    INFER,
    base64_images,
    binary_images,
    canvas,
    images,
    outputs,
    score,
    tensor,
    with_raw,
)
from tests.images import BLUE, GREEN, RED, encoded, one_red, rotated, squares
from tests.required_inputs import without_defaults

RED_BOX = [[32.0, 16.0, 64.0, 48.0]]


async def infer(client: httpx.AsyncClient, *inputs: object, **fields: object) -> httpx.Response:
    return await client.post(INFER, json={"inputs": inputs, **fields})


async def test_v2_health_and_server_metadata(client: httpx.AsyncClient) -> None:
    live = await client.get("/v2/health/live")
    assert (live.status_code, live.json()) == (200, {"live": True})
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True})
    server = (await client.get("/v2")).json()
    assert server["name"] == "retinaserve"
    assert "binary_tensor_data" in server["extensions"]


async def test_v2_ready_is_503_with_the_reason(start: Start) -> None:
    async with start() as client:
        client._transport.app.state.service.draining = True  # type: ignore[attr-defined]
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.json()["ready"] is False
            assert "draining" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"
        assert (await client.get("/v2/health/live")).status_code == 200


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
async def test_v2_model_metadata_lists_tensors(client: httpx.AsyncClient, path: str) -> None:
    model = (await client.get(path)).json()
    assert (model["name"], model["versions"]) == ("tiny", ["1"])
    inputs = {each["name"]: (each["datatype"], each["shape"]) for each in model["inputs"]}
    assert inputs["images"] == ("UINT8", [-1, -1, -1, 3])
    assert inputs["image_sizes"] == ("INT64", [-1, 2])
    assert inputs["max_detections"] == ("INT64", [1])
    assert inputs["encoded_images"] == ("BYTES", [-1])
    found = [(each["name"], each["datatype"], each["shape"]) for each in model["outputs"]]
    assert found == [
        ("image_index", "INT64", [-1]),
        ("boxes", "FP32", [-1, 4]),
        ("scores", "FP32", [-1]),
        ("labels", "INT64", [-1]),
    ]
    assert model["parameters"]["classes"] == ["red", "green", "blue"]
    ready = (await client.get(f"{path}/ready")).json()
    assert ready == {"name": "tiny", "ready": True}
    assert (await client.get(f"{path}/config")).json()["max_batch_size"] == 0


async def test_v2_repository_index_lists_models(client: httpx.AsyncClient) -> None:
    for body in (b"", b"{}", b'{"ready": true}'):
        answer = await client.post("/v2/repository/index", content=body)
        entry = {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
        assert answer.json() == [entry]
    for body in (b"[", b"[]", b'{"ready": 1}'):
        answer = await client.post("/v2/repository/index", content=body)
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]


async def test_v2_unknown_model_or_path_is_404(client: httpx.AsyncClient) -> None:
    for path in (
        "/v2/models/none",
        "/v2/models/none/ready",
        "/v2/models/none/config",
        "/v2/models/tiny/versions/2",
        "/v2/models/tiny/versions/2/ready",
        "/v2/models/tiny/versions/0/ready",
        "/v2/models/tiny/versions/one",
        "/v2/models/tiny/versions/" + "9" * 5000,
        "/v2/models/tiny/versions/-1/ready",
        "/v2/nothing",
    ):
        answer = await client.get(path)
        assert answer.status_code == 404, path
        assert list(answer.json()) == ["error"]
        assert len(answer.content) < 500
        assert answer.headers["content-type"] == "application/json"


async def test_v2_wrong_method_is_405(client: httpx.AsyncClient) -> None:
    answer = await client.get(INFER)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "use POST" in answer.json()["error"]


@pytest.mark.parametrize("nested", [True, False])
async def test_v2_infer_accepts_canvases_as_json(client: httpx.AsyncClient, nested: bool) -> None:
    given = images(canvas(one_red()))
    if nested:
        given["data"] = canvas(one_red()).tolist()
    answer = await infer(client, given, id="job-7")
    document = answer.json()
    assert (document["model_name"], document["model_version"]) == ("tiny", "1")
    assert document["id"] == "job-7"
    found = outputs(answer)
    assert list(found) == ["image_index", "boxes", "scores", "labels"]
    assert found["boxes"].tolist() == RED_BOX
    assert found["labels"].tolist() == found["image_index"].tolist() == [0]
    assert found["scores"].tolist() == [1.0]


@pytest.mark.parametrize("kind", ["optional", "required"])
async def test_v2_infer_equals_the_model_file(start: Start, tmp_path: Path, kind: str) -> None:
    served = tiny_model.save(tmp_path)
    if kind == "required":
        served.write_bytes(without_defaults(served.read_bytes()))
    async with start(models_dir=tmp_path, max_batch_size=4) as client:
        given = canvas(
            squares((0, 0, (200, 0, 0)), (48, 0, GREEN), (96, 60, BLUE)),
            squares((5, 7, RED), (60, 50, (0, 0, 180))),
            squares(),
        )
        sizes = np.array([[96, 128], [40, 70], [0, 0]], np.int64)
        session = ort.InferenceSession(
            tiny_model.build().SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for thresholds in (
            {},
            {"score_threshold": 0.2, "iou_threshold": 0.1},
            {"score_threshold": 0.1, "max_detections": 3},
        ):
            kinds = {"score_threshold": "FP32", "iou_threshold": "FP32", "max_detections": "INT64"}
            feeds: dict[str, Any] = {"images": given, "image_sizes": sizes}
            inputs = [images(given), tensor("image_sizes", sizes, "INT64")]
            for name, value in thresholds.items():
                dtype = np.float32 if kinds[name] == "FP32" else np.int64
                feeds[name] = np.array([value], dtype)
                inputs.append(tensor(name, feeds[name], kinds[name]))
            expected = session.run(None, feeds)
            found = outputs(await infer(client, *inputs))
            for name, values in zip(found, expected, strict=True):
                np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)
            assert len(found["scores"]) > 1
            assert set(found["image_index"].tolist()) == {0, 1}


async def test_v2_empty_outputs_keep_dtype_and_shape(client: httpx.AsyncClient) -> None:
    empty = {"image_index": (0,), "boxes": (0, 4), "scores": (0,), "labels": (0,)}
    for parameters in ({}, {"binary_data_output": True}):
        for given in (images(canvas(squares())), base64_images(encoded(squares()))):
            found = outputs(await infer(client, given, parameters=parameters))
            assert {name: values.shape for name, values in found.items()} == empty


async def test_v2_encoded_images_equal_v1(client: httpx.AsyncClient) -> None:
    large = squares((0, 0, RED), (48, 0, (0, 180, 0)), (96, 60, (0, 0, 210)), (40, 60, (0, 0, 160)))
    files = [
        encoded(large.resize((512, 384)), "JPEG"),
        rotated(one_red(), 6),
        encoded(squares()),
        encoded(large, "WEBP"),
    ]
    for wanted in ({}, {"score_threshold": 0.55}, {"iou_threshold": 0.05, "max_detections": 1}):
        declared, raw = binary_images(*files)
        document = {"inputs": [declared], "parameters": wanted}
        found = outputs(await client.post(INFER, **with_raw(document, raw)))
        assert outputs(await infer(client, base64_images(*files), parameters=wanted)).keys()
        position = 0
        for index, file in enumerate(files):
            answer = (await client.post("/v1/detect", content=file, params=wanted)).json()
            detections = answer["detections"]
            rows = slice(position, position + len(detections))
            position += len(detections)
            assert set(found["image_index"][rows].tolist()) <= {index}
            assert found["labels"][rows].tolist() == [each["class_id"] for each in detections]
            boxes = [[each["box"][k] for k in ("x1", "y1", "x2", "y2")] for each in detections]
            np.testing.assert_allclose(
                found["boxes"][rows], np.reshape(boxes, (-1, 4)), atol=0.0051
            )
            scores = [each["score"] for each in detections]
            np.testing.assert_allclose(found["scores"][rows], scores, atol=0.000051)
        assert position == len(found["scores"]) > 0


async def test_v2_thresholds_are_tensors_or_parameters(
    client: httpx.AsyncClient,
) -> None:
    image = base64_images(encoded(squares((0, 0, (180, 0, 0)))))
    assert len(outputs(await infer(client, image))["scores"]) == 1
    for answer in (
        await infer(client, image, score(0.9)),
        await infer(client, image, parameters={"score_threshold": 0.9}),
        await infer(client, image, parameters={"score_threshold": "0.9"}),
    ):
        assert len(outputs(answer)["scores"]) == 0
    answer = await infer(client, image, score(0.9), parameters={"score_threshold": 0.9})
    assert answer.status_code == 400
    assert "twice" in answer.json()["error"]


async def test_v2_outputs_are_selected_and_encoded_as_requested(client: httpx.AsyncClient) -> None:
    answer = await infer(
        client,
        images(canvas(one_red())),
        outputs=[
            {"name": "scores"},
            {"name": "boxes", "parameters": {"binary_data": True}},
        ],
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    header = json.loads(answer.content[: int(answer.headers[HEADER])])
    assert [each["name"] for each in header["outputs"]] == ["boxes", "scores"]
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert header["outputs"][1]["data"] == [1.0]
    assert outputs(answer)["boxes"].tolist() == RED_BOX
    answer = await infer(
        client,
        images(canvas(one_red())),
        outputs=[{"name": "labels", "parameters": {"binary_data": False}}],
        parameters={"binary_data_output": True},
    )
    assert HEADER not in answer.headers
    assert outputs(answer)["labels"].tolist() == [0]


async def test_v2_encoded_images_accept_a_column(client: httpx.AsyncClient) -> None:
    given = base64_images(encoded(one_red()), encoded(one_red()))
    given["shape"] = [2, 1]
    assert outputs(await infer(client, given))["image_index"].tolist() == [0, 1]
    given["data"] = [[each] for each in given["data"]]
    assert outputs(await infer(client, given))["image_index"].tolist() == [0, 1]


async def test_v2_error_names_the_bad_image(client: httpx.AsyncClient) -> None:
    for bad, status in ((b"rubbish", 415), (b"", 400), (encoded(one_red())[:50], 400)):
        declared, raw = binary_images(encoded(one_red()), bad)
        answer = await client.post(INFER, **with_raw({"inputs": [declared]}, raw))
        assert answer.status_code == status
        assert answer.json()["error"].startswith("encoded_images[1]: ")


async def test_v2_inputs_are_bounded(start: Start) -> None:
    async with start(max_batch_images=3, max_image_pixels=20_000) as client:
        answer = await infer(client, images(np.zeros((4, 32, 32, 3), np.uint8)))
        assert (answer.status_code, "at most 3" in answer.json()["error"]) == (413, True)
        answer = await infer(client, images(np.zeros((1, 128, 128, 3), np.uint8)))
        assert (answer.status_code, "12288" in answer.json()["error"]) == (413, True)
        answer = await infer(client, images(np.zeros((2, 96, 128, 3), np.uint8)))
        assert answer.status_code == 200, "a batch of more than a device takes at a time"
        answer = await infer(client, base64_images(*[encoded(one_red())] * 4))
        assert (answer.status_code, "at most 3" in answer.json()["error"]) == (413, True)
        answer = await infer(client, base64_images(encoded(squares(size=(200, 200)))))
        assert (answer.status_code, "at most 20000" in answer.json()["error"]) == (413, True)


async def test_v2_large_bodies_are_parsed_one_at_a_time(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0
    parse = rest.parse

    def watched(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return parse(*arguments)

    monkeypatch.setattr(rest, "parse", watched)
    note = {"note": "x" * 1_100_000}
    answers = await asyncio.gather(
        *(infer(client, images(canvas(one_red())), parameters=note) for _ in range(4))
    )
    assert [answer.status_code for answer in answers] == [200] * 4
    assert most == 1


async def test_v2_full_queue_is_503(start: Start) -> None:
    async with start(max_queue_size=2) as client:
        service = client._transport.app.state.service  # type: ignore[attr-defined]
        with service.places.hold(1, 0):
            answer = await infer(client, base64_images(*[encoded(one_red())] * 3))
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "queue is full" in answer.json()["error"]
            assert service.places.held == 1
        answer = await infer(client, base64_images(*[encoded(one_red())] * 2))
        assert answer.status_code == 200


async def test_v2_late_request_is_refused_before_parsing(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = client._transport.app.state.service.admission  # type: ignore[attr-defined]

    def refuse(*_: object, **__: object) -> None:
        raise Unavailable("too late", reason="deadline", retry_after=6.5)

    monkeypatch.setattr(admission, "promise", refuse)
    file = encoded(one_red())
    for given in (images(canvas(one_red())), base64_images(file), base64_images(file, file)):
        answer = await infer(client, given)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.json()["error"].endswith("too late")


async def test_v2_deadline_is_504(start: Start) -> None:
    async with start() as client:
        slow = encoded(squares().resize((4000, 4000)), "JPEG")
        late = await infer(client, base64_images(slow), parameters={"timeout": 1000})
        # Refused at once where the service knows that it would be late.
        assert late.status_code in (503, 504)
        assert list(late.json()) == ["error"]
        document = {"inputs": [base64_images(slow)]}
        late = await client.post(INFER, json=document, headers={"X-Deadline-Ms": "1"})
        assert late.status_code in (503, 504)
        image = base64_images(encoded(one_red()))
        for timeout in (0, 9_000_000, 10**15):
            assert (await infer(client, image, parameters={"timeout": timeout})).is_success
        for timeout in (-1, 0.5, "soon", True, None, [], 10**400):
            answer = await infer(client, image, parameters={"timeout": timeout})
            assert answer.status_code == 400, timeout
            assert "timeout" in answer.json()["error"] or "JSON" in answer.json()["error"]
        answer = await client.post(INFER, json={}, headers={"X-Deadline-Ms": "0"})
        assert answer.status_code == 422
        assert list(answer.json()) == ["error"]


async def test_v2_content_encoding_is_415(client: httpx.AsyncClient) -> None:
    answer = await client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415
    assert "unencoded" in answer.json()["error"]


async def test_v2_declared_large_body_is_413(new_client: httpx.AsyncClient) -> None:
    headers = {"Content-Length": str(2**40), HEADER: "10"}
    answer = await new_client.post(INFER, content=b"{}", headers=headers)
    assert answer.status_code == 413
    assert list(answer.json()) == ["error"]


async def test_v2_base64_data_that_is_no_image_is_refused(client: httpx.AsyncClient) -> None:
    text = base64.b64encode(b"no image").decode()
    given = {"name": "encoded_images", "datatype": "BYTES", "shape": [1], "data": [text]}
    assert (await infer(client, given)).status_code == 415


async def test_openapi_describes_v2(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    operation = paths["/v2/models/{name}/infer"]["post"]
    assert set(operation["responses"]) >= {"200", "400", "404", "413", "415", "503", "504"}
    assert "application/octet-stream" in operation["requestBody"]["content"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names >= {"name", "X-Deadline-Ms", HEADER}
    assert {"/v2", "/v2/health/ready", "/v2/models/{name}/versions/{version}/infer"} <= set(paths)
