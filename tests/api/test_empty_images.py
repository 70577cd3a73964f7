"""Images whose header says that they have no pixels, on every way that reads the header first."""

from __future__ import annotations

import base64

import httpx
import pytest
from PIL import Image

from service.imaging.header import read_header
from tests.images import encoded, png_header


def empty_jpeg(*, progressive: bool) -> bytes:
    """A JPEG whose height is to follow its first scan, which no decoder here takes."""
    data = encoded(Image.new("RGB", (48, 40)), "JPEG", progressive=progressive)
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    return data[: frame + 5] + b"\x00\x00" + data[frame + 7 :]


def empty_webp() -> bytes:
    data = encoded(Image.new("RGB", (48, 40)), "WEBP")
    return data[:26] + b"\x00\x00" + data[28:]


EMPTY = {
    "png of no width": png_header(0, 40),
    "png of no height": png_header(40, 0),
    "jpeg": empty_jpeg(progressive=False),
    "progressive jpeg": empty_jpeg(progressive=True),
    "webp": empty_webp(),
    "webp of no known kind": b"RIFF\x20\x00\x00\x00WEBPVP9 " + bytes(20),
}


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("query", ["", "?tile=auto", "?tile=64"])
@pytest.mark.parametrize("accept", ["application/json", "image/png"])
async def test_detect_rejects_image_without_pixels(
    client: httpx.AsyncClient, data: bytes, query: str, accept: str
) -> None:
    answer = await client.post(f"/v1/detect{query}", content=data, headers={"Accept": accept})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
async def test_batch_and_v2_reject_image_without_pixels(
    client: httpx.AsyncClient, data: bytes
) -> None:
    files = [("files", ("a", data))]
    batch = await client.post("/v1/detect/batch?tile=auto", files=files)
    assert [each["status"] for each in batch.json()["results"]] == [400]
    text = base64.b64encode(data).decode()
    image = {"name": "encoded_images", "datatype": "BYTES", "shape": [1], "data": [text]}
    answer = await client.post("/v2/models/tiny/infer", json={"inputs": [image]})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("data", EMPTY.values(), ids=EMPTY)
def test_image_without_pixels_is_rejected_before_its_header(data: bytes) -> None:
    assert read_header(data) is None
