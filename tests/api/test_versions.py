"""One rule of what a version is, on every route and in every protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests import tiny_model
from tests.api.conftest import Start
from tests.images import encoded, one_red

LARGEST = 10**18 - 1
IMAGE = encoded(one_red())
NO_VERSIONS = ("0", "01", "%D9%A1", "v1", "1.0", "+1", "%201", "1_0", "9" * 19, str(2**64))


@pytest.fixture
async def client(start: Start, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A service of versions with 1, 10 and 18 digits, and of folders that are none."""
    for version in (1, 1234567890, LARGEST):
        tiny_model.save(tmp_path, version=version)
    content = (tmp_path / "tiny" / "1" / "model.onnx").read_bytes()
    for folder in ("01", "\u0662", str(10**18), str(2**64)):
        (tmp_path / "tiny" / folder).mkdir()
        (tmp_path / "tiny" / folder / "model.onnx").write_bytes(content)
    async with start(models_dir=tmp_path) as client:
        yield client


async def test_listed_versions_serve_on_v1_and_v2(
    client: httpx.AsyncClient,
) -> None:
    (model,) = (await client.get("/v1/models")).json()["models"]
    listed = [each["version"] for each in model["versions"]]
    assert listed == [1, 1234567890, LARGEST]
    assert (await client.get("/v2/models/tiny")).json()["versions"] == list(map(str, listed))
    for version in listed:
        answer = await client.post(f"/v1/detect?version={version}", content=IMAGE)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"]["version"] == version
        for path in ("", "/ready", "/config"):
            answer = await client.get(f"/v2/models/tiny/versions/{version}{path}")
            assert answer.status_code == 200, answer.text
    answer = await client.post("/v1/detect", content=IMAGE)
    assert answer.json()["model"]["version"] == LARGEST
    assert (await client.get("/readyz")).status_code == 200
    assert (await client.get("/metrics")).status_code == 200


async def test_invalid_version_is_refused_with_the_rule(client: httpx.AsyncClient) -> None:
    for written in NO_VERSIONS:
        for method, path, status in (
            ("POST", f"/v1/detect?version={written}", 422),
            ("POST", f"/v1/detect/batch?version={written}", 422),
            ("GET", f"/v2/models/tiny/versions/{written}", 404),
            ("GET", f"/v2/models/tiny/versions/{written}/ready", 404),
            ("GET", f"/v2/models/tiny/versions/{written}/config", 404),
            ("POST", f"/v2/models/tiny/versions/{written}/infer", 404),
        ):
            answer = await client.request(method, path, content=IMAGE)
            assert answer.status_code == status, (path, answer.text)
            assert "at most 18 ASCII digits without a leading zero" in answer.text, path
