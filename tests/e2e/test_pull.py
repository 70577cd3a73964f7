"""A published detector, at its own size: downloaded, exported, served."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner

from model_export.commands.pull import PUBLISHED
from service.cli import retinaserve
from tests.e2e.browser import ROOT, server
from tests.unit.model_export.file_server import File, serving
from tests.unit.model_export.golden import parity


@pytest.mark.slow
def test_a_pulled_detector_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    torch.save(parity.load("v2").state_dict(), written)
    weights = File(written.getvalue(), etag='"1"', cut=100_000_000)
    digest = hashlib.sha256(weights.body).hexdigest()
    assert len(weights.body) == pytest.approx(PUBLISHED["coco"].megabytes * 1e6, rel=0.01)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    with serving(weights) as url:
        entry = replace(PUBLISHED["coco"], url=f"{url}/v2-{digest[:8]}.pth", sha256=digest)
        monkeypatch.setitem(PUBLISHED, "coco", entry)
        for cut, status in ((weights.cut, 2), (None, 0)):
            weights.cut = cut
            done = CliRunner().invoke(retinaserve, ["pull", "coco"])
            assert done.exit_code == status, done.output
    assert weights.requests[-1][1]["Range"] == "bytes=100000000-"
    assert "canvas: short-side:400,667" in done.stdout
    with server(models_dir=tmp_path / "models", request_timeout_ms=120_000) as url:
        (model,) = httpx.get(url + "v1/models").json()["models"]
        image = (ROOT / "service" / "static" / "sample.jpg").read_bytes()
        answer = httpx.post(
            url + "v1/detect?score_threshold=0.05", content=image, timeout=150
        ).json()
    assert model["name"] == answer["model"]["name"] == "coco"
    assert model["versions"][0]["thresholds"]["score"] == 0.5
    assert "person" in model["versions"][0]["classes"]
    assert answer["detections"]
