"""The table of an ablation as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_export.study.ablation import Result
from model_export.study.ablation_table import Summary
from model_export.study.figures import panels, save


def write(title: str, summaries: Sequence[Summary], results: Sequence[Result], path: Path) -> Path:
    """Draw a dot for every run, a bar for every row's mean and, where known, the paper's AP."""
    known = any(each.paper is not None for each in summaries)
    height = 1.2 + 0.36 * len(summaries)
    figure, axes = panels(2 if known else 1, width=6.0, height=height)
    rows = {each.name: index for index, each in enumerate(summaries)}
    ours = axes[0]
    ours.barh(list(rows.values()), [each.mean or 0.0 for each in summaries], alpha=0.35)
    for result in results:
        mark = "o" if result.diverged is None else "x"
        ours.plot([100 * result.ap], [rows[result.row]], mark, color="tab:blue", markersize=4)
    ours.set(title=title, xlabel="AP (dots: seeds, crosses: diverged)")
    if known:
        told = [each for each in summaries if each.paper is not None]
        places = [rows[each.name] for each in told]
        axes[1].barh(places, [each.paper or 0.0 for each in told], color="tab:gray", alpha=0.5)
        axes[1].set(title="The paper, on COCO", xlabel="AP")
    for each in axes:
        each.set_yticks(list(rows.values()), list(rows), parse_math=False)
        each.set_ylim(len(rows) - 0.4, -0.6)
    return save(figure, path)
