"""Tiles: where they lie, what their borders cut, and one answer out of many views."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.engine import tiling
from service.engine.postprocessing import Selection, resolve, select
from service.engine.tiling import Plan, Tile, View, parse_tile, plan, starts
from service.errors import InvalidParameter, TooLarge
from service.imaging.canvas import Buckets, ShortSide, Size
from service.imaging.decode import cut, open_image, prepare
from service.runtime.artifact import Metadata, Thresholds
from service.runtime.detector import Detections
from tests.images import encoded, noise

RULE = Buckets(sizes=(Size(384, 512), Size(512, 384), Size(448, 448)))
TORCHVISION = ShortSide(short=800, long=1333)
CLASSES = ("a", "b")


def selection(
    classes: int = 2, *, score: float = 0.3, iou: float = 0.5, most: int | None = None
) -> Selection:
    metadata = Metadata(
        name="tiles",
        classes=tuple(f"class {i}" for i in range(classes)),
        canvas=RULE,
        thresholds=Thresholds(score=0.5),
    )
    return resolve(metadata, score_threshold=score, iou_threshold=iou, max_detections=most)


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    """x1, y1, x2, y2, score, label."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections(
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.float32),
        table[:, 5].astype(np.int64),
    )


@pytest.mark.parametrize(
    ("side", "tile", "begins"),
    [
        (300, 400, (0,)),
        (400, 400, (0,)),
        (401, 400, (0, 1)),
        # 300 further on at most: 700 is reached by two, 701 takes a third, spread evenly.
        (700, 400, (0, 300)),
        (701, 400, (0, 150, 301)),
        (1000, 400, (0, 300, 600)),
    ],
)
def test_tile_offsets_are_even(side: int, tile: int, begins: tuple[int, ...]) -> None:
    assert starts(side, tile) == begins


@given(st.integers(1, 70_000), st.integers(32, 4096))
def test_tiles_cover_the_side_and_overlap(side: int, tile: int) -> None:
    begins = starts(side, tile)
    assert begins[0] == 0
    assert begins[-1] == max(0, side - tile), "shifted inwards: nothing to pad"
    steps = np.diff(begins)
    assert (steps >= 1).all()
    assert (tile - steps >= tile / 4).all()


@pytest.mark.parametrize(
    ("size", "tile", "count"),
    [
        # No more than twice as large as a canvas: as a whole.
        ((1, 1), "auto", 1),
        ((300, 400), "auto", 1),
        ((768, 1024), "auto", 1),
        ((896, 896), "auto", 1),
        # 1026 > 2 * 512. Columns begin 384 apart, rows 288 apart: 3 x 3 lying, and the whole;
        # standing 2 rows of 4; 448 x 448 is 336 apart: 2 rows of 3 tiles, the fewest.
        ((769, 1026), "auto", 7),
        ((769, 1026), "off", 1),
        # 5000 wide: 1 row of 13 lying tiles, also where the image is lower than a tile.
        ((100, 5000), "auto", 14),
        # A tile is as long as the image, so it is the whole image.
        ((600, 800), 800, 1),
        ((600, 800), 65535, 1),
        # Lying tiles of 400 x 300, 300 and 225 apart: 3 x 3; standing 4 x 2; 400 x 400: 3 x 2.
        ((600, 800), 400, 7),
    ],
)
def test_tiling_counts_tiles_and_the_whole(size: tuple[int, int], tile: Tile, count: int) -> None:
    assert plan(Size(*size), RULE, tile).count == count


def test_tiling_accepts_a_4k_frame() -> None:
    bundled = Buckets(sizes=(Size(480, 640), Size(640, 480), Size(544, 544)))
    chosen = plan(Size(2160, 3840), bundled, "auto")
    # Lying 8 x 6, standing 11 x 5, square 10 x 5.
    assert chosen.count == 8 * 6 + 1 <= tiling.MAX_VIEWS
    assert chosen.tile.canvas == (480, 640)


rules = st.sampled_from([RULE, TORCHVISION, Buckets(sizes=(Size(96, 128),))])
tiles = st.one_of(st.just("auto"), st.integers(tiling.MIN_TILE, 3000))


@settings(max_examples=60)
@given(st.integers(1, 6000), st.integers(1, 6000), rules, tiles)
def test_tiles_fit_their_canvas_and_cover_the_image(
    height: int, width: int, rule: Buckets | ShortSide, tile: Tile
) -> None:
    image = Size(height, width)
    chosen = plan(image, rule, tile)
    views = chosen.views
    assert len(views) == chosen.count
    assert views[-1] == ((0, 0), rule.fit(image))
    for (x, y), placed in views:
        assert 0 <= x <= x + placed.original.width <= width
        assert 0 <= y <= y + placed.original.height <= height
        assert placed.resized.height <= placed.canvas.height
        assert placed.resized.width <= placed.canvas.width
        assert min(placed.resized) >= 1
    assert len({view.letterbox.canvas for view in views[:-1]}) <= 1, "tiles share batches"
    if tile == "auto":
        assert all(view.letterbox.resized == view.letterbox.original for view in views[:-1])
    if chosen.count > 1:
        # Rows times columns: covering each side is covering the image.
        far = views[-2]
        assert far.corner[0] + far.letterbox.original.width == width
        assert far.corner[1] + far.letterbox.original.height == height


@settings(max_examples=60)
@given(st.integers(1, 30_000), st.integers(1, 30_000), rules, tiles, st.integers(1, 200))
def test_tiling_refusal_names_a_fitting_size(
    height: int, width: int, rule: Buckets | ShortSide, tile: Tile, limit: int
) -> None:
    try:
        chosen = plan(Size(height, width), rule, tile, limit=limit)
    except TooLarge as error:
        text = str(error)
        assert f"{width} x {height}" in text
        assert f"at most {limit} " in text
        named = int(text.rpartition("tile=")[2])
        assert plan(Size(height, width), rule, named, limit=limit).count <= limit
    else:
        assert chosen.count <= limit


@pytest.mark.parametrize("size", [Size(1, 50_000_000), Size(50_000_000, 1), Size(10**9, 10**9)])
@pytest.mark.parametrize("tile", ["auto", 32])
def test_tiling_counts_without_cutting(size: Size, tile: Tile) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a grid was made to be counted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "starts", refuse)
        with pytest.raises(TooLarge, match=r"at most 128 are accepted: send a smaller image$"):
            plan(size, RULE, tile, limit=128)


@given(st.integers(1, 5000), st.integers(1, 700))
def test_tiling_count_equals_the_grid(side: int, tile: int) -> None:
    assert tiling._number(side, tile) == len(tiling.starts(side, tile))


@pytest.mark.parametrize(("text", "tile"), [("off", "off"), ("auto", "auto"), ("640", 640)])
def test_tile_parameter_accepts_valid_values(text: str, tile: Tile) -> None:
    assert parse_tile(text) == tile


@pytest.mark.parametrize(
    "text", ["", "foo", "0", "31", "65536", "-640", "6.4", "640x480", "²⁰⁰", "9" * 5000, "Auto"]
)
def test_tile_parameter_rejects_invalid_values(text: str) -> None:
    with pytest.raises(InvalidParameter, match="32 to 65535"):
        parse_tile(text)


def test_tile_keeps_the_pixels_of_the_image() -> None:
    image = noise((1400, 1100))
    pixels = np.asarray(image)
    views = plan(Size(1100, 1400), RULE, "auto").views[:-1]
    assert len(views) > 4
    for (x, y), placed in views:
        made = cut(image, (x, y), placed)
        height, width = placed.original
        assert (made.canvas == pixels[y : y + height, x : x + width]).all()


def test_tile_of_a_low_image_is_padded() -> None:
    image = noise((1400, 100))
    (x, y), placed = plan(Size(100, 1400), RULE, "auto").views[1]
    made = cut(image, (x, y), placed)
    assert made.canvas.shape == (384, 512, 3)
    assert (made.canvas[:100] == np.asarray(image)[:, x : x + 512]).all()
    assert not made.canvas[100:].any()


def test_tile_of_another_size_is_scaled() -> None:
    image = Image.new("RGB", (1000, 1000))
    image.paste("white", (500, 500, 1000, 1000))
    chosen = plan(Size(1000, 1000), RULE, 640)
    assert chosen.tile.original == (640, 640)
    assert chosen.tile.canvas == chosen.tile.resized == (448, 448)
    made = cut(image, (360, 360), chosen.tile)
    # The white begins 140 of 640 pixels into the tile: 98 of 448.
    assert made.canvas[:96].max() == 0
    assert made.canvas[100:, 100:].min() == 255


def test_tiling_of_one_canvas_equals_no_tiling() -> None:
    data = encoded(noise((700, 500)), "JPEG")
    opened = open_image(data)
    canvases = tiling.lay_out(opened, plan(opened.size, RULE, "auto"), RULE)
    (made,) = (make() for make in canvases.makers)
    plain = prepare(data, RULE)
    assert made.letterbox == plain.letterbox
    assert (made.canvas == plain.canvas).all()
    raw = detections((10, 10, 90, 90, 0.9, 0), (12, 10, 90, 90, 0.8, 0), (5, 5, 5, 9, 0.7, 1))
    merged, plainly = (
        function(*arguments, selection(most=1))  # type: ignore[operator]
        for function, arguments in (
            (tiling.merge, (canvases.plan, [raw])),
            (select, (raw, plain.letterbox)),
        )
    )
    assert merged.boxes.tolist() == plainly.boxes.tolist()


def guaranteed(chosen: Plan) -> tuple[int, int]:
    """(x, y): how large an object may be and still lie uncut in some tile, by the grid's rule."""
    height, width = chosen.tile.original
    x, y = chosen.tile.ratios
    return int(width / 4 - 16 / x), int(height / 4 - 16 / y)


def seen(
    chosen: Plan, objects: NDArray[np.float64], scores: NDArray[np.float64]
) -> list[Detections]:
    """A perfect detector: of every object that a view shows, the part that it shows."""
    found = []
    for (x, y), placed in chosen.views:
        height, width = placed.original
        low = np.clip(objects[:, :2] - (x, y), 0, (width, height))
        high = np.clip(objects[:, 2:] - (x, y), 0, (width, height))
        visible = ((high - low) >= 1).all(axis=1)
        boxes = placed.to_canvas(np.concatenate([low, high], axis=1).astype(np.float32))
        order = np.argsort(-scores)
        labels = np.arange(len(objects))
        order = order[visible[order]]
        found.append(Detections(boxes[order], scores[order].astype(np.float32), labels[order]))
    return found


def mistaken(view: View, found: Detections, objects: NDArray[np.float64]) -> Detections:
    """The same, but what is not whole gets a label that no object has."""
    boxes = view.letterbox.to_original(found.boxes) + np.array(view.corner * 2)
    whole = np.isclose(boxes, objects[found.labels], atol=0.1).all(axis=1)
    labels = np.where(whole, found.labels, found.labels + len(objects))
    return Detections(found.boxes, found.scores, labels)


@settings(max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1600, 2000), (700, 3000), (2500, 1200), (400, 1500)]),
    st.sampled_from(["auto", 700, 300]),
    st.booleans(),
)
def test_merge_keeps_every_object_once(
    seed: int, size: tuple[int, int], tile: Tile, small: bool
) -> None:
    rng = np.random.default_rng(seed)
    image, chosen = Size(*size), plan(Size(*size), RULE, tile)
    assert chosen.count > 1
    count = 20
    largest = np.array(guaranteed(chosen) if small else (image.width, image.height))
    extents = np.floor(rng.uniform(0.1, 1.0, (count, 2)) * largest)
    room = np.array([image.width, image.height]) - extents
    corners = np.floor(rng.uniform(0, 1, (count, 2)) * (room + 1))
    objects = np.concatenate([corners, corners + extents], axis=1)
    scores = rng.uniform(0.6, 0.9, count)
    views = seen(chosen, objects, scores)
    if small:
        # The tiles alone have to do it, and a part of an object looks like something else.
        views[-1] = detections()
        views = [
            mistaken(view, each, objects) for view, each in zip(chosen.views, views, strict=True)
        ]
    merged = tiling.merge(chosen, views, selection(2 * count))
    assert sorted(merged.labels.tolist()) == list(range(count))
    np.testing.assert_allclose(merged.boxes, objects[merged.labels], atol=0.01)
    assert merged.scores.tolist() == sorted(merged.scores.tolist(), reverse=True)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["auto", 300]))
def test_merge_keeps_neighbours_of_one_class(seed: int, tile: Tile) -> None:
    rng = np.random.default_rng(seed)
    chosen = plan(Size(900, 1100), RULE, tile)
    step_x, step_y = guaranteed(chosen)
    across, down = 1100 // step_x, 900 // step_y
    corners = np.stack(np.meshgrid(np.arange(across) * step_x, np.arange(down) * step_y), axis=-1)
    corners = corners.reshape(-1, 2).astype(np.float64)
    objects = np.concatenate([corners, corners + np.array([step_x, step_y])], axis=1)
    views = seen(chosen, objects, rng.uniform(0.4, 0.9, len(objects)))
    one_class = [Detections(each.boxes, each.scores, each.labels * 0) for each in views]
    merged = tiling.merge(chosen, one_class, selection(1))
    places = sorted(map(tuple, merged.boxes.round().astype(int).tolist()))
    assert places == sorted(map(tuple, objects.astype(int).tolist()))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_merge_ignores_boxes_below_the_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = plan(Size(1200, 1600), RULE, "auto")
    views = []
    for _ in chosen.views:
        corners = rng.integers(0, 300, (12, 2))
        rows = np.concatenate([corners, corners + rng.integers(20, 140, (12, 2))], axis=1)
        scores = np.sort(rng.uniform(0, 1, 12))[::-1]
        views.append(detections(*np.column_stack([rows, scores, rng.integers(0, 2, 12)])))
    asked = selection(score=0.5)
    cut_before = [each.pick(each.scores > 0.5) for each in views]
    one, other = tiling.merge(chosen, views, asked), tiling.merge(chosen, cut_before, asked)
    assert one.boxes.tolist() == other.boxes.tolist()
    assert one.scores.tolist() == other.scores.tolist()
    assert len(one) > 0
    assert one.scores.min() > 0.5


# Two tiles of 448 x 448 side by side over 700 x 448 pixels: x 0..448 and 252..700. One canvas
# pixel is one pixel, so within 8 pixels of 448 or of 252 is at a border.
PAIR = Plan(RULE.fit(Size(448, 700)), RULE.tiles()[2], tiled=True)
assert (PAIR.columns, PAIR.rows) == ((0, 252), (0,))


@pytest.mark.parametrize(
    ("box", "view", "kept", "at_border"),
    [
        # At the left tile's right border; the right one sees it whole.
        ((380, 100, 448, 200), 0, False, True),
        ((380, 100, 441, 200), 0, False, True),
        ((380, 100, 439, 200), 0, True, False),
        # The same place, as the right tile sees it.
        ((380, 100, 470, 200), 1, True, False),
        # Too wide for the right tile: it would cut it too.
        ((240, 100, 448, 200), 0, True, True),
        ((255, 100, 448, 200), 0, True, True),
        # The image's own borders cut nothing.
        ((0, 0, 100, 448), 0, True, False),
        ((620, 0, 700, 448), 1, True, False),
        # The whole image is asked only where no tile sees all of it.
        ((380, 100, 430, 200), 2, False, False),
        ((240, 100, 460, 200), 2, True, False),
        ((0, 0, 700, 448), 2, True, False),
    ],
)
def test_merge_prefers_the_tile_that_holds_the_box(
    box: tuple[int, int, int, int], view: int, kept: bool, at_border: bool
) -> None:
    best, cut_off = tiling.believed(PAIR, np.array([box], dtype=np.float64), np.array([view]))
    assert (bool(best[0]), bool(cut_off[0])) == (kept, at_border)


def test_merge_prefers_the_tile_with_fewer_cut_sides() -> None:
    square = RULE.tiles()[2]
    chosen = Plan(RULE.fit(Size(700, 700)), square, tiled=True)
    assert chosen.columns == chosen.rows == (0, 252)
    # In the top-left tile's bottom-right corner, and taller than what the rows share.
    boxes = np.array([[400, 240, 448, 448], [400, 240, 480, 448]], dtype=np.float64)
    best, cut_off = tiling.believed(chosen, boxes, np.array([0, 1]))
    assert best.tolist() == [False, True]
    assert cut_off.tolist() == [True, True]


@pytest.mark.parametrize(
    ("x1", "label", "is_cut", "score", "dropped"),
    [
        (300, 0, True, 0.6, True),
        # Small objects do lie on larger ones.
        (300, 0, False, 0.6, False),
        (300, 1, True, 0.6, False),
        # Exactly half of it is not most of it.
        (352, 0, True, 0.6, False),
        (351, 0, True, 0.6, True),
        # A faint box of half the image, as there are at low thresholds, erases nothing clear.
        (300, 0, True, 0.44, False),
        (300, 0, True, 0.46, True),
    ],
)
def test_merge_drops_cut_fragments(
    x1: int, label: int, is_cut: bool, score: float, dropped: bool
) -> None:
    found = detections((x1, 100, 448, 200, 0.9, label), (0, 0, 400, 400, score, 0))
    parted = tiling.fragments(found, np.array([is_cut, False]))
    assert parted.tolist() == [dropped, False]


def test_merge_drops_many_fragments_in_chunks() -> None:
    rows = [(i, i, i + 50, i + 50, 0.5, 0) for i in range(300)]
    rows += [(400, 400, 410, 410, 0.5, 0), (0, 0, 400, 400, 0.6, 0)]
    parted = tiling.fragments(detections(*rows), np.arange(302) < 301)
    assert parted.tolist() == [True] * 300 + [False] * 2


def brute_force(found: Detections, iou: float, limit: int) -> list[int]:
    """NMS as the definition reads, in whole numbers where it matters."""
    kept: list[int] = []
    for i in sorted(range(len(found)), key=lambda i: (-found.scores[i], i)):
        x1, y1, x2, y2 = found.boxes[i].tolist()
        for j in kept:
            u1, v1, u2, v2 = found.boxes[j].tolist()
            shared = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
            both = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            if found.labels[i] == found.labels[j] and shared > iou * both:
                break
        else:
            kept.append(i)
    return kept[:limit]


corner = st.integers(0, 12)
extent = st.integers(1, 8)
rows = st.tuples(corner, corner, extent, extent, st.integers(1, 5), st.integers(0, 2)).map(
    lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3], r[4] / 5, r[5])
)


@given(
    st.lists(rows, max_size=30), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(1, 40)
)
def test_nms_equals_brute_force(
    boxes: list[tuple[float, float, float, float, float, int]], iou: float, limit: int
) -> None:
    found = detections(*boxes)
    assert tiling.nms(found, iou, limit=limit).tolist() == brute_force(found, iou, limit)


def test_nms_equals_hand_computed_table() -> None:
    # 10 x 10 boxes, 5 apart: 50 of 150 pixels shared.
    found = detections((0, 0, 10, 10, 0.5, 0), (5, 0, 15, 10, 0.9, 0), (5, 0, 15, 10, 0.7, 1))
    assert tiling.nms(found, 1 / 3 + 1e-9, limit=9).tolist() == [1, 2, 0]
    assert tiling.nms(found, 0.3, limit=9).tolist() == [1, 2]
    assert tiling.nms(found, 0.3, limit=1).tolist() == [1]
    assert tiling.nms(detections(), 0.3, limit=1).tolist() == []


def test_merge_applies_max_detections_to_the_image() -> None:
    chosen = plan(Size(1600, 2000), RULE, "auto")
    rows = [(x, y, x + 20, y + 20, 0.9, 0) for x in range(9, 340, 21) for y in range(9, 440, 21)]
    views = [detections(*rows)] + [detections()] * (chosen.count - 1)
    assert chosen.tile.canvas == (512, 384)
    assert len(tiling.merge(chosen, views, selection())) == len(rows) == 336
    assert len(tiling.merge(chosen, views, selection(most=7))) == 7
    assert selection().max_detections == 300


def test_merge_keeps_small_object_on_a_large_one() -> None:
    chosen = plan(Size(1600, 2000), RULE, "auto")
    rows = detections((100, 100, 300, 300, 0.8, 0), (150, 150, 180, 180, 0.7, 0))
    views = [rows] + [detections()] * (chosen.count - 1)
    assert len(tiling.merge(chosen, views, selection())) == 2


def test_merge_without_detections_is_empty() -> None:
    chosen = plan(Size(1600, 2000), RULE, "auto")
    merged = tiling.merge(chosen, [detections()] * chosen.count, selection())
    assert merged.boxes.shape == (0, 4)
    assert merged.labels.dtype == np.int64
