"""The route of single images, which FastAPI documents and does not run."""

from __future__ import annotations

from pathlib import Path

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.app import create_app
from service.settings import Settings
from tests.api.conftest import running
from tests.images import encoded, one_red


class Watching:
    """Middleware that is added to the finished application."""

    def __init__(self, app: ASGIApp, seen: list[str]) -> None:
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            self._seen.append(scope["path"])
        await self._app(scope, receive, send)


async def test_middleware_added_from_outside_sees_single_images(repository: Path) -> None:
    seen: list[str] = []
    app = create_app(Settings(models_dir=repository, device="cpu"))
    app.add_middleware(Watching, seen=seen)
    async with running(app) as client:
        answer = await client.post("/v1/detect", content=encoded(one_red()))
    assert answer.status_code == 200
    assert seen == ["/v1/detect"]


async def test_detect_rejects_other_methods(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/detect")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


async def test_detect_is_counted_under_its_route(new_client: httpx.AsyncClient) -> None:
    await new_client.post("/v1/detect", content=encoded(one_red()))
    await new_client.post("/v1/detect", content=b"no image")
    text = (await new_client.get("/metrics")).text
    for status in (200, 415):
        line = f'route="/v1/detect",status="{status}"'
        assert any(line in each and each.endswith(" 1.0") for each in text.splitlines()), text


async def test_detect_works_in_a_mounted_application(repository: Path) -> None:
    inner = create_app(Settings(models_dir=repository, device="cpu"))
    outer = FastAPI(lifespan=lambda _: inner.router.lifespan_context(inner))
    outer.state.service = inner.state.service
    outer.mount("/pictures", inner)
    async with running(outer) as client:
        good = await client.post("/pictures/v1/detect", content=encoded(one_red()))
        bad = await client.post("/pictures/v1/detect", content=b"no image")
    assert good.status_code == 200
    assert bad.status_code == 415
    assert bad.json()["instance"] == "/pictures/v1/detect"
