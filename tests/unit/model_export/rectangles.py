"""Images of one bright rectangle, and a detector of a few lines of ONNX that finds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from PIL import Image

from service.imaging.canvas import Buckets, Size
from service.runtime.artifact import Metadata, set_metadata

_GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
rectangles (
  uint8[b, h, w, 3] images, int64[n, 2] image_sizes, float[1] score_threshold,
  float[1] iou_threshold, int64[1] max_detections
) => (int64[d] image_index, float[d, 4] boxes, float[d] scores, int64[d] labels)
<int64[1, 2] image_sizes = {0, 0}, float[1] score_threshold = {0.3},
 float[1] iou_threshold = {0.5}, int64[1] max_detections = {300},
 int64[1] last = {-1}, int64[1] first = {0}, float middle = {127.5}, float score = {0.9},
 int64[3] label_of_channel = {RED, GREEN, 0},
 int64[2] x_side = {1, 3}, int64[2] y_side = {2, 3}, float one = {1.0}>
{
  pixels = Cast <to = 1> (images)
  columns = ReduceMax <axes = [1, 3], keepdims = 0> (pixels)
  rows = ReduceMax <axes = [2, 3], keepdims = 0> (pixels)
  column_is_bright = Greater (columns, middle)
  row_is_bright = Greater (rows, middle)
  column_flags = Cast <to = 1> (column_is_bright)
  row_flags = Cast <to = 1> (row_is_bright)
  x1_index = ArgMax <axis = 1> (column_flags)
  y1_index = ArgMax <axis = 1> (row_flags)
  x2_index = ArgMax <axis = 1, select_last_index = 1> (column_flags)
  y2_index = ArgMax <axis = 1, select_last_index = 1> (row_flags)
  x1 = Cast <to = 1> (x1_index)
  y1 = Cast <to = 1> (y1_index)
  x2_inside = Cast <to = 1> (x2_index)
  y2_inside = Cast <to = 1> (y2_index)
  x2 = Add (x2_inside, one)
  y2 = Add (y2_inside, one)
  all_boxes = Concat <axis = 1> (x1, y1, x2, y2)
  channels = ReduceMax <axes = [1, 2], keepdims = 0> (pixels)
  channel = ArgMax <axis = 1, keepdims = 0> (channels)
  all_labels = Gather (label_of_channel, channel)
  brightest = ReduceMax <axes = [1], keepdims = 0> (channels)
  is_there = Greater (brightest, middle)
  is_wanted = Less (score_threshold, score)
  kept = And (is_there, is_wanted)
  where = NonZero (kept)
  image_index = Squeeze (where, first)
  boxes = Gather (all_boxes, image_index)
  labels = Gather (all_labels, image_index)
  shape = Shape (image_index)
  scores = Expand (score, shape)
}
"""


CLASSES = ("red", "green")


def write_model(path: Path, classes: Sequence[str] = CLASSES) -> Path:
    """A model file that finds a bright rectangle on black; `classes` may have any order."""
    text = _GRAPH.replace("RED", str(classes.index("red")), 1)
    model = onnx.parser.parse_model(text.replace("GREEN", str(classes.index("green")), 1))
    set_metadata(
        model,
        Metadata(
            name="rectangles",
            classes=tuple(classes),
            canvas=Buckets(sizes=(Size(96, 128), Size(128, 96))),
        ),
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def draw_data(root: Path, names: Sequence[str] = CLASSES, *, val_objects: bool = True) -> Path:
    """Images, upright and lying, of a red or green rectangle, as VOC: 6 train and 10 val.

    The last of each split has none. `names` is what red and green are called. Without
    `val_objects` the rectangles of val are not labelled.
    """
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    stems = [f"image-{index}" for index in range(16)]
    for split, members in (("val", stems[:10]), ("train", stems[10:])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(members))
    for index, stem in enumerate(stems):
        width, height = ((200, 150), (150, 200), (180, 150))[index % 3]
        x1, y1 = generator.integers(5, 60, 2)
        x2, y2 = x1 + generator.integers(50, 80), y1 + generator.integers(50, 80)
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        thing = ""
        if index not in (9, 15):
            pixels[y1:y2, x1:x2, index % 2] = 255
        if index not in (9, 15) and (val_objects or index >= 10):
            thing = (
                f"<object><name>{names[index % 2]}</name><bndbox><xmin>{x1}</xmin>"
                f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            )
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{stem}.png")
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.png</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{thing}</annotation>"
        )
    return root
