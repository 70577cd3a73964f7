"""The page's manners: refusals, queues, keys, keyboards, screen readers, large pictures."""

from __future__ import annotations

import csv
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from axe_core_python.selenium import Axe
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from service.annotate import class_colour
from service.artifact import Thresholds
from service.security.keys import new_key, revoke_key
from tests import tiny_model
from tests.e2e.browser import (
    PATIENCE,
    Page,
    Temper,
    count,
    detect,
    free_port,
    proxy,
    server,
    until,
)


@pytest.fixture
def page(browser: webdriver.Chrome, tiny_url: str) -> Iterator[Page]:
    page = Page(browser, tiny_url)
    yield page
    assert page.complaints() == []


@pytest.fixture
def temper() -> Temper:
    return Temper()


@pytest.fixture
def moody(browser: webdriver.Chrome, tiny_url: str, temper: Temper) -> Iterator[Page]:
    """The page of a service that does with pictures what `temper` says."""
    with proxy("/", tiny_url, temper) as url:
        page = Page(browser, url)
        yield page
        assert page.complaints() == []


def copies(picture: Path, folder: Path, names: list[str]) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.read_bytes())
    return paths


def test_a_folder_brings_the_pictures_below_it(page: Page, squares: Path, tmp_path: Path) -> None:
    copies(squares, tmp_path, ["smears/b10.png", "smears/b9.PNG", "smears/left/a.png"])
    copies(squares, tmp_path, ["smears/.hidden.png", "smears/notes.txt", "alone.dat"])
    page.drop(tmp_path / "smears", tmp_path / "alone.dat")
    page.until_through()
    names = [button.get_attribute("aria-label") for button in page.thumbnails()]
    found = ["smears/b9.PNG", "smears/b10.png", "smears/left/a.png", "alone.dat"]
    assert names == [f"{n}, picture {i} of 4, 3 detections" for i, n in enumerate(found, 1)]


def test_what_is_saved_of_several_pictures(
    page: Page, tiny_url: str, squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "saved").mkdir()
    page.save_to(tmp_path / "saved")
    text = tmp_path / "no picture.png"
    text.write_text("no picture")
    # Larger than what the page shows of it, so the saved one must come from the file.
    large = tmp_path / 'the "large", one.png'
    with Image.open(squares) as image:
        image.resize((2560, 1920), Image.Resampling.NEAREST).save(large)
    page.drop(large, text, squares)
    page.until_through()
    page.set_score(0.6)
    for name in ("save-json", "save-csv", "save-picture"):
        page[name].click()
    picture = 'the "large", one-boxes.png'.replace('"', "_")
    expected = {"detections.json", "detections.csv", picture}
    until(lambda: {path.name for path in (tmp_path / "saved").iterdir()} == expected)

    answers = {path.name: detect(tiny_url, path, score_threshold=0.6) for path in (large, squares)}
    saved = json.loads((tmp_path / "saved" / "detections.json").read_text())
    assert saved["model"] == {"name": "tiny", "version": 1}
    first, refused, last = saved["results"]
    assert [each["id"] for each in saved["results"]] == [large.name, text.name, squares.name]
    assert [each["status"] for each in saved["results"]] == [200, 415, 200]
    assert first["detections"] == answers[large.name]["detections"]
    assert last["detections"] == answers[squares.name]["detections"]
    assert "JPEG" in refused["error"]["detail"]

    rows = list(csv.reader(io.StringIO((tmp_path / "saved" / "detections.csv").read_text())))
    assert rows[0] == ["file", "label", "class_id", "score", "x1", "y1", "x2", "y2"]
    assert [row[:3] + [float(value) for value in row[3:]] for row in rows[1:]] == [
        [name, each["label"], str(each["class_id"]), each["score"], *each["box"].values()]
        for name, answer in answers.items()
        for each in answer["detections"]
    ]

    with Image.open(tmp_path / "saved" / picture) as annotated:
        assert annotated.size == (2560, 1920)
        for each in answers[large.name]["detections"]:
            x, y = round(each["box"]["x2"]) - 1, round(each["box"]["y2"]) - 200
            edge = annotated.convert("RGB").crop((x - 3, y, x + 3, y + 1)).get_flattened_data()
            assert class_colour(each["class_id"]) in edge
    until(lambda: page.browser.execute_script("return watched.urls.size") == 0)


def test_tiles_find_what_is_small_in_a_large_picture(
    page: Page, tiny_url: str, squares: Path, tmp_path: Path
) -> None:
    sheet = Image.new("RGB", (1024, 768))
    with Image.open(squares) as image:
        sheet.paste(image, (300, 400))
    path = tmp_path / "sheet.png"
    sheet.save(path)
    plain, tiled = detect(tiny_url, path), detect(tiny_url, path, tile="auto")
    assert count(plain) != count(tiled)
    page.choose(path)
    page.until_settled()
    assert page.counts() == count(plain)
    page["tile"].click()
    page.until_through()
    assert page.counts() == count(tiled)
    assert f"looked at in {tiled['image']['tiles']} pieces" in page["readout"].text
    assert "tile=auto" in page["curl-line"].get_attribute("textContent")


# What the page makes of each refusal that the service does not repeat by itself; whether it
# offers to try again.
_REFUSALS = {
    400: ("damaged", False),
    404: ("model is gone", False),
    408: ("upload was too slow", True),
    413: ("too large", False),
    415: ("not a picture", False),
    422: ("refused a setting", False),
    500: ("The service failed", True),
    503: ("service is busy", True),
    504: ("service was too slow", True),
    507: ("answered 507", False),
}


def test_refusals_are_sentences(moody: Page, temper: Temper, squares: Path) -> None:
    for status, (words, may_retry) in _REFUSALS.items():
        temper.refusals.append((status, {}))
        moody.choose(squares)
        assert moody.until_settled() == "failed"
        text = moody["message"].text
        assert words in text, status
        assert "squares.png: " in text
        assert "The service says: so it was told." in text
        assert moody["retry"].is_displayed() == may_retry, status
        if status == 504:
            moody.screenshot("late")
            moody["retry"].click()
            moody.wait(
                lambda: moody.browser.execute_script("return document.body.dataset.state") == "done"
            )
        moody["clear"].click()
    # A connection that breaks may be one of several things, so the page tries a few times.
    temper.refusals.extend([(0, {})] * 3)
    moody.choose(squares)
    assert moody.until_settled() == "failed"
    assert "only a part" in moody["message"].text
    assert not temper.refusals


def test_it_waits_as_long_as_it_is_told(moody: Page, temper: Temper, squares: Path) -> None:
    """And holds all other pictures back, too, unless a person knows better."""
    temper.refusals.append((503, {"Retry-After": "1"}))
    moody.choose(squares)
    assert moody.until_settled() == "done"
    asked = len(temper.queries)
    assert asked == 2
    temper.refusals.extend([(429, {"Retry-After": "300"})] * 2)
    moody.choose(squares, *[squares] * 3)
    moody.wait(lambda: "Too many requests. Trying again in" in moody["busy"].text)
    moody.wait(lambda: not temper.refusals and temper.at_once == 0)
    assert len(temper.queries) == asked + 2
    moody.screenshot("limited")
    moody["now"].click()
    moody.until_through()
    assert moody.counts() == {"red": 2, "green": 1}
    assert moody.browser.switch_to.active_element.get_attribute("id") == "stage"


def test_few_requests_at_once_and_they_can_be_cancelled(
    moody: Page, temper: Temper, squares: Path, tmp_path: Path
) -> None:
    temper.gate = threading.Semaphore(0)
    pictures = copies(squares, tmp_path, [f"{number}.png" for number in range(1, 8)])
    moody.drop(*pictures)
    moody.wait(lambda: temper.at_once == 2)
    temper.gate.release(3)
    moody.wait(lambda: moody["progress-text"].text == "3 of 7" and temper.at_once == 2)
    assert moody["progress"].get_property("value") == 3
    moody.wait(lambda: moody["total"].text == "3 of 9 in 7 pictures")
    moody.screenshot("queue")
    moody["cancel"].click()
    assert not moody["queue"].is_displayed()
    labels = [button.get_attribute("aria-label") for button in moody.thumbnails()]
    assert sum("failed" in label for label in labels) == 4
    temper.gate.release(1000)
    moody.thumbnails()[-1].click()
    assert "Cancelled" in moody["message"].text
    assert moody["retry"].text == "Try all 4 again"
    moody["retry"].click()
    moody.until_through()
    assert moody["total"].text == "3 of 21 in 7 pictures"
    assert temper.most_at_once == 2


def test_a_picture_of_fifty_million_pixels_does_not_hold_up_the_page(
    page: Page, tiny_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    image = Image.new("RGB", (8000, 6250), (30, 90, 30))
    image.paste((255, 0, 0), (0, 0, 3000, 3000))
    image.save(path, quality=70)
    # Turns of the event loop: a page that decoded by itself would miss all of them meanwhile.
    page.browser.execute_script(
        "window.longest = 0; let before = performance.now();"
        "const turn = () => { const now = performance.now();"
        " longest = Math.max(longest, now - before); before = now; setTimeout(turn, 5); };"
        "window.began = before; turn()"
    )
    page.choose(path)
    page.wait(page["picture"].is_displayed)
    longest, whole = page.browser.execute_script("return [longest, performance.now() - began]")
    assert longest < whole / 2
    assert page.until_settled() == "done"
    assert "8000 \N{MULTIPLICATION SIGN} 6250" in page["readout"].text
    assert page.counts() == count(detect(tiny_url, path))
    assert page["picture"].get_property("width") < 2400


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


def test_every_control_is_reached_by_the_keyboard_and_left_again(
    page: Page, squares: Path, tmp_path: Path
) -> None:
    assert set(tab_through(page)) == controls(page)
    page.choose(*copies(squares, tmp_path, ["first.png", "second.png", "third.png"]))
    page.until_through()
    for name in ("curl", "json"):
        page[name].find_element(By.TAG_NAME, "summary").click()
    assert set(tab_through(page)) == controls(page)

    page.browser.execute_script("document.querySelector('#strip [tabindex=\"0\"]').focus()")
    focused = page.press(Keys.ARROW_RIGHT)
    assert focused.get_attribute("aria-label").startswith("second.png")
    assert "second.png" in page["readout"].text
    focused = page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert focused.get_attribute("aria-label").startswith("second.png")

    page.set_score(0.6)
    page.browser.execute_script("document.querySelector('tbody [tabindex=\"0\"]').focus()")
    boxes = []
    for key in (Keys.HOME, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_UP):
        row = page.press(key)
        label, score = (cell.text for cell in row.find_elements(By.TAG_NAME, "td")[:2])
        assert page["readout"].text.startswith(f"{label} {score}, 32 \N{MULTIPLICATION SIGN} 32 px")
        boxes.append(page["readout"].text)
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


def test_screen_readers_and_contrast(page: Page, squares: Path, tmp_path: Path) -> None:
    assert violations(page, dark=False) == violations(page, dark=True) == []
    assert {("button", "Choose pictures"), ("status", "")} <= spoken(page)
    text = tmp_path / "text.png"
    text.write_text("text")
    page.choose(squares, text)
    page.until_through()
    page.until_announced()
    assert violations(page, dark=False) == violations(page, dark=True) == []
    assert page["summary"].get_attribute("textContent") == "squares.png: 2 red, 1 green, 0 blue"
    assert "1 of them failed" in page["news"].get_attribute("textContent")
    assert {
        ("slider", "Score above"),
        ("checkbox", "red"),
        ("checkbox", "Tiles for large pictures"),
        ("button", "Save as CSV"),
        ("button", "squares.png, picture 1 of 2, 3 detections"),
        ("button", "text.png, picture 2 of 2, failed"),
        ("columnheader", "Score"),
        ("image", "Boxes around what was found; the table of detections says the same"),
    } <= spoken(page)
    page.thumbnails()[1].click()
    assert violations(page, dark=False) == violations(page, dark=True) == []
    assert any(role == "alert" for role, _ in spoken(page))


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


def test_it_asks_for_a_key(browser: webdriver.Chrome, locked: Locked, squares: Path) -> None:
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
    page.wait(lambda: "This is no key" in page["key-error"].text)
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


def test_a_model_that_is_unloaded_gives_way_to_the_next(
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
    assert page["total"].text == "1 of 2 in 2 pictures"
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


def test_the_description_of_the_api_works_without_any_other_host(
    browser: webdriver.Chrome, tiny_url: str
) -> None:
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
