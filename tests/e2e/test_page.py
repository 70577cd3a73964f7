"""The page at `/`, in a real Chromium on a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from service.imaging.samples import draw_smear
from service.runtime.artifact import Thresholds
from tests import tiny_model
from tests.e2e.browser import (
    PATIENCE,
    Page,
    count,
    detect,
    free_port,
    proxy,
    server,
    until,
)


@pytest.fixture
def page(browser: webdriver.Chrome, bundled: str) -> Iterator[Page]:
    page = Page(browser, bundled)
    yield page
    assert page.complaints() == []


@pytest.fixture(scope="module")
def smear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smear") / "it's drawn.png"
    draw_smear(21, red=14, white=1, platelets=3)[0].save(path)
    return path


def test_page_shows_boxes_of_a_dropped_photograph(page: Page, bundled: str, bccd: Path) -> None:
    name = (bccd / "ImageSets" / "Main" / "val.txt").read_text().split()[0]
    image = bccd / "JPEGImages" / f"{name}.jpg"
    answer = detect(bundled, image)
    page.drop(image)
    assert page.until_settled() == "done"
    assert len(answer["detections"]) >= 5
    page.screenshot("real")
    assert page.counts() == count(answer)
    page["labels"].click()
    assert page.drawn(answer).total() >= 0.9 * count(answer).total()


def test_page_shows_boxes_of_a_chosen_file(page: Page, bundled: str, smear: Path) -> None:
    answer = detect(bundled, smear)
    page.choose(smear)
    assert page.until_settled() == "done"
    assert page.counts() == count(answer)
    page["labels"].click()
    assert page.drawn(answer).total() >= 0.9 * count(answer).total()


def test_page_slider_filters_without_a_request(page: Page, bundled: str, smear: Path) -> None:
    page.choose(smear)
    page.until_settled()
    seen = set()
    for score in (0.1, 0.5, 0.8):
        expected = detect(bundled, smear, score_threshold=score)
        page.set_score(score)
        assert page.counts() == count(expected), score
        assert page["score-value"].text == f"{score:.2f}"
        seen.add(count(expected).total())
    assert len(seen) > 1
    requests = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert sum("v1/detect" in name for name in requests) == 1
    page["reset"].click()
    assert page.counts() == count(detect(bundled, smear))


def test_page_hides_a_deselected_class(page: Page, smear: Path) -> None:
    page.choose(smear)
    page.until_settled()
    label = page.counts().most_common(1)[0][0]
    page["labels"].click()
    rows = json.loads(page["json-text"].get_attribute("textContent"))["detections"]
    of_class = {"image": {"width": 640, "height": 480}} | {
        "detections": [row for row in rows if row["label"] == label]
    }
    assert page.drawn(of_class).total() >= 0.9 * len(of_class["detections"])
    box = page["classes"].find_element(By.CSS_SELECTOR, f"[data-class='{label}'] input")
    box.send_keys(Keys.SPACE)
    assert page.drawn(of_class).total() == 0
    assert label not in {
        row["label"]
        for row in json.loads(page["json-text"].get_attribute("textContent"))["detections"]
    }
    assert "classes=" in page["curl-line"].get_attribute("textContent")


def test_page_sample_can_be_downloaded(page: Page, bundled: str, tmp_path: Path) -> None:
    page.screenshot("start")
    page["sample"].click()
    assert page.until_settled() == "done"
    stored = Path(__file__).parents[2] / "service" / "static" / "sample.jpg"
    answer = detect(bundled, stored)
    assert page.counts() == count(answer)
    shown = json.loads(page["json-text"].get_attribute("textContent"))
    assert shown["detections"] == answer["detections"]
    assert "in the service" in page["timing"].text
    line = page["curl-line"].get_attribute("textContent")
    assert line == f"curl --data-binary '@sample.jpg' '{bundled}v1/detect'"
    page.until_announced()
    page.screenshot("sample")
    saved = tmp_path / "saved"
    saved.mkdir()
    behaviour = {"behavior": "allow", "downloadPath": str(saved)}
    page.browser.execute_cdp_cmd("Page.setDownloadBehavior", behaviour)
    page["save-json"].click()
    page["save-image"].click()
    until(lambda: {path.name for path in saved.iterdir()} == {"sample.json", "sample-boxes.png"})
    assert json.loads((saved / "sample.json").read_text()) == shown
    with Image.open(saved / "sample-boxes.png") as annotated, Image.open(stored) as plain:
        assert annotated.size == plain.size
        assert annotated.convert("RGB").tobytes() != plain.convert("RGB").tobytes()


def test_page_handles_several_images(page: Page, bundled: str, smear: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jpg"
    draw_smear(22, width=800, height=600, red=8)[0].save(other)
    page.drop(smear, other)
    page.until_settled()
    assert page.counts() == count(detect(bundled, smear))
    thumbnails = page["strip"].find_elements(By.TAG_NAME, "button")
    assert len(thumbnails) == 2
    thumbnails[0].click()
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.until_settled()
    assert page.counts() == count(detect(bundled, other))
    assert "other.jpg, 800 \N{MULTIPLICATION SIGN} 600" in page["readout"].text
    page.screenshot("several")
    page["clear"].click()
    assert page["empty"].is_displayed()


def test_page_accepts_a_pasted_image(page: Page, bundled: str, smear: Path) -> None:
    page.paste(smear)
    assert page.until_settled() == "done"
    assert page.counts() == count(detect(bundled, smear))


def test_page_refuses_text(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "cells.jpg"
    text.write_text("no image at all")
    page.drop(text)
    assert page.until_settled() == "failed"
    assert "not an image" in page["message"].text
    assert "cells.jpg" in page["message"].text
    assert "JPEG, PNG" in page["message"].text
    assert not page["retry"].is_displayed()
    page.screenshot("refused")


def test_page_refuses_empty_and_truncated_images(page: Page, smear: Path, tmp_path: Path) -> None:
    empty, cut = tmp_path / "empty.png", tmp_path / "cut.png"
    empty.write_bytes(b"")
    cut.write_bytes(smear.read_bytes()[:2000])
    for image, words in ((empty, "The file is empty"), (cut, "cut off")):
        page.drop(image)
        assert page.until_settled() == "failed"
        assert "damaged" in page["message"].text
        assert words in page["message"].text
        page["clear"].click()


def test_page_content_policy_allows_only_this_host(page: Page) -> None:
    policy = page.browser.execute_async_script(
        "const [done] = arguments;"
        "fetch('.').then((r) => done(r.headers.get('Content-Security-Policy')))"
    )
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    loaded = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert loaded
    assert all(name.startswith(page.url) for name in loaded)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1360, True)])
def test_page_fits_narrow_screens_and_dark_mode(
    page: Page, smear: Path, width: int, dark: bool
) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 500}
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    try:
        page.choose(smear)
        page.until_settled()
        overflow = (
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert page.browser.execute_script(overflow) == 0
        edges = [page[name].rect["x"] + page[name].rect["width"] for name in ("answer", "panel")]
        assert edges[0] == pytest.approx(edges[1], abs=1)
        canvas = page["boxes"]
        assert canvas.get_property("width") == pytest.approx(2 * canvas.size["width"], abs=2)
        page.screenshot(f"{'phone' if width < 500 else 'desktop'}-{'dark' if dark else 'light'}")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_page_offers_class_thresholds_and_models(
    browser: webdriver.Chrome, squares: Path, tmp_path: Path
) -> None:
    tiny_model.save(tmp_path, name="strict", thresholds=Thresholds(score=0.9012))
    own = Thresholds(score=0.5, per_class={"red": 0.7, "blue": 0.0118})
    tiny_model.save(tmp_path, name="lenient", thresholds=own)
    torn = tiny_model.save(tmp_path, name="torn")
    torn.write_bytes(torn.read_bytes()[:1000])
    with server(models_dir=tmp_path, default_model="lenient") as url:
        page = Page(browser, url)
        page.wait(lambda: "torn, version 1: failed" in page["model"].text)
        options = {each.text: each.is_enabled() for each in Select(page["model"]).options}
        assert options == {
            "lenient, version 1": True,
            "strict, version 1": True,
            "torn, version 1: failed": False,
        }
        page.drop(squares)
        page.until_settled()
        assert page.counts() == {"red": 1, "green": 1} == count(detect(url, squares))
        assert "red 0.7" in page["score-note"].text
        # The slider keeps to two digits, which are what it shows, whatever the thresholds have.
        page.set_score(0.6)
        assert (page["score"].get_property("value"), page["score-value"].text) == ("0.6", "0.60")
        assert page.counts() == {"red": 2, "green": 1}
        Select(page["model"]).select_by_visible_text("strict, version 1")
        page.until_settled()
        assert page.counts() == {"red": 1} == count(detect(url, squares, model="strict"))
        assert page["score-value"].text == "0.9012"
        assert "model=strict" in page["curl-line"].get_attribute("textContent")
        page.screenshot("models")
        assert page.complaints() == []


def test_page_follows_exif_orientation(
    browser: webdriver.Chrome, tiny_url: str, squares: Path, tmp_path: Path
) -> None:
    """The browser and the service must turn it alike, or the boxes lie beside the squares."""
    turned = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(squares) as image:
        image.save(turned, exif=exif)
    answer = detect(tiny_url, turned)
    assert answer["image"] == {"width": 96, "height": 128}
    page = Page(browser, tiny_url)
    page.choose(turned)
    page.until_settled()
    assert "96 \N{MULTIPLICATION SIGN} 128" in page["readout"].text
    page["labels"].click()
    assert page.drawn(answer) == {"red": 2, "green": 1}
    canvas = page["boxes"]
    assert canvas.size["width"] / canvas.size["height"] == pytest.approx(96 / 128, rel=0.01)


def test_page_works_below_a_path_prefix(
    browser: webdriver.Chrome, tiny: Path, squares: Path
) -> None:
    with server("--root-path", "/cells", models_dir=tiny) as url, proxy("/cells/", url) as outside:
        page = Page(browser, outside)
        page.drop(squares)
        assert page.until_settled() == "done"
        assert page.counts() == count(detect(url, squares))
        assert f"{outside}v1/detect" in page["curl-line"].get_attribute("textContent")
        assert page.complaints() == []


def test_page_works_by_keyboard(browser: webdriver.Chrome, tiny_url: str) -> None:
    page = Page(browser, tiny_url)
    reached = []
    for _ in range(12):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.browser.switch_to.active_element.get_attribute("id"))
        if reached[-1] == "sample":
            break
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.until_settled() == "done"
    assert page.browser.switch_to.active_element.get_attribute("id") == "stage"
    before = page.counts()
    for _ in range(12):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        if page.browser.switch_to.active_element.get_attribute("id") == "score":
            break
    page.browser.switch_to.active_element.send_keys(Keys.END)
    assert page["score-value"].text == "0.99"
    assert page.counts() != before


def test_page_refuses_too_large_file(browser: webdriver.Chrome, tiny: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.jpg"
    large.write_bytes(b"\xff\xd8\xff" + bytes(6_000_000))
    with server(models_dir=tiny, max_body_bytes=100_000) as url:
        page = Page(browser, url)
        page.drop(large)
        assert page.until_settled() == "failed"
        assert "too large" in page["message"].text
        assert "6.0 MB" in page["message"].text


def test_page_recovers_when_the_service_returns(
    browser: webdriver.Chrome, tiny: Path, squares: Path
) -> None:
    port = free_port()
    with server(models_dir=tiny, port=port) as url:
        page = Page(browser, url)
    page.drop(squares)
    assert page.until_settled() == "failed"
    assert "does not answer" in page["message"].text
    page.wait(lambda: page["status"].get_attribute("data-state") == "down")
    page.screenshot("down")
    with server(models_dir=tiny, port=port) as url:
        page.wait(lambda: page["status"].get_attribute("data-state") == "ready")
        page["retry"].click()
        assert page.until_settled() == "done"
        assert page.counts() == count(detect(url, squares))


def test_page_waits_while_loading_and_on_full_queue(
    browser: webdriver.Chrome, squares: Path, tmp_path: Path
) -> None:
    # Some seconds for an image on any machine, and as long for the warm-up.
    tiny_model.save(tmp_path, work=150)
    with server(
        models_dir=tmp_path, wait=False, max_queue_size=1, request_timeout_ms=60_000
    ) as url:
        page = Page(browser, url, ready=False)
        page.wait(lambda: "load" in page["status"].text.lower())
        page.wait(lambda: page["status"].get_attribute("data-state") == "ready")
        blocker = threading.Thread(target=detect, args=(url, squares))
        blocker.start()
        page.drop(squares)
        try:
            page.wait(lambda: "Trying again in" in page["busy"].text)
            page.screenshot("busy")
        finally:
            blocker.join(PATIENCE)
        assert page.until_settled() == "done"
        assert page.counts() == count(detect(url, squares))
