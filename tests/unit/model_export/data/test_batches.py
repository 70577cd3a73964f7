"""Canvases in memory, boxes that follow their pixels, batches that anybody can repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from model_export.data.augmentation import scaled_canvas
from model_export.data.batches import (
    Augmentation,
    Batch,
    CanvasBatchSampler,
    CanvasCache,
    Example,
    Key,
    TrainingBatches,
    augment,
    collate,
    transpose,
)
from model_export.data.datasets import Sample
from model_export.data.samples import CROWD
from service.errors import DataError
from service.imaging import decode as imaging
from service.imaging.canvas import Buckets, Size
from tests.unit.model_export.voc_folder import load_voc

BACKGROUND = 40
"""Not zero, so that padding is told from the image."""

COLOURS = ((255, 40, 40), (40, 255, 40), (40, 40, 255), (255, 255, 40))

CANVAS = Size(96, 128)

RULE = Buckets(sizes=(Size(64, 96), Size(96, 64)))


def drawn(
    size: Size,
    box: tuple[int, int, int, int] | None,
    *,
    canvas: Size = CANVAS,
    label: int = 0,
) -> Example:
    """A rectangle in its label's colour; `box` None for an image without objects."""
    pixels = np.zeros((*canvas, 3), dtype=np.uint8)
    pixels[: size.height, : size.width] = BACKGROUND
    if box is not None:
        pixels[box[1] : box[3], box[0] : box[2]] = COLOURS[label]
    rows = [] if box is None else [box]
    return Example(
        canvas=pixels,
        size=size,
        boxes=np.array(rows, dtype=np.float32).reshape(-1, 4),
        labels=np.full(len(rows), label, dtype=np.int64),
    )


def extent(canvas: NDArray[np.uint8], label: int) -> tuple[float, float, float, float] | None:
    """Where a colour of COLOURS is, to the pixel."""
    bright = canvas.astype(int) > (255 + BACKGROUND) / 2
    mask = (bright == (np.array(COLOURS[label]) == 255)).all(axis=2)
    if not mask.any():
        return None
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def no_others() -> Example:
    raise AssertionError("no mosaic was asked for")


def geometry(**changes: float | tuple[float, float]) -> Augmentation:
    """Augmentation without colour, and only what `changes` says."""
    return Augmentation.none().model_copy(update=changes)


@st.composite
def examples(draw: st.DrawFn, *, label: int = 0) -> Example:
    size = Size(draw(st.integers(24, 96)), draw(st.integers(24, 128)))
    x1 = draw(st.integers(0, size.width - 6))
    y1 = draw(st.integers(0, size.height - 6))
    x2 = draw(st.integers(x1 + 6, size.width))
    y2 = draw(st.integers(y1 + 6, size.height))
    return drawn(size, (x1, y1, x2, y2), label=label)


geometries = st.builds(
    lambda low, span, aspect, translate, horizontal, vertical: geometry(
        scale=(low, low * span),
        aspect=aspect,
        translate=translate,
        horizontal_flip=horizontal,
        vertical_flip=vertical,
        min_visible=0.05,
    ),
    st.floats(0.5, 1.6),
    st.floats(1, 1.5),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)


def check_padding(example: Example) -> None:
    height, width = example.size
    assert 1 <= height <= example.canvas.shape[0]
    assert 1 <= width <= example.canvas.shape[1]
    assert not example.canvas[height:].any()
    assert not example.canvas[:, width:].any()
    assert example.canvas[:height, :width].any(axis=2).all()


# --- augmentation --------------------------------------------------------------------------------


@given(example=examples(), augmentation=geometries, seed=st.integers(0, 2**32))
def test_boxes_follow_their_pixels(example: Example, augmentation: Augmentation, seed: int) -> None:
    before = example.canvas.copy()
    varied = augment(example, augmentation, np.random.default_rng(seed), others=no_others)
    assert np.array_equal(example.canvas, before)
    assert varied.canvas.shape == example.canvas.shape
    check_padding(varied)
    found = extent(varied.canvas, 0)
    if len(varied.boxes):
        assert varied.boxes.dtype == np.float32
        assert varied.labels.tolist() == [0]
        box = varied.boxes[0]
        assert (box >= 0).all()
        assert (box <= np.array([*varied.size[::-1]] * 2)).all()
        if (box[2:] - box[:2]).min() >= 2:
            assert found == pytest.approx(tuple(box), abs=1.0)
    elif found is not None:
        # Dropped: at most a sliver is left to see.
        area = (found[2] - found[0]) * (found[3] - found[1])
        x1, y1, x2, y2 = example.boxes[0]
        whole = (x2 - x1) * (y2 - y1) * (1.6 * 1.5) ** 2
        narrow = min(found[2] - found[0], found[3] - found[1]) <= 2
        assert narrow or area <= 0.05 * whole + found[2] - found[0] + found[3] - found[1]


@given(example=examples(), horizontal=st.booleans(), vertical=st.booleans())
def test_flips_are_exact(example: Example, horizontal: bool, vertical: bool) -> None:
    augmentation = geometry(horizontal_flip=float(horizontal), vertical_flip=float(vertical))
    flipped = augment(example, augmentation, np.random.default_rng(0), others=no_others)
    assert flipped.size == example.size
    assert extent(flipped.canvas, 0) == tuple(flipped.boxes[0])
    again = augment(flipped, augmentation, np.random.default_rng(0), others=no_others)
    assert np.array_equal(again.canvas, example.canvas)
    assert np.array_equal(again.boxes, example.boxes)


def test_a_flip_by_hand() -> None:
    example = drawn(Size(50, 80), (10, 5, 30, 20))
    both = geometry(horizontal_flip=1, vertical_flip=1)
    flipped = augment(example, both, np.random.default_rng(0), others=no_others)
    assert flipped.boxes.tolist() == [[50, 30, 70, 45]]


def test_zooming_out_shrinks_the_image_by_the_factor() -> None:
    example = drawn(Size(96, 128), (32, 24, 64, 48))
    half = geometry(scale=(0.5, 0.5))
    shrunk = augment(example, half, np.random.default_rng(0), others=no_others)
    assert shrunk.size == Size(48, 64)
    assert shrunk.boxes.tolist() == [[16, 12, 32, 24]]


def test_zooming_in_keeps_the_size_and_enlarges_the_objects() -> None:
    example = drawn(Size(96, 128), (56, 40, 72, 56))
    double = geometry(scale=(2.0, 2.0))
    for seed in range(20):
        enlarged = augment(example, double, np.random.default_rng(seed), others=no_others)
        assert enlarged.size == example.size
        for box in enlarged.boxes:
            inside = box[0] > 0 and box[1] > 0 and box[2] < 128 and box[3] < 96
            assert not inside or (box[2:] - box[:2]).tolist() == pytest.approx([32, 32])


@pytest.mark.parametrize(("min_visible", "kept"), [(0.51, 0), (0.01, 1)])
def test_a_box_is_dropped_when_too_little_of_it_stays(min_visible: float, kept: int) -> None:
    # The window is half as high as the box: at most half of it is ever seen, and always some.
    example = drawn(Size(96, 128), (32, 0, 96, 96))
    augmentation = geometry(scale=(2.0, 2.0), min_visible=min_visible)
    for seed in range(10):
        varied = augment(example, augmentation, np.random.default_rng(seed), others=no_others)
        assert len(varied.boxes) == len(varied.labels) == kept


def test_without_augmentation_a_image_stays_as_it_is() -> None:
    example = drawn(Size(50, 80), (10, 5, 30, 20))
    same = augment(example, Augmentation.none(), np.random.default_rng(0), others=no_others)
    assert np.array_equal(same.canvas, example.canvas)
    assert np.array_equal(same.boxes, example.boxes)
    assert same.size == example.size


@given(seed=st.integers(0, 2**32), height=st.integers(1, 96), width=st.integers(1, 128))
def test_images_without_objects_and_of_any_size_pass(seed: int, height: int, width: int) -> None:
    wild = Augmentation(scale=(0.3, 3.0), aspect=1.0, translate=0.5, vertical_flip=0.5, mosaic=0.5)
    example = drawn(Size(height, width), None)
    varied = augment(example, wild, np.random.default_rng(seed), others=lambda: example)
    check_padding(varied)
    assert varied.boxes.shape == (0, 4)
    assert varied.boxes.dtype == np.float32
    assert varied.labels.shape == (0,)
    assert varied.labels.dtype == np.int64


# --- mosaic --------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(
    tiles=st.tuples(*(examples(label=label) for label in range(4))),
    augmentation=geometries,
    canvas_scale=st.sampled_from([1.0, 0.75, 1.5]),
    seed=st.integers(0, 2**32),
)
def test_a_mosaic_holds_four_images_and_their_boxes(
    tiles: tuple[Example, Example, Example, Example],
    augmentation: Augmentation,
    canvas_scale: float,
    seed: int,
) -> None:
    others = iter(tiles[1:])
    mosaic = augment(
        tiles[0],
        augmentation.model_copy(update={"mosaic": 1.0}),
        np.random.default_rng(seed),
        others=lambda: next(others),
        canvas_scale=canvas_scale,
    )
    assert next(others, None) is None
    assert mosaic.canvas.shape[:2] == scaled_canvas(CANVAS, canvas_scale)
    check_padding(mosaic)
    assert len(mosaic.boxes) == len(mosaic.labels)
    assert (mosaic.boxes >= 0).all()
    assert (mosaic.boxes <= np.array([*mosaic.size[::-1]] * 2)).all()
    for box, label in zip(mosaic.boxes, mosaic.labels.tolist(), strict=True):
        if (box[2:] - box[:2]).min() >= 3:
            assert extent(mosaic.canvas, label) == pytest.approx(tuple(box), abs=1.0)


def test_mosaics_vary_in_centre_and_scale() -> None:
    tiles = [drawn(Size(96, 128), (0, 0, 128, 96), label=label) for label in range(4)]
    corners, scales = set(), set()
    for seed in range(30):
        others = iter(tiles[1:])
        mosaic = augment(
            tiles[0],
            geometry(mosaic=1.0, min_visible=0.01),
            np.random.default_rng(seed),
            others=lambda: next(others),  # noqa: B023 - at once
        )
        assert mosaic.size == Size(96, 128)
        assert mosaic.labels.tolist() == [0, 1, 2, 3]
        x, y = mosaic.boxes[0, 2:].tolist()
        # Every image fills its part, which begins and ends at the same centre.
        assert mosaic.boxes.tolist() == [
            [0, 0, x, y], [x, 0, 128, y], [0, y, x, 96], [x, y, 128, 96],
        ]  # fmt: skip
        assert 32 <= x <= 96
        assert 24 <= y <= 72
        corners.add((x, y))
    assert len(corners) > 20
    small = drawn(Size(96, 128), (56, 40, 72, 56))
    for seed in range(30):
        mosaic = augment(
            small,
            geometry(mosaic=1.0, min_visible=1.0),
            np.random.default_rng(seed),
            others=lambda: small,
        )
        scales |= {float(box[2] - box[0]) / 16 for box in mosaic.boxes}
    assert 0.25 <= min(scales) < 0.5
    assert 0.75 < max(scales) <= 1.001


def test_a_mosaic_drops_boxes_by_the_share_that_is_left_of_the_whole_object() -> None:
    """Cut by the mosaic and by the zoom, 60 % of 60 % are left: less than half."""
    ramp = np.zeros((96, 128, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 128)
    ramp[..., 1] = np.linspace(0, 255, 96)[:, None]
    whole = Example(
        ramp, Size(96, 128), np.array([[0, 0, 128, 96]], np.float32), np.zeros(1, np.int64)
    )
    augmentation = geometry(mosaic=1.0, scale=(0.8, 1.5), translate=0.2, min_visible=0.5)
    kept = 0
    for seed in range(300):
        varied = augment(whole, augmentation, np.random.default_rng(seed), others=lambda: whole)
        for x1, y1, x2, y2 in varied.boxes.round().astype(int):
            # The colours say which part of the object it is.
            seen = varied.canvas[y1:y2, x1:x2, :2].astype(float) / 255
            share = float(np.ptp(seen[..., 0], axis=None) * np.ptp(seen[..., 1], axis=None))
            assert share > 0.45
            kept += 1
    assert kept > 20


@pytest.mark.parametrize(("label", "kept"), [(0, 0), (CROWD, 4)])
def test_what_a_mosaic_cuts_of_a_crowd_stays(label: int, kept: int) -> None:
    region = drawn(Size(96, 128), (0, 0, 128, 96))
    region.labels[:] = label
    augmentation = geometry(mosaic=1.0, min_visible=1.0)
    mosaic = augment(region, augmentation, np.random.default_rng(0), others=lambda: region)
    assert mosaic.labels.tolist() == [label] * kept


def test_mosaics_of_other_canvases_and_of_images_without_objects() -> None:
    first = drawn(Size(96, 128), None)
    tiles = [
        drawn(Size(128, 60), (0, 0, 60, 128), canvas=Size(128, 96), label=1),
        drawn(Size(5, 128), (0, 0, 128, 5), label=2),
        drawn(Size(1, 1), None, canvas=Size(32, 32)),
    ]
    for seed in range(20):
        others = iter(tiles)
        mosaic = augment(
            first,
            geometry(mosaic=1.0, min_visible=0.001),
            np.random.default_rng(seed),
            others=lambda: next(others),  # noqa: B023 - at once
        )
        assert mosaic.canvas.shape == first.canvas.shape
        check_padding(mosaic)
        assert mosaic.labels.tolist() == [1, 2]
        for box, label in zip(mosaic.boxes, (1, 2), strict=True):
            assert extent(mosaic.canvas, label) == pytest.approx(tuple(box), abs=1.0)


@pytest.mark.parametrize(
    ("until", "progress", "made"),
    [(0.8, 0.0, True), (0.8, 0.79, True), (0.8, 0.8, False), (0.8, 1.0, False), (0, 0.0, False)],
)
def test_mosaics_end_early_and_nothing_else_changes(
    until: float, progress: float, made: bool
) -> None:
    example = drawn(Size(96, 128), (10, 20, 90, 80))
    asked = 0

    def other() -> Example:
        nonlocal asked
        asked += 1
        return example

    def varied(**changes: float) -> Example:
        augmentation = Augmentation(**changes)
        rng = np.random.default_rng(5)
        return augment(example, augmentation, rng, others=other, progress=progress)

    late = varied(mosaic=1.0, mosaic_until=until)
    assert asked == (3 if made else 0)
    without = varied(mosaic=0.0)
    assert np.array_equal(late.canvas, without.canvas) is not made
    assert (late.boxes.tolist() == without.boxes.tolist()) is not made


# --- canvas scales -------------------------------------------------------------------------------


@given(
    example=examples(),
    augmentation=geometries,
    factor=st.floats(0.25, 4),
    seed=st.integers(0, 2**32),
)
def test_boxes_follow_their_pixels_to_another_canvas(
    example: Example, augmentation: Augmentation, factor: float, seed: int
) -> None:
    varied = augment(
        example,
        augmentation,
        np.random.default_rng(seed),
        others=no_others,
        canvas_scale=factor,
    )
    canvas = Size(*varied.canvas.shape[:2])
    for side, before in zip(canvas, CANVAS, strict=True):
        assert side % 32 == 0
        assert abs(side - before * factor) <= 16
    check_padding(varied)
    assert (varied.boxes >= 0).all()
    assert (varied.boxes <= np.array([*varied.size[::-1]] * 2)).all()
    for box in varied.boxes:
        # An enlarged edge is blurred over as many pixels.
        if (box[2:] - box[:2]).min() >= 3:
            assert extent(varied.canvas, 0) == pytest.approx(tuple(box), abs=max(1.0, factor))


def test_a_canvas_of_twice_the_sides_by_hand() -> None:
    example = drawn(Size(50, 80), (10, 5, 30, 20))
    doubled = augment(
        example, geometry(), np.random.default_rng(0), others=no_others, canvas_scale=2.0
    )
    assert doubled.canvas.shape == (192, 256, 3)
    assert doubled.size == Size(100, 160)
    assert doubled.boxes.tolist() == [[20, 10, 60, 40]]


# --- colour --------------------------------------------------------------------------------------


def colour(**changes: float) -> Augmentation:
    return Augmentation.none().model_copy(update=changes)


def jittered(pixel: tuple[int, int, int], augmentation: Augmentation, seed: int) -> list[int]:
    """One pixel of an evenly coloured image after colour jitter; its padding stays zero."""
    canvas = np.zeros((32, 64, 3), dtype=np.uint8)
    canvas[:20, :50] = pixel
    example = Example(canvas, Size(20, 50), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    varied = augment(example, augmentation, np.random.default_rng(seed), others=no_others)
    assert not varied.canvas[20:].any()
    assert not varied.canvas[:, 50:].any()
    pixels = varied.canvas[:20, :50].reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return [int(value) for value in pixels[0]]


@given(seed=st.integers(0, 2**32), grey=st.integers(1, 255))
def test_hue_and_saturation_leave_grey_alone(seed: int, grey: int) -> None:
    augmentation = colour(hue=0.5, saturation=1.0, contrast=0.9)
    assert jittered((grey, grey, grey), augmentation, seed) == pytest.approx([grey] * 3, abs=1)


@given(seed=st.integers(0, 2**32))
def test_brightness_scales_all_channels_alike_within_its_range(seed: int) -> None:
    red, green, blue = jittered((200, 100, 50), colour(brightness=0.25), seed)
    assert 149 <= red <= 250
    assert (green, blue) == pytest.approx((red / 2, red / 4), abs=1)


@given(seed=st.integers(0, 2**32))
def test_an_even_grey_has_no_contrast_at_any_brightness(seed: int) -> None:
    grey = (120, 120, 120)
    both = jittered(grey, colour(brightness=0.5, contrast=0.9), seed)
    assert both == pytest.approx(jittered(grey, colour(brightness=0.5), seed), abs=1)


@given(seed=st.integers(0, 2**32))
def test_hue_turns_colours_and_keeps_their_mean(seed: int) -> None:
    varied = jittered((130, 110, 90), colour(hue=0.5), seed)
    assert sum(varied) / 3 == pytest.approx(110, abs=1)


def test_the_jitter_is_not_idle() -> None:
    for name in ("brightness", "saturation", "hue"):
        assert jittered((200, 100, 50), colour(**{name: 0.3}), 1) != [200, 100, 50], name


def test_contrast_spreads_about_the_mean() -> None:
    canvas = np.full((32, 32, 3), 100, dtype=np.uint8)
    canvas[:, 16:] = 140
    example = Example(canvas, Size(32, 32), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    spreads = set()
    for seed in range(10):
        varied = augment(
            example, colour(contrast=0.5), np.random.default_rng(seed), others=no_others
        )
        low, high = varied.canvas[0, 0, 0], varied.canvas[0, 31, 0]
        assert (int(low) + int(high)) / 2 == pytest.approx(120, abs=1)
        spreads.add(int(high) - int(low))
    assert min(spreads) < 40 < max(spreads)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (1.2, 0.8)),
        ("scale", (0.0, 1.0)),
        ("horizontal_flip", 1.5),
        ("brightness", 1.0),
        ("mosaic_until", 1.1),
        ("canvas_scales", ()),
        ("canvas_scales", (1.0, 0.0)),
        ("canvas_scales", (5.0,)),
        ("canvas_scales", (float("nan"),)),
        ("min_visible", 0.0),
        ("zoom", 2.0),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Augmentation.model_validate({field: value})


def test_settings_survive_json() -> None:
    augmentation = Augmentation(scale=(0.5, 2.0), mosaic=0.25, canvas_scales=(0.75, 1.0))
    assert Augmentation.model_validate_json(augmentation.model_dump_json()) == augmentation


# --- cache ---------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Ten images on two canvases, each of its own colour and with one box."""
    found = []
    for number in range(10):
        width, height = (120, 80) if number % 3 else (80, 120)
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (width, height), (20 * number + 20, 100, 50)).save(path)
        box = np.array([[10, 10, 40 + number, 50]], dtype=np.float32)
        found.append(Sample(path, Size(height, width), box, np.array([number % 2])))
    return found


def test_the_cache_holds_what_the_service_would_see(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    assert len(cache) == 10
    assert cache.canvases[:2] == (Size(96, 64), Size(64, 96))
    for sample, example in zip(samples, cache, strict=True):
        prepared = imaging.prepare(sample.path.read_bytes(), RULE)
        assert np.array_equal(example.canvas, prepared.canvas)
        assert example.size == prepared.letterbox.resized
        assert example.labels.tolist() == sample.labels.tolist()
        assert np.allclose(prepared.letterbox.to_original(example.boxes), sample.boxes, atol=1e-4)
    # 120 x 80 fits 96 x 64 exactly, by 0.8.
    assert cache[1].boxes.tolist() == [pytest.approx([8, 8, 32.8, 40])]


@pytest.mark.parametrize(("images", "on_demand"), [(0, 10), (0.99, 10), (4, 6), (10, 0)])
def test_what_exceeds_the_budget_is_decoded_on_demand(
    samples: list[Sample], images: float, on_demand: int
) -> None:
    whole = CanvasCache(samples, RULE, progress=False)
    canvas_bytes = 64 * 96 * 3
    partial = CanvasCache(samples, RULE, memory_bytes=int(images * canvas_bytes), progress=False)
    assert sum(partial[index] is not partial[index] for index in range(10)) == on_demand
    for one, other in zip(whole, partial, strict=True):
        assert np.array_equal(one.canvas, other.canvas)
        assert np.array_equal(one.boxes, other.boxes)


def test_indices_beyond_the_samples_are_refused(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    assert cache[-1] is cache[9]
    with pytest.raises(IndexError):
        cache[10]


def test_canvases_cannot_be_written_to(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    with pytest.raises(ValueError, match="read-only"):
        cache[0].canvas[0, 0] = 1


def test_images_that_do_not_decode_are_all_named(samples: list[Sample]) -> None:
    for number in (2, 7):
        whole = samples[number].path.read_bytes()
        samples[number].path.write_bytes(whole[: len(whole) - 30])
    samples[5].path.unlink()
    for memory_bytes in (0, 1 << 30):
        with pytest.raises(DataError) as caught:
            CanvasCache(samples, RULE, memory_bytes=memory_bytes, progress=False)
        message = str(caught.value)
        for number in (2, 5, 7):
            assert str(samples[number].path) in message
        assert str(samples[3].path) not in message


def test_of_many_undecodable_images_twenty_are_named(samples: list[Sample]) -> None:
    samples[0].path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        CanvasCache(samples[:1] * 25, RULE, progress=False)
    assert str(caught.value).count("0.png") == 20
    assert str(caught.value).endswith("... and 5 more")


def test_a_image_that_vanishes_later_is_named(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, memory_bytes=0, progress=False)
    samples[4].path.unlink()
    with pytest.raises(DataError, match=r"4\.png"):
        cache[4]


def test_an_empty_cache_is_possible() -> None:
    assert len(CanvasCache([], RULE, progress=False)) == 0


# --- batches -------------------------------------------------------------------------------------


def test_collated_shapes_and_types() -> None:
    batch = collate([drawn(Size(50, 80), (1, 2, 30, 40)), drawn(Size(96, 100), None)])
    assert len(batch) == 2
    assert (batch.images.shape, batch.images.dtype) == ((2, 96, 128, 3), torch.uint8)
    assert batch.image_sizes.dtype == torch.int64
    assert batch.image_sizes.tolist() == [[50, 80], [96, 100]]
    assert [boxes.shape for boxes in batch.boxes] == [(1, 4), (0, 4)]
    assert {boxes.dtype for boxes in batch.boxes} == {torch.float32}
    assert [labels.tolist() for labels in batch.labels] == [[0], []]
    assert {labels.dtype for labels in batch.labels} == {torch.int64}


def test_only_equal_canvases_share_a_batch() -> None:
    with pytest.raises(ValueError, match="one canvas size"):
        collate([drawn(Size(32, 32), None), drawn(Size(32, 32), None, canvas=Size(64, 64))])
    with pytest.raises(ValueError, match="one canvas size"):
        collate([])


@given(example=examples())
def test_the_transpose_swaps_pixels_and_boxes(example: Example) -> None:
    batch = collate([example, drawn(Size(30, 40), None)])
    swapped = transpose(batch)
    assert swapped.images.shape == (2, 128, 96, 3)
    assert swapped.images.is_contiguous()
    assert swapped.image_sizes.tolist() == [[*example.size[::-1]], [40, 30]]
    assert extent(swapped.images[0].numpy(), 0) == tuple(swapped.boxes[0][0].tolist())
    again = transpose(swapped)
    assert torch.equal(again.images, batch.images)
    assert torch.equal(again.boxes[0], batch.boxes[0])
    assert torch.equal(again.image_sizes, batch.image_sizes)


def test_a_batch_moves_as_a_whole() -> None:
    moved = collate([drawn(Size(50, 80), (1, 2, 30, 40))]).to("meta", non_blocking=True)
    tensors = [moved.images, moved.image_sizes, *moved.boxes, *moved.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.gpu
def test_a_batch_is_pinned_as_a_whole() -> None:
    pinned = collate([drawn(Size(50, 80), (1, 2, 30, 40))]).pin_memory()
    assert all(
        tensor.is_pinned()
        for tensor in [pinned.images, pinned.image_sizes, *pinned.boxes, *pinned.labels]
    )


CANVASES = st.lists(st.sampled_from([Size(64, 96), Size(96, 64), Size(64, 64)]), max_size=40)


@given(
    canvases=CANVASES,
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_batches_have_one_canvas_and_every_sample_once(
    canvases: list[Size], batch_size: int, seed: int
) -> None:
    sampler = CanvasBatchSampler(canvases, batch_size=batch_size, seed=seed)
    sampler.set_epoch(3)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    seen = [key.sample for batch in batches for key in batch]
    assert len(seen) == len(set(seen))
    assert {key.epoch for batch in batches for key in batch} <= {3}
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({canvases[key.sample] for key in batch}) == 1
    # No canvas is left out, and of each at most a short batch.
    assert {canvases[sample] for sample in seen} == set(canvases)
    for canvas in set(canvases):
        left_out = canvases.count(canvas) - sum(canvases[sample] == canvas for sample in seen)
        assert left_out < batch_size


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = CanvasBatchSampler([Size(64, 64)] * 40, batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return [[key.sample for key in batch] for batch in sampler]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_keys_know_how_much_of_the_schedule_is_done() -> None:
    sampler = CanvasBatchSampler(
        [Size(64, 64)] * 8, batch_size=2, progress=lambda epochs: epochs / 10
    )
    sampler.set_epoch(3)
    done = [[key.progress for key in batch] for batch in sampler]
    assert done == [[0.3] * 2, [0.325] * 2, [0.35] * 2, [0.375] * 2]


def equal(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.image_sizes, other.image_sizes)
        and all(map(torch.equal, one.boxes, other.boxes))
        and all(map(torch.equal, one.labels, other.labels))
    )


def test_any_number_of_workers_gives_the_same_batches(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    augmentation = Augmentation(
        mosaic=0.5, mosaic_until=0.5, transpose=0.5, canvas_scales=(0.75, 1.0, 1.5)
    )
    batches = TrainingBatches(cache, augmentation, seed=7)

    def epoch(number: int, workers: int) -> list[Batch]:
        sampler = CanvasBatchSampler(
            cache.canvases, batch_size=2, seed=7, progress=lambda epochs: epochs / 9
        )
        sampler.set_epoch(number)
        return list(DataLoader(batches, sampler=sampler, batch_size=None, num_workers=workers))

    alone = epoch(4, 0)
    assert len(alone) == 5
    assert all(map(equal, alone, epoch(4, 2)))
    assert not all(map(equal, alone, epoch(5, 0)))


@pytest.mark.parametrize("count", [3, 2, 1])
def test_shares_of_a_batch_make_the_whole(samples: list[Sample], count: int) -> None:
    """Also its transpose and its canvas are those of the whole; a process without a share gets an
    image that does not count."""
    cache = CanvasCache(samples, RULE, progress=False)
    augmentation = Augmentation(mosaic=0.5, transpose=0.5, canvas_scales=(1.0, 1.5))

    def batches(**place: int) -> TrainingBatches:
        return TrainingBatches(cache, augmentation, seed=3, **place)

    wide = [index for index, canvas in enumerate(cache.canvases) if canvas.width > canvas.height]
    transposed = 0
    for epoch in range(6):
        keys = [Key(epoch, sample) for sample in wide[:count]]
        whole = batches()[keys]
        transposed += whole.images.shape[1] > whole.images.shape[2]
        shares = [batches(rank=rank, processes=2)[keys] for rank in range(2)]
        assert [share.counted for share in shares] == [True, count > 1]
        assert {share.smallest_share for share in shares} == {1}
        for index in range(count):
            share, place = shares[index % 2], index // 2
            assert torch.equal(share.images[place], whole.images[index])
            assert torch.equal(share.boxes[place], whole.boxes[index])
            assert torch.equal(share.labels[place], whole.labels[index])
        assert all(len(share) for share in shares)
    assert 0 < transposed < 6


@pytest.mark.parametrize(
    ("parts", "smallest", "sizes"),
    [(1, None, [5]), (2, None, [2, 3]), (9, None, [1] * 5), (3, 2, [2, 3]), (3, 4, [1, 2, 2])],
)
def test_parts_are_as_many_on_every_process(
    samples: list[Sample], parts: int, smallest: int | None, sizes: list[int]
) -> None:
    cache = CanvasCache(samples[:1], RULE, progress=False)
    batch = collate([cache[0]] * 5)
    batch.smallest_share = smallest
    cut = batch.split(parts)
    assert [len(part) for part in cut] == sizes
    assert [len(part.boxes) for part in cut] == sizes
    assert torch.equal(torch.cat([part.images for part in cut]), batch.images)


def test_a_sample_is_varied_anew_in_every_epoch(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    batches = TrainingBatches(cache, Augmentation(), seed=0)
    sizes = {batches.example(Key(epoch, 1)).size for epoch in range(8)}
    assert len(sizes) > 4
    other_seed = TrainingBatches(cache, Augmentation(), seed=1)
    assert not np.array_equal(
        batches.example(Key(0, 1)).canvas, other_seed.example(Key(0, 1)).canvas
    )


def test_whole_batches_are_transposed_as_often_as_asked(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)

    def wide(probability: float) -> int:
        augmentation = Augmentation.none().model_copy(update={"transpose": probability})
        batches = TrainingBatches(cache, augmentation, seed=0)
        pairs = [[Key(epoch, 1), Key(epoch, 2)] for epoch in range(60)]
        return sum(batches[pair].images.shape[2] == 96 for pair in pairs)

    assert len(TrainingBatches(cache, Augmentation(), seed=0)) == 10
    assert (wide(0), wide(1)) == (60, 0)
    assert 15 <= wide(0.5) <= 45


def test_every_batch_draws_a_canvas_scale(samples: list[Sample]) -> None:
    cache = CanvasCache(samples, RULE, progress=False)
    augmentation = geometry().model_copy(update={"canvas_scales": (0.75, 1.0, 1.5)})
    batches = TrainingBatches(cache, augmentation, seed=0)
    drawn_sizes = [
        Size(*batches[[Key(epoch, 1), Key(epoch, 2)]].images.shape[1:3]) for epoch in range(60)
    ]
    # Of 64 x 96; 48 and 72 are rounded to multiples of 32.
    counts = {size: drawn_sizes.count(size) for size in set(drawn_sizes)}
    assert counts.keys() == {Size(64, 64), Size(64, 96), Size(96, 128)}
    assert min(counts.values()) >= 10


def test_real_images_end_to_end(bccd: Path) -> None:
    dataset = load_voc(bccd, "val")
    rule = Buckets(sizes=(Size(192, 256), Size(256, 192)))
    cache = CanvasCache(dataset.samples[:12], rule, progress=False)
    augmentation = Augmentation(mosaic=0.3, transpose=0.5, canvas_scales=(0.75, 1.25))
    batches = TrainingBatches(cache, augmentation, seed=0)
    sampler = CanvasBatchSampler(cache.canvases, batch_size=4)
    objects = 0
    for keys in sampler:
        batch = batches[keys]
        assert len(batch) == 4
        for boxes, labels, size in zip(batch.boxes, batch.labels, batch.image_sizes, strict=True):
            height, width = size.tolist()
            limit = torch.tensor([width, height, width, height])
            assert ((boxes >= 0) & (boxes <= limit)).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert ((labels >= 0) & (labels < 3)).all()
            objects += len(boxes)
    assert objects > 60
