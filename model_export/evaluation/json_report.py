"""An evaluation as JSON. Numbers are in [0, 1]; None is a value that cannot be measured.

`schema` 1; keys are only ever added under the same number:

- `model`: `name`, `file`, `sha256`, `bytes`, `calibrated`, `provenance` as in the file;
- `data`: `name`, `split`, `pictures`, `objects`, `classes` in the order of the labels, and `sha256`
  over file names, sizes and labels;
- `metrics`: all fields of `evaluation.coco_metrics.Evaluation`: the twelve COCO figures (`ap`,
  `ap50`, `ap75`, `ap_small` … `ar1`, `ar10`, `ar100`, `ar_small` …), `per_class`, `timing` in
  milliseconds per image. The size of an object is its area as annotated, else that of its box;
  objects marked difficult are not counted;
- `thresholds`: by class, the score threshold that `export --data` would choose on these images;
- `threshold_choice`: `score`, the threshold of highest F1 over all classes together, `images` and
  `folds`, and what the thresholds are worth: `f1` on the images that they were chosen on,
  `f1_cross_validated` on images that they were not chosen on, each with `micro` (all classes
  together) and `macro` (mean over the classes that have objects);
- `operating_points`: by class, `best` (`threshold`, `precision`, `recall`, `f1` where F1 is highest
  on these images), `chosen` (the same at that of `thresholds`) and `recommended` (the same at the
  file's own threshold);
- `calibration`: `min_score`, `overall` and `per_class`, each with `d_ece`, `bias` (mean score minus
  precision), `detections` and `bins`;
- `confusion`: `labels` of rows and columns; `counts[i][j]` objects of class i detected as j. The
  last row holds detections without an object, the last column objects without a detection;
- `mistakes`: how many of each kind at the recommended thresholds, by `error_analysis`;
- `curves`: by class, `recall` and `precision`: COCO's interpolated precision at IoU 0.50;
- `against`, with `--against` alone: `model`, `metrics`, and `difference` (this file minus that one)
  of `ap`, `ap50`, `d_ece`, each with `value` and the ends `low` and `high` of its 95 % interval;
  `note`: what the interval leaves out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, Final

from model_export.evaluation.bootstrap import SEEDS_NOTE
from model_export.evaluation.error_analysis import MISTAKES
from model_export.evaluation.reliability import MIN_SCORE
from model_export.evaluation.results import Baseline, EvaluationResults, ModelFile
from model_export.evaluation.thresholds import RECALLS, OperatingPoints

SCHEMA: Final = 1


def to_json(measured: EvaluationResults, against: Baseline | None = None) -> dict[str, Any]:
    """Return plain values in the module's schema."""
    dataset, evaluation = measured.dataset, measured.evaluation
    chosen = measured.chosen
    kinds = Counter(each.outcome for each in measured.mistakes)
    written: dict[str, Any] = {
        "schema": SCHEMA,
        "model": _model(measured.model),
        "data": {
            "name": dataset.root.resolve().name,
            "split": dataset.split,
            "pictures": evaluation.images,
            "objects": evaluation.boxes,
            "classes": list(dataset.classes),
            "sha256": measured.data_digest,
        },
        "metrics": evaluation.to_dict(),
        "thresholds": {
            name: None if chosen is None else chosen.thresholds.of(name) for name in dataset.classes
        },
        "threshold_choice": (
            None if chosen is None else {"score": chosen.thresholds.score, **chosen.to_dict()}
        ),
        "operating_points": _operating_points(measured),
        "calibration": {
            "min_score": MIN_SCORE,
            "overall": measured.overall_calibration.to_dict(),
            "per_class": {name: each.to_dict() for name, each in measured.calibration.items()},
        },
        "confusion": {
            "labels": [*dataset.classes, None],
            "counts": measured.confusion.counts.tolist(),
        },
        "mistakes": {str(kind): kinds[kind] for kind in MISTAKES},
        "curves": {
            name: None if each is None else _curve(each) for name, each in measured.points.items()
        },
    }
    if against is not None:
        written["against"] = {
            "model": _model(against.model),
            "metrics": against.evaluation.to_dict(),
            "difference": asdict(against.comparison),
            "note": SEEDS_NOTE,
        }
    return written


def _model(model: ModelFile) -> dict[str, Any]:
    return {
        "name": model.metadata.name,
        "file": model.path.name,
        "sha256": model.sha256,
        "bytes": model.size,
        "calibrated": model.metadata.calibrated,
        "provenance": model.metadata.provenance,
    }


def _operating_points(measured: EvaluationResults) -> dict[str, Any]:
    own = measured.model.metadata.thresholds
    chosen = None if measured.chosen is None else measured.chosen.thresholds
    return {
        name: {
            "best": _best(each),
            "chosen": None if chosen is None else _at(each, chosen.of(name)),
            "recommended": _at(each, own.of(name)),
        }
        for name, each in measured.points.items()
    }


def _best(points: OperatingPoints | None) -> dict[str, float | None] | None:
    exact = None if points is None else points.best_threshold()
    return None if points is None or exact is None else _at(points, points.written(exact))


def _at(points: OperatingPoints | None, threshold: float) -> dict[str, float | None] | None:
    if points is None:
        return None
    precision, recall, f1 = points.at(threshold)
    return {"threshold": threshold, "precision": precision, "recall": recall, "f1": f1}


def _curve(points: OperatingPoints) -> dict[str, list[float]]:
    return {"recall": RECALLS.tolist(), "precision": points.interpolated().tolist()}
