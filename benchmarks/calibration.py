"""What calibration does on images that it was not fitted on, by the calibrated file itself.

    python benchmarks/calibration.py service/models/blood-cells/1/checkpoint.safetensors --data bccd

Halves a split image by image, calibrates on each half, and measures the calibrated file on the
other one: calibration error of detections above score 0.05, AP at score 0 with 300 detections.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model_export.checkpoints import load_checkpoint
from model_export.data.datasets import Sample, load
from model_export.evaluation.calibration import calibrate
from model_export.evaluation.reliability import reliability
from model_export.evaluation.coco_metrics import SCORE, coco_metrics, match
from model_export.evaluation.inference import detect
from model_export.export.graph import export, replace_weights
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections


def found_by(model: Path, samples: Sequence[Sample], score: float) -> list[Detections]:
    detector = devices.open_detector(read_artifact(model), devices.Device("cpu"))
    return detect(detector, samples, batch_size=1, score=score)


def row(model: Path, samples: Sequence[Sample], classes: Sequence[str]) -> tuple[float, float]:
    """D-ECE, and AP in points of 100."""
    found = found_by(model, samples, 0.0)
    judged = [each.at_50() for each in match(samples, found, classes)]
    error = reliability(
        np.concatenate([each.scores for each in judged]),
        np.concatenate([each.hits for each in judged]),
    ).error
    return error or 0.0, 100 * (coco_metrics(samples, found, classes).ap or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--split", default="val", help="not the one that was trained on")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    classes = checkpoint.description.classes
    samples = load(arguments.data, arguments.split, classes=classes).samples
    print("measured on   D-ECE before   after   AP before    after  scale, offset by class")
    with tempfile.TemporaryDirectory() as scratch:
        plain, calibrated = Path(scratch) / "plain.onnx", Path(scratch) / "calibrated.onnx"
        metadata = export(checkpoint, plain, name="plain")
        for side in (0, 1):
            fitted, held_out = samples[side::2], samples[1 - side :: 2]
            found = found_by(plain, fitted, SCORE)
            score_map = calibrate(fitted, found, classes).score_map
            calibrated.write_bytes(plain.read_bytes())
            replace_weights(calibrated, score_map.fold(checkpoint.weights), metadata)
            before, after = (row(each, held_out, classes) for each in (plain, calibrated))
            maps = zip(classes, score_map.scales, score_map.offsets, strict=True)
            print(
                f"{len(held_out):4} images  {before[0]:12.4f}  {after[0]:6.4f}  "
                f"{before[1]:10.3f}  {after[1]:7.3f}  "
                + ", ".join(f"{name} {scale:.2f} {offset:+.2f}" for name, scale, offset in maps)
            )


if __name__ == "__main__":
    main()
