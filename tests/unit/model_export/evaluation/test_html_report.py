import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model_export.evaluation import error_images
from model_export.evaluation import html_report as report
from model_export.evaluation.bootstrap import compare
from model_export.evaluation.coco_metrics import Timing
from model_export.evaluation.json_report import to_json
from model_export.evaluation.results import Baseline
from service.errors import DataError
from service.runtime.artifact import Thresholds
from tests.unit.model_export.cases import (
    EMPTY,
    NOTHING,
    detections,
    measurement,
    model_file,
    random_case,
    sample,
    with_areas,
    with_difficult,
)

EVIL = "<script>alert('x')</script>"
EVIL_CLASSES = (EVIL, '"><img src=x onerror=alert(1)>')
VOID = {"meta", "img", "br", "path", "rect", "circle", "link"}


class Page(HTMLParser):
    """Tags, attributes and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sources(self, kind: str = "jpeg") -> list[str]:
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [each for each in sources if each.startswith(f"data:image/{kind}")]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / f"{EVIL.replace('/', '_')}.png"
    pixels = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def shown(image, classes=("cell", "speck"), **options):
    truth, found = random_case(3)
    truth = [dataclasses.replace(each, path=image) for each in truth]
    return measurement(truth, found, classes, model_file(classes, **options))


# --- the page ------------------------------------------------------------------------------------


def test_page_is_whole_and_needs_no_other_file(image):
    measured = shown(image, provenance={"git_commit": "abc", "config": {"epochs": 3}})
    text = report.render(measured)
    page = Page(text)
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,", "#"))
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    for value in (measured.evaluation.ap, measured.evaluation.ar_large):
        assert f"{value:.4f}" in page.text
    assert f"{measured.overall_calibration.error:.3f}" in page.text
    assert "epochs" in page.text
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= anchors


def test_names_from_outside_are_text(image):
    measured = shown(image, EVIL_CLASSES, provenance={EVIL: [EVIL], "config": {EVIL: EVIL}})
    against = Baseline(
        model_file(EVIL_CLASSES, name="other"),
        measured.evaluation,
        compare(
            measured.dataset.samples, measured.found, measured.found, EVIL_CLASSES, resamples=3
        ),
    )
    text = report.render(measured, against)
    page = Page(text)
    assert "script" not in page.tags
    for source in page.sources("svg"):
        drawing = ElementTree.fromstring(_decoded(source))
        assert not list(drawing.iter("{http://www.w3.org/2000/svg}script"))
    assert EVIL not in text
    assert EVIL in page.text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_images_are_images_of_every_kind_that_there_is(image):
    measured = shown(image)
    page = Page(report.render(measured))
    kinds = {each.outcome for each in measured.mistakes}
    assert len(kinds) >= 3
    assert len(page.sources()) >= len(kinds)
    for source in page.sources():
        with Image.open(BytesIO(_decoded(source))) as opened:
            assert opened.size == (400, 300)


def test_budget_keeps_the_worst_of_each_kind(image, monkeypatch):
    measured = shown(image)
    whole = report.render(measured)
    sources = Page(whole).sources()
    monkeypatch.setattr(report, "BUDGET", sum(map(len, sources)) // 2)
    less = report.render(measured)
    kept = Page(less).sources()
    assert 0 < len(kept) < len(sources)
    kinds = {each.outcome for each in measured.mistakes}
    firsts = [next(each for each in measured.mistakes if each.outcome is kind) for kind in kinds]
    drawn = error_images.draw_all(firsts, measured.dataset.samples, measured.analyses)
    assert set(drawn.values()) <= set(kept)


def test_page_of_nothing(tmp_path):
    page = Page(report.render(measurement([EMPTY], [NOTHING])))
    assert not page.sources()
    assert "No detection scores above 0.05" in page.text
    assert "nothing to draw" in page.text
    assert "nan" not in page.text.lower().split()


def test_figures_name_every_class(image):
    many = tuple(f"class {index}" for index in range(9))
    boxes = [[60 * index, 10, 60 * index + 40, 60] for index in range(9)]
    truth = [sample(boxes, range(9), image)]
    found = [detections(boxes, np.linspace(0.9, 0.4, 9), range(9))]
    page = Page(report.render(measurement(truth, found, many)))
    curves, f1, overall, by_class = (_decoded(each).decode() for each in page.sources("svg"))
    for figure in (curves, f1, by_class):
        assert all(name in figure for name in many)
    assert "D-ECE" in overall


def test_page_has_thresholds_in_full_and_their_f1_cross_validated(image):
    own = Thresholds(score=0.5, per_class={"cell": 0.61803})
    measured = shown(image, thresholds=own)
    page = Page(report.render(measured))
    text = page.text
    assert str(measured.chosen) in text
    assert "by 5-fold cross-validation" in text
    for name in measured.classes:
        assert f"{measured.f1(name):.3f}{measured.chosen.thresholds.of(name)}{own.of(name)}" in text
    held_back = [each for each in measured.mistakes if each.detection is None and each.score]
    assert held_back, "an object whose detection is held back is needed"
    assert "not above 0.61803" in text or "not above 0.5" in text


def test_comparison_is_told_in_words(image):
    measured = shown(image)
    worse = [each.pick(slice(None, None, 3)) for each in measured.found]
    other = measurement(measured.dataset.samples, worse)
    outcome = compare(
        measured.dataset.samples, measured.found, worse, measured.classes, resamples=50
    )
    assert outcome.ap.low > 0
    page = Page(report.render(measured, Baseline(other.model, other.evaluation, outcome)))
    assert f"AP{outcome.ap.value:+.4f}" in page.text
    assert "better" in page.text


def test_latency_is_shown(image):
    measured = shown(image)
    timing = Timing(12.34, 15.0, 3.21, 20.0, batch_size=16, device="cuda:0")
    timed = dataclasses.replace(measured.evaluation, timing=timing)
    text = Page(report.render(dataclasses.replace(measured, evaluation=timed))).text
    for part in ("12.3", "3.2", "20.0", "16 a call", "cuda:0"):
        assert part in text


def test_image_that_is_gone_is_named(image):
    measured = shown(image)
    image.unlink()
    with pytest.raises(DataError, match=r"replace the image"):
        report.render(measured)


# --- crops ---------------------------------------------------------------------------------------


def test_labelled_and_detected_are_drawn_where_they_are(tmp_path):
    path = tmp_path / "black.png"
    Image.new("RGB", (640, 480)).save(path)
    truth = [sample([[100, 100, 200, 200]], [0], path)]
    found = [detections([[100, 100, 200, 140]], [0.9], [0])]
    measured = measurement(truth, found)
    (mistake,) = measured.mistakes
    ((_, source),) = error_images.draw_all(
        [mistake], measured.dataset.samples, measured.analyses
    ).items()
    left, top, right, _ = error_images.crop_box((100, 100, 200, 200), 640, 480)
    scale = 400 / (right - left)
    with Image.open(BytesIO(_decoded(source))) as image:
        bottom = image.getpixel((round((150 - left) * scale), round((200 - top) * scale)))
        middle = image.getpixel((round((150 - left) * scale), round((140 - top) * scale)))
        assert image.getpixel((5, 5)) == pytest.approx((0, 0, 0), abs=8)
    assert bottom[2] > bottom[0] + 60, "blue below: labelled"
    assert middle[0] > middle[2] + 60, "orange in the middle: detected"


def test_a_line_of_pixels_is_drawn_too(tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (3000, 1)).save(path)
    measured = measurement([sample([[0, 0, 3000, 1]], [0], path)], [NOTHING])
    drawn = error_images.draw_all(measured.mistakes, measured.dataset.samples, measured.analyses)
    assert len(drawn) == 1


@given(
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_crops_lie_inside_and_hold_the_box(corners, width, height):
    x1, x2 = sorted((corners[0] * width, corners[1] * width))
    y1, y2 = sorted((corners[2] * height, corners[3] * height))
    left, top, right, bottom = error_images.crop_box((x1, y1, x2, y2), width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert left <= x1 + 1e-6
    assert right >= x2 - 1e-6
    assert top <= y1 + 1e-6
    assert bottom >= y2 - 1e-6


# --- for machines --------------------------------------------------------------------------------


def test_answer_has_the_keys_that_are_promised():
    measured = measurement(*random_case(3))
    comparison = compare(
        measured.dataset.samples, measured.found, measured.found, measured.classes, resamples=3
    )
    written = to_json(measured, Baseline(measured.model, measured.evaluation, comparison))
    again = json.loads(json.dumps(written, allow_nan=False))
    promised = re.findall(r"^- `(\w+)`", to_json.__globals__["__doc__"], re.MULTILINE)
    assert ["schema", *promised] == list(again)
    assert again["schema"] == 1
    assert again["confusion"]["labels"] == ["cell", "speck", None]
    assert np.array(again["confusion"]["counts"]).shape == (3, 3)
    assert sum(again["mistakes"].values()) == len(measured.mistakes)
    assert again["calibration"]["overall"]["d_ece"] == measured.overall_calibration.error
    points = again["operating_points"]["cell"]
    assert points["chosen"]["threshold"] == again["thresholds"]["cell"]
    assert points["chosen"]["f1"] == measured.f1("cell")
    assert points["best"]["f1"] == measured.points["cell"].f1.max() >= points["chosen"]["f1"]
    assert points["recommended"]["threshold"] == 0.3
    choice = again["threshold_choice"]
    assert choice["score"] == measured.chosen.thresholds.score
    assert (choice["images"], choice["folds"]) == (len(measured.dataset.samples), 5)
    for key, f1 in (
        ("f1", measured.chosen.in_sample),
        ("f1_cross_validated", measured.chosen.cross_validated),
    ):
        assert choice[key] == {"micro": round(f1.micro, 4), "macro": round(f1.macro, 4)}
    assert len(again["curves"]["speck"]["precision"]) == 101
    assert set(again["against"]["difference"]) == {"ap", "ap50", "d_ece"}
    assert "leaves out the spread over training seeds" in again["against"]["note"]


def test_digest_tells_data_apart():
    truth, found = random_case(3)
    moved = [dataclasses.replace(truth[0], boxes=truth[0].boxes + 1), *truth[1:]]
    hard, outlined = with_difficult(truth, 3), with_areas(truth, 3)
    digest = measurement(truth, found).data_digest
    assert digest == measurement(truth, found[::-1]).data_digest
    assert digest != measurement(moved, found).data_digest
    assert digest != measurement(truth[::-1], found).data_digest
    assert len({digest, *(measurement(each, found).data_digest for each in (hard, outlined))}) == 3


def test_answer_of_nothing_is_json():
    written = json.loads(json.dumps(to_json(measurement([EMPTY], [NOTHING])), allow_nan=False))
    assert written["curves"] == {"cell": None, "speck": None}
    assert written["thresholds"] == {"cell": None, "speck": None}
    assert written["threshold_choice"] is None
    assert "against" not in written


def _decoded(source: str) -> bytes:
    return base64.b64decode(source.partition("base64,")[2])
