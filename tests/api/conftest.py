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
    """Return what a test needs of the application beside its address, or None."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if "client" not in fixtures:
        return "makes an application or server of its own"
    return next((reason for name, reason in INSIDE.items() if name in fixtures), None)


class Remote(httpx.AsyncHTTPTransport):
    """The transport to a service in another process, whose application is out of reach."""

    @property
    def app(self) -> FastAPI:
        pytest.skip("looks inside the application")


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


@pytest.fixture(scope="session")
def start(repository: Path) -> Start:
    """Start an application with the given settings."""

    def begin(**given: object) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        chosen = {"models_dir": repository, "device": "cpu", "cpu_inferences": 1, **given}
        return running(create_app(Settings(**chosen)))  # type: ignore[arg-type]

    return begin


@pytest.fixture(scope="module")
async def client(start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with default settings that all tests of a file share."""
    if URL is not None:
        async with httpx.AsyncClient(
            transport=Remote(verify=False), base_url=URL, timeout=PATIENCE
        ) as client:
            yield client
    else:
        async with start() as client:
            yield client


@pytest.fixture
async def new_client(start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that no other test has used: its metrics count from zero."""
    async with start() as client:
        yield client
