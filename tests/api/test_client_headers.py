"""Requests as real clients send them: their Accept and Content-Type, and their usual mistakes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from tests.api.inference_protocol import INFER, base64_images, binary_images, with_raw
from tests.images import LFS_POINTER, encoded, noise, one_red

PNG = encoded(one_red())
JPEG = encoded(noise((96, 64)), "JPEG")
WEBP = encoded(noise((96, 64)), "WEBP")
TEXT = base64.b64encode(PNG).decode()
BOX = {"x1": 32.0, "y1": 16.0, "x2": 64.0, "y2": 48.0}

JSON = "application/json"
PROBLEM = "application/problem+json"
LINES = "application/x-ndjson"
FORM = "application/x-www-form-urlencoded"
DATA = "multipart/form-data; boundary="
BATCH = "/v1/detect/batch"

CHROME = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;"
    "q=0.8,application/signed-exchange;v=b3;q=0.7"
)
CHROME_IMG = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FIREFOX_92 = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,"
    "image/svg+xml,*/*;q=0.8"
)
FIREFOX_IMG = "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5"
SAFARI_IMG = (
    "image/webp,image/avif,image/jxl,image/heic,image/heic-sequence,video/*;q=0.8,image/png,"
    "image/svg+xml,image/*;q=0.8,*/*;q=0.5"
)
JAVA_8 = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
JAVA_17 = "text/html, image/gif, image/jpeg, */*; q=0.2"
AXIOS = "application/json, text/plain, */*"


class Sent(NamedTuple):
    """What a client sends; None for a header that it leaves out."""

    accept: str | None
    content_type: str | None
    body: bytes
    method: str = "POST"
    path: str = "/v1/detect"


def form(boundary: str, *disposition: str, content: bytes = PNG, more: str = "") -> bytes:
    """A form of one part, as a client writes it."""
    head = f"--{boundary}\r\nContent-Disposition: {'; '.join(disposition)}\r\n{more}\r\n"
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode()


def by_curl(content: bytes) -> bytes:
    """What `curl -d @FILE` makes of a file."""
    return content.translate(None, b"\r\n\0")


def as_json(image: object) -> bytes:
    return json.dumps({"image": image}).encode()


NAMED = ("form-data", 'name="file"', 'filename="cells.png"')
DOTNET = ("form-data", "name=file", "filename=cells.png", "filename*=utf-8''cells.png")
GUID = "6f276b0d-636d-8e3d-aa2c-93ae737189fd"
TYPED = "Content-Type: image/png\r\n"

ANSWERED = {
    "HttpURLConnection 8": Sent(JAVA_8, FORM, PNG),
    "HttpURLConnection 17": Sent(JAVA_17, FORM, PNG),
    "HttpURLConnection with a type": Sent(JAVA_8, "image/png", PNG),
    "Java HttpClient": Sent(None, None, PNG),
    "OkHttp": Sent(None, "image/png", PNG),
    "OkHttp, JSON": Sent(None, "application/json; charset=utf-8", as_json(TEXT)),
    "HttpClient of .NET": Sent(None, None, PNG),
    "HttpClient of .NET, JSON": Sent(None, "application/json; charset=utf-8", as_json(TEXT)),
    "HttpClient of .NET, a form": Sent(None, f'{DATA}"{GUID}"', form(GUID, *DOTNET)),
    "Invoke-WebRequest -InFile": Sent(None, FORM, PNG),
    "Invoke-RestMethod -Form": Sent(None, f'{DATA}"{GUID}"', form(GUID, *DOTNET, more=TYPED)),
    "Invoke-RestMethod -ContentType": Sent(None, JSON, b"\xef\xbb\xbf" + as_json(TEXT)),
    "net/http of Go": Sent(None, "image/png", PNG),
    "mime/multipart of Go": Sent(
        None,
        f"{DATA}5d41402abc4b2a76",
        form("5d41402abc4b2a76", *NAMED, more="Content-Type: application/octet-stream\r\n"),
    ),
    "urllib": Sent(None, FORM, PNG),
    "requests and httpx": Sent("*/*", None, PNG),
    "requests and httpx, files": Sent("*/*", f"{DATA}716e66bc", form("716e66bc", *NAMED)),
    "requests and httpx, json": Sent("*/*", JSON, as_json(TEXT)),
    "aiohttp": Sent("*/*", "application/octet-stream", PNG),
    "aiohttp, FormData": Sent(
        "*/*",
        f"{DATA}c92a03a1",
        b"--c92a03a1\r\n" + TYPED.encode() + form("c92a03a1", *NAMED)[len("--c92a03a1\r\n") :],
    ),
    "axios": Sent(AXIOS, FORM, PNG),
    "axios, JSON": Sent(AXIOS, JSON, as_json(f"data:image/png;base64,{TEXT}")),
    "fetch of Node": Sent("*/*", None, PNG),
    "FormData of Node": Sent(
        "*/*",
        f"{DATA}----formdata-undici-050488546038",
        form("----formdata-undici-050488546038", *NAMED, more=TYPED),
    ),
    "Chrome, a form": Sent(
        CHROME,
        f"{DATA}----WebKitFormBoundary7MA4YWxkTrZu0gW",
        form("----WebKitFormBoundary7MA4YWxkTrZu0gW", *NAMED, more=TYPED),
    ),
    "Chrome, fetch": Sent("*/*", "image/png", PNG),
    "Chrome, img": Sent(CHROME_IMG, "image/png", PNG),
    "Firefox, a form": Sent(
        FIREFOX,
        f"{DATA}----geckoformboundary39a1f2",
        form("----geckoformboundary39a1f2", *NAMED, more=TYPED),
    ),
    "Firefox 92": Sent(FIREFOX_92, "image/png", PNG),
    "Firefox, img": Sent(FIREFOX_IMG, "image/png", PNG),
    "Safari, img": Sent(SAFARI_IMG, "image/png", PNG),
    "curl --data-binary": Sent("*/*", FORM, PNG),
    "curl -F": Sent("*/*", f"{DATA}---6f276b0d", form("---6f276b0d", *NAMED, more=TYPED)),
    "curl --json": Sent(JSON, JSON, as_json(TEXT)),
    "curl -T -X POST": Sent("*/*", None, PNG),
    "wget --post-file": Sent("*/*", FORM, PNG),
    "text/html alone": Sent("text/html", None, PNG),
    "an image type that is not written": Sent("image/gif", None, PNG),
    "image/* below JSON": Sent("image/*;q=0.1, application/json;q=0.5", None, PNG),
    "image/* above JSON": Sent("image/*;q=0.5, application/json;q=0.1", None, PNG),
    "no meaning": Sent(";q=;,*//,=\xff", None, PNG),
    "base64 in lines": Sent("*/*", JSON, as_json(base64.encodebytes(PNG).decode())),
    "base64url": Sent("*/*", JSON, as_json(base64.urlsafe_b64encode(PNG).decode())),
    "base64 without padding": Sent("*/*", JSON, as_json(TEXT.rstrip("="))),
}
DRAWN = {
    "image/png": "image/png",
    "image/jpeg": "image/jpeg",
    "image/*": "image/jpeg",
    "image/webp, image/png;q=0.9": "image/png",
    "image/png, application/json;q=0": "image/png",
    "image/png, application/problem+json": "image/png",
}


async def send(
    client: httpx.AsyncClient, sent: Sent, more: Mapping[str, str] | None = None
) -> httpx.Response:
    headers = [("Host", "test"), ("Content-Length", str(len(sent.body)))]
    if sent.accept is not None:
        headers.append(("Accept", sent.accept))
    if sent.content_type is not None:
        headers.append(("Content-Type", sent.content_type))
    request = client.build_request(sent.method, sent.path, content=sent.body)
    # Without those that this client adds.
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    request.headers = httpx.Headers(raw)
    return await client.send(request)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM
    return str(answer.json()["detail"])


@pytest.mark.parametrize("name", ANSWERED)
async def test_clients_get_json(client: httpx.AsyncClient, name: str) -> None:
    answer = await send(client, ANSWERED[name])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == JSON
    assert [each["box"] for each in answer.json()["detections"]] == [BOX]


@pytest.mark.parametrize(("accept", "media"), DRAWN.items())
async def test_images_are_drawn_where_json_is_not_accepted(
    client: httpx.AsyncClient, accept: str, media: str
) -> None:
    answer = await send(client, Sent(accept, None, PNG))
    assert (answer.status_code, answer.headers["content-type"]) == (200, media)
    # Errors are problems whatever is accepted.
    assert "a GIF image" in refusal(await send(client, Sent(accept, None, b"GIF89a")), 415)


async def test_several_accept_headers_are_one(client: httpx.AsyncClient) -> None:
    async def media(path: str, *accept: str, **given: Any) -> str:
        headers = [("Accept", each) for each in accept]
        request = client.build_request("POST", path, **given)
        del request.headers["Accept"]
        request.headers = httpx.Headers([*request.headers.items(), *headers])
        return str((await client.send(request)).headers["content-type"])

    image, batch = {"content": PNG}, {"files": [("files", PNG)]}
    assert await media("/v1/detect", "image/png", JSON, **image) == JSON
    assert await media("/v1/detect", "text/html;q=0.1", "image/png", **image) == "image/png"
    assert await media("/v1/detect/batch", "image/png", LINES, **batch) == LINES
    assert await media("/v1/detect/batch", f"{LINES};q=0.5", JSON, **batch) == JSON


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, JSON),
        ("*/*", JSON),
        (JAVA_8, JSON),
        (CHROME, JSON),
        ("image/png", JSON),
        (LINES, LINES),
        (f"{LINES}, application/json", LINES),
        (f"{LINES};q=0", JSON),
    ],
)
async def test_batch_route_chooses_lines_by_accept(
    client: httpx.AsyncClient, accept: str | None, media: str
) -> None:
    body = form("b", "form-data", 'name="files"')
    answer = await send(client, Sent(accept, f"{DATA}b", body, path=BATCH))
    assert (answer.status_code, answer.headers["content-type"]) == (200, media)


@pytest.mark.parametrize(
    "accept",
    [
        None,
        JAVA_8,
        CHROME,
        ";q=;,*//,=\xff",
        "application/openmetrics-text;version=x",
        "application/openmetrics-text;version=2.x",
        "text/plain;version=1.x.0",
        "application/openmetrics-text;version=1.0.0;escaping=x",
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/", "/docs", "/v1/models", "/v2", "/healthz"])
async def test_get_routes_accept_any_accept_header(
    client: httpx.AsyncClient, path: str, accept: str | None
) -> None:
    answer = await send(client, Sent(accept, None, b"", "GET", path))
    assert answer.status_code == 200, answer.text


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\1\xd4meta" + bytes(64)
WRONG: dict[str, tuple[Sent, int, tuple[str, ...]]] = {
    "JSON without its type": (
        Sent("*/*", None, as_json(TEXT)),
        415,
        ("JSON text", "missing", JSON),
    ),
    "curl -d of JSON": (Sent("*/*", FORM, as_json(TEXT)), 415, ("JSON text", FORM, JSON)),
    "base64": (Sent("*/*", "text/plain;charset=UTF-8", TEXT.encode()), 415, ("base64 text",)),
    "a data URL": (
        Sent("*/*", "text/plain", f"data:image/png;base64,{TEXT}".encode()),
        415,
        ("a data URL", JSON),
    ),
    "HEIC": (Sent("*/*", "image/jpeg", HEIC), 415, ("a HEIC image", "JPEG, PNG or WebP")),
    "AVIF": (Sent("*/*", "image/avif", encoded(one_red(), "AVIF")), 415, ("an AVIF image",)),
    "TIFF": (Sent("*/*", "image/tiff", encoded(one_red(), "TIFF")), 415, ("a TIFF image",)),
    "BMP": (Sent("*/*", "image/bmp", encoded(one_red(), "BMP")), 415, ("a BMP image",)),
    "GIF": (Sent("*/*", "image/gif", encoded(one_red(), "GIF")), 415, ("a GIF image",)),
    "HTML": (Sent("*/*", "text/html", b"<!DOCTYPE html><p>404"), 415, ("an HTML page",)),
    "PDF": (Sent("*/*", "application/pdf", b"%PDF-1.7\n"), 415, ("a PDF document",)),
    "ZIP": (Sent("*/*", "application/zip", b"PK\3\4\24\0"), 415, ("a ZIP archive",)),
    "XML": (Sent("*/*", "text/xml", b"<annotation/>"), 415, ("XML text",)),
    "SVG": (Sent("*/*", "image/svg+xml", b"<svg/>"), 415, ("an SVG drawing",)),
    "an LFS pointer": (Sent("*/*", FORM, LFS_POINTER), 415, ("Git LFS pointer", "git lfs pull")),
    "a path": (Sent("*/*", FORM, b"cells/a.jpg"), 415, ("the name of a file", "--data-binary @")),
    "@file": (Sent("*/*", FORM, b"@a.jpg"), 415, ("the name of a file ('@a.jpg')",)),
    "curl -d of a field": (Sent("*/*", FORM, b"file=@a.jpg"), 415, ("form fields", "-F file=@")),
    "an empty body": (Sent("*/*", None, b""), 400, ("0 bytes", "--data-binary", "missing")),
    "curl -d @ of a JPEG": (Sent("*/*", FORM, by_curl(JPEG)), 400, ("use `curl --data-binary",)),
    "curl -d @ of a PNG": (Sent("*/*", FORM, by_curl(PNG)), 400, ("use `curl --data-binary",)),
    "curl -d @ of a WebP": (Sent("*/*", FORM, by_curl(WEBP)), 400, ("use `curl --data-binary",)),
    "curl -d @ of a JPEG with its type": (
        Sent("*/*", "image/jpeg", by_curl(JPEG)),
        400,
        ("use `curl --data-binary",),
    ),
    "a small JPEG without CR and LF": (
        Sent("*/*", FORM, encoded(one_red(), "JPEG").translate(None, b"\r\n")),
        400,
        ("does not decode", "use `curl --data-binary"),
    ),
    "a large JPEG without CR and LF": (
        Sent("*/*", FORM, encoded(noise((256, 256)), "JPEG").translate(None, b"\r\n")),
        400,
        ("use `curl --data-binary",),
    ),
    "a PNG with other line ends": (
        Sent("*/*", "image/png", PNG.replace(b"\r\n", b"\n")),
        415,
        ("a PNG image whose line breaks were removed or changed", "--data-binary"),
    ),
    "a JPEG that JavaScript read as text": (
        Sent(AXIOS, "text/plain", JPEG.decode("utf-8", "replace").encode()),
        415,
        ("an image that was read as text",),
    ),
    "a form without its type": (
        Sent("*/*", "image/png", form("b", *NAMED)),
        415,
        ("a multipart form", "'image/png'"),
    ),
    "a form without a boundary": (
        Sent(AXIOS, "multipart/form-data", form("b", *NAMED)),
        400,
        ("without a boundary", "leave that header to the library"),
    ),
    "an image as a form": (Sent(AXIOS, f"{DATA}b", JPEG), 400, ("boundary", "a JPEG image")),
    "an empty form": (Sent(AXIOS, f"{DATA}b", b""), 400, ("nothing (0 bytes)",)),
    "an image as JSON": (Sent("*/*", JSON, PNG), 400, ("not valid JSON", "a PNG image")),
    "an empty body as JSON": (Sent("*/*", JSON, b""), 400, ("nothing (0 bytes)",)),
    "a base64 string as JSON": (Sent("*/*", JSON, json.dumps(TEXT).encode()), 400, ("object",)),
    "a path in JSON": (
        Sent("*/*", JSON, as_json("/home/me/a.jpg")),
        400,
        ("not valid base64", "the name of a file ('/home/me/a.jpg')"),
    ),
    "Python's bytes in JSON": (
        Sent("*/*", JSON, as_json(str(base64.b64encode(PNG)))),
        400,
        ("bytes as Python prints them",),
    ),
    "a Buffer in JSON": (
        Sent(AXIOS, JSON, as_json({"type": "Buffer", "data": [137, 80]})),
        400,
        ("a dict", "base64 string"),
    ),
    "base64 of a HEIC in JSON": (
        Sent("*/*", JSON, as_json(base64.b64encode(HEIC).decode())),
        415,
        ("a HEIC image",),
    ),
    "base64 in a form": (
        Sent("*/*", f"{DATA}b", form("b", *NAMED, content=TEXT.encode())),
        415,
        ("base64 text",),
    ),
    "a data URL in a form": (
        Sent("*/*", f"{DATA}b", form("b", *NAMED, content=b"data:image/png;base64,iVBORw0KGgo=")),
        415,
        ("a data URL",),
    ),
    "curl -F without @": (
        Sent("*/*", f"{DATA}b", form("b", *NAMED[:2], content=b"a.jpg")),
        415,
        ("the name of a file ('a.jpg')",),
    ),
    "curl -T": (Sent("*/*", None, PNG, method="PUT"), 405, ("use POST",)),
    "an image to the batch route": (
        Sent("*/*", FORM, PNG, path=BATCH),
        415,
        ("a PNG image", FORM, "multipart/form-data with parts named 'files'", JSON),
    ),
    "JSON without its type to the batch route": (
        Sent("*/*", None, json.dumps({"images": [{"image": TEXT}]}).encode(), path=BATCH),
        415,
        ("JSON text", "no Content-Type", JSON),
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_error_names_what_was_sent_and_what_to_send(
    client: httpx.AsyncClient, name: str
) -> None:
    sent, status, named = WRONG[name]
    detail = refusal(await send(client, sent), status)
    for each in named:
        assert each in detail
    assert len(detail) < 700


async def test_an_image_without_cr_and_lf_is_answered(client: httpx.AsyncClient) -> None:
    black = encoded(Image.new("L", (1600, 1600)), "JPEG", quality=98, optimize=True)
    assert black.translate(None, b"\r\n") == black
    answer = await send(client, Sent("*/*", FORM, black))
    assert answer.status_code == 200, answer.text


async def test_batch_images_are_read_and_named_alike(client: httpx.AsyncClient) -> None:
    images = [f"data:image/png;base64,{TEXT}", TEXT.rstrip("="), "a.jpg", "données.jpg"]
    body = b"\xef\xbb\xbf" + json.dumps({"images": [{"image": each} for each in images]}).encode()
    answer = await send(client, Sent("*/*", JSON, body, path=BATCH))
    results = answer.json()["results"]
    assert [each["status"] for each in results] == [200, 200, 400, 400]
    assert "the name of a file ('a.jpg')" in results[2]["error"]["detail"]
    assert "the name of a file ('données.jpg')" in results[3]["error"]["detail"]


async def test_v2_images_are_read_and_named_alike(client: httpx.AsyncClient) -> None:
    given = base64_images(PNG) | {"data": [f"data:image/png;base64,{TEXT.rstrip('=')}"]}
    body = b"\xef\xbb\xbf" + json.dumps({"inputs": [given]}).encode()
    answer = await send(client, Sent("*/*", JSON, body, path=INFER))
    assert answer.status_code == 200, answer.text

    async def error(**content: Any) -> str:
        return str((await client.post(INFER, **content)).json()["error"])

    path = base64_images(PNG) | {"data": ["a.jpg"]}
    assert "the name of a file ('a.jpg')" in await error(json={"inputs": [path]})
    assert "a PNG image" in await error(content=PNG)
    declared, raw = binary_images(TEXT.encode())
    assert "base64 text" in await error(**with_raw({"inputs": [declared]}, raw))
