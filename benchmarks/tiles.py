"""What tiles gain on large images, and what they cost.

    python benchmarks/tiles.py DATA [--model FILE.onnx] [--split val] [--across 3]

Labelled images are pasted side by side into large ones, so the truth is known and each image
alone, on a canvas of its own, shows the most that tiles can reach. `twice` counts objects that
more than one detection of their class hits at IoU 0.5. Milliseconds are the median of a large
image, decoding apart.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_export.data.datasets import load
from model_export.data.samples import Sample
from model_export.evaluation.coco_metrics import KEPT_DETECTIONS, SCORE, coco_metrics
from service.engine import tiling
from service.engine.postprocessing import Selection
from service.engine.postprocessing import resolve as resolve_selection
from service.imaging.canvas import Size
from service.imaging.decode import decode, open_image
from service.runtime.artifact import MAX_DETECTIONS_CAP, read_artifact
from service.runtime.detector import Detections, Detector
from service.runtime.devices import open_detector, resolve
from service.settings import bundled_models

BUNDLED = bundled_models() / "blood-cells" / "1" / "model.onnx"


def detect(canvases: tiling.Canvases, detector: Detector, selection: Selection) -> Detections:
    """Run the detector on one view after the other: what the service does in its pipeline."""
    found: list[Detections] = []
    for make in canvases.makers:
        prepared = make()
        found += detector(
            prepared.canvas[np.newaxis],
            np.array([prepared.letterbox.resized], dtype=np.int64),
            score_threshold=selection.lowest_score,
            iou_threshold=selection.iou,
        )
    return tiling.merge(canvases.plan, found, selection)


def paste(samples: Sequence[Sample], across: int) -> tuple[bytes, Sample]:
    """A JPEG of the samples' images, row by row, and its truth."""
    width = max(sample.size.width for sample in samples)
    height = max(sample.size.height for sample in samples)
    size = Size(height * across, width * across)
    image = Image.new("RGB", (size.width, size.height))
    boxes = []
    for number, sample in enumerate(samples):
        corner = (number % across * width, number // across * height)
        image.paste(decode(sample.path.read_bytes()), corner)
        boxes.append(sample.boxes + np.array(corner * 2, dtype=np.float32))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    labels = np.concatenate([sample.labels for sample in samples])
    return file.getvalue(), Sample(samples[0].path, size, np.concatenate(boxes), labels)


def alone(
    samples: Sequence[Sample], across: int, detector: Detector, chosen: Selection
) -> Detections:
    """Each image by itself; the boxes where the large image has them."""
    width = max(sample.size.width for sample in samples)
    height = max(sample.size.height for sample in samples)
    parts = []
    for number, sample in enumerate(samples):
        found, _, _ = look(sample.path.read_bytes(), "off", detector, chosen)
        corner = (number % across * width, number // across * height)
        shift = np.array(corner * 2, dtype=np.float32)
        parts.append(Detections(found.boxes + shift, found.scores, found.labels))
    return Detections(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )


def look(
    data: bytes, tile: tiling.Tile, detector: Detector, chosen: Selection
) -> tuple[Detections, int, float]:
    """What is found, on how many canvases, and in how many seconds after decoding."""
    rule = detector.metadata.canvas
    opened = open_image(data)
    canvases = tiling.lay_out(opened, tiling.plan(opened.size, rule, tile), rule)
    started = time.perf_counter()
    found = detect(canvases, detector, chosen)
    return found, canvases.plan.count, time.perf_counter() - started


def ious(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    near = np.maximum(one[:, None, :2], other[None, :, :2])
    far = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(far - near, 0, None).prod(axis=2)
    areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (one, other)]
    overlap: NDArray[np.float32] = shared / (areas[0][:, None] + areas[1] - shared)
    return overlap


def twice(truth: Sample, found: Detections, defaults: Selection) -> int:
    """At the model's own thresholds, as a user counts."""
    kept = found.pick(found.scores > defaults.scores[found.labels])
    hits = ious(truth.boxes, kept.boxes) >= 0.5
    hits &= truth.labels[:, None] == kept.labels
    return int((hits.sum(axis=1) > 1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--split", default="val")
    parser.add_argument("--across", type=int, default=3)
    parser.add_argument("--tiles", default="auto", help="comma list of auto and numbers")
    options = parser.parse_args()
    artifact = read_artifact(options.model)
    metadata = artifact.metadata
    detector = open_detector(artifact, resolve("auto").devices[0])
    samples = load(options.data, options.split, classes=metadata.classes).samples
    each = options.across**2
    groups = [samples[i : i + each] for i in range(0, len(samples) - each + 1, each)]
    large = [paste(group, options.across) for group in groups]
    truth = [sample for _, sample in large]
    defaults = resolve_selection(metadata)
    wanted = resolve_selection(
        metadata, score_threshold=SCORE, max_detections=KEPT_DETECTIONS * each
    )
    size = truth[0].size
    print(f"{len(large)} images of {size.width} x {size.height}, {each} labelled ones in each")
    print(f"{'':>10} canvases      ms     AP   AP50  twice")
    for tile in ("off", *map(tiling.parse_tile, options.tiles.split(",")), None):
        looks = [
            (alone(group, options.across, detector, wanted), each, 0.0)
            if tile is None
            else look(data, tile, detector, wanted)
            for group, (data, _) in zip(groups, large, strict=True)
        ]
        found = [detections for detections, _, _ in looks]
        result = coco_metrics(truth, found, metadata.classes, max_detections=MAX_DETECTIONS_CAP)
        doubles = sum(map(twice, truth, found, [defaults] * len(truth)))
        print(
            f"{'alone' if tile is None else tile:>10} {looks[0][1]:8d} "
            f"{statistics.median(seconds for _, _, seconds in looks) * 1e3:7.0f} "
            f"{result.ap or 0:6.3f} {result.ap50 or 0:6.3f} {doubles:6d}"
        )


if __name__ == "__main__":
    main()
