"""The loss of a batch: who counts, by what it is divided, and what may never become NaN."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from model_export.config import LossConfig
from model_export.retinanet.losses import Focal, SmoothL1, focal_loss
from model_export.retinanet.matching import IouMatcher
from model_export.retinanet.model import Level
from model_export.training.detection_loss import Losses
from tests.unit.model_export.losses import detection_loss

NAN, INF = math.nan, math.inf

# Two levels of two and one anchors; the last is far from everything.
ANCHORS = (
    torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]]),
    torch.tensor([[100.0, 100, 140, 140]]),
)


def levels(
    *, images: int = 1, classes: int = 2, logit: float = 0.0, delta: float = 0.0
) -> list[Level]:
    return [
        Level(
            logits=torch.full((images, len(anchors), classes), logit, requires_grad=True),
            deltas=torch.full((images, len(anchors), 4), delta, requires_grad=True),
            anchors=anchors,
        )
        for anchors in ANCHORS
    ]


def loss_of(
    made: Sequence[Level],
    boxes: Sequence[list[tuple[float, ...]]],
    labels: Sequence[list[int]],
    *,
    matcher: IouMatcher | None = None,
    loss: LossConfig | None = None,
) -> Losses:
    return detection_loss(
        made,
        [torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in boxes],
        [torch.tensor(row, dtype=torch.int64) for row in labels],
        matcher=matcher or IouMatcher(),
        loss=loss or LossConfig(),
    )


def gradients(made: Sequence[Level]) -> list[Tensor]:
    found = []
    for level in made:
        for tensor in (level.logits, level.deltas):
            assert tensor.grad is not None
            found.append(tensor.grad)
    return found


# One element at logit 0: alpha_t * 0.25 * log 2.
ONE = 0.25 * 0.25 * math.log(2)
ZERO = 0.75 * 0.25 * math.log(2)


def test_by_hand() -> None:
    """The first anchor is the object, the other two are background, in both classes."""
    losses = loss_of(levels(delta=0.05), [[(0, 0, 10, 10)]], [[1]])
    assert losses.classification.item() == pytest.approx(ONE + 5 * ZERO, rel=1e-5)
    # Four deltas of 0.05 below beta 0.1: 0.5 * 0.05^2 / 0.1 each.
    assert losses.regression.item() == pytest.approx(4 * 0.0125, rel=1e-5)


def test_the_label_s_own_logit_is_the_one() -> None:
    made = levels()
    loss_of(made, [[(0, 0, 10, 10)]], [[1]]).classification.backward()
    assert made[0].logits.grad is not None
    signs = made[0].logits.grad.sign()[0].tolist()
    # A negative slope raises the logit.
    assert signs == [[1, -1], [1, 1]]


def test_ignored_anchors_count_in_nothing() -> None:
    # 4.5 of 10 rows overlap with the first anchor: IoU 0.45, between the thresholds.
    made = levels(delta=0.05)
    strict = IouMatcher(low_quality_matches=False)
    losses = loss_of(made, [[(0, 0, 10, 4.5)]], [[0]], matcher=strict)
    assert losses.classification.item() == pytest.approx(4 * ZERO, rel=1e-5)
    assert losses.regression.item() == 0
    (losses.classification + losses.regression).backward()
    assert made[0].logits.grad is not None
    assert not made[0].logits.grad[0, 0].any()
    assert made[0].logits.grad[0, 1].all()


def test_a_low_quality_match_learns_its_object() -> None:
    losses = loss_of(levels(), [[(0, 0, 10, 2)]], [[0]])
    assert losses.classification.item() == pytest.approx(ONE + 5 * ZERO, rel=1e-5)
    # The centre is 4 of 10 up, the height a fifth: beyond beta, |x| - 0.05 each.
    assert losses.regression.item() == pytest.approx(0.4 + math.log(5) - 0.1, rel=1e-5)


def test_both_parts_are_divided_by_the_foreground_of_the_whole_batch() -> None:
    """Not per image: two objects on one and none on the other make two in all."""
    made = levels(images=2, delta=0.05)
    losses = loss_of(made, [[(0, 0, 10, 10), (20, 0, 30, 10)], []], [[0, 1], []])
    assert losses.classification.item() == pytest.approx((2 * ONE + 10 * ZERO) / 2, rel=1e-5)
    assert losses.regression.item() == pytest.approx(8 * 0.0125 / 2, rel=1e-5)


def test_without_objects_the_divisor_is_1_and_every_parameter_has_a_gradient() -> None:
    made = levels(images=2, delta=3.0)
    losses = loss_of(made, [[], []], [[], []])
    assert losses.classification.item() == pytest.approx(12 * ZERO, rel=1e-5)
    assert losses.regression.item() == 0
    (losses.classification + losses.regression).backward()
    for level in made:
        assert level.deltas.grad is not None
        assert not level.deltas.grad.any()
        assert level.logits.grad is not None
        assert (level.logits.grad > 0).all()


def test_settings_reach_the_losses() -> None:
    made = levels(logit=1.0, delta=0.05)
    boxes: list[list[tuple[float, ...]]] = [[(0, 0, 10, 10)]]
    chosen = LossConfig(
        classification=Focal(alpha=0.6, gamma=0.5), box=SmoothL1(beta=0.0), box_weight=3.0
    )
    losses = loss_of(made, boxes, [[0]], loss=chosen)
    one = focal_loss(torch.ones(1), torch.ones(1), alpha=0.6, gamma=0.5).item()
    zero = focal_loss(torch.ones(1), torch.zeros(1), alpha=0.6, gamma=0.5).item()
    assert losses.classification.item() == pytest.approx(one + 5 * zero, rel=1e-5)
    assert losses.regression.item() == pytest.approx(3 * 4 * 0.05, rel=1e-5)


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    made = levels(logit=-20.0)
    with torch.no_grad():
        made[0].logits[0, 0, 1] = 20.0
    losses = loss_of(made, [[(0, 0, 10, 10)]], [[1]])
    assert losses.classification.item() < 1e-8
    assert losses.regression.item() == 0


@pytest.mark.parametrize(
    "rubbish",
    [
        (NAN, NAN, NAN, NAN),
        (0, 0, NAN, 10),
        (0, 0, INF, INF),
        (-INF, -INF, INF, INF),
        (5, 5, 5, 5),
        (0, 0, 10, 0),
        (10, 10, 0, 0),
        (1e30, 1e30, 2e30, 2e30),
        (0, 0, 1e-30, 1e-30),
        (-50, -50, -40, -40),
    ],
)
def test_boxes_that_are_none_change_nothing(rubbish: tuple[float, ...]) -> None:
    made, plain = levels(images=2, delta=0.3), levels(images=2, delta=0.3)
    losses = loss_of(made, [[(0, 0, 10, 10), rubbish], [rubbish]], [[1, 0], [0]])
    expected = loss_of(plain, [[(0, 0, 10, 10)], []], [[1], []])
    assert losses.classification.item() == expected.classification.item()
    assert losses.regression.item() == expected.regression.item()
    (losses.classification + losses.regression).backward()
    (expected.classification + expected.regression).backward()
    for found, wanted in zip(gradients(made), gradients(plain), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_predictions_stay_finite(logit: float, gamma: float) -> None:
    made = levels(logit=logit, delta=1e4)
    losses = loss_of(
        made, [[(0, 0, 10, 10)]], [[1]], loss=LossConfig(classification=Focal(gamma=gamma))
    )
    total = losses.classification + losses.regression
    total.backward()
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_summed_in_float32(dtype: torch.dtype) -> None:
    """60,000 anchors of loss 0.13 each would be infinite in float16 and coarse in bfloat16."""
    count = 60_000
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(count, 1)
    anchors[1:] += 1000
    level = Level(
        logits=torch.zeros(1, count, 1, dtype=dtype, requires_grad=True),
        deltas=torch.zeros(1, count, 4, dtype=dtype, requires_grad=True),
        anchors=anchors,
    )
    losses = loss_of([level], [[(0, 0, 10, 10)]], [[0]])
    assert losses.classification.dtype == torch.float32
    assert losses.classification.item() == pytest.approx(ONE + (count - 1) * ZERO, rel=1e-4)


# --- shards --------------------------------------------------------------------------------------

# Images of one batch: two objects, none, one, and one that only rubbish is on.
BOXES: tuple[list[tuple[float, ...]], ...] = (
    [(0, 0, 10, 9), (20, 0, 31, 10)],
    [],
    [(98, 100, 141, 139)],
    [(NAN, 0, 1, 1)],
)
LABELS = ([0, 1], [], [1], [0])


def batch_levels(images: Sequence[int]) -> list[Level]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for anchors in ANCHORS:
        logits = torch.randn(4, len(anchors), 2, generator=generator)[list(images)]
        deltas = torch.randn(4, len(anchors), 4, generator=generator)[list(images)]
        made.append(Level(logits.requires_grad_(), deltas.requires_grad_(), anchors))
    return made


def batch_gradients(images: Sequence[int]) -> list[Tensor]:
    made = batch_levels(images)
    losses = loss_of(made, [BOXES[i] for i in images], [LABELS[i] for i in images])
    (losses.classification + losses.regression).backward()
    return gradients(made)


def test_a_batch_is_its_shards_weighed_by_their_foreground() -> None:
    whole = batch_gradients([0, 1, 2, 3])
    # Three foreground anchors in all: two in the first shard, one in the second.
    shards = ((slice(0, 2), 2 / 3), (slice(2, 4), 1 / 3))
    for part, share in shards:
        images = list(range(4))[part]
        for together, alone in zip(whole, batch_gradients(images), strict=True):
            assert torch.allclose(together[part], alone * share, atol=1e-6)


def _as_process(rank: int, port: int) -> list[Tensor]:
    """This process's gradients of its shard, as one of two."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        # Uneven in foreground: 2 anchors on the first process, 1 on the second.
        return batch_gradients([[0, 1], [2, 3]][rank])
    finally:
        dist.destroy_process_group()


def _worker(port: int, results: Any) -> None:
    torch.set_num_threads(1)
    results.put([gradient.tolist() for gradient in _as_process(1, port)])


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one_big_batch() -> None:
    whole = batch_gradients([0, 1, 2, 3])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_worker, args=(port, results))
    worker.start()
    first = _as_process(0, port)
    second = results.get(timeout=60)
    worker.join(60)
    assert worker.exitcode == 0
    for together, one, other in zip(whole, first, second, strict=True):
        # Distributed training averages the processes' gradients.
        apart = torch.cat([one, torch.tensor(other)]) / 2
        assert torch.allclose(together, apart, atol=1e-6)
