"""From labelled images to an endpoint by the commands, and one answer on every way.

The commands are those of docs/tutorials/own-data.md; the tests go on with what they leave.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from model_export.checkpoints import load_checkpoint
from model_export.commands.train import bundled_checkpoint
from model_export.data.batches import CanvasCache
from model_export.data.datasets import Sample
from model_export.evaluation.inference import detect
from model_export.export.verify import (
    BOX_TOLERANCE,
    NO_DIFFERENCE,
    SCORE,
    SCORE_TOLERANCE,
    compare,
)
from model_export.retinanet.model import RetinaNet
from model_export.training.callbacks import detect_example
from service.cli import retinaserve
from service.errors import DataError
from service.imaging.canvas import Size
from service.imaging.samples import draw_smear
from service.runtime import devices
from service.runtime.artifact import MODEL_FILE, read_artifact
from service.runtime.detector import Detections
from service.settings import bundled_models
from tests.e2e import tutorial
from tests.e2e.browser import ROOT, server
from tests.unit.model_export.voc_folder import annotation, load_voc

CONFIG: dict[str, Any] = {
    "model": {
        "backbone": "resnet18",
        "fpn_channels": 16,
        "head_width": 16,
        "head_depth": 1,
        "anchors": {"sizes": [[20], [28], [40], [64], [128]], "ratios": [0.7, 1.4]},
    },
    "canvas": {"rule": "buckets", "sizes": [[96, 128], [128, 96]]},
    "optimiser": {"name": "adamw", "lr": 0.002, "warmup_steps": 5},
    "epochs": 4,
    "batch_size": 4,
    "validate_every": 4,
    "ema_decay": 0.8,
    "precision": "32",
    "workers": 0,
}


@dataclass(frozen=True)
class Model:
    """A model of the server's repository, and where it came from."""

    name: str
    path: Path
    checkpoint: Path | None


def call(*arguments: object) -> Result:
    """The `retinaserve` command, as its entry point runs it."""
    result = CliRunner().invoke(retinaserve, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result


def draw(root: Path, splits: Mapping[str, Sequence[int]]) -> Path:
    """Smears of 160 x 120 pixels, every third upright, as a Pascal VOC folder."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, seeds in splits.items():
        stems = [f"smear-{seed}" for seed in seeds]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
        for seed, stem in zip(seeds, stems, strict=True):
            width, height = (120, 160) if seed % 3 == 2 else (160, 120)
            image, cells = draw_smear(seed, width=width, height=height, platelets=0)
            image.save(root / "JPEGImages" / f"{stem}.png")
            (root / "Annotations" / f"{stem}.xml").write_text(
                annotation(cells, size=(width, height), filename=f"{stem}.png")
            )
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands have run."""
    path = tmp_path_factory.mktemp("whole-path")
    tutorial.run(ROOT / "docs" / "tutorials" / "own-data.md", path)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return folder / "cells"


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run's folder."""
    return folder / "runs" / "cells"


@pytest.fixture(scope="module")
def cells(folder: Path, trained: Path) -> Model:
    """The run's best checkpoint as a model file, in a repository beside the bundled model."""
    return Model("cells", folder / "models" / "cells" / "1" / MODEL_FILE, trained / "best.ckpt")


@pytest.fixture(scope="module")
def blood_cells() -> Model:
    (path,) = bundled_models().glob(f"*/*/{MODEL_FILE}")
    try:
        checkpoint = bundled_checkpoint()
    except DataError:
        checkpoint = None
    return Model(path.parent.parent.name, path, checkpoint)


@pytest.fixture(scope="module")
def client(folder: Path, cells: Model, blood_cells: Model) -> Iterator[httpx.Client]:
    """A client of a server of both models."""
    copied = folder / "models" / blood_cells.name / "1"
    copied.mkdir(parents=True)
    (copied / MODEL_FILE).write_bytes(blood_cells.path.read_bytes())
    models = ("--models", str(folder / "models"))
    with (
        server(*models, default_model=cells.name) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def drawn(folder: Path) -> list[Sample]:
    """Images of the size of photographs, lying and upright."""
    root = folder / "drawn"
    root.mkdir()
    found = []
    for seed, (width, height) in enumerate([(640, 480), (480, 640), (500, 500), (900, 500)]):
        path = root / f"{seed}.png"
        draw_smear(seed, width=width, height=height, platelets=3)[0].save(path)
        found.append(
            Sample(path, Size(height, width), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        )
    return found


# --- the commands --------------------------------------------------------------------------------


def test_train_leaves_its_run_folder(trained: Path) -> None:
    names = ("last.ckpt", "best.ckpt", "metrics.csv", "config.yaml", "curves.png")
    assert sorted(path.name for path in trained.iterdir()) == sorted(names)
    assert yaml.safe_load((trained / "config.yaml").read_text())["epochs"] == 3
    with (trained / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["ap"]) > 0.3


def test_evaluate_reproduces_the_metrics_of_the_file(
    cells: Model, data: Path, tmp_path: Path
) -> None:
    answer = tmp_path / "answer.json"
    call("evaluate", cells.path, "--data", data, "--device", "cpu", "--json", answer)
    measured = json.loads(answer.read_text())["metrics"]
    metrics = read_artifact(cells.path).metadata.metrics
    assert metrics is not None
    assert (metrics.dataset, metrics.split) == ("cells", "val")
    assert metrics.ap == pytest.approx(measured["ap"], abs=1e-4)
    assert metrics.ap50 == pytest.approx(measured["ap50"], abs=1e-4)


# --- one image, one answer ---------------------------------------------------------------------


def by_torch(network: RetinaNet, model: Model, samples: Sequence[Sample]) -> list[Detections]:
    rule = read_artifact(model.path).metadata.canvas
    examples = CanvasCache(samples, rule, progress=False)
    found = [
        detect_example(network, example, rule.fit(sample.size), device=torch.device("cpu"))
        for example, sample in zip(examples, samples, strict=True)
    ]
    return [served(each) for each in found]


def by_file(model: Model, samples: Sequence[Sample]) -> list[Detections]:
    detector = devices.open_detector(read_artifact(model.path), devices.Device("cpu"))
    return [served(each) for each in detect(detector, samples, batch_size=4)]


def by_command(model: Model, samples: Sequence[Sample]) -> list[Detections]:
    result = call("detect", *[each.path for each in samples], "--model", model.path,
                  "--score-threshold", SCORE, "--device", "cpu")  # fmt: skip
    return [parsed(each) for each in json.loads(result.stdout)["results"]]


def by_request(client: httpx.Client, model: Model, samples: Sequence[Sample]) -> list[Detections]:
    query = {"model": model.name, "score_threshold": SCORE}
    answers = [
        client.post("v1/detect", params=query, content=each.path.read_bytes()) for each in samples
    ]
    return [parsed(answer.raise_for_status().json()) for answer in answers]


def by_batch(
    client: httpx.Client, model: Model, samples: Sequence[Sample], order: Sequence[int | None]
) -> list[tuple[int, Detections]]:
    """Images by their index in `samples`; None stands for a file that is not an image."""
    contents = [b"no image" if i is None else samples[i].path.read_bytes() for i in order]
    answer = client.post(
        "v1/detect/batch",
        params={"model": model.name, "score_threshold": SCORE},
        files=[("files", (f"{place}.png", each)) for place, each in enumerate(contents)],
    )
    results = answer.raise_for_status().json()["results"]
    assert [each["status"] for each in results] == [415 if i is None else 200 for i in order]
    return [(i, parsed(each)) for i, each in zip(order, results, strict=True) if i is not None]


def served(found: Detections) -> Detections:
    """What a service would say: above the threshold, without boxes of no area."""
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found.pick((found.scores > SCORE) & (sides > 0).all(axis=1))


def parsed(answer: dict[str, Any]) -> Detections:
    rows = answer["detections"]
    corners = ("x1", "y1", "x2", "y2")
    return Detections(
        np.array([[r["box"][c] for c in corners] for r in rows], np.float32).reshape(-1, 4),
        np.array([r["score"] for r in rows], np.float32),
        np.array([r["class_id"] for r in rows], np.int64),
    )


def check_same(found: Sequence[Detections], expected: Sequence[Detections]) -> None:
    """As the promise is: boxes within 0.5 pixels, scores within 1e-3."""
    assert len(found) == len(expected)
    total = NO_DIFFERENCE
    for a, b in zip(found, expected, strict=True):
        total |= compare(a, b)
    assert total.boxes <= BOX_TOLERANCE, total
    # The API's scores have four digits.
    assert total.scores <= SCORE_TOLERANCE, total
    assert total.unpaired == 0, total
    assert total.detections > 0


def check_every_way(
    client: httpx.Client, model: Model, samples: Sequence[Sample], expected: Sequence[Detections]
) -> None:
    check_same(by_command(model, samples), expected)
    check_same(by_request(client, model, samples), expected)
    last = len(samples) - 1
    companies: list[list[int | None]] = [
        list(range(len(samples))),
        [last, None, *range(len(samples) - 1)],
        [0, 0, last, 0],
        [last],
    ]
    for order in companies:
        answers = by_batch(client, model, samples, order)
        check_same([each for _, each in answers], [expected[index] for index, _ in answers])


def test_trained_model_agrees_on_every_route(
    client: httpx.Client, cells: Model, data: Path
) -> None:
    assert cells.checkpoint is not None
    samples = load_voc(data, "val").samples
    checkpoint = load_checkpoint(cells.checkpoint)
    expected = by_torch(checkpoint.build(), cells, samples)
    assert sum(len(each) for each in expected) > 10
    check_same(by_file(cells, samples), expected)
    check_every_way(client, cells, samples, expected)


def test_bundled_model_agrees_on_every_route_for_drawn_images(
    client: httpx.Client, blood_cells: Model, drawn: list[Sample]
) -> None:
    check_every_way(client, blood_cells, drawn, by_file(blood_cells, drawn))


def test_bundled_model_agrees_on_every_route_for_real_images(
    client: httpx.Client, blood_cells: Model, bccd: Path
) -> None:
    classes = read_artifact(blood_cells.path).metadata.classes
    samples = load_voc(bccd, "val", classes=classes).samples[:5]
    check_every_way(client, blood_cells, samples, by_file(blood_cells, samples))


def test_bundled_checkpoint_matches_the_bundled_file(
    blood_cells: Model, drawn: list[Sample]
) -> None:
    if blood_cells.checkpoint is None:
        pytest.skip("no training checkpoint is bundled")
    network = load_checkpoint(blood_cells.checkpoint).build()
    found = by_torch(network, blood_cells, drawn)
    # It is kept in half precision, so the answers are near, not equal.
    for a, b in zip(found, by_file(blood_cells, drawn), strict=True):
        difference = compare(a, b)
        assert difference.detections >= 0.9 * max(len(a), len(b)), difference
        assert difference.scores <= 0.03, difference


# --- a run that is killed ------------------------------------------------------------------------


def test_train_resumes_after_sigkill(tmp_path: Path) -> None:
    data = draw(tmp_path / "few", {"train": range(6), "val": range(6, 8)})
    small = {**CONFIG, "model": {**CONFIG["model"], "backbone": "mobilenet_v2"}, "batch_size": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small))
    run = tmp_path / "run"
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "train", "--data", str(data), "--config",
             str(tmp_path / "config.yaml"), "--output", str(run), "--epochs", "999",
             "--device", "cpu"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            limit = time.monotonic() + 240
            while len(epochs(run)) < 2 and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            assert process.wait() == -signal.SIGKILL, log.read_text()
    assert "weights_only" not in log.read_text()
    assert "Traceback" not in log.read_text()

    load_checkpoint(run / "last.ckpt")
    finished = torch.load(run / "last.ckpt", weights_only=True)["epoch"] + 1
    result = call("train", "--data", data, "--output", run, "--resume", "--epochs", finished + 1,
                  "--device", "cpu")  # fmt: skip
    assert "best AP" in result.stdout
    assert epochs(run) == list(range(1, finished + 2))
    provenance = load_checkpoint(run / "last.ckpt").description.provenance
    assert "--resume" not in provenance["command"]
    assert provenance["config"]["epochs"] == finished + 1
    assert not list(run.glob("*.part"))


def epochs(run: Path) -> list[int]:
    try:
        with (run / "metrics.csv").open(newline="") as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
