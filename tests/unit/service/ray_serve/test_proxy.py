"""What a client of Ray Serve's proxy reads when Ray answers, and when the service does."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from service.ray_serve.proxy import ProxyAnswers, layers

Headers = list[tuple[bytes, bytes]]
PLAIN: Headers = [(b"content-type", b"text/plain; charset=utf-8")]
REFUSED = b"Request dropped due to backpressure"


class Ray:
    """Ray's proxy as far as it matters here: it sends messages, or ends without any."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages
        self.headers: Headers = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = list(scope["headers"])
        for message in self.messages:
            await send(message)


def answering(status: int, headers: Headers, body: bytes = REFUSED) -> Ray:
    return Ray(
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


async def ask(ray: Ray, path: str = "/v1/detect", headers: Sequence[str] = ()) -> httpx.Response:
    transport = httpx.ASGITransport(app=ProxyAnswers(ray))
    sent = [("x-request-id", each) for each in headers]
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=b"picture", headers=sent)


@pytest.mark.parametrize(
    ("ray", "status", "words"),
    [
        (answering(503, PLAIN), 503, "no replica takes requests"),
        (answering(408, PLAIN), 504, "request_timeout_s"),
        (Ray(), 503, "the replica that had the request is gone"),
    ],
)
async def test_rays_own_refusals_are_problems(ray: Ray, status: int, words: str) -> None:
    answer = await ask(ray, headers=["job-1"])
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "job-1"
    assert answer.json()["status"] == status
    assert words in answer.json()["detail"]


async def test_rays_own_idea_of_when_to_come_back_is_kept() -> None:
    answer = await ask(answering(503, [*PLAIN, (b"retry-after", b"7")]))
    assert answer.headers["retry-after"] == "7"


async def test_the_inference_protocol_has_errors_of_its_own() -> None:
    answer = await ask(answering(503, PLAIN), path="/v2/models/tiny/infer")
    assert answer.json().keys() == {"error"}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, [(b"content-type", b"application/problem+json"), (b"retry-after", b"3")]),
        (408, [(b"content-type", b"application/problem+json")]),
        (200, PLAIN),
        (404, PLAIN),
        (429, PLAIN),
    ],
)
async def test_everything_else_passes(status: int, headers: Headers) -> None:
    answer = await ask(answering(status, headers))
    assert (answer.status_code, answer.content) == (status, REFUSED)
    for name, value in headers:
        assert answer.headers[name.decode()] == value.decode()


async def test_rays_own_paths_are_left_alone() -> None:
    answer = await ask(answering(503, PLAIN, b"This node is being drained."), path="/-/healthz")
    assert answer.content == b"This node is being drained."


async def test_an_answer_that_breaks_off_is_not_begun_again() -> None:
    begun: Message = {"type": "http.response.start", "status": 200, "headers": []}
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nobody asks")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/detect", "method": "POST", "headers": []}
    await ProxyAnswers(Ray(begun))(scope, receive, send)
    assert sent == [begun]


async def test_one_id_for_a_request() -> None:
    twice: Headers = [(b"x-request-id", b"job-1"), (b"X-Request-ID", b"job-1")]
    ray = answering(200, twice)
    answer = await ask(ray, headers=["job-1"])
    assert answer.headers.get_list("x-request-id") == ["job-1"]
    assert [value for name, value in ray.headers if name == b"x-request-id"] == [b"job-1"]


@pytest.mark.parametrize("given", [(), ("a b",), ("x" * 129,), ("<id>", "job-2")])
async def test_an_id_that_may_not_be_repeated_is_replaced_before_ray_sees_it(
    given: Sequence[str],
) -> None:
    ray = Ray()
    answer = await ask(ray, headers=given)
    (seen,) = [value.decode() for name, value in ray.headers if name == b"x-request-id"]
    assert answer.headers["x-request-id"] == seen
    assert len(seen) == 32


def test_ray_finds_it() -> None:
    (layer,) = layers()
    assert layer.cls is ProxyAnswers
