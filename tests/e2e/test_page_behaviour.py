"""The page's manners: folders, files to keep, refusals, queues, large images."""

from __future__ import annotations

import codecs
import csv
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver

from service.engine.drawing import class_colour
from service.filenames import csv_cell
from tests.e2e.browser import Page, Temper, copies, count, detect, proxy, until


@pytest.fixture
def temper() -> Temper:
    return Temper()


@pytest.fixture
def moody(browser: webdriver.Chrome, tiny_url: str, temper: Temper) -> Iterator[Page]:
    """The page of a service that does with images what `temper` says."""
    with proxy("/", tiny_url, temper) as url:
        page = Page(browser, url)
        yield page
        assert page.complaints() == []


def test_page_takes_images_of_a_dropped_folder(
    tiny_page: Page, squares: Path, tmp_path: Path
) -> None:
    copies(squares, tmp_path, ["smears/b10.png", "smears/b9.PNG", "smears/left/a.png"])
    copies(squares, tmp_path, ["smears/.hidden.png", "smears/notes.txt", "alone.dat"])
    tiny_page.drop(tmp_path / "smears", tmp_path / "alone.dat")
    tiny_page.until_through()
    names = [button.get_attribute("aria-label") for button in tiny_page.thumbnails()]
    found = ["smears/b9.PNG", "smears/b10.png", "smears/left/a.png", "alone.dat"]
    assert names == [f"{n}, image {i} of 4, 3 detections" for i, n in enumerate(found, 1)]


def test_page_saves_results_of_several_images(
    tiny_page: Page, tiny_url: str, squares: Path, tmp_path: Path
) -> None:
    (tmp_path / "saved").mkdir()
    tiny_page.save_to(tmp_path / "saved")
    text = tmp_path / "no image.png"
    text.write_text("no image")
    # Larger than what the page shows of it, so the saved one must come from the file.
    large = tmp_path / 'the "large", one.png'
    with Image.open(squares) as image:
        image.resize((2560, 1920), Image.Resampling.NEAREST).save(large)
    (small,) = copies(squares, tmp_path, ["=1+1, 叉车.png"])
    tiny_page.drop(large, text, small)
    tiny_page.until_through()
    tiny_page.thumbnails()[1].click()
    assert not tiny_page["save-image"].is_enabled()
    tiny_page.thumbnails()[0].click()
    assert tiny_page["save-note"].text == "JSON and CSV hold all images."
    tiny_page.set_score(0.6)
    for name in ("save-json", "save-csv", "save-image"):
        tiny_page[name].click()
    image = 'the "large", one-boxes.png'.replace('"', "_")
    expected = {"detections.json", "detections.csv", image}
    until(lambda: {path.name for path in (tmp_path / "saved").iterdir()} == expected)

    answers = {path.name: detect(tiny_url, path, score_threshold=0.6) for path in (large, small)}
    saved = json.loads((tmp_path / "saved" / "detections.json").read_text())
    assert saved["model"] == {"name": "tiny", "version": 1}
    first, refused, last = saved["results"]
    assert [each["id"] for each in saved["results"]] == [large.name, text.name, small.name]
    assert [each["status"] for each in saved["results"]] == [200, 415, 200]
    assert first["detections"] == answers[large.name]["detections"]
    assert last["detections"] == answers[small.name]["detections"]
    assert "JPEG" in refused["error"]["detail"]

    table = (tmp_path / "saved" / "detections.csv").read_bytes()
    assert table.startswith(codecs.BOM_UTF8), "without it, Excel reads another encoding"
    rows = list(csv.reader(io.StringIO(table.decode("utf-8-sig"))))
    assert rows[0] == ["file", "label", "class_id", "score", "x1", "y1", "x2", "y2"]
    assert [row[:3] + [float(value) for value in row[3:]] for row in rows[1:]] == [
        [csv_cell(name), each["label"], str(each["class_id"]), each["score"], *each["box"].values()]
        for name, answer in answers.items()
        for each in answer["detections"]
    ]

    with Image.open(tmp_path / "saved" / image) as annotated:
        assert annotated.size == (2560, 1920)
        for each in answers[large.name]["detections"]:
            x, y = round(each["box"]["x2"]) - 1, round(each["box"]["y2"]) - 200
            edge = annotated.convert("RGB").crop((x - 3, y, x + 3, y + 1)).get_flattened_data()
            assert class_colour(each["class_id"]) in edge
    until(lambda: tiny_page.browser.execute_script("return watched.urls.size") == 0)


def test_page_tiling_finds_small_objects(
    tiny_page: Page, tiny_url: str, squares: Path, tmp_path: Path
) -> None:
    sheet = Image.new("RGB", (1024, 768))
    with Image.open(squares) as image:
        sheet.paste(image, (300, 400))
    path = tmp_path / "sheet.png"
    sheet.save(path)
    plain, tiled = detect(tiny_url, path), detect(tiny_url, path, tile="auto")
    assert count(plain) != count(tiled)
    tiny_page.choose(path)
    tiny_page.until_settled()
    assert tiny_page.counts() == count(plain)
    tiny_page["tile"].click()
    tiny_page.until_through()
    assert tiny_page.counts() == count(tiled)
    assert f"looked at in {tiled['image']['tiles']} pieces" in tiny_page["readout"].text
    assert "tile=auto" in tiny_page["curl-line"].get_attribute("textContent")


# What the page makes of each refusal that the service does not repeat by itself; whether it
# offers to try again.
_REFUSALS = {
    400: ("damaged", False),
    404: ("model is gone", False),
    408: ("upload was too slow", True),
    413: ("too large", False),
    415: ("not an image", False),
    422: ("refused a setting", False),
    500: ("The service failed", True),
    503: ("service is busy", True),
    504: ("service was too slow", True),
    507: ("answered 507", False),
}


def test_page_shows_refusals_as_sentences(moody: Page, temper: Temper, squares: Path) -> None:
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


def test_page_honours_retry_after(moody: Page, temper: Temper, squares: Path) -> None:
    """And holds all other images back, too, unless a person knows better."""
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


def test_page_bounds_and_cancels_requests(
    moody: Page, temper: Temper, squares: Path, tmp_path: Path
) -> None:
    temper.gate = threading.Semaphore(0)
    images = copies(squares, tmp_path, [f"{number}.png" for number in range(1, 8)])
    moody.drop(*images)
    moody.wait(lambda: temper.at_once == 2)
    temper.gate.release(3)
    moody.wait(lambda: moody["progress-text"].text == "3 of 7" and temper.at_once == 2)
    assert moody["progress"].get_property("value") == 3
    moody.wait(lambda: moody["total"].text == "3 of 9 in 7 images")
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
    assert moody["total"].text == "3 of 21 in 7 images"
    assert temper.most_at_once == 2


def test_page_stays_responsive_with_a_huge_image(
    tiny_page: Page, tiny_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    image = Image.new("RGB", (8000, 6250), (30, 90, 30))
    image.paste((255, 0, 0), (0, 0, 3000, 3000))
    image.save(path, quality=70)
    # Turns of the event loop: a page that decoded by itself would miss all of them meanwhile.
    tiny_page.browser.execute_script(
        "window.longest = 0; let before = performance.now();"
        "const turn = () => { const now = performance.now();"
        " longest = Math.max(longest, now - before); before = now; setTimeout(turn, 5); };"
        "window.began = before; turn()"
    )
    tiny_page.choose(path)
    tiny_page.wait(tiny_page["image"].is_displayed)
    longest, whole = tiny_page.browser.execute_script("return [longest, performance.now() - began]")
    assert longest < whole / 2
    assert tiny_page.until_settled() == "done"
    assert "8000 \N{MULTIPLICATION SIGN} 6250" in tiny_page["readout"].text
    assert tiny_page.counts() == count(detect(tiny_url, path))
    assert tiny_page["image"].get_property("width") < 2400
