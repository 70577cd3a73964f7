"""The Open Inference Protocol over gRPC, with the published client and by hand."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from service.http.auth.keys import new_key
from service.http.oip import grpc_messages, grpc_methods, grpc_server, grpc_streams
from tests.api.inference_protocol import canvas, prefixed
from tests.api.served import PATIENCE, Served, served
from tests.certificates import make_certificate
from tests.images import encoded, one_red

METHOD = "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Served]:
    with served(repository, max_batch_size=2, max_body_bytes=1_000_000) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture
def channel(server: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


def images(*contents: bytes) -> triton.InferInput:
    values = np.array(contents, dtype=object)
    return triton.InferInput("encoded_images", [len(contents)], "BYTES").set_data_from_numpy(values)


def canvases(images: np.ndarray[Any, Any]) -> triton.InferInput:
    given = triton.InferInput("images", list(images.shape), "UINT8")
    return given.set_data_from_numpy(images)


def typed(**changed: Any) -> pb.ModelInferRequest:
    """A request whose tensor stands in the typed contents."""
    images = canvas(one_red())
    fields: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": images.shape}
    tensor = pb.ModelInferRequest.InferInputTensor(**(fields | changed))
    if "contents" not in changed:
        tensor.contents.uint_contents.extend(images.ravel().tolist())
    return pb.ModelInferRequest(model_name="tiny", inputs=[tensor])


def infer(channel: grpc.Channel, request: pb.ModelInferRequest, **options: Any) -> Any:
    call = channel.unary_unary(
        METHOD + "ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    return call(request, timeout=PATIENCE, **options)


def refusal(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_grpc_async_infer_returns_detections(client: triton.InferenceServerClient) -> None:
    done = threading.Event()
    found: dict[str, Any] = {}

    def finished(result: Any, error: Any) -> None:
        found.update(result=result, error=error)
        done.set()

    client.async_infer("tiny", [canvases(canvas(one_red()))], finished)
    assert done.wait(PATIENCE)
    assert found["error"] is None
    assert found["result"].as_numpy("scores").tolist() == [1.0]


def test_grpc_typed_contents_are_answered_typed(channel: grpc.Channel) -> None:
    answer = infer(channel, typed())
    assert list(answer.raw_output_contents) == []
    outputs = {each.name: each for each in answer.outputs}
    assert list(outputs["boxes"].shape) == [1, 4]
    assert list(outputs["boxes"].contents.fp32_contents) == [32, 16, 64, 48]
    assert list(outputs["labels"].contents.int64_contents) == [0]
    contents = pb.InferTensorContents(bytes_contents=[encoded(one_red())])
    given = typed(name="encoded_images", datatype="BYTES", shape=[1], contents=contents)
    assert list(infer(channel, given).outputs[2].contents.fp32_contents) == [1.0]


@pytest.mark.parametrize(
    ("call", "code", "named"),
    [
        (lambda c: c.is_model_ready("tiny", "two"), "NOT_FOUND", "no version 'two'"),
        (
            lambda c: c.infer("tiny", [images(encoded(one_red()))], timeout=1),
            "DEADLINE_EXCEEDED|UNAVAILABLE",
            "deadline",
        ),
        (lambda c: c.get_inference_statistics("tiny"), "UNIMPLEMENTED", "there are ServerLive"),
    ],
)
def test_grpc_errors_have_status_codes(
    client: triton.InferenceServerClient,
    call: Callable[[triton.InferenceServerClient], object],
    code: str,
    named: str,
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call(client)
    assert caught.value.status().removeprefix("StatusCode.") in code.split("|")
    assert named in caught.value.message()


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (pb.ModelInferRequest(model_name="tiny"), "1 to 6"),
        (typed(name="image"), "unknown input 'image'"),
        (typed(datatype="FP32"), "not UINT8"),
        (typed(shape=[-1, 96, 128, 3]), "shape"),
        (typed(shape=[1, 2**62, 2**62, 3]), "largest canvas"),
        (typed(shape=[1, 64, 64, 3]), "the data has more"),
        (typed(contents=pb.InferTensorContents(uint_contents=[256] * 36864)), "outside 0..255"),
        (typed(contents=pb.InferTensorContents(int_contents=[1])), "belongs into uint_contents"),
        (typed(contents=pb.InferTensorContents()), "the data has 0"),
        (
            pb.ModelInferRequest(
                model_name="tiny", inputs=typed().inputs, raw_input_contents=[b"x"]
            ),
            "give one",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=typed(contents=None).inputs,
                raw_input_contents=[b"x", b"y"],
            ),
            "2 entries for 1 inputs",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny", inputs=typed(contents=None).inputs, raw_input_contents=[b"x"]
            ),
            "1 bytes of data",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=typed(
                    name="encoded_images", datatype="BYTES", shape=[1], contents=None
                ).inputs,
                raw_input_contents=[prefixed(b"abc") + b"\xff"],
            ),
            "too few for the length",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=typed().inputs,
                parameters={"score_threshold": pb.InferParameter()},
            ),
            "must be a number",
        ),
    ],
)
def test_grpc_rejects_malformed_tensors(
    channel: grpc.Channel, request_: pb.ModelInferRequest, named: str
) -> None:
    error = refusal(lambda: infer(channel, request_))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in error.details()


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata"])
def test_grpc_rejects_bytes_that_do_not_parse(channel: grpc.Channel, method: str) -> None:
    error = refusal(lambda: channel.unary_unary(METHOD + method)(b"\xff\xff\xff", timeout=PATIENCE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_grpc_rejects_messages_of_too_many_fields(channel: grpc.Channel) -> None:
    call = channel.unary_unary(METHOD + "ModelInfer")
    for content in (b"\x2a\x00" * 100_000, b"\x78\x00" * 100_000, b"\x22\x00" * 1100):
        error = refusal(partial(call, content, timeout=PATIENCE))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "more than 1088 fields" in error.details()
    error = refusal(partial(call, b"\x7b\x7c", timeout=PATIENCE))
    assert "wire type 3" in error.details()


@pytest.mark.parametrize("method", ["ServerLive", "ModelMetadata", "RepositoryIndex"])
def test_grpc_bounds_messages_of_other_methods(channel: grpc.Channel, method: str) -> None:
    content = pb.ModelMetadataRequest(name="x" * 70_000).SerializeToString()
    error = refusal(lambda: channel.unary_unary(METHOD + method)(content, timeout=PATIENCE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 65536" in error.details()


def test_grpc_bounds_health_check_messages(channel: grpc.Channel) -> None:
    check, watched = grpc_messages.load()[grpc_messages.HEALTH]
    content = check.request(service="x" * 70_000).SerializeToString()
    unary = channel.unary_unary(f"/{grpc_messages.HEALTH}/{check.name}")
    stream = channel.unary_stream(f"/{grpc_messages.HEALTH}/{watched.name}")
    for call in (
        lambda: unary(content, timeout=PATIENCE),
        lambda: next(stream(content, timeout=PATIENCE)),
    ):
        assert "at most 65536" in refusal(call).details()


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"model_name": "x" * 500_000}, "NOT_FOUND"),
        ({"model_version": "x" * 500_000}, "NOT_FOUND"),
        ({"model_name": "x" * 500_000, "model_version": "none"}, "NOT_FOUND"),
        ({"id": "x" * 500_000}, "INVALID_ARGUMENT"),
        ({"outputs": [{"name": "x" * 500_000}]}, "INVALID_ARGUMENT"),
        (
            {"outputs": [{"name": "x" * 500_000, "parameters": {"classification": {}}}]},
            "INVALID_ARGUMENT",
        ),
        ({"parameters": {"timeout": {"string_param": "x" * 500_000}}}, "INVALID_ARGUMENT"),
    ],
)
def test_grpc_errors_quote_little_of_the_request(
    channel: grpc.Channel, changed: dict[str, Any], code: str
) -> None:
    fields: dict[str, Any] = {"model_name": "tiny", "inputs": typed().inputs} | changed
    error = refusal(lambda: infer(channel, pb.ModelInferRequest(**fields)))
    assert error.code() is grpc.StatusCode[code]
    assert len(error.details()) < 300


def test_grpc_bounds_compressed_messages(channel: grpc.Channel) -> None:
    call = channel.unary_unary(METHOD + "ModelInfer")
    compression = grpc.Compression.Gzip
    error = refusal(
        lambda: call(bytes(50_000_000), compression=compression, timeout=PATIENCE),
    )
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    content = typed().SerializeToString()
    assert call(content, compression=compression, timeout=PATIENCE)


def test_grpc_large_messages_are_parsed_one_at_a_time(
    server: Served, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0
    read_infer = grpc_methods.read_infer

    def watched(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return read_infer(*arguments)

    monkeypatch.setattr(grpc_methods, "read_infer", watched)
    content = (
        typed().SerializeToString()
        + pb.ModelInferRequest(
            parameters={"note": pb.InferParameter(string_param="x" * 500_000)}
        ).SerializeToString()
    )
    call = channel.unary_unary(METHOD + "ModelInfer")
    pending = [call.future(content, timeout=PATIENCE) for _ in range(4)]
    assert all(each.result() for each in pending)
    assert most == 1


@pytest.fixture
def stuck(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A pipeline that never answers, until it is called."""

    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(server.service.pipeline, "detect_canvas", never)
        yield patch.undo


def test_grpc_deadline_cancels_the_request(
    server: Served, channel: grpc.Channel, stuck: Callable[[], None]
) -> None:
    call = channel.unary_unary(METHOD + "ModelInfer")
    error = refusal(lambda: call(typed().SerializeToString(), timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: server.service.places.held == 0)


def test_grpc_cancel_frees_queue_place(
    server: Served, channel: grpc.Channel, stuck: Callable[[], None]
) -> None:
    call = channel.unary_unary(METHOD + "ModelInfer")
    pending = [call.future(typed().SerializeToString()) for _ in range(6)]
    until(lambda: server.service.places.held == 6)
    for each in pending:
        each.cancel()
    until(lambda: server.service.places.held == 0)
    stuck()
    assert infer(channel, typed()).model_name == "tiny"


def test_grpc_message_timeout_ends_the_call(repository: Path) -> None:
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(PATIENCE)
        yield b""

    with (
        served(repository, body_timeout_ms=200) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        for method in ("ModelInfer", "ModelMetadata"):
            call = channel.stream_unary(METHOD + method)
            error = refusal(partial(call, messages(), timeout=PATIENCE))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "within 0.2 s" in error.details()
            error = refusal(partial(call, iter(()), timeout=PATIENCE))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        never.set()


def test_grpc_full_queue_refuses_before_the_message(
    server: Served, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(PATIENCE)
        yield b""

    monkeypatch.setattr(server.service.places, "limit", 0)
    error = refusal(
        lambda: channel.stream_unary(METHOD + "ModelInfer")(messages(), timeout=PATIENCE)
    )
    never.set()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "queue is full" in error.details()


def test_grpc_full_queue_has_retry_after(repository: Path) -> None:
    with (
        served(repository, max_queue_size=2) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        contents = pb.InferTensorContents(bytes_contents=[encoded(one_red())] * 2)
        given = typed(name="encoded_images", datatype="BYTES", shape=[2], contents=contents)
        with server.service.places.hold(1, 0):
            error = refusal(lambda: infer(channel, given))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        trailing = dict(error.trailing_metadata())
        assert int(trailing["retry-after"]) >= 1
        assert trailing["x-request-id"]


def test_grpc_serves_keys_over_tls(repository: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    name = new_key(keys, "tester", admin=False)
    certificate, key = make_certificate(tmp_path)
    with (
        served(repository, certificate=certificate, key=key, api_keys_file=keys) as server,
        triton.InferenceServerClient(
            server.grpc.replace("127.0.0.1", "localhost"),
            ssl=True,
            root_certificates=str(certificate),
        ) as client,
    ):
        assert client.is_server_ready(), "probes need no key"
        for headers in (None, {"authorization": "Bearer wrong"}, {"x-api-key": ""}):
            with pytest.raises(InferenceServerException) as caught:
                client.get_model_metadata("tiny", headers=headers)
            assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        for headers in ({"authorization": f"Bearer {name}"}, {"x-api-key": name}):
            assert client.get_model_metadata("tiny", headers=headers).name == "tiny"


def test_grpc_health_check_reports_serving(server: Served, channel: grpc.Channel) -> None:
    check, _ = grpc_messages.load()[grpc_messages.HEALTH]
    call = channel.unary_unary(
        f"/{grpc_messages.HEALTH}/Check",
        request_serializer=check.request.SerializeToString,
        response_deserializer=check.response.FromString,
    )
    for name in ("", grpc_messages.INFERENCE):
        assert call(check.request(service=name)).status == 1
    assert refusal(lambda: call(check.request(service="x"))).code() is grpc.StatusCode.NOT_FOUND
    server.service.draining = True
    try:
        assert call(check.request()).status == 2
    finally:
        server.service.draining = False


SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


def watch(channel: grpc.Channel, name: str = "") -> Any:
    _, method = grpc_messages.load()[grpc_messages.HEALTH]
    call = channel.unary_stream(
        f"/{grpc_messages.HEALTH}/Watch",
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )
    return call(method.request(service=name), timeout=PATIENCE)


def test_grpc_health_watch_reports_changes(server: Served, channel: grpc.Channel) -> None:
    states = watch(channel, grpc_messages.INFERENCE)
    assert next(states).status == SERVING
    server.service.draining = True
    try:
        assert next(states).status == NOT_SERVING
    finally:
        server.service.draining = False
    assert next(states).status == SERVING
    states.cancel()
    unknown = watch(channel, "x")
    assert next(unknown).status == SERVICE_UNKNOWN
    unknown.cancel()


def test_grpc_health_watches_are_bounded_and_see_the_shutdown(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_streams, "_MOST_WATCHES", 2)
    with ExitStack() as stack:
        with served(repository, drain_seconds=PATIENCE) as server:
            channel = stack.enter_context(grpc.insecure_channel(server.grpc))
            watches = [watch(channel) for _ in range(2)]
            assert [next(states).status for states in watches] == [SERVING, SERVING]
            error = refusal(lambda: next(watch(channel)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [next(states).status for states in watches] == [NOT_SERVING, NOT_SERVING]


def test_grpc_slow_messages_do_not_block_others(repository: Path) -> None:
    never = threading.Event()

    def messages() -> Iterator[bytes]:
        never.wait(PATIENCE)
        yield b""

    with (
        served(repository, max_body_bytes=1_000_000, max_queue_bytes=2_000_000) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        call = channel.stream_unary(METHOD + "ModelInfer")
        slow = [call.future(messages(), timeout=PATIENCE) for _ in range(3)]
        until(lambda: any(each.done() for each in slow))
        (refused,) = [each for each in slow if each.done()]
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "2 messages are arriving slowly" in refused.details()
        assert dict(refused.trailing_metadata())["retry-after"] == "1"
        assert infer(channel, typed()).model_name == "tiny"
        never.set()
        until(lambda: all(each.done() for each in slow))


def test_grpc_silent_connections_are_bounded_and_closed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(grpc_server, "descriptors", lambda: 6)
    with served(repository) as server, ExitStack() as stack:
        host, _, port = server.grpc.rpartition(":")
        clients = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE))
            for _ in range(6)
        ]
        greeted = [bool(client.recv(65_536)) for client in clients]
        assert 1 <= sum(greeted) <= 3, "half of the file descriptors"
        for client in clients:
            while client.recv(65_536):
                pass


def test_grpc_descriptors_match_the_proto_files(tmp_path: Path) -> None:
    from grpc_tools import protoc

    folder = Path(str(files("service.http.oip")))
    target = tmp_path / "messages.binpb"
    arguments = ["protoc", f"--proto_path={folder}", f"--descriptor_set_out={target}"]
    assert protoc.main([*arguments, "open_inference.proto", "health.proto"]) == 0
    assert target.read_bytes() == (folder / grpc_messages.DESCRIPTORS).read_bytes()


def test_grpc_messages_match_triton() -> None:
    published = pb.DESCRIPTOR.message_types_by_name
    for method in grpc_messages.load()[grpc_messages.INFERENCE]:
        for kind in (method.request, method.response):
            compare(kind.DESCRIPTOR, published[kind.DESCRIPTOR.name])


def compare(ours: Any, theirs: Any) -> None:
    """Field by field, down to the last message."""
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type) == (other.number, other.type), field.full_name
        if field.message_type is not None:
            compare(field.message_type, other.message_type)
        if field.enum_type is not None:
            names = {(value.name, value.number) for value in field.enum_type.values}
            assert names <= {(value.name, value.number) for value in other.enum_type.values}


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)
