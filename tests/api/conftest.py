"""The application in this process, with the tiny model, and images that it understands.

With RETINASERVE_TEST_URL the tests ask a service that runs elsewhere, under Ray Serve, say. It
serves what `tiny_model.save` writes, as one replica on a CPU with default settings. Tests that need
more than its address are skipped with what they need.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.http.app import create_app
from service.settings import Settings
from tests import tiny_model

Start = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]

FOLDER = Path(__file__).parent
URL = os.environ.get("RETINASERVE_TEST_URL")
PATIENCE = 60.0
INSIDE = {
    "caplog": "reads the log of the application's process",
    "monkeypatch": "changes code in the application's process",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what a service that runs elsewhere cannot be asked."""
    for item in items:
        if URL is not None and item.path.is_relative_to(FOLDER):
            reason = needs_more_than_an_address(item)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def needs_more_than_an_address(item: pytest.Item) -> str | None:
    """What a test needs of the application beside its address."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if fixtures.isdisjoint({"client", "start"}):
        return "makes an application or server of its own"
    own = item.get_closest_marker("own_service")
    if own is not None:
        return str(own.kwargs["reason"])
    return next((reason for name, reason in INSIDE.items() if name in fixtures), None)


class Elsewhere(httpx.AsyncHTTPTransport):
    """To a service in another process, whose insides nobody can look at."""

    @property
    def app(self) -> FastAPI:
        pytest.skip("looks inside the application")


@asynccontextmanager
async def elsewhere(url: str, **given: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service at RETINASERVE_TEST_URL."""
    if given:
        pytest.skip(f"needs settings of its own: {', '.join(given)}")
    async with httpx.AsyncClient(
        transport=Elsewhere(verify=False), base_url=url, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the tiny model as version 1."""
    root = tmp_path_factory.mktemp("models")
    tiny_model.save(root)
    return root


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose models have loaded."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        states = [slot.state for slot in app.state.service.registry.slots()]
        while not {"waiting", "loading"}.isdisjoint(states):
            await asyncio.sleep(0.005)
            states = [slot.state for slot in app.state.service.registry.slots()]
        yield client


@pytest.fixture
def start(repository: Path) -> Start:
    """Start an application with other settings than the defaults."""

    def begin(**given: object) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        if URL is not None:
            return elsewhere(URL, **given)
        settings = Settings(**{"models_dir": repository, "device": "cpu", **given})  # type: ignore[arg-type]
        return running(create_app(settings))

    return begin


@pytest.fixture
async def client(start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with default settings."""
    async with start() as client:
        yield client
