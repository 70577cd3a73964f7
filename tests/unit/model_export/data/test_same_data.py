"""One data set, three formats: the same samples, and the same AP of the bundled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_export.data.datasets import load
from model_export.data.problems import Kind
from model_export.evaluation.coco_metrics import coco_metrics
from model_export.evaluation.inference import detect
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.settings import bundled_models
from tests.unit.model_export import copies

# Not by falling count: the order in the files must not matter.
NAMES = ("Platelets", "RBC", "WBC")


@pytest.fixture(scope="module")
def formats(bccd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Blood cells in each format."""
    root = tmp_path_factory.mktemp("formats")
    return {
        "voc": bccd,
        "coco": copies.write_coco(bccd, root / "coco", NAMES),
        "yolo": copies.write_yolo(bccd, root / "yolo", NAMES),
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_samples_in_every_format(formats: dict[str, Path], split: str) -> None:
    voc, coco, yolo = (load(root, split) for root in formats.values())
    assert voc.classes == coco.classes == yolo.classes == ("RBC", "WBC", "Platelets")
    for other in (coco, yolo):
        assert len(other.samples) == len(voc.samples) == {"train": 205, "val": 87}[split]
        for mine, theirs in zip(voc.samples, other.samples, strict=True):
            assert theirs.path.resolve() == mine.path.resolve()
            assert theirs.size == mine.size
            assert theirs.labels.tolist() == mine.labels.tolist()
            # Half a unit in the last place of a float32 at 640.
            np.testing.assert_allclose(theirs.boxes, mine.boxes, rtol=0, atol=3.1e-5)
        # The box without area is found and dropped in each.
        assert [problem.kind for problem in other.problems] == [Kind.NO_AREA]


def test_the_same_ap_in_every_format(bccd: Path, tmp_path: Path) -> None:
    (model,) = bundled_models().glob("blood-cells/*/model.onnx")
    artifact = read_artifact(model)
    classes = artifact.metadata.classes
    detector = devices.open_detector(artifact, devices.Device("cpu"))
    roots = [
        copies.write_voc(bccd, tmp_path / "voc", most=6),
        copies.write_coco(bccd, tmp_path / "coco", NAMES, most=6),
        copies.write_yolo(bccd, tmp_path / "yolo", NAMES, most=6),
    ]
    results = []
    for root in roots:
        samples = load(root, "val", classes=classes).samples
        results.append(coco_metrics(samples, detect(detector, samples, batch_size=1), classes))
    voc, coco, yolo = results
    assert voc.ap is not None
    assert voc.ap > 0.4
    assert (voc.images, voc.boxes) == (6, sum(each.count for each in voc.per_class.values()))
    assert coco == voc
    assert yolo == voc
