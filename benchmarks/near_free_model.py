"""A stand-in for a network that costs next to nothing, so that what is left is the service.

It keeps the model file's inputs, outputs and selection, and answers 15 detections an image; only
the network is replaced by a look at one pixel in 32 x 32.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker
import onnx.parser

from model_export.export.nms import append_selection, declare_inputs
from service.imaging.canvas import Buckets, Size
from service.runtime.artifact import MODEL_FILE, Metadata, Thresholds, set_metadata

CANVASES = (Size(384, 512), Size(512, 384), Size(448, 448))
DETECTIONS = 15

_TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
near_free (
    uint8[batch, height, width, 3] images
) => (
    float[batch, candidates, 4] candidate_boxes,
    float[batch, candidates] candidate_scores,
    int64[batch, candidates] candidate_labels
)
<
    int64[2] start = {16, 16}, int64[2] end = {100000, 100000}, int64[2] axes = {1, 2},
    int64[2] step = {32, 32}, int64[2] flat_shape = {0, -1}, int64 zero = {0}, int64 one = {1},
    int64 side = {32}, float white = {255.0}, float nothing = {0.0}, int64[1] last = {-1}
>
{
    sampled = Slice (images, start, end, axes, step)
    red = Gather <axis = 3> (sampled, zero)
    red_float = Cast <to = 1> (red)
    bright = Div (red_float, white)
    candidate_scores = Reshape (bright, flat_shape)
    blank = Mul (candidate_scores, nothing)
    candidate_labels = Cast <to = 7> (blank)
    cells = Shape <start = 1, end = 2> (candidate_scores)
    cell_count = Squeeze (cells)
    columns = Shape <start = 2, end = 3> (red)
    index = Range (zero, cell_count, one)
    column = Mod (index, columns)
    row = Div (index, columns)
    x1 = Mul (column, side)
    y1 = Mul (row, side)
    x2 = Add (x1, side)
    y2 = Add (y1, side)
    x1_column = Unsqueeze (x1, last)
    y1_column = Unsqueeze (y1, last)
    x2_column = Unsqueeze (x2, last)
    y2_column = Unsqueeze (y2, last)
    grid = Concat <axis = 1> (x1_column, y1_column, x2_column, y2_column)
    grid_float = Cast <to = 1> (grid)
    blank_column = Unsqueeze (blank, last)
    candidate_boxes = Add (grid_float, blank_column)
}
"""


def write_near_free_model(repository: Path) -> Path:
    """Write `repository`/near-free/1/model.onnx; its path."""
    model = onnx.parser.parse_model(_TEXT)
    append_selection(model, classes=1)
    declare_inputs(model)
    thresholds = Thresholds(max_detections=DETECTIONS)
    set_metadata(
        model,
        Metadata(
            name="near-free",
            classes=("bright",),
            canvas=Buckets(sizes=CANVASES),
            thresholds=thresholds,
        ),
    )
    onnx.checker.check_model(model, full_check=True)
    path = repository / "near-free" / "1" / MODEL_FILE
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    return path
