"""The Open Inference Protocol with the published clients, unchanged: over REST and over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.api.inference_protocol import canvas
from tests.api.served import Served, served
from tests.images import RED, encoded, one_red, squares

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Served]:
    with served(repository, max_body_bytes=1_000_000) as running:
        yield running


class Dialect:
    """One of the clients, and the words that only it has."""

    def __init__(self, kind: Any, address: str) -> None:
        self.kind = kind
        self.is_http = kind is tritonclient.http
        self.client = kind.InferenceServerClient(address)

    def ask(self, method: str, *arguments: object) -> Any:
        """What the server says of itself, as JSON."""
        options = {} if self.is_http else {"as_json": True}
        return getattr(self.client, method)(*arguments, **options)

    def infer(self, *inputs: Any, model: str = "tiny", **options: Any) -> Any:
        return self.client.infer(model, list(inputs), **options)

    def images(self, *files: bytes) -> Any:
        values = np.array(files, dtype=object)
        given = self.kind.InferInput("encoded_images", [len(files)], "BYTES")
        return given.set_data_from_numpy(values)

    def canvases(self, images: Array, **options: bool) -> Any:
        given = self.kind.InferInput("images", list(images.shape), "UINT8")
        return given.set_data_from_numpy(images, **options)

    def wanted(self, *names: str, **options: bool) -> list[Any]:
        return [self.kind.InferRequestedOutput(name, **options) for name in names]


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def dialect(request: pytest.FixtureRequest, server: Served) -> Iterator[Dialect]:
    kind = request.param
    made = Dialect(kind, server.http if kind is tritonclient.http else server.grpc)
    with made.client:
        yield made


@pytest.fixture
def http(server: Served) -> Iterator[Dialect]:
    made = Dialect(tritonclient.http, server.http)
    with made.client:
        yield made


def test_triton_client_reads_health_and_metadata(dialect: Dialect) -> None:
    client = dialect.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    told = dialect.ask("get_server_metadata")
    assert told["name"] == "retinaserve"
    assert "binary_tensor_data" in told["extensions"]
    for version in ("", "1"):
        model = dialect.ask("get_model_metadata", "tiny", version)
        assert model["versions"] == ["1"]
        assert model["platform"] == "onnxruntime_onnx"
        named = [each["name"] for each in model["outputs"]]
        assert named == ["image_index", "boxes", "scores", "labels"]
        first = model["inputs"][0]
        assert (first["name"], first["datatype"]) == ("images", "UINT8")
        assert [int(side) for side in first["shape"]] == [-1, -1, -1, 3]


def test_triton_client_reads_model_config_and_index(dialect: Dialect) -> None:
    config = dialect.ask("get_model_config", "tiny")
    config = config if dialect.is_http else config["config"]
    assert config["name"] == "tiny"
    assert config["input"][0]["data_type"] == "TYPE_UINT8"
    assert [int(side) for side in config["output"][1]["dims"]] == [-1, 4]
    index = dialect.ask("get_model_repository_index")
    (model,) = index if dialect.is_http else index["models"]
    assert (model["name"], model["version"], model["state"]) == ("tiny", "1", "READY")


def test_triton_client_sends_canvases(dialect: Dialect) -> None:
    images = canvas(one_red(), squares((48, 0, RED)))
    result = dialect.infer(dialect.canvases(images), request_id="job-7", model_version="1")
    response = result.get_response() if dialect.is_http else result.get_response(as_json=True)
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")
    assert response["id"] == "job-7"
    assert result.as_numpy("image_index").tolist() == [0, 1]
    assert result.as_numpy("boxes").tolist() == [[32, 16, 64, 48], [48, 0, 80, 32]]
    assert result.as_numpy("boxes").dtype == result.as_numpy("scores").dtype == np.float32
    assert result.as_numpy("labels").dtype == np.int64


def test_triton_client_batch_is_split(server: Served, dialect: Dialect) -> None:
    assert server.service.max_batch_size == 1, "a CPU"
    given = [squares((16 * i, 0, RED)) for i in range(3)]
    result = dialect.infer(dialect.canvases(canvas(*given)))
    assert result.as_numpy("image_index").tolist() == [0, 1, 2]
    assert result.as_numpy("boxes").tolist() == [[16 * i, 0, 16 * i + 32, 32] for i in range(3)]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_triton_client_mixes_binary_and_json(
    http: Dialect, binary_in: bool, binary_out: bool
) -> None:
    images = canvas(one_red(), squares((48, 0, RED)))
    outputs = http.wanted("image_index", "boxes", "scores", "labels", binary_data=binary_out)
    result = http.infer(http.canvases(images, binary_data=binary_in), outputs=outputs)
    assert result.as_numpy("boxes").tolist() == [[32, 16, 64, 48], [48, 0, 80, 32]]
    assert result.as_numpy("scores").dtype == np.float32
    empty = http.infer(http.images(encoded(squares())), outputs=outputs)
    assert empty.as_numpy("boxes").shape == (0, 4)


def test_triton_client_images_equal_v1(server: Served, dialect: Dialect) -> None:
    large = encoded(squares((0, 0, RED), (64, 0, (190, 0, 0))).resize((512, 384)), "JPEG")
    for wanted in ({}, {"score_threshold": 0.9}, {"max_detections": 1}):
        result = dialect.infer(dialect.images(large), parameters=wanted)
        with server.client() as plain:
            answer = plain.post("/v1/detect", content=large, params=wanted).json()
        boxes = [list(each["box"].values()) for each in answer["detections"]]
        assert boxes
        np.testing.assert_allclose(result.as_numpy("boxes"), boxes, atol=0.0051)
        scores = [each["score"] for each in answer["detections"]]
        np.testing.assert_allclose(result.as_numpy("scores"), scores, atol=0.000051)


def test_triton_client_sends_several_images(dialect: Dialect) -> None:
    large = squares((0, 0, RED), (64, 0, (200, 0, 0))).resize((512, 384))
    result = dialect.infer(dialect.images(encoded(large), encoded(one_red())))
    assert result.as_numpy("image_index").tolist() == [0, 0, 1]
    assert result.as_numpy("boxes")[2].tolist() == [32, 16, 64, 48]


def test_triton_client_selects_outputs(dialect: Dialect) -> None:
    outputs = dialect.wanted("labels", "boxes")
    result = dialect.infer(dialect.images(encoded(squares())), outputs=outputs)
    assert result.as_numpy("boxes").shape == (0, 4)
    assert result.as_numpy("labels").shape == (0,)
    assert result.as_numpy("scores") is None, "it was not asked for"


def test_triton_client_async_requests_are_answered(http: Dialect) -> None:
    given = [http.canvases(canvas(squares((16 * i, 0, RED)))) for i in range(6)]
    pending = [
        http.client.async_infer("tiny", [each], request_id=str(i)) for i, each in enumerate(given)
    ]
    for i, each in enumerate(pending):
        result = each.get_result()
        assert result.get_response()["id"] == str(i)
        assert result.as_numpy("boxes").tolist() == [[16 * i, 0, 16 * i + 32, 32]]


@pytest.mark.parametrize(
    ("call", "status", "code", "named"),
    [
        (lambda d: d.ask("get_model_metadata", "none"), 404, "NOT_FOUND", "no model 'none'"),
        (lambda d: d.ask("get_model_config", "none"), 404, "NOT_FOUND", "no model 'none'"),
        (
            lambda d: d.infer(d.images(b"x"), model_version="9"),
            404,
            "NOT_FOUND",
            "no version 9",
        ),
        (lambda d: d.infer(d.images(b"no image")), 415, "INVALID_ARGUMENT", "JPEG"),
        (lambda d: d.infer(d.images(b"")), 400, "INVALID_ARGUMENT", "empty"),
        (
            lambda d: d.infer(d.canvases(np.zeros((1, 33, 32, 3), "u1"))),
            400,
            "INVALID_ARGUMENT",
            "32",
        ),
        (
            lambda d: d.infer(d.canvases(np.zeros((65, 32, 32, 3), "u1"))),
            413,
            "INVALID_ARGUMENT",
            "at most 64",
        ),
        (
            lambda d: d.infer(d.images(b"x"), parameters={"score_threshold": 2.0}),
            400,
            "INVALID_ARGUMENT",
            "not in 0..1",
        ),
        (
            lambda d: d.infer(d.images(bytes(2_000_000))),
            413,
            "RESOURCE_EXHAUSTED",
            "larger",
        ),
        (lambda d: d.client.load_model("tiny"), 404, "UNIMPLEMENTED", ""),
    ],
)
def test_triton_client_errors_are_readable(
    dialect: Dialect, call: Callable[[Dialect], object], status: int, code: str, named: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(dialect)
    assert caught.value.status() == (str(status) if dialect.is_http else f"StatusCode.{code}")
    assert named in caught.value.message()


def test_triton_client_compressed_request_is_415(http: Dialect) -> None:
    with pytest.raises(InferenceServerException, match="Content-Encoding 'gzip'") as caught:
        http.infer(http.images(b"x"), request_compression_algorithm="gzip")
    assert caught.value.status() == "415"
    result = http.infer(http.images(encoded(one_red())), response_compression_algorithm="gzip")
    assert result.as_numpy("scores").tolist() == [1.0], "an answer may stay as it is"
