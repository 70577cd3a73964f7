"""Training batches: canvases in memory, augmentation, batches of equal canvas.

Canvases come from `service.imaging.decode.prepare`, the one imaging path, so that an image that is
not augmented reaches the network exactly as it does in the service. Boxes are x1, y1, x2, y2 in
canvas pixels, continuous edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from tqdm import tqdm

from model_export.data.augmentation import Augmentation, Example, augment
from model_export.data.datasets import Sample
from model_export.data.problems import LISTED_PROBLEMS
from model_export.data.samples import CROWD
from service.errors import DataError, RetinaserveError
from service.imaging import decode as imaging
from service.imaging.canvas import Buckets, ShortSide, Size

DEFAULT_CACHE_BYTES: Final = 4 << 30

__all__ = [
    "Augmentation",
    "Batch",
    "CanvasBatchSampler",
    "CanvasCache",
    "Example",
    "Key",
    "TrainingBatches",
    "augment",
    "collate",
    "transpose",
]


# --- cache ---------------------------------------------------------------------------------------


class CanvasCache(Sequence[Example]):
    """The samples as examples, decoded once and held as uint8 up to `memory_bytes`.

    Every image is decoded at construction, also those beyond the budget, so that one that does
    not decode stops training before it begins; these are decoded again whenever they are asked
    for. Canvases are shared and read-only. Raises DataError naming every undecodable image.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        rule: Buckets | ShortSide,
        *,
        memory_bytes: int = DEFAULT_CACHE_BYTES,
        threads: int = 4,
        progress: bool = True,
        title: str = "decoding",
    ) -> None:
        self._samples = tuple(samples)
        self._rule = rule
        self.canvases: tuple[Size, ...] = tuple(rule.fit(item.size).canvas for item in samples)
        """Each sample's canvas, known from its size alone."""
        filled = np.cumsum([3 * canvas.area for canvas in self.canvases], dtype=np.int64)
        self._held = int(np.searchsorted(filled, memory_bytes, side="right"))
        self._examples: list[Example] = []
        failures: list[str] = []
        with ThreadPoolExecutor(threads) as pool:
            decoded = pool.map(self._try_decode, range(len(self._samples)))
            for outcome in tqdm(
                decoded, total=len(self._samples), desc=title, unit="image", disable=not progress
            ):
                if isinstance(outcome, str):
                    failures.append(outcome)
                elif isinstance(outcome, Example):
                    self._examples.append(outcome)
        if failures:
            more = len(failures) - LISTED_PROBLEMS
            lines = failures[:LISTED_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
            raise DataError(
                "images that do not decode; replace them or take them out of the split\n"
                + "\n".join(lines)
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        index = range(len(self._samples))[index]
        if index < self._held:
            return self._examples[index]
        return self._decode(index)

    def _try_decode(self, index: int) -> Example | str | None:
        """Return the example, an error message, or None if it decodes but is not held."""
        try:
            example = self._decode(index)
        except DataError as error:
            return str(error)
        return example if index < self._held else None

    def _decode(self, index: int) -> Example:
        sample = self._samples[index]
        try:
            prepared = imaging.prepare(sample.path.read_bytes(), self._rule)
        except (RetinaserveError, OSError) as error:
            raise DataError(f"{sample.path}: {error}") from error
        prepared.canvas.flags.writeable = False
        placed = prepared.letterbox
        return Example(
            canvas=prepared.canvas,
            size=placed.resized,
            boxes=placed.to_canvas(np.concatenate([sample.boxes, sample.crowds])),
            labels=np.concatenate([sample.labels, np.full(len(sample.crowds), CROWD)]),
        )


# --- batches -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """Images of one canvas size, with their labels."""

    images: torch.Tensor
    """(B, H, W, 3) uint8 RGB."""
    image_sizes: torch.Tensor
    """(B, 2) int64: height and width of each image's part of its canvas."""
    boxes: list[torch.Tensor]
    """B times (N, 4) float32: x1, y1, x2, y2 in canvas pixels."""
    labels: list[torch.Tensor]
    """B times (N,) int64."""
    counted: bool = True
    """False if this process has no share of a batch: its image is another's, and has no loss."""
    smallest_share: int | None = None
    """Images of the process that has the fewest, where several share a batch."""

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return a copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            function(self.images),
            function(self.image_sizes),
            [function(boxes) for boxes in self.boxes],
            [function(labels) for labels in self.labels],
            self.counted,
            self.smallest_share,
        )

    def split(self, parts: int) -> list[Batch]:
        """Split into at most `parts` batches of nearly equal length, as many in every process."""
        count = len(self)
        parts = min(parts, count if self.smallest_share is None else self.smallest_share)
        edges = [count * part // parts for part in range(parts + 1)]
        return [self._cut(slice(*ends)) for ends in itertools.pairwise(edges)]

    def _cut(self, part: slice) -> Batch:
        return Batch(
            self.images[part],
            self.image_sizes[part],
            self.boxes[part],
            self.labels[part],
            self.counted,
            self.smallest_share,
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples of one canvas size. Raises ValueError if there is none or they differ."""
    shapes = {example.canvas.shape[:2] for example in examples}
    if len(shapes) != 1:
        raise ValueError(f"a batch needs examples of one canvas size, got {sorted(shapes)}")
    return Batch(
        images=torch.from_numpy(np.stack([example.canvas for example in examples])),
        image_sizes=torch.tensor([tuple(example.size) for example in examples]),
        boxes=[torch.tensor(example.boxes) for example in examples],
        labels=[torch.tensor(example.labels) for example in examples],
    )


def transpose(batch: Batch) -> Batch:
    """Swap the axes of every image: canvases of 384 x 512 become 512 x 384."""
    return Batch(
        images=batch.images.transpose(1, 2).contiguous(),
        image_sizes=batch.image_sizes.flip(1),
        boxes=[boxes[:, [1, 0, 3, 2]] for boxes in batch.boxes],
        labels=batch.labels,
        counted=batch.counted,
        smallest_share=batch.smallest_share,
    )


class Key(NamedTuple):
    """A sample in an epoch; with the seed it determines the random state."""

    epoch: int
    sample: int
    progress: float = 0.0
    """Share of the schedule that is done before its batch."""


class CanvasBatchSampler(Sampler[list[Key]]):
    """Batches of equal canvas, in an order that depends on (seed, epoch) alone.

    A canvas's short last batch is left out, unless it is its only one: the images of a rare
    canvas would never be seen. `progress` gives the share of the schedule that is done after a
    number of epochs; 2.5 is the middle of the third.
    """

    def __init__(
        self,
        canvases: Sequence[Size],
        *,
        batch_size: int,
        seed: int = 0,
        progress: Callable[[float], float] = lambda epochs: 0.0,
    ) -> None:
        self._groups: dict[Size, list[int]] = {}
        for index, canvas in enumerate(canvases):
            self._groups.setdefault(canvas, []).append(index)
        self._batch_size = batch_size
        self._seed = seed
        self._progress = progress
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(len(self._cuts(len(group))) for group in self._groups.values())

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng([self._seed, self._epoch])
        epoch = self._epoch
        batches: list[list[int]] = []
        for group in self._groups.values():
            order = rng.permutation(group).tolist()
            batches += [order[cut] for cut in self._cuts(len(group))]
        for place, position in enumerate(rng.permutation(len(batches))):
            progress = self._progress(epoch + place / len(batches))
            yield [Key(epoch, sample, progress) for sample in batches[position]]

    def _cuts(self, count: int) -> list[slice]:
        size = self._batch_size
        cuts = [slice(first, first + size) for first in range(0, count, size)]
        short = count % size != 0
        return cuts[:-1] if short and len(cuts) > 1 else cuts


class TrainingBatches(TorchDataset[Batch]):
    """Augmented batches, indexed by the keys of a CanvasBatchSampler.

    For `DataLoader(batches, sampler=sampler, batch_size=None)`: a batch depends on its keys and
    the seed alone, so that any number of workers and a resumed run give the same ones. Of several
    `processes` that are given the same keys, each makes its share of the examples;
    together they make what one process would.
    """

    def __init__(
        self,
        cache: CanvasCache,
        augmentation: Augmentation,
        *,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._cache = cache
        self._augmentation = augmentation
        self._seed = seed
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, keys: Sequence[Key]) -> Batch:
        # The 1 keeps this stream apart from those of the samples, which have one number less.
        rng = np.random.default_rng([self._seed, keys[0].epoch, keys[0].sample, 1])
        transposed = rng.random() < self._augmentation.transpose
        canvas_scale = float(rng.choice(self._augmentation.canvas_scales))
        share = keys[self._rank :: self._processes]
        # A process without a share still takes part in the step, so it needs some image; one of
        # the batch leaves the statistics that batch norms share nearly as they are.
        spare = [keys[self._rank % len(keys)]]
        batch = collate([self.example(key, canvas_scale) for key in share or spare])
        batch.counted = bool(share)
        batch.smallest_share = max(1, len(keys) // self._processes)
        return transpose(batch) if transposed else batch

    def example(self, key: Key, canvas_scale: float = 1.0) -> Example:
        """Return one augmented example."""
        rng = np.random.default_rng([self._seed, key.epoch, key.sample])

        def other() -> Example:
            return self._cache[int(rng.integers(len(self._cache)))]

        return augment(
            self._cache[key.sample],
            self._augmentation,
            rng,
            others=other,
            progress=key.progress,
            canvas_scale=canvas_scale,
        )
