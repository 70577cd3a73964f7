"""One evaluation as a self-contained HTML page: no script, nothing fetched.

Values from a model file or a data set (class names, file names, provenance) are escaped by the
template, and the page's content security policy forbids scripts.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import jinja2
import numpy as np
import onnxruntime
from matplotlib.figure import Figure

from model_export.evaluation import error_images, plots
from model_export.evaluation.bootstrap import SEEDS_NOTE, Difference
from model_export.evaluation.coco_metrics import KEPT_DETECTIONS, MAX_DETECTIONS, SCORE
from model_export.evaluation.error_analysis import HIT_IOU, MISTAKES, NEAR_IOU, Mistake, Outcome
from model_export.evaluation.reliability import MIN_SCORE
from model_export.evaluation.results import Baseline, EvaluationResults
from service.imaging.canvas import Buckets, ShortSide

SHOWN: Final = 12
"""Images of each kind of mistake."""
BUDGET: Final = 3_500_000
"""Characters of all images together; the worst of each kind come first."""

_DIAGRAMS: Final = 48
"""Classes with a reliability diagram of their own, those with the most detections first."""
_CONFUSED: Final = 8


@dataclass(frozen=True, slots=True)
class Image:
    """One mistake with its crop and captions."""

    source: str
    title: str
    text: str
    file: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """The mistakes of one kind."""

    name: str
    meaning: str
    total: int
    images: tuple[Image, ...]


_MEANINGS: Final = {
    Outcome.MISSED: "Labelled, but nothing was detected there. First those that not even a low "
    "score speaks for, large before small.",
    Outcome.FALSE: "Detected where nothing is labelled. The highest-scoring ones are often missing "
    "labels.",
    Outcome.CONFUSED: f"The right place (IoU at least {HIT_IOU:g}), the wrong class.",
    Outcome.MISPLACED: f"The right class, but the boxes overlap by {NEAR_IOU:g} to {HIT_IOU:g} "
    "only.",
    Outcome.DUPLICATE: "A further detection of an object that was already found.",
}


def render(measured: EvaluationResults, against: Baseline | None = None) -> str:
    """Return the page. Raises DataError if an image can no longer be read."""
    return (
        page_templates()
        .get_template("report.html")
        .render(**_context(measured), against=None if against is None else _against(against))
    )


def page_templates() -> jinja2.Environment:
    """Return the templates of self-contained pages; all values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model_export"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=_fixed, percent=_percent)
    return environment


def _context(measured: EvaluationResults) -> dict[str, Any]:
    evaluation, metadata = measured.evaluation, measured.model.metadata
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": measured.model,
        "metadata": metadata,
        "canvas": _canvas(metadata.canvas),
        "dataset": measured.dataset,
        "data_name": measured.dataset.root.resolve().name,
        "data_digest": measured.data_digest,
        "evaluation": evaluation,
        "timing": evaluation.timing,
        "overall": measured.overall_calibration,
        "detected": int(measured.confusion.counts[:, :-1].sum()),
        **_shares(measured),
        "coco": _coco(measured),
        "chosen": measured.chosen,
        "classes": list(_classes(measured)),
        "figures": _figures(measured),
        "confusion": _confusion(measured),
        "confused": list(_most_confused(measured)),
        "galleries": _galleries(measured),
        "provenance": _provenance(metadata.provenance),
        "config": _config(metadata.provenance),
        "onnxruntime": onnxruntime.__version__,
        "constants": {
            "score": SCORE,
            "kept": KEPT_DETECTIONS,
            "max_detections": MAX_DETECTIONS,
            "min_score": MIN_SCORE,
        },
        "colours": {"labelled": error_images.LABELLED, "detected": error_images.DETECTED},
    }


def _canvas(rule: Buckets | ShortSide) -> str:
    if isinstance(rule, ShortSide):
        return f"shorter side {rule.short}, longer at most {rule.long} pixels"
    sizes = ", ".join(f"{size.height}x{size.width}" for size in rule.sizes)
    return f"{sizes} pixels (height x width), the one that fits best"


def _shares(measured: EvaluationResults) -> dict[str, float | None]:
    """Recall and precision of all classes together at the file's own thresholds."""
    counts = measured.confusion.counts
    hits = int(np.trace(counts[:-1, :-1]))
    objects, detected = int(counts[:-1].sum()), int(counts[:, :-1].sum())
    return {
        "recall": hits / objects if objects else None,
        "precision": hits / detected if detected else None,
    }


def _coco(measured: EvaluationResults) -> list[tuple[str, str, float | None]]:
    each = measured.evaluation
    return [
        ("AP", "mean over IoU 0.50 to 0.95", each.ap),
        ("AP50", "IoU 0.50", each.ap50),
        ("AP75", "IoU 0.75", each.ap75),
        ("AP small", "below 32² pixels", each.ap_small),
        ("AP medium", "32² to 96² pixels", each.ap_medium),
        ("AP large", "above 96² pixels", each.ap_large),
        ("AR1", "one detection a class", each.ar1),
        ("AR10", "ten detections a class", each.ar10),
        ("AR100", "a hundred detections a class", each.ar100),
        ("AR small", "below 32² pixels", each.ar_small),
        ("AR medium", "32² to 96² pixels", each.ar_medium),
        ("AR large", "above 96² pixels", each.ar_large),
    ]


def _classes(measured: EvaluationResults) -> Iterator[dict[str, Any]]:
    precision, recall = measured.confusion.precision(), measured.confusion.recall()
    for label, name in enumerate(measured.classes):
        yield {
            "name": name,
            "result": measured.evaluation.per_class[name],
            "f1": measured.f1(name),
            "chosen": None if measured.chosen is None else measured.chosen.thresholds.of(name),
            "threshold": measured.model.metadata.thresholds.of(name),
            "precision": _finite(precision[label]),
            "recall": _finite(recall[label]),
            "d_ece": measured.calibration[name].error,
        }


def _figures(measured: EvaluationResults) -> dict[str, str]:
    """Return figures by name, each as a data URI; those without anything to draw are left out."""
    drawn: dict[str, Figure] = {}
    if any(points is not None and points.scores.size for points in measured.points.values()):
        drawn["precision_recall"] = plots.precision_recall(measured, measured.classes)
        drawn["f1"] = plots.f1_over_threshold(measured, measured.classes)
    if measured.overall_calibration.total:
        drawn["reliability"] = plots.reliability_diagram(measured.overall_calibration)
        if len(measured.classes) > 1:
            most = sorted(measured.calibration.items(), key=lambda item: -item[1].total)
            drawn["class_reliability"] = plots.reliability_by_class(dict(most[:_DIAGRAMS]))
    return {name: _svg_uri(figure) for name, figure in drawn.items()}


def _svg_uri(figure: Figure) -> str:
    # As an image, not inline: names in it stay text, and its ids and styles stay its own.
    return "data:image/svg+xml;base64," + base64.b64encode(plots.svg(figure)).decode("ascii")


def _confusion(measured: EvaluationResults) -> list[tuple[str | None, list[tuple[int, float]]]]:
    """Return rows of counts and shares; the name of the last is None: no object there."""
    counts, shares = measured.confusion.counts, measured.confusion.row_shares()
    return [
        (name, list(zip(row.tolist(), share.tolist(), strict=True)))
        for name, row, share in zip([*measured.classes, None], counts, shares, strict=True)
    ]


def _most_confused(measured: EvaluationResults) -> Iterator[tuple[str, str, int]]:
    between = measured.confusion.counts[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    for flat in np.argsort(-between, axis=None, kind="stable")[:_CONFUSED]:
        true, detected = np.unravel_index(flat, between.shape)
        # What happened once says little.
        if between[true, detected] > 1:
            names = measured.classes[true], measured.classes[detected]
            yield *names, int(between[true, detected])


def _galleries(measured: EvaluationResults) -> list[Gallery]:
    totals = Counter(each.outcome for each in measured.mistakes)
    chosen = {
        kind: [each for each in measured.mistakes if each.outcome is kind][:SHOWN]
        for kind in MISTAKES
    }
    drawn = error_images.draw_all(
        [each for group in chosen.values() for each in group],
        measured.dataset.samples,
        measured.analyses,
    )
    fitting = _within_budget(chosen.values(), drawn)
    return [
        Gallery(
            name=str(kind),
            meaning=_MEANINGS[kind],
            total=totals[kind],
            images=tuple(
                Image(drawn[each], *_caption(measured, each)) for each in group if each in fitting
            ),
        )
        for kind, group in chosen.items()
    ]


def _within_budget(
    groups: Iterable[Sequence[Mistake]], drawn: Mapping[Mistake, str]
) -> set[Mistake]:
    """Return the worst of each kind, then the second of each, up to the budget."""
    left = BUDGET
    fitting = set()
    ranked = [(rank, each) for group in groups for rank, each in enumerate(group)]
    for _, mistake in sorted(ranked, key=lambda pair: pair[0]):
        left -= len(drawn[mistake])
        if left < 0:
            break
        fitting.add(mistake)
    return fitting


def _caption(measured: EvaluationResults, mistake: Mistake) -> tuple[str, str, str]:
    """Title, explanation and file name."""
    sample = measured.dataset.samples[mistake.image]
    analysis = measured.analyses[mistake.image]
    true = None if mistake.thing is None else measured.classes[sample.labels[mistake.thing]]
    if mistake.detection is None:
        threshold = measured.model.metadata.thresholds.of(str(true))
        held_back = f"the best detection there scores {mistake.score:.4f}, not above {threshold}"
        text = held_back if mistake.score else f"no detection there, not even at {SCORE:g}"
        return str(true), text, sample.path.name
    name = measured.classes[analysis.shown.labels[mistake.detection]]
    iou = "" if mistake.iou is None else f"IoU {mistake.iou:.2f}"
    text = {
        Outcome.FALSE: "nothing of the kind is labelled here",
        Outcome.CONFUSED: f"labelled {true}, {iou}",
        Outcome.MISPLACED: f"{iou} with the labelled box",
        Outcome.DUPLICATE: f"{iou} with an object found already ({true})",
    }[mistake.outcome]
    return f"{name} {mistake.score:.2f}", text, sample.path.name


def _against(against: Baseline) -> dict[str, Any]:
    differences = against.comparison
    rows = [
        ("AP", differences.ap, 1),
        ("AP50", differences.ap50, 1),
        ("D-ECE", differences.d_ece, -1),
    ]
    return {
        "model": against.model,
        "evaluation": against.evaluation,
        "note": SEEDS_NOTE,
        "rows": [
            (name, each, _verdict(each, sign)) for name, each, sign in rows if each is not None
        ],
    }


def _verdict(difference: Difference, sign: int) -> str:
    if not difference.beyond_chance:
        return "open"
    return "better" if sign * difference.value > 0 else "worse"


def _provenance(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return key and text of each entry except the configuration, which is long."""
    return [
        (key.replace("_", " "), _in_words(value))
        for key, value in provenance.items()
        if key != "config" and value not in (None, [], {})
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_in_words, value))
    return str(value)


def _config(provenance: dict[str, Any]) -> str | None:
    config = provenance.get("config")
    return None if config is None else json.dumps(config, indent=2)


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001 - a dash, for no value


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"  # noqa: RUF001
