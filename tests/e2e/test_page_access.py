"""Who gets at the page and how: keyboards, screen readers, keys; models that go; the API's page."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from service.http.auth.keys import new_key, revoke_key
from service.runtime.artifact import Thresholds
from tests import tiny_model
from tests.e2e.browser import PATIENCE, Page, copies, free_port, server, until


def controls(page: Page) -> set[str]:
    """What can be operated now, each by something that tells it from the others."""
    names: list[str] = page.browser.execute_script(_CONTROLS)
    return set(names)


_NAME = """
const name = (e) => e.id || e.dataset.copy || e.textContent.trim() ||
  e.closest("[data-class]")?.dataset.class || e.getAttribute("aria-label");
"""
_CONTROLS = (
    _NAME + "return [...document.querySelectorAll("
    "'a, button, input, select, summary, pre[tabindex], [tabindex=\"0\"]')]"
    ".filter((e) => e.checkVisibility() && !e.disabled && e.tabIndex >= 0).map(name)"
)
_FOCUSED = (
    _NAME + "const e = document.activeElement; if (e === document.body) return null;"
    # A switched class shows its focus on the coloured square beside the hidden box.
    "const shows = e.closest('#classes') ? e.nextElementSibling : e;"
    "const { outlineStyle, outlineWidth } = getComputedStyle(shows);"
    "const isDrawn = outlineStyle !== 'none' && outlineWidth !== '0px';"
    "return [name(e), e.matches(':focus-visible') && isDrawn]"
)


def tab_through(page: Page) -> list[str]:
    """Press Tab from the first control until the page is left; the controls in that order."""
    page.browser.execute_script("document.querySelector('a').focus()")
    reached: list[str] = [page.browser.execute_script(_FOCUSED)[0]]
    for _ in range(60):
        page.press(Keys.TAB)
        focused = page.browser.execute_script(_FOCUSED)
        if focused is None or focused[0] in reached:
            return reached
        assert focused[1], f"the focus on {focused[0]} cannot be seen"
        reached.append(focused[0])
    raise AssertionError(f"no end: {reached}")


def test_page_controls_are_reachable_by_keyboard(
    tiny_page: Page, squares: Path, tmp_path: Path
) -> None:
    assert set(tab_through(tiny_page)) == controls(tiny_page)
    tiny_page.choose(*copies(squares, tmp_path, ["first.png", "second.png", "third.png"]))
    tiny_page.until_through()
    for name in ("curl", "json"):
        tiny_page[name].find_element(By.TAG_NAME, "summary").click()
    assert set(tab_through(tiny_page)) == controls(tiny_page)

    tiny_page.browser.execute_script("document.querySelector('#strip [tabindex=\"0\"]').focus()")
    focused = tiny_page.press(Keys.ARROW_RIGHT)
    assert focused.get_attribute("aria-label").startswith("second.png")
    assert "second.png" in tiny_page["readout"].text
    focused = tiny_page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert focused.get_attribute("aria-label").startswith("second.png")

    tiny_page.set_score(0.6)
    tiny_page.browser.execute_script("document.querySelector('tbody [tabindex=\"0\"]').focus()")
    boxes = []
    for key in (Keys.HOME, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_UP):
        row = tiny_page.press(key)
        label, score = (cell.text for cell in row.find_elements(By.TAG_NAME, "td")[:2])
        assert tiny_page["readout"].text.startswith(
            f"{label} {score}, 32 \N{MULTIPLICATION SIGN} 32 px"
        )
        boxes.append(tiny_page["readout"].text)
    assert len(set(boxes)) == 3
    assert boxes[1] == boxes[3]


def spoken(page: Page) -> set[tuple[str, str]]:
    """Role and name of everything that a screen reader finds."""
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    }


def violations(page: Page, dark: bool) -> list[Any]:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    try:
        found = Axe().run(page.browser)["violations"]
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]


def test_page_passes_axe(tiny_page: Page, squares: Path, tmp_path: Path) -> None:
    assert violations(tiny_page, dark=False) == violations(tiny_page, dark=True) == []
    assert {("button", "Choose images"), ("status", "")} <= spoken(tiny_page)
    text = tmp_path / "text.png"
    text.write_text("text")
    tiny_page.choose(squares, text)
    tiny_page.until_through()
    tiny_page.until_announced()
    assert violations(tiny_page, dark=False) == violations(tiny_page, dark=True) == []
    assert (
        tiny_page["summary"].get_attribute("textContent") == "squares.png: 2 red, 1 green, 0 blue"
    )
    assert "1 of them failed" in tiny_page["news"].get_attribute("textContent")
    assert {
        ("slider", "Score above"),
        ("checkbox", "red"),
        ("checkbox", "Tiles for large images"),
        ("button", "Save as CSV"),
        ("button", "squares.png, image 1 of 2, 3 detections"),
        ("button", "text.png, image 2 of 2, failed"),
        ("columnheader", "Score"),
        ("image", "Boxes around what was found; the table of detections says the same"),
    } <= spoken(tiny_page)
    tiny_page.thumbnails()[1].click()
    assert violations(tiny_page, dark=False) == violations(tiny_page, dark=True) == []
    assert any(role == "alert" for role, _ in spoken(tiny_page))


@dataclass(frozen=True)
class Locked:
    """A server with keys, two versions of a model and an admin listener."""

    url: str
    admin: str
    keys: Path


@pytest.fixture(scope="module")
def locked(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    root = tmp_path_factory.mktemp("locked")
    keys, port = root / "keys.json", free_port()
    new_key(keys, "page", admin=False)
    tiny_model.save(root / "models", version=1, thresholds=Thresholds(score=0.9))
    tiny_model.save(root / "models", version=2)
    with server(models_dir=root / "models", api_keys_file=keys, admin_port=port) as url:
        yield Locked(url, f"http://127.0.0.1:{port}/", keys)


def enter_key(page: Page, key: str) -> None:
    page.wait(page["key-dialog"].is_displayed)
    page.press(key, Keys.ENTER)


def test_page_asks_for_a_key(browser: webdriver.Chrome, locked: Locked, squares: Path) -> None:
    key = new_key(locked.keys, "reader", admin=False)
    until(lambda: not is_refused(locked, key))
    page = Page(browser, locked.url, ready=False)
    page.wait(page["key-dialog"].is_displayed)
    assert "API key" in page["key-dialog"].text
    assert page.browser.switch_to.active_element.get_attribute("id") == "key"
    assert violations(page, dark=False) == violations(page, dark=True) == []
    page.press(Keys.ESCAPE)
    page.wait(lambda: "key is needed" in page["status"].text)
    page["key-button"].click()
    enter_key(page, "rs_wrong")
    page.wait(lambda: "does not accept" in page["key-error"].text)
    page.screenshot("key")
    enter_key(page, "schlüssel")
    page.wait(lambda: "This is not a key" in page["key-error"].text)
    enter_key(page, key)
    page.wait(lambda: page["status"].get_attribute("data-state") == "ready")
    page.choose(squares)
    assert page.until_settled() == "done"
    assert key not in page.browser.page_source
    assert '-H "X-API-Key: $KEY"' in page["curl-line"].get_attribute("textContent")

    browser.refresh()
    page.wait(lambda: page["status"].get_attribute("data-state") == "ready")
    revoke_key(locked.keys, "reader")
    other = new_key(locked.keys, "other", admin=False)
    until(lambda: is_refused(locked, key) and not is_refused(locked, other))
    page.choose(squares)
    page.wait(lambda: "does not accept" in page["key-error"].text)
    page.press(Keys.ESCAPE)
    assert page.until_settled() == "failed"
    assert "wants an API key" in page["message"].text
    page["retry"].click()
    enter_key(page, other)
    page.until_through()
    assert page.counts() == {"red": 2, "green": 1}
    page["key-button"].click()
    assert browser.execute_script("return sessionStorage.length + localStorage.length") == 0
    assert browser.get_cookies() == []
    assert page.complaints() == []


def test_page_switches_from_an_unloaded_model(
    browser: webdriver.Chrome, locked: Locked, squares: Path
) -> None:
    admin = new_key(locked.keys, "admin", admin=True)
    until(lambda: not is_refused(locked, admin))
    page = Page(browser, locked.url, ready=False)
    enter_key(page, admin)
    page.choose(squares)
    assert page.until_settled() == "done"
    assert page.counts() == {"red": 2, "green": 1}
    address = f"{locked.admin}v1/models/tiny/unload?version=2"
    request = urllib.request.Request(address, b"", {"X-API-Key": admin})
    urllib.request.urlopen(request, timeout=PATIENCE).close()
    page.choose(squares)
    page.until_through()
    page.wait(lambda: "this is tiny, version 1" in page["toast"].text)
    assert page["total"].text == "1 of 2 in 2 images"
    selected, unloaded = Select(page["model"]).options
    assert (selected.text, selected.is_selected()) == ("tiny, version 1", True)
    assert (unloaded.text, unloaded.is_enabled()) == ("tiny, version 2: unloaded", False)
    page["key-button"].click()
    assert page.complaints() == []


def is_refused(locked: Locked, key: str) -> bool:
    request = urllib.request.Request(f"{locked.url}v1/models", headers={"X-API-Key": key})
    try:
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    return False


def test_api_docs_work_offline(browser: webdriver.Chrome, tiny_url: str) -> None:
    page = Page(browser, tiny_url + "docs", ready=False)
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, ".opblock-summary-path"))
    paths = {
        each.get_attribute("data-path")
        for each in page.browser.find_elements(By.CSS_SELECTOR, ".opblock-summary-path")
    }
    assert {"/v1/detect", "/v1/detect/batch", "/v1/models"} <= paths
    loaded = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert all(name.startswith((tiny_url, "data:")) for name in loaded)
    assert page.complaints() == []
    page.screenshot("docs")
