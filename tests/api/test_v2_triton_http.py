"""The Open Inference Protocol over REST, with the published client, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.api.inference_protocol import canvas
from tests.api.served import Served, served
from tests.pictures import RED, encoded, one_red, squares


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Served]:
    with served(repository, max_batch_size=2) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.http, concurrency=2) as client:
        yield client


def pictures(*files: bytes) -> triton.InferInput:
    values = np.array(files, dtype=object)
    return triton.InferInput("encoded_images", [len(files)], "BYTES").set_data_from_numpy(values)


def canvases(images: np.ndarray[Any, Any], *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput("images", list(images.shape), "UINT8")
    return given.set_data_from_numpy(images, binary_data=binary)


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("tiny")["platform"] == "onnxruntime_onnx"
    assert client.get_model_metadata("tiny", "1")["versions"] == ["1"]
    assert client.get_model_config("tiny")["input"][0]["data_type"] == "TYPE_UINT8"
    assert client.get_model_repository_index()[0]["state"] == "READY"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_canvases_both_ways(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    images = canvas(one_red(), squares((48, 0, RED)))
    result = client.infer(
        "tiny",
        [canvases(images, binary=binary_in)],
        outputs=wanted("image_index", "boxes", "scores", "labels", binary=binary_out),
        model_version="1",
        request_id="job-7",
    )
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")
    assert response["id"] == "job-7"
    assert result.as_numpy("image_index").tolist() == [0, 1]
    assert result.as_numpy("boxes").tolist() == [[32, 16, 64, 48], [48, 0, 80, 32]]
    assert result.as_numpy("boxes").dtype == result.as_numpy("scores").dtype == np.float32
    assert result.as_numpy("labels").dtype == np.int64


def test_pictures_with_thresholds(client: triton.InferenceServerClient) -> None:
    large = squares((0, 0, RED), (64, 0, (200, 0, 0))).resize((512, 384))
    result = client.infer("tiny", [pictures(encoded(large), encoded(one_red()))])
    assert result.as_numpy("image_index").tolist() == [0, 0, 1]
    assert result.as_numpy("boxes")[2].tolist() == [32, 16, 64, 48]
    result = client.infer("tiny", [pictures(encoded(large))], parameters={"score_threshold": 0.9})
    assert result.as_numpy("boxes").tolist() == [[0, 0, 128, 128]]


@pytest.mark.parametrize("binary", [True, False])
def test_no_detections(client: triton.InferenceServerClient, binary: bool) -> None:
    result = client.infer(
        "tiny", [pictures(encoded(squares()))], outputs=wanted("boxes", "labels", binary=binary)
    )
    assert result.as_numpy("boxes").shape == (0, 4)
    assert result.as_numpy("labels").shape == (0,)
    assert result.as_numpy("scores") is None, "it was not asked for"


def test_many_at_once(client: triton.InferenceServerClient) -> None:
    given = [canvases(canvas(squares((16 * i, 0, RED)))) for i in range(6)]
    pending = [
        client.async_infer("tiny", [each], request_id=str(i)) for i, each in enumerate(given)
    ]
    for i, each in enumerate(pending):
        result = each.get_result()
        assert result.get_response()["id"] == str(i)
        assert result.as_numpy("boxes").tolist() == [[16 * i, 0, 16 * i + 32, 32]]


@pytest.mark.parametrize(
    ("call", "status", "named"),
    [
        (lambda c: c.get_model_metadata("none"), 404, "no model 'none'"),
        (lambda c: c.infer("tiny", [pictures(b"x")], model_version="9"), 404, "no version 9"),
        (lambda c: c.infer("tiny", [pictures(b"no picture")]), 415, "JPEG"),
        (lambda c: c.infer("tiny", [pictures(b"")]), 400, "empty"),
        (lambda c: c.infer("tiny", [canvases(np.zeros((1, 33, 32, 3), "u1"))]), 400, "32"),
        (lambda c: c.infer("tiny", [canvases(np.zeros((3, 32, 32, 3), "u1"))]), 413, "at most 2"),
        (
            lambda c: c.infer("tiny", [pictures(b"x")], request_compression_algorithm="gzip"),
            415,
            "Content-Encoding 'gzip'",
        ),
        (lambda c: c.load_model("tiny"), 404, "Not Found"),
    ],
)
def test_errors(
    client: triton.InferenceServerClient,
    call: Callable[[triton.InferenceServerClient], object],
    status: int,
    named: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(client)
    assert caught.value.status() == str(status)
    assert named in caught.value.message()


def test_an_answer_may_stay_unpacked(client: triton.InferenceServerClient) -> None:
    result = client.infer(
        "tiny", [pictures(encoded(one_red()))], response_compression_algorithm="gzip"
    )
    assert result.as_numpy("scores").tolist() == [1.0]
