"""One browser and two servers for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver

from tests import tiny_model
from tests.e2e.browser import Page, chromium, server


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = chromium(tmp_path_factory.mktemp("chromium"))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def bundled(browser: webdriver.Chrome) -> Iterator[str]:
    """A server with the bundled model; not started without a browser."""
    with server() as url:
        yield url


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one model, which finds bright squares."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_model.save(root)
    return root


@pytest.fixture(scope="session")
def tiny_url(browser: webdriver.Chrome, tiny: Path) -> Iterator[str]:
    with server(models_dir=tiny) as url:
        yield url


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two red squares and a green one, for the tiny model: no resizing, scores of 0.6 and more."""
    image = Image.new("RGB", (128, 96))
    for place, colour in (((0, 0), (255, 0, 0)), ((64, 0), (160, 0, 0)), ((0, 48), (0, 190, 0))):
        image.paste(colour, (*place, place[0] + 32, place[1] + 32))
    path = tmp_path_factory.mktemp("squares") / "squares.png"
    image.save(path)
    return path


@pytest.fixture
def tiny_page(browser: webdriver.Chrome, tiny_url: str) -> Iterator[Page]:
    page = Page(browser, tiny_url)
    yield page
    assert page.complaints() == []
