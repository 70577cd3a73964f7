"""Charts of the report as inline SVG: they take the page's colours, light or dark.

Both axes go from 0 to 1. Text is escaped; series are coloured by the style sheet (`.s0` … `.s6`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from model_export.evaluation.bootstrap import Difference
from model_export.evaluation.reliability import Reliability

SERIES: Final = 7
"""So many colours are told apart."""

_WIDTH: Final = 460
_HEIGHT: Final = 320
_LEFT: Final = 46
_BOTTOM: Final = 40
_MARGIN: Final = 12
_TICKS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_APART: Final = 0.6
"""Pixels. A curve of ten thousand points needs no more than its pixels."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve with a name."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    mark: tuple[float, float] | None = None
    """A point to stand out."""
    note: str = ""
    """Said of the mark."""


def lines(series: Sequence[Line], *, across: str, up: str, label: str) -> Markup:
    """Curves in one frame, at most `SERIES` of them in colours of their own."""
    drawn = [
        _curve(each, index % SERIES if len(series) <= SERIES else 0)
        for index, each in enumerate(series)
    ]
    return _frame(drawn, across=across, up=up, label=label)


def reliability(calibration: Reliability, *, label: str) -> Markup:
    """Precision of each score bin as a bar, and how far it is from what the scores say."""
    drawn = [_path(Markup("M{:.1f},{:.1f}L{:.1f},{:.1f}").format(*_at(0, 0), *_at(1, 1)), "ideal")]
    rows = zip(
        calibration.edges[:-1],
        calibration.edges[1:],
        calibration.counts,
        calibration.confidence,
        calibration.precision,
        strict=True,
    )
    for low, high, count, score, share in rows:
        if count:
            drawn.append(_bin(float(low), float(high), int(count), float(score), float(share)))
    return _frame(drawn, across="score", up="precision", label=label)


def interval(difference: Difference, *, reach: float) -> Markup:
    """A difference with its interval on a line from -reach to +reach, 0 in the middle."""

    def x(value: float) -> float:
        return 100 + 92 * max(-1.0, min(1.0, value / reach))

    return Markup(
        '<svg class="interval" viewBox="0 0 200 24" role="img" aria-label="{:+.4f}, from {:+.4f} '
        'to {:+.4f}"><path class="axis" d="M8,12H192M100,3V21"/>'
        '<path class="whisker" d="M{:.1f},12H{:.1f}M{:.1f},7v10M{:.1f},7v10"/>'
        '<circle class="point" cx="{:.1f}" cy="12" r="4.5"/></svg>'
    ).format(
        difference.value,
        difference.low,
        difference.high,
        x(difference.low),
        x(difference.high),
        x(difference.low),
        x(difference.high),
        x(difference.value),
    )


def _frame(drawn: Iterable[Markup], *, across: str, up: str, label: str) -> Markup:
    grid = Markup("").join(
        Markup(
            '<path class="grid" d="M{:.1f},{:.1f}V{:.1f}M{:.1f},{:.1f}H{:.1f}"/>'
            '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{:g}</text>'
            '<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{:g}</text>'
        ).format(
            *(_at(tick, 0)[0], _at(0, 0)[1], _at(0, 1)[1]),
            *(_at(0, 0)[0], _at(0, tick)[1], _at(1, 0)[0]),
            *(_at(tick, 0)[0], _HEIGHT - _BOTTOM + 15, tick),
            *(_LEFT - 6, _at(0, tick)[1] + 4, tick),
        )
        for tick in _TICKS
    )
    middle_x, middle_y = _at(0.5, 0.5)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}'
        '<text class="axis-name" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        '<text class="axis-name" transform="translate(12 {:.1f}) rotate(-90)" '
        'text-anchor="middle">{}</text></svg>'
    ).format(
        *(_WIDTH, _HEIGHT, label, grid, Markup("").join(drawn)),
        *(middle_x, _HEIGHT - 5, across, middle_y, up),
    )


def _curve(line: Line, colour: int) -> Markup:
    points = _thinned(line.x, line.y)
    if not points:
        return Markup("")
    steps = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = _path(Markup("M{}").format(steps), f"curve s{colour}", line.name)
    if line.mark is None:
        return drawn
    x, y = _at(*line.mark)
    return drawn + Markup(
        '<circle class="mark s{}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
    ).format(colour, x, y, line.note or line.name)


def _bin(low: float, high: float, count: int, score: float, share: float) -> Markup:
    left, top = _at(low, share)
    right, floor = _at(high, 0)
    x, said = _at(score, score)
    above = min(top, said) - 5
    return Markup(
        "<g><title>{} detections score {:g} to {:g}, {:.3f} on average; {:.1%} of them hit</title>"
        '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
        '<path class="gap {}" d="M{:.1f},{:.1f}V{:.1f}"/>'
        '<text class="count" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text></g>'
    ).format(
        *(count, low, high, score, share),
        *(left + 1, top, right - left - 2, floor - top),
        *("over" if score > share else "under", x, said, top),
        *((left + right) / 2, above, count),
    )


def _path(d: Markup, css: str, title: str = "") -> Markup:
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(css, d, title)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Points in pixels, those left out that lie where the last one does; both ends stay."""
    points = [_at(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    kept = points[:1]
    for point in points[1:]:
        if max(abs(point[0] - kept[-1][0]), abs(point[1] - kept[-1][1])) >= _APART:
            kept.append(point)
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def _at(x: float, y: float) -> tuple[float, float]:
    """Data in [0, 1] to pixels."""
    return (
        _LEFT + x * (_WIDTH - _LEFT - _MARGIN),
        _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - _MARGIN),
    )
