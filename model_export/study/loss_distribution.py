"""Distribution of a trained model's loss over its examples (Focal Loss, figure 4).

An example is one logit: (anchor, its class) is foreground, every (anchor, class) of a background
anchor is background. With one class that is the paper's anchor. alpha scales all of a kind alike
and does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from model_export.data.batches import Example, collate
from model_export.retinanet.anchors import level_anchors
from model_export.retinanet.losses import focal_loss
from model_export.retinanet.matching import BACKGROUND, Matcher
from model_export.retinanet.model import RetinaNet
from model_export.study.figures import panels, save, write_columns
from model_export.training.detection_loss import assign
from service.errors import DataError

GAMMAS: Final = (0.0, 0.5, 1.0, 2.0)
HARDEST: Final = (0.01, 0.2)
"""Shares of the examples whose share of the loss is printed."""

_LIMIT: Final = 64.0
_BINS: Final = 1 << 15
"""Logits are counted in bins of 1/256: that bounds memory, and the loss's error to some 0.2 % times
1 + gamma."""
_POINTS: Final = 1001


class Histogram:
    """Counts of x_t, the logit of an example's true answer, over any number of examples."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, dtype=np.int64)

    def add(self, x_t: Tensor) -> None:
        """Count the logits; those beyond +-64 are counted there."""
        index = ((x_t.double() + _LIMIT) * (_BINS / (2 * _LIMIT))).floor()
        counted = torch.bincount(index.clamp(0, _BINS - 1).long().flatten(), minlength=_BINS)
        self.counts += counted.cpu().numpy()

    @property
    def examples(self) -> int:
        """Number of counted examples."""
        return int(self.counts.sum())

    def losses(self, gamma: float) -> NDArray[np.float64]:
        """(bins,) loss of one example in each bin, at the bin's middle."""
        middles = (np.arange(_BINS) + 0.5) * (2 * _LIMIT / _BINS) - _LIMIT
        loss = focal_loss(torch.from_numpy(middles), torch.ones(_BINS), alpha=None, gamma=gamma)
        return loss.double().numpy()


@dataclass(frozen=True, slots=True)
class Distribution:
    """The cumulative distribution of the normalised loss at one gamma."""

    gamma: float
    examples: NDArray[np.float64]
    """(P,) share of the examples, the easiest first, rising from 0 to 1."""
    loss: NDArray[np.float64]
    """(P,) share of the loss that they carry together."""

    def hardest(self, share: float) -> float:
        """Return the share of the loss that this share of the examples, the hardest, carries."""
        return float(1 - np.interp(1 - share, self.examples, self.loss))


def distribution(histogram: Histogram, gamma: float) -> Distribution:
    """Cumulative share of the loss over cumulative share of the examples.

    Raises ValueError if there are none, or none with a loss.
    """
    # The loss falls with x_t: from the easiest example on is from the highest bin down.
    counts = histogram.counts[::-1]
    weighed = counts * histogram.losses(gamma)[::-1]
    if not weighed.sum():
        raise ValueError(f"no examples with a loss at gamma {gamma:g}")
    examples = np.concatenate([[0.0], counts.cumsum() / counts.sum()])
    loss = np.concatenate([[0.0], weighed.cumsum() / weighed.sum()])
    filled = np.concatenate([[True], counts > 0])
    return Distribution(gamma, examples[filled], loss[filled])


@torch.no_grad()
def collect(
    network: RetinaNet,
    examples: Sequence[Example],
    *,
    matcher: Matcher,
    device: torch.device,
) -> tuple[Histogram, Histogram]:
    """Return logits of a data set's foreground and of its background."""
    foreground, background = Histogram(), Histogram()
    network.eval()
    for index in tqdm(range(len(examples)), desc="logits", unit="image", disable=None):
        batch = collate([examples[index]]).to(device)
        levels = network(batch.images, batch.image_sizes)
        logits = torch.cat([level.logits for level in levels], dim=1)[0]
        anchors = level_anchors(network.config.anchors, *batch.images.shape[1:3])
        anchors = [level.to(device) for level in anchors]
        [matched] = assign(anchors, batch.boxes, batch.labels, matcher)
        if not logits.isfinite().all():
            raise DataError("the network's logits are not finite; use another checkpoint")
        positive = matched >= 0
        foreground.add(logits[positive, batch.labels[0][matched[positive]]])
        background.add(-logits[matched == BACKGROUND])
    return foreground, background


def write(
    foreground: Sequence[Distribution], background: Sequence[Distribution], output: Path
) -> list[Path]:
    """Write loss-distribution.png and .csv into `output`; their paths."""
    figure, axes = panels(2)
    share = np.linspace(0, 1, _POINTS)
    columns: dict[str, list[float]] = {"share of examples": share.tolist()}
    for each, title, found in zip(
        axes, ("foreground", "background"), (foreground, background), strict=True
    ):
        for one in found:
            each.plot(one.examples, one.loss, label=f"gamma {one.gamma:g}")
            loss = np.interp(share, one.examples, one.loss)
            columns[f"{title}, gamma {one.gamma:g}"] = loss.tolist()
        each.set(
            title=f"{title} (figure 4)",
            xlabel="share of examples, easiest first",
            ylabel="share of the loss",
        )
        each.legend()
    return [
        save(figure, output / "loss-distribution.png"),
        write_columns(output / "loss-distribution.csv", columns),
    ]
