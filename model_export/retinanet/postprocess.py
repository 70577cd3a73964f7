"""From predictions to candidate boxes, and the reference non-maximum suppression.

What the model file does behind the network has to agree with `candidates` and `suppress`, which
serve validation during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from model_export.retinanet.box_coding import decode
from model_export.retinanet.matching import box_iou
from model_export.retinanet.model import Level, RetinaNet

TOP_K: Final = 1000
"""(anchor, class) pairs kept per level (Focal Loss, section 4)."""

MANY_CLASSES: Final = 8
"""Number of classes from which on the best pairs are found in two steps. onnxruntime's TopK on
CUDA reads a row about seven times with one of the GPU's many blocks: 8 million pairs would take it
longer than the network."""


class CandidateNetwork(nn.Module):
    """The model file up to its candidate boxes, in torch: canvases in, candidates out."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `candidates`; an image size of 0 stands for the whole canvas."""
        sizes = torch.where(image_sizes > 0, image_sizes, torch.tensor(images.shape[1:3]))
        return candidates(self.network(images, sizes), sizes)


def candidates(levels: Sequence[Level], image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (B, N, 4), scores (B, N) and labels (B, N) of each level's best pairs.

    Scores are sigmoid(logit); boxes are clipped to the image's (B, 2) height and width.
    """
    boxes, scores, labels = [], [], []
    for level in levels:
        best, anchor, label = best_pairs(level.logits, TOP_K)
        deltas = level.deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
        boxes.append(decode(deltas, level.anchors[anchor]))
        scores.append(best.float().sigmoid())
        labels.append(label)
    return _clip(torch.cat(boxes, dim=1), image_sizes), torch.cat(scores, 1), torch.cat(labels, 1)


def best_pairs(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, anchors and labels (B, count) of the best (anchor, class) pairs of (B, N, K) logits.

    Fewer where there are fewer. With many classes only the best anchors' pairs are looked at: an
    anchor that has one of the best pairs is among the `count` anchors with the best best class.
    """
    if logits.shape[2] < MANY_CLASSES:
        return _best_of_all(logits, count)
    kept = logits.amax(dim=2).topk(min(count, logits.shape[1]), dim=1).indices
    pairs = logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[2]))
    best, row, label = _best_of_all(pairs, count)
    return best, kept.gather(1, row), label


def _best_of_all(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = logits.flatten(1)
    best, index = flat.topk(min(count, flat.shape[1]), dim=1)
    return best, index // logits.shape[2], index % logits.shape[2]


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    score_threshold: float,
    iou_threshold: float,
    max_detections: int,
) -> Tensor:
    """Return indices (D,) of one image's detections, by falling score.

    Of boxes (N, 4) with score strictly above `score_threshold`, a box goes when a better one of
    its own class overlaps it by strictly more than `iou_threshold`.
    """
    above = torch.nonzero(scores > score_threshold).flatten()
    order = above[scores[above].argsort(descending=True, stable=True)]
    boxes, labels = boxes[order], labels[order]
    alive = torch.ones(len(order), dtype=torch.bool)
    kept: list[int] = []
    for index in range(len(order)):
        if len(kept) == max_detections:
            break
        if alive[index]:
            kept.append(index)
            overlap = box_iou(boxes[index : index + 1], boxes)[0]
            alive &= ~((overlap > iou_threshold) & (labels == labels[index]))
    return order[torch.tensor(kept, dtype=torch.int64)]


def _clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    limit = image_sizes.flip(1).to(boxes.dtype)[:, None, :]
    zero = torch.zeros((), dtype=boxes.dtype, device=boxes.device)
    low = torch.minimum(torch.maximum(boxes[..., :2], zero), limit)
    high = torch.minimum(torch.maximum(boxes[..., 2:], zero), limit)
    return torch.cat([low, high], dim=-1)
