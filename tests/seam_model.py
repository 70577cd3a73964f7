"""A small model file with the seam: `tiny_model`'s squares, split into network and selection.

As in the exported files, candidates are the best (cell, class) pairs, boxes are looked up in a
table that follows from the canvas's shape, and sizes of images have a default.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker
import onnx.parser

from model_export.export.nms import append_selection, declare_inputs
from service.imaging.canvas import Buckets, ShortSide
from service.runtime.artifact import MODEL_FILE, Metadata, Thresholds, set_metadata
from tests import tiny_model

_TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
seam (
    uint8[batch, height, width, 3] images, int64[sizes, 2] image_sizes
) => (
    float[batch, candidates, 4] candidate_boxes,
    float[batch, candidates] candidate_scores,
    int64[batch, candidates] candidate_labels
)
<
    float white = {255.0}, int64[3] by_class = {0, 3, -1}, int64[2] flat = {0, -1},
    int64 zero = {0}, int64 one = {1}, int64 classes = {3}, int64 cell = {32}, int64 step = {16},
    int64[1] last = {-1}, int64[1] most = {1000}, int64[1] first = {0}, int64[1] second = {1},
    int64[1] third = {2}
>
{
    pixels = Cast <to = 1> (images)
    planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
    bright = Div (planes, white)
    pooled = AveragePool <kernel_shape = [32, 32], strides = [16, 16]> (bright)
    class_rows = Reshape (pooled, by_class)
    cell_rows = Transpose <perm = [0, 2, 1]> (class_rows)
    pairs = Reshape (cell_rows, flat)

    canvas = Shape <start = 1, end = 3> (images)
    inner = Sub (canvas, cell)
    steps = Div (inner, step)
    grid = Add (steps, one)
    rows = Gather <axis = 0> (grid, zero)
    columns = Gather <axis = 0> (grid, one)
    cells = Mul (rows, columns)
    all_pairs = Mul (cells, classes)
    all_pairs_row = Unsqueeze (all_pairs, first)
    kept = Min (all_pairs_row, most)
    number = Range (zero, cells, one)
    column = Mod (number, columns)
    row = Div (number, columns)
    x1 = Mul (column, step)
    y1 = Mul (row, step)
    x2 = Add (x1, cell)
    y2 = Add (y1, cell)
    x1_column = Unsqueeze (x1, last)
    y1_column = Unsqueeze (y1, last)
    x2_column = Unsqueeze (x2, last)
    y2_column = Unsqueeze (y2, last)
    table = Concat <axis = 1> (x1_column, y1_column, x2_column, y2_column)
    table_float = Cast <to = 1> (table)

    candidate_scores, best = TopK <axis = 1, largest = 1, sorted = 1> (pairs, kept)
    candidate_labels = Mod (best, classes)
    best_cell = Div (best, classes)
    best_column = Unsqueeze (best_cell, last)
    boxes_of_best = GatherND (table_float, best_column)
    given = Greater (image_sizes, zero)
    sizes_known = Where (given, image_sizes, canvas)
    heights = Slice (sizes_known, first, second, second)
    widths = Slice (sizes_known, second, third, second)
    corners = Concat <axis = 1> (widths, heights, widths, heights)
    corners_float = Cast <to = 1> (corners)
    limits = Unsqueeze (corners_float, second)
    candidate_boxes = Min (boxes_of_best, limits)
}
"""


def build(rule: Buckets | ShortSide | None = None) -> onnx.ModelProto:
    """The model; by default with the canvases of `tiny_model`."""
    model = onnx.parser.parse_model(_TEXT)
    append_selection(model, classes=len(tiny_model.CLASSES))
    declare_inputs(model)
    set_metadata(
        model,
        Metadata(
            name="seam",
            classes=tiny_model.CLASSES,
            canvas=rule or Buckets(sizes=tiny_model.SIZES),
            thresholds=Thresholds(score=0.5),
        ),
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def save(root: Path, rule: Buckets | ShortSide | None = None) -> Path:
    """Write the model into a repository; the file's path."""
    path = root / "seam" / "1" / MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(build(rule), path)
    return path
