"""Once there are keys: what is open, what is closed, and how a closed door looks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import pytest
from starlette.routing import Mount, Route

from service.http.auth.keys import new_key, revoke_key
from tests.api.conftest import Start
from tests.images import encoded, one_red

GOOD = encoded(one_red())
OPEN = {"/", "/healthz", "/readyz", "/docs", "/docs.js", "/openapi.json", "/metrics"}
OPEN_FOLDERS = ("/static", "/docs-assets", "/v2/health/")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def key(path: Path) -> str:
    return new_key(path, "camera", admin=False)


@pytest.fixture
async def closed(start: Start, path: Path, key: str) -> AsyncIterator[httpx.AsyncClient]:
    async with start(api_keys_file=path) as client:
        yield client


def every_path(client: httpx.AsyncClient) -> Iterable[str]:
    app = client._transport.app  # type: ignore[attr-defined]
    for route in app.routes:
        assert isinstance(route, Route | Mount) or hasattr(route, "path"), route
        yield route.path.replace("{", "").replace("}", "")


async def test_routes_require_a_key_except_public_ones(
    closed: httpx.AsyncClient,
) -> None:
    seen = set()
    for path in every_path(closed):
        status = (
            await closed.get(path + ("/x" if path in ("/static", "/docs-assets") else ""))
        ).status_code
        is_open = path in OPEN or path.startswith(OPEN_FOLDERS)
        assert (status != 401) == is_open, path
        seen.add(path)
    assert {"/v1/detect", "/v1/detect/batch", "/v1/models", "/", "/static"} <= seen


@pytest.mark.parametrize(
    "url",
    [
        "/v1/nothing",
        "/x",
        "/v1/detect/",
        "/healthz//",
        "/static",
        "/staticx",
        "/healthz/",
        "/Healthz",
        "/healthz/../v1/models",
        "/v2/models/x",
        "/v2/repository",
    ],
)
async def test_unknown_paths_require_a_key(closed: httpx.AsyncClient, url: str) -> None:
    assert (await closed.get(url)).status_code == 401


async def test_static_files_reject_path_traversal(closed: httpx.AsyncClient) -> None:
    for path in ("/static/..%2fcli.py", "/static/%2e%2e/cli.py", "/static//etc/passwd"):
        assert (await closed.get(path)).status_code in (401, 404)


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {} ", "x"])
async def test_key_is_accepted_as_bearer_or_x_api_key(
    closed: httpx.AsyncClient, key: str, form: str
) -> None:
    headers = {"X-API-Key": key} if form == "x" else {"Authorization": form.format(key)}
    answer = await closed.post("/v1/detect", content=GOOD, headers=headers)
    assert answer.status_code == 200


async def test_key_is_found_beside_a_proxy_authorization(
    closed: httpx.AsyncClient, key: str
) -> None:
    for other in ("Basic dXNlcjpwYXNz", "Bearer of-the-proxy"):
        headers = {"Authorization": other, "X-API-Key": key}
        assert (await closed.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic KEY"},
        {"Authorization": "KEY"},
        {"X-API-Key": ""},
        {"X-API-Key": "KEYx"},
        {"X-API-Key": "x" * 2000},
        {"Cookie": "key=KEY"},
    ],
)
async def test_missing_or_wrong_key_is_401(
    closed: httpx.AsyncClient, key: str, headers: dict[str, str]
) -> None:
    given = {name: value.replace("KEY", key) for name, value in headers.items()}
    answer = await closed.post("/v1/detect", content=GOOD, headers=given)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="retinaserve"'
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 401
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert key not in answer.text


async def test_key_in_query_is_ignored(closed: httpx.AsyncClient, key: str) -> None:
    assert (await closed.get("/v1/models", params={"api_key": key})).status_code == 401


async def test_missing_key_on_v2_is_a_protocol_error(closed: httpx.AsyncClient) -> None:
    for path in ("/v2", "/v2/models/tiny/infer"):
        answer = await closed.post(path, content=b"{}")
        assert answer.status_code == 401
        assert list(answer.json()) == ["error"]
        assert "X-API-Key" in answer.json()["error"]


async def test_missing_key_is_refused_before_the_body(closed: httpx.AsyncClient) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(10):
            read += 1
            yield bytes(1000)

    assert (await closed.post("/v1/detect", content=body())).status_code == 401
    assert read == 0


async def test_revoked_key_is_refused(
    start: Start, path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.http.auth.keys._LOOK_EVERY", 0.0)
    async with start(api_keys_file=path) as client:
        headers = {"X-API-Key": key}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        revoke_key(path, "camera")
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_openapi_declares_the_key(
    closed: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    document = (await closed.get("/openapi.json")).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header"}
    assert {"401", "429"} <= document["paths"]["/v1/detect"]["post"]["responses"].keys()
    assert "security" not in (await client.get("/openapi.json")).json(), "there are no keys"


async def test_metrics_require_a_key_when_not_public(start: Start, path: Path, key: str) -> None:
    async with start(api_keys_file=path, metrics_public=False) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"X-API-Key": key})).status_code == 200


async def test_metrics_count_refused_keys_without_their_values(
    closed: httpx.AsyncClient,
) -> None:
    for number in range(20):
        headers = {"X-API-Key": f"guess-{number}", "X-Request-Id": f"made-up-{number}"}
        await closed.get(f"/v1/models/guess-{number}", headers=headers)
    text = (await closed.get("/metrics")).text
    assert 'retinaserve_refusals_total{reason="unauthorized"} 20.0' in text
    assert "guess-" not in text
    assert "made-up-" not in text


async def test_rate_limit_is_per_key(start: Start, path: Path, key: str) -> None:
    other = new_key(path, "other", admin=False)
    async with start(api_keys_file=path, rate_limit="3/h") as client:

        async def call(value: str) -> httpx.Response:
            return await client.get("/v1/models", headers={"X-API-Key": value})

        for _ in range(20):
            assert (await call("rs_wrong")).status_code == 401
        assert [(await call(key)).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = await call(key)
        assert 1190 <= int(refused.headers["retry-after"]) <= 1200
        assert refused.headers["content-type"] == "application/problem+json"
        assert "3/h" in refused.json()["detail"]
        assert (await call(other)).status_code == 200
        assert (await client.get("/healthz")).status_code == 200


async def test_rate_limit_without_keys_is_per_address(start: Start) -> None:
    async with start(rate_limit="2/h") as client:
        statuses = [(await client.get("/v1/models")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert (await client.get("/")).status_code == 200


PREFLIGHT = {
    "Origin": "https://lab.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-api-key",
}


async def test_cors_is_refused_by_default(closed: httpx.AsyncClient, key: str) -> None:
    answer = await closed.options("/v1/detect", headers=PREFLIGHT)
    assert answer.status_code == 401
    headers = {"X-API-Key": key, "Origin": "https://lab.example"}
    answer = await closed.get("/v1/models", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_cors_preflight_of_listed_origin_needs_no_key(
    start: Start, path: Path, key: str
) -> None:
    async with start(api_keys_file=path, cors_origins="https://lab.example") as client:
        answer = await client.options("/v1/detect", headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://lab.example"
        other = await client.options(
            "/v1/detect", headers={**PREFLIGHT, "Origin": "https://evil.example"}
        )
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        for headers, status in (({"X-API-Key": key}, 200), ({}, 401)):
            answer = await client.get(
                "/v1/models", headers={"Origin": "https://lab.example", **headers}
            )
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://lab.example"
            assert "access-control-allow-credentials" not in answer.headers


async def test_browser_security_headers_are_sent(closed: httpx.AsyncClient) -> None:
    for path in ("/", "/docs", "/docs.js", "/static/app.js", "/docs-assets/swagger-ui.css"):
        answer = await closed.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
    for path in ("/", "/v1/models", "/nothing", "/healthz", "/openapi.json", "/docs-assets/none"):
        answer = await closed.get(path)
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], path
        assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
        assert len(answer.headers.get_list("content-security-policy")) == 1
    page = (await closed.get("/")).headers["content-security-policy"]
    assert "unsafe" not in page
