"""`retinaserve pull`, with a small network in place of the published ones."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from model_export.commands.pull import PUBLISHED
from model_export.download import name_digits
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.torchvision_import import ANCHORS, ARCHITECTURES, COCO_CLASSES
from service.cli import retinaserve
from service.imaging.canvas import ShortSide
from service.runtime.artifact import read_artifact
from tests.unit.model_export.file_server import File, serving

ARCHITECTURE = PUBLISHED["coco"].architecture
SMALL = ModelConfig(
    backbone="mobilenet_v2", fpn_channels=8, head_width=8, head_depth=1, anchors=ANCHORS
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(retinaserve, ["pull", *map(str, arguments)])


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A state dict of random weights, with COCO's 91 classes."""
    torch.manual_seed(0)
    state = RetinaNet(SMALL, classes=len(COCO_CLASSES)).state_dict()
    # Scores far enough apart that the export has detections to compare, and no ties.
    state["classification_head.out.weight"] *= 3000
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture
def published(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> File:
    """The small network as what `pull coco` downloads, in an empty folder and home."""
    monkeypatch.setitem(ARCHITECTURES, ARCHITECTURE, SMALL)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return File(weights)


def publish(monkeypatch: pytest.MonkeyPatch, url: str, weights: bytes) -> None:
    digest = hashlib.sha256(weights).hexdigest()
    entry = replace(PUBLISHED["coco"], url=f"{url}/small-{digest[:8]}.pth", sha256=digest)
    monkeypatch.setitem(PUBLISHED, "coco", entry)


def test_without_a_name_it_lists_what_there_is() -> None:
    result = call()
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PUBLISHED) == ["coco", "coco-v1"]
    for each, line in zip(PUBLISHED.values(), lines, strict=True):
        assert each.architecture in line


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_carry_the_beginning_of_the_hash(name: str) -> None:
    published = PUBLISHED[name]
    assert published.url.startswith("https://")
    assert len(published.sha256) == 64
    assert published.sha256.startswith(name_digits(published.url))
    assert published.architecture in ARCHITECTURES


def test_a_published_detector_becomes_a_described_model_file(
    published: File, untraced_exporter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(published) as url:
        publish(monkeypatch, url, published.body)
        published.cut = len(published.body) // 2
        result = call("coco", "--canvas", "short-side:96,128")
        assert result.exit_code == 2
        assert "bytes early" in result.stderr
        assert not Path("models").exists()
        published.cut = None
        result = call("coco", "--canvas", "short-side:96,128")
        assert result.exit_code == 0, result.output
        # A second one, from what was downloaded.
        again = call("coco", "--canvas", "64x96", "--output", "models/coco/2/model.onnx")
        assert again.exit_code == 0, again.output
    assert len(published.requests) == 2
    assert "verified on 6 images" in result.stdout
    assert result.stdout.endswith("next:\n  retinaserve serve --models models\n")
    metadata = read_artifact(Path("models/coco/1/model.onnx")).metadata
    assert metadata.name == "coco"
    assert metadata.classes == COCO_CLASSES
    assert metadata.canvas == ShortSide(short=96, long=128)
    assert metadata.thresholds.score == 0.5
    # What is published was not measured on this file.
    assert metadata.metrics is None
    origin = metadata.provenance
    assert origin["published"]["ap"] == 0.415
    assert origin["url"].startswith(url)
    assert origin["weights"]["sha256"] == hashlib.sha256(published.body).hexdigest()
    assert [each.partition(" (")[0] for each in origin["licences"]] == ["BSD-3-Clause", "CC BY 4.0"]
    refused = call("coco")
    assert refused.exit_code == 2
    assert "models/coco/1/model.onnx: is there already" in refused.stderr
    assert "--output models/coco/2/model.onnx" in refused.stderr


def test_a_file_from_another_machine(
    published: File, untraced_exporter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, "http://weights.invalid", published.body)
    result = call("coco")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("on another machine and give it by --from FILE\n")
    # Under any name, and not copied.
    Path("fetched.bin").write_bytes(published.body)
    result = call("coco", "--from", "fetched.bin", "--canvas", "64x96")
    assert result.exit_code == 0, result.output
    assert read_artifact(Path("models/coco/1/model.onnx")).metadata.name == "coco"
    assert not list(Path("home").rglob("*.pth"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("yolo", "yolo: not a published detector; expected coco or coco-v1"),
        ("--from other.pth", "--from and --output need a NAME: coco or coco-v1"),
        ("coco --canvas 100x100", "--canvas '100x100'"),
        ("coco --from other.pth", "other.pth: sha256 is not "),
        ("coco --from page.html", "that are an HTML page"),
        ("coco --from missing.pth", "'missing.pth' does not exist"),
        ("coco --from other.pth --output other.pth", "writing it would replace other.pth"),
        ("coco --output models/coco/v1/model.onnx", "'v1' is not a version"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(
    arguments: str, words: str, published: File, tmp_path: Path
) -> None:
    Path("other.pth").write_bytes(b"other")
    Path("page.html").write_text("<!doctype html><title>Log in</title>")
    before = sorted(tmp_path.rglob("*"))
    result = call(*arguments.split())
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
