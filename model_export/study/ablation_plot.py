"""The table of an ablation as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_export.study.ablation import Result, Summary
from model_export.study.figures import panels, save


def write(title: str, summaries: Sequence[Summary], results: Sequence[Result], path: Path) -> Path:
    """Draw a dot for every run, a bar for every row's mean and, where known, the paper's AP."""
    known = any(each.paper is not None for each in summaries)
    height = 1.2 + 0.36 * len(summaries)
    figure, axes = panels(2 if known else 1, width=6.0, height=height)
    names = [each.name for each in summaries]
    ours = axes[0]
    ours.barh(names, [each.mean for each in summaries], color="tab:blue", alpha=0.35)
    for result in results:
        ours.plot([100 * result.ap], [result.row], "o", color="tab:blue", markersize=4)
    ours.set(title=title, xlabel="AP (dots: seeds)")
    ours.invert_yaxis()
    if known:
        paper = axes[1]
        paper.barh(names, [each.paper or 0.0 for each in summaries], color="tab:gray", alpha=0.5)
        paper.set(title="The paper, on COCO", xlabel="AP")
        paper.invert_yaxis()
    return save(figure, path)
