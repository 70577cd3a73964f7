"""A tiny real model file: the contract's inputs, outputs and NMS, without a network to train.

It finds bright squares: the score of class red, green or blue in a 32 px cell (one every 16 px) is
the mean of that channel there. So answers depend on every pixel, and a test can work them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser

from service.imaging.canvas import Buckets, Size
from service.runtime.artifact import MODEL_FILE, Metadata, Metrics, Thresholds, set_metadata

CLASSES = ("red", "green", "blue")
SIZES = (Size(96, 128), Size(128, 96), Size(96, 96))
CELL = 32
STEP = 16

_GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (
  uint8[batch, height, width, 3] images,
  int64[1, 2] image_sizes = {0, 0},
  float[1] score_threshold = {0.3},
  float[1] iou_threshold = {0.5},
  int64[1] max_detections = {300}
) => (
  int64[detections] image_index, float[detections, 4] boxes,
  float[detections] scores, int64[detections] labels
) <
  int64[1] cap = {1000}, int64[1] whole = {0}
> {
  pixels = Cast <to = 1> (images)
  planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
  white = Constant <value_float = WHITE> ()
  bright = Div (planes, white)
  pooled = AveragePool <kernel_shape = [32, 32], strides = [16, 16]> (bright)
  grid_shape = Shape (pooled)
  one = Constant <value_ints = [1]> ()
  zero = Constant <value_ints = [0]> ()
  zero_scalar = Constant <value_int = 0> ()
  one_scalar = Constant <value_int = 1> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  four = Constant <value_ints = [4]> ()
  rows = Slice (grid_shape, two, three)
  columns = Slice (grid_shape, three, four)
  batch_size = Slice (grid_shape, zero, one)
  cell_scores_shape = Constant <value_ints = [0, 3, -1]> ()
  plain_scores = Reshape (pooled, cell_scores_shape)
  WORK
  BALLAST
  POISON
  row_scalar = Squeeze (rows)
  column_scalar = Squeeze (columns)
  row_numbers = Range (zero_scalar, row_scalar, one_scalar)
  column_numbers = Range (zero_scalar, column_scalar, one_scalar)
  row_column = Unsqueeze (row_numbers, one)
  column_row = Unsqueeze (column_numbers, zero)
  grid = Concat <axis = 0> (rows, columns)
  row_grid = Expand (row_column, grid)
  column_grid = Expand (column_row, grid)
  flat = Constant <value_ints = [-1]> ()
  row_flat = Reshape (row_grid, flat)
  column_flat = Reshape (column_grid, flat)
  step = Constant <value_int = 16> ()
  cell = Constant <value_int = 32> ()
  y1 = Mul (row_flat, step)
  x1 = Mul (column_flat, step)
  y2 = Add (y1, cell)
  x2 = Add (x1, cell)
  x1c = Unsqueeze (x1, one)
  y1c = Unsqueeze (y1, one)
  x2c = Unsqueeze (x2, one)
  y2c = Unsqueeze (y2, one)
  cells = Concat <axis = 1> (x1c, y1c, x2c, y2c)
  cells_float = Cast <to = 1> (cells)
  cells_one = Unsqueeze (cells_float, zero)
  box_shape = Concat <axis = 0> (batch_size, one, one)
  cells_batch = Expand (cells_one, box_shape)
  image_shape = Shape (images)
  canvas_size = Slice (image_shape, one, three)
  given = Greater (image_sizes, whole)
  sizes = Where (given, image_sizes, canvas_size)
  heights = Slice (sizes, zero, one, one)
  widths = Slice (sizes, one, two, one)
  limits_int = Concat <axis = 1> (widths, heights, widths, heights)
  limits_float = Cast <to = 1> (limits_int)
  limits = Unsqueeze (limits_float, one)
  candidate_boxes = Min (cells_batch, limits)
  max_wanted = Min (max_detections, cap)
  chosen = NonMaxSuppression <center_point_box = 0> (
    candidate_boxes, cell_scores, max_wanted, iou_threshold, score_threshold)
  image_column = Slice (chosen, zero, one, one)
  label_column = Slice (chosen, one, two, one)
  box_column = Slice (chosen, two, three, one)
  image_all = Squeeze (image_column, one)
  label_all = Squeeze (label_column, one)
  score_all = GatherND (cell_scores, chosen)
  image_box = Concat <axis = 1> (image_column, box_column)
  box_all = GatherND (candidate_boxes, image_box)
  image_double = Cast <to = 11> (image_all)
  score_double = Cast <to = 11> (score_all)
  twice = Add (image_double, image_double)
  order_key = Sub (twice, score_double)
  count = Shape (order_key)
  sorted_key, order = TopK <largest = 0, sorted = 1> (order_key, count)
  image_sorted = Gather (image_all, order)
  image_left = Unsqueeze (image_sorted, one)
  image_right = Unsqueeze (image_sorted, zero)
  earlier = Greater (image_left, image_right)
  earlier_int = Cast <to = 7> (earlier)
  first = ReduceSum <keepdims = 0> (earlier_int, one)
  count_scalar = Squeeze (count)
  positions = Range (zero_scalar, count_scalar, one_scalar)
  rank = Sub (positions, first)
  within = Less (rank, max_wanted)
  keep = Compress <axis = 0> (order, within)
  image_index = Gather (image_all, keep)
  boxes = Gather (box_all, keep)
  scores = Gather (score_all, keep)
  labels = Gather (label_all, keep)
}
"""

_NO_WORK = "busy_scores = Identity (plain_scores)"
_NO_BALLAST = "laden_scores = Identity (busy_scores)"
_BALLAST = """
  average = ReduceMean <keepdims = 0> (bright)
  nil = Constant <value_float = 0.0> ()
  dark = Mul (average, nil)
  row = Cast <to = 7> (dark)
  weight = Gather <axis = 0> (ballast, row)
  heaviest = ReduceMax <keepdims = 0> (weight)
  weightless = Mul (heaviest, nil)
  laden_scores = Add (busy_scores, weightless)
"""
_NO_POISON = "cell_scores = Identity (laden_scores)"
_POISON = """
  red_plane = Slice (bright, zero, one, one)
  top_row = Slice (red_plane, zero, one, two)
  corner = Slice (top_row, zero, one, three)
  blue_plane = Slice (bright, two, three, one)
  blue_corner_row = Slice (blue_plane, zero, one, two)
  blue_corner = Slice (blue_corner_row, zero, one, three)
  both = Mul (corner, blue_corner)
  worst = ReduceMax <keepdims = 0> (both)
  bad = Floor (worst)
  bad_index = Cast <to = 7> (bad)
  nothing = Constant <value_floats = [0.0]> ()
  added = Gather <axis = 0> (nothing, bad_index)
  cell_scores = Add (laden_scores, added)
"""


def build(
    *,
    name: str = "tiny",
    sizes: Sequence[Size] = SIZES,
    thresholds: Thresholds | None = None,
    work: int = 0,
    poison: bool = False,
    white: float = 255.0,
    ballast: int = 0,
) -> onnx.ModelProto:
    """The model. `work` products of 512 x 512 matrices make an inference slow.

    A channel of value `white` scores 1. So many MiB of weights, which change no answer, are the
    `ballast`. With `poison`, a batch in which some image's top-left pixel is magenta (255, any,
    255) fails.
    """
    text = _GRAPH.replace("WORK", _burn(work) if work else _NO_WORK)
    text = text.replace("POISON", _POISON if poison else _NO_POISON)
    text = text.replace("BALLAST", _BALLAST if ballast else _NO_BALLAST)
    model = onnx.parser.parse_model(text.replace("WHITE", str(white)))
    if ballast:
        weights = np.ones((ballast, 1024, 256), dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "ballast"))
    # The default is one row for the whole batch; a caller may give a row for each image.
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "sizes"
    onnx.checker.check_model(model, full_check=True)
    metadata = Metadata(
        name=name,
        classes=CLASSES,
        canvas=Buckets(sizes=tuple(sizes)),
        thresholds=thresholds or Thresholds(score=0.5, per_class={"blue": 0.8}),
        metrics=Metrics(dataset="drawn squares", split="val", ap=0.5, ap50=0.9),
        provenance={"licences": {"model": "Apache-2.0"}},
    )
    set_metadata(model, metadata)
    return model


def save(root: Path, *, name: str = "tiny", version: int = 1, **options: object) -> Path:
    """Write the model into a repository, over what is there; the file's path."""
    path = root / name / str(version) / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(build(name=name, **options), path)  # type: ignore[arg-type]
    return path


def _burn(products: int) -> str:
    lines = [
        "mean = ReduceMean <keepdims = 0> (bright)",
        "square = Constant <value_ints = [512, 512]> ()",
        "hot0 = Expand (mean, square)",
        "side = Constant <value_float = 512.0> ()",
    ]
    for i in range(products):
        lines += [f"raw{i} = MatMul (hot{i}, hot{i})", f"hot{i + 1} = Div (raw{i}, side)"]
    lines += [
        f"heat = ReduceMean <keepdims = 0> (hot{products})",
        "none = Constant <value_float = 0.0> ()",
        "cold = Mul (heat, none)",
        "busy_scores = Add (plain_scores, cold)",
    ]
    return "\n  ".join(lines)
