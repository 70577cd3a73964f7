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


async def test_every_route_is_closed_but_those_that_the_contract_opens(
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
async def test_what_is_no_open_path_is_closed(closed: httpx.AsyncClient, url: str) -> None:
    assert (await closed.get(url)).status_code == 401


async def test_a_file_outside_the_page_s_folder_stays_outside(closed: httpx.AsyncClient) -> None:
    for path in ("/static/..%2fcli.py", "/static/%2e%2e/cli.py", "/static//etc/passwd"):
        assert (await closed.get(path)).status_code in (401, 404)


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {} ", "x"])
async def test_both_ways_to_bring_a_key(closed: httpx.AsyncClient, key: str, form: str) -> None:
    headers = {"X-API-Key": key} if form == "x" else {"Authorization": form.format(key)}
    answer = await closed.post("/v1/detect", content=GOOD, headers=headers)
    assert answer.status_code == 200


async def test_a_proxy_s_own_authorization_does_not_hide_the_key(
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
async def test_a_closed_door(closed: httpx.AsyncClient, key: str, headers: dict[str, str]) -> None:
    given = {name: value.replace("KEY", key) for name, value in headers.items()}
    answer = await closed.post("/v1/detect", content=GOOD, headers=given)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="retinaserve"'
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 401
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert key not in answer.text


async def test_a_key_in_the_address_is_none(closed: httpx.AsyncClient, key: str) -> None:
    assert (await closed.get("/v1/models", params={"api_key": key})).status_code == 401


async def test_the_inference_protocol_has_errors_of_its_own(closed: httpx.AsyncClient) -> None:
    for path in ("/v2", "/v2/models/tiny/infer"):
        answer = await closed.post(path, content=b"{}")
        assert answer.status_code == 401
        assert list(answer.json()) == ["error"]
        assert "X-API-Key" in answer.json()["error"]


async def test_the_body_of_a_stranger_is_not_read(closed: httpx.AsyncClient) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(10):
            read += 1
            yield bytes(1000)

    assert (await closed.post("/v1/detect", content=body())).status_code == 401
    assert read == 0


async def test_a_revoked_key_and_its_name_in_the_state(
    start: Start, path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.http.auth.keys._LOOK_EVERY", 0.0)
    async with start(api_keys_file=path) as client:
        headers = {"X-API-Key": key}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        revoke_key(path, "camera")
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_the_documentation_asks_for_a_key(
    closed: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    document = (await closed.get("/openapi.json")).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header"}
    assert {"401", "429"} <= document["paths"]["/v1/detect"]["post"]["responses"].keys()
    assert "security" not in (await client.get("/openapi.json")).json(), "there are no keys"


async def test_metrics_can_be_closed(start: Start, path: Path, key: str) -> None:
    async with start(api_keys_file=path, metrics_public=False) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"X-API-Key": key})).status_code == 200


async def test_metrics_count_refusals_by_kind_and_never_by_what_was_sent(
    closed: httpx.AsyncClient,
) -> None:
    for number in range(20):
        headers = {"X-API-Key": f"guess-{number}", "X-Request-Id": f"made-up-{number}"}
        await closed.get(f"/v1/models/guess-{number}", headers=headers)
    text = (await closed.get("/metrics")).text
    assert 'retinaserve_refusals_total{reason="unauthorized"} 20.0' in text
    assert "guess-" not in text
    assert "made-up-" not in text


async def test_a_rate_limit_counts_each_key_for_itself(start: Start, path: Path, key: str) -> None:
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


async def test_without_keys_the_address_is_limited(start: Start) -> None:
    async with start(rate_limit="2/h") as client:
        statuses = [(await client.get("/v1/models")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert (await client.get("/")).status_code == 200


PREFLIGHT = {
    "Origin": "https://lab.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-api-key",
}


async def test_pages_elsewhere_are_not_let_in(closed: httpx.AsyncClient, key: str) -> None:
    answer = await closed.options("/v1/detect", headers=PREFLIGHT)
    assert answer.status_code == 401
    headers = {"X-API-Key": key, "Origin": "https://lab.example"}
    answer = await closed.get("/v1/models", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


async def test_pages_that_are_let_in_ask_without_the_key(
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


async def test_headers_for_browsers(closed: httpx.AsyncClient) -> None:
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
