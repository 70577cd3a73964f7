"""The application in this process, with the tiny model, and pictures that it understands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.api import create_app
from service.settings import Settings
from tests import tiny_model

Start = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


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
        settings = Settings(**{"models_dir": repository, "device": "cpu", **given})  # type: ignore[arg-type]
        return running(create_app(settings))

    return begin


@pytest.fixture
async def client(start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with default settings."""
    async with start() as client:
        yield client
