"""Invalid input over every route gets its documented error, and the next request is served."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import httpx
import pytest
from PIL import Image

from tests.images import RED, encoded, huge_png, noise, one_red, rotated, sixteen_bit, squares

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
RED_BOX = {"x1": 32.0, "y1": 16.0, "x2": 64.0, "y2": 48.0}
LIMIT = 33_554_432


def truncated_jpeg() -> bytes:
    content = encoded(noise((256, 192)), "JPEG")
    return content[: len(content) // 2]


def truncated_png() -> bytes:
    content = encoded(noise((64, 64)))
    return content[: len(content) // 2]


def palette() -> bytes:
    return encoded(one_red().quantize(8))


def transparent() -> bytes:
    """Red where it is opaque; elsewhere invisible bright blue."""
    image = Image.new("RGBA", (128, 96), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (32, 16, 64, 48))
    image.paste((0, 0, 0, 255), (64, 0, 128, 96))
    return encoded(image)


def animated(kind: str) -> bytes:
    others = [Image.new("RGB", (128, 96), "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(one_red(), kind, save_all=True, append_images=others, **options)


BAD: dict[str, tuple[Callable[[], bytes], int]] = {
    "0 bytes": (lambda: b"", 400),
    "text named .jpg": (lambda: b"Dear server, I am no image at all.\n" * 20, 415),
    "truncated JPEG": (truncated_jpeg, 400),
    "truncated PNG": (truncated_png, 400),
    "a JPEG's first bytes": (lambda: b"\xff\xd8\xff\xe0\x00\x10JFIF", 400),
    "30,000 x 30,000 PNG": (huge_png, 413),
    "GIF": (lambda: encoded(one_red(), "GIF"), 415),
    "animated GIF": (partial(animated, "GIF"), 415),
    "SVG": (lambda: SVG, 415),
    "BMP": (lambda: encoded(one_red(), "BMP"), 415),
    "TIFF": (lambda: encoded(one_red(), "TIFF"), 415),
}

GOOD: dict[str, Callable[[], bytes]] = {
    "CMYK JPEG": lambda: encoded(one_red().convert("CMYK"), "JPEG", quality=95),
    "grey JPEG": lambda: encoded(squares((32, 16, (255, 255, 255))).convert("L"), "JPEG"),
    "16-bit grey PNG": lambda: sixteen_bit(squares((32, 16, (255, 255, 255)))),
    "1-bit PNG": lambda: encoded(squares((32, 16, (255, 255, 255))).convert("1")),
    "palette PNG": palette,
    "alpha PNG": transparent,
    "animated PNG": partial(animated, "PNG"),
    "animated WebP": partial(animated, "WEBP"),
    "EXIF-rotated PNG": lambda: rotated(one_red(), 8),
}


async def raw(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post("/v1/detect", content=content, params={"score_threshold": 0.9})


async def multipart(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    files = {"file": ("cells.jpg", content, "image/jpeg")}
    return await client.post("/v1/detect", files=files, params={"score_threshold": 0.9})


async def as_json(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    document = {"image": base64.b64encode(content).decode()}
    return await client.post("/v1/detect", json=document, params={"score_threshold": 0.9})


WAYS = (raw, multipart, as_json)


async def assert_still_serving(client: httpx.AsyncClient) -> None:
    answer = await raw(client, encoded(one_red()))
    assert answer.status_code == 200
    assert [each["box"] for each in answer.json()["detections"]] == [RED_BOX]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
async def test_detect_rejects_bad_images(
    client: httpx.AsyncClient, name: str, way: Callable[..., object]
) -> None:
    make, status = BAD[name]
    answer = await way(client, make())
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert problem["status"] == status
    assert problem["instance"] == "/v1/detect"
    await assert_still_serving(client)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GOOD)
async def test_detect_accepts_unusual_images(
    client: httpx.AsyncClient, name: str, way: Callable[..., object]
) -> None:
    answer = await way(client, GOOD[name]())
    assert answer.status_code == 200, answer.text
    assert answer.json()["image"] == {"width": 128, "height": 96}
    boxes = [each["box"] for each in answer.json()["detections"] if each["label"] == "red"]
    # Where a page shines through, white is red too; the square itself is there in any case.
    assert RED_BOX in boxes
    await assert_still_serving(client)


async def test_transparent_pixels_are_white(
    client: httpx.AsyncClient,
) -> None:
    answer = await raw(client, transparent())
    left_edge = [each for each in answer.json()["detections"] if each["box"]["x1"] == 0.0]
    assert {each["label"] for each in left_edge} == {"red", "green", "blue"}


async def test_declared_large_body_is_413_before_reading(new_client: httpx.AsyncClient) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield bytes(1 << 20)

    answer = await new_client.post(
        "/v1/detect", content=body(), headers={"Content-Length": str(100 << 20)}
    )
    assert answer.status_code == 413
    assert read == 0
    await assert_still_serving(new_client)


@pytest.mark.parametrize("content_type", ["image/jpeg", "multipart/form-data; boundary=b"])
async def test_chunked_large_body_is_413_at_the_limit(
    new_client: httpx.AsyncClient, content_type: str
) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield bytes(1 << 20)

    answer = await new_client.post(
        "/v1/detect", content=body(), headers={"Content-Type": content_type}
    )
    assert answer.status_code == 413
    assert read == LIMIT // (1 << 20) + 1
    assert str(LIMIT) in answer.json()["detail"]
    await assert_still_serving(new_client)


async def test_content_encoding_is_415(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/v1/detect", content=encoded(one_red()), headers={"Content-Encoding": "gzip"}
    )
    assert answer.status_code == 415
    assert "gzip" in answer.json()["detail"]
    answer = await client.post(
        "/v1/detect", content=encoded(one_red()), headers={"Content-Encoding": "identity"}
    )
    assert answer.status_code == 200


def broken_json() -> Iterator[tuple[str, bytes]]:
    yield "not JSON", b'{"image": '
    yield "not an object", b'["aGk="]'
    yield "no image", b'{"picture": "aGk="}'
    yield "not a string", b'{"image": 7}'
    yield "not base64", b'{"image": "***"}'
    yield "half a group", b'{"image": "abcde"}'
    yield "padding inside", b'{"image": "aGk=aGk="}'
    yield "not ASCII", '{"image": "é"}'.encode()
    yield "a data URL without base64", b'{"image": "data:image/png,aGk="}'
    yield "not UTF-8", b'{"image": "\xff"}'
    yield "empty body", b""


@pytest.mark.parametrize(("name", "body"), list(broken_json()))
async def test_detect_rejects_broken_json(
    client: httpx.AsyncClient, name: str, body: bytes
) -> None:
    answer = await client.post(
        "/v1/detect", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == 400, name
    await assert_still_serving(client)


def broken_forms() -> Iterator[tuple[str, str, bytes, int]]:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    yield "no boundary", "multipart/form-data", b"--b--\r\n", 400
    yield "empty body", "multipart/form-data; boundary=b", b"", 400
    yield "no closing boundary", "multipart/form-data; boundary=b", head + b"abc", 400
    yield "nothing in it", "multipart/form-data; boundary=b", b"--b--\r\n", 400
    yield "another boundary", "multipart/form-data; boundary=c", head + b"x\r\n--b--\r\n", 400
    yield (
        "no name",
        "multipart/form-data; boundary=b",
        b"--b\r\nContent-Type: image/png\r\n\r\nx\r\n--b--\r\n",
        400,
    )
    yield "two files", "multipart/form-data; boundary=b", (head + b"x\r\n") * 2 + b"--b--\r\n", 400
    yield "many parts", "multipart/form-data; boundary=b", (head + b"x\r\n") * 40 + b"--b--", 422


@pytest.mark.parametrize(("name", "content_type", "body", "status"), list(broken_forms()))
async def test_detect_rejects_broken_forms(
    client: httpx.AsyncClient, name: str, content_type: str, body: bytes, status: int
) -> None:
    answer = await client.post("/v1/detect", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status, (name, answer.text)
    await assert_still_serving(client)


async def test_form_error_names_the_right_field(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.post("/v1/detect", files={"image": encoded(one_red())})
    assert answer.status_code == 400
    assert "'file'" in answer.json()["detail"]
    assert "image" in answer.json()["detail"]


async def test_unknown_paths_and_methods_are_problems(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/nothing")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    answer = await client.get("/v1/detect")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["status"] == 405


async def test_large_jpeg_boxes_are_in_original_pixels(
    client: httpx.AsyncClient,
) -> None:
    large = squares((32, 16, RED)).resize((2048, 1536), Image.Resampling.NEAREST)
    answer = await raw(client, encoded(large, "JPEG", quality=95))
    (found,) = answer.json()["detections"]
    assert found["box"] == {"x1": 512.0, "y1": 256.0, "x2": 1024.0, "y2": 768.0}


LONG = "a" * 7000


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/v1/detect?" + "&".join(f"x{i}=y" for i in range(250)), {}, b""),
        ("/v1/detect?" + "&".join(f"x{i}" for i in range(1900)), {}, b""),
        (f"/v1/detect?{LONG}=1", {}, b""),
        (f"/v1/detect?{LONG}=1&{LONG[:1]}=1", {}, b""),
        (f"/v1/detect?a{LONG[:1000]}=1&a{LONG[:1000]}=1", {}, b""),
        (f"/v1/detect?score_threshold={LONG}", {}, b""),
        (f"/v1/detect?tile={LONG}", {}, b""),
        (f"/v1/detect?format={LONG}", {}, b""),
        (f"/v1/detect?classes={LONG}", {}, b""),
        ("/v1/detect?classes=" + "a," * 3500, {}, b""),
        (f"/v1/detect?model={LONG}", {}, b""),
        (f"/v1/detect?version={'9' * 7000}", {}, b""),
        (f"/v1/detect?{LONG}{LONG}", {}, b""),
        (f"/{LONG}", {}, b""),
        (f"/{LONG}{LONG}", {}, b""),
        (f"/v2/models/{LONG}/infer", {}, b""),
        (f"/v2/models/tiny/versions/{LONG}/infer", {}, b""),
        ("/v1/detect", {"Content-Encoding": LONG[:2000]}, b""),
        ("/v1/detect", {"X-Deadline-Ms": LONG[:2000]}, b"x"),
        ("/v1/detect/batch", {"Content-Type": LONG[:2000]}, b"x"),
        *(
            ("/v1/detect", {name: ";," * 30_000}, b"x")
            for name in ("Accept", "Authorization", "Content-Type", "X-Deadline-Ms")
        ),
        (
            "/v1/detect",
            {"Content-Type": "multipart/form-data; boundary=b"},
            b"".join(
                b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n' % (b"n" * 3900)
                for _ in range(16)
            )
            + b"--b--\r\n",
        ),
        (
            "/v1/detect/batch",
            {"Content-Type": "application/json"},
            b'{"images": [{"id": {"%s": 1}}]}' % (b"n" * 100_000),
        ),
    ],
)
async def test_errors_quote_little_of_the_request(
    client: httpx.AsyncClient, path: str, headers: dict[str, str], body: bytes
) -> None:
    answer = await client.post(path, headers=headers, content=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.content) < 1500, answer.text
    assert sum(len(value) for value in answer.headers.values()) < 1500
    await assert_still_serving(client)


@pytest.mark.parametrize("name", ["Accept", "Range", "Traceparent", "Content-Type"])
async def test_parsed_headers_are_bounded(client: httpx.AsyncClient, name: str) -> None:
    for path in ("/v1/models", "/static/sample.jpg", "/metrics"):
        answer = await client.get(path, headers={name: "," * 2049})
        assert answer.status_code == 431
        assert answer.headers["content-type"] == "application/problem+json"
        assert f"{name.lower()} has 2049 bytes; at most 2048" in answer.json()["detail"]
        assert (await client.get(path, headers={name: "," * 2048})).status_code < 500
    assert (await client.get("/v1/models", headers={"Cookie": "a=b;" * 8000})).status_code == 200


async def test_paths_and_queries_are_bounded(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/models?" + "a" * 8192)
    assert answer.status_code == 414
    assert "at most 8192" in answer.json()["detail"]
    assert (await client.get("/v1/models?" + "a" * 8000)).status_code == 200


async def test_queries_of_many_parameters_are_refused_unparsed(
    client: httpx.AsyncClient,
) -> None:
    answer = await client.post("/v1/detect?" + "a&" * 256)
    assert answer.status_code == 422
    assert "more than 256 parameters" in answer.json()["detail"]
