"""The parts of the model file around the network, written in ONNX itself.

Before it the normalisation of the image; behind it, level by level, the best anchors and boxes.
All of that depends on the canvas, whose size the file leaves open: torch's exporter takes several
times as long to follow open sizes as to export the network, and guesses at some. What it computes
is what `RetinaNet` and `candidates` compute, and `verification` compares the two in every export.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from model_export.retinanet.anchors import LEVELS
from model_export.retinanet.box_coding import MAX_LOG_SCALE
from model_export.retinanet.model import RetinaNet
from model_export.retinanet.postprocess import MANY_CLASSES, TOP_K
from service.runtime.detector import SEAM

PIXELS: Final = "pixels"
"""What the network is given."""

_INPUT: Final = """
prepare (uint8[batch, height, width, 3] images, int64[sizes, 2] image_sizes) => (
    float[batch, 3, height, width] pixels, int64[2] input_canvas, int64[sizes, 2] input_sizes
)
<
    int64 input_none = {0},
    int64 input_one = {1},
    int64[1] input_first = {0},
    int64[1] input_second = {1},
    int64[2] input_not_rows = {1, 3},
    int64[2] input_not_columns = {1, 2},
    float input_outside = {0.0}
>
{
    input_canvas = Shape <start = 1, end = 3> (images)
    input_given = Greater (image_sizes, input_none)
    input_sizes = Where (input_given, image_sizes, input_canvas)

    input_height = Gather (input_canvas, input_none)
    input_width = Gather (input_canvas, input_one)
    input_rows = Range (input_none, input_height, input_one)
    input_columns = Range (input_none, input_width, input_one)
    input_row_limits = Gather <axis = 1> (input_sizes, input_first)
    input_column_limits = Gather <axis = 1> (input_sizes, input_second)
    input_rows_in = Less (input_rows, input_row_limits)
    input_columns_in = Less (input_columns, input_column_limits)
    input_row_mask = Unsqueeze (input_rows_in, input_not_rows)
    input_column_mask = Unsqueeze (input_columns_in, input_not_columns)
    input_inside = And (input_row_mask, input_column_mask)

    input_bytes = Transpose <perm = [0, 3, 1, 2]> (images)
    input_levels = Cast <to = 1> (input_bytes)
    input_centred = Sub (input_levels, input_mean)
    input_normal = Div (input_centred, input_std)
    pixels = Where (input_inside, input_normal, input_outside)
}
"""

# With few classes every anchor's pairs are looked at, with many only those of the anchors with the
# best best class.
_LOOKED_AT: Final = {
    "all": "    LEVEL_rows = Identity (LEVEL_class_rows)",
    "best": """
    LEVEL_every_row = Reshape (LEVEL_class_rows, decode_by_class)
    LEVEL_best_class = ReduceMax <keepdims = 0> (LEVEL_every_row, decode_last_axis)
    LEVEL_row_count = Mul (LEVEL_cell_count, decode_anchors)
    LEVEL_rows_kept = Min (LEVEL_row_count, decode_most)
    LEVEL_best_logits, LEVEL_kept =
        TopK <axis = 1, largest = 1, sorted = 1> (LEVEL_best_class, LEVEL_rows_kept)
    LEVEL_kept_column = Unsqueeze (LEVEL_kept, decode_last_axis)
    LEVEL_kept_classes = Expand (LEVEL_kept_column, decode_class_width)
    LEVEL_rows = GatherElements <axis = 1> (LEVEL_every_row, LEVEL_kept_classes)
""",
}
_ANCHOR_OF_ROW: Final = {
    "all": "    LEVEL_anchor = Identity (LEVEL_row)",
    "best": "    LEVEL_anchor = GatherElements <axis = 1> (LEVEL_kept, LEVEL_row)",
}

# An anchor's number tells its cell, row by row, and which of the cell's anchors it is. What follows
# from the canvas is taken from its shape alone, and none of it from the maps': see
# `service.runtime.gpu.graph_split`.
_LEVEL: Final = """
    LEVEL_reach = Add (input_canvas, LEVEL_rest)
    LEVEL_grid = Div (LEVEL_reach, LEVEL_pixels)
    LEVEL_grid_rows = Gather (LEVEL_grid, decode_first)
    LEVEL_grid_columns = Gather (LEVEL_grid, decode_second)
    LEVEL_cell_count = Mul (LEVEL_grid_rows, LEVEL_grid_columns)
    LEVEL_pair_count = Mul (LEVEL_cell_count, decode_pairs)
    LEVEL_count = Min (LEVEL_pair_count, decode_most)

    LEVEL_class_rows = Transpose <perm = [0, 2, 3, 1]> (LEVEL_class_maps)
LOOKED_AT
    LEVEL_pair_logits = Reshape (LEVEL_rows, decode_flat)
    LEVEL_logits, LEVEL_index =
        TopK <axis = 1, largest = 1, sorted = 1> (LEVEL_pair_logits, LEVEL_count)
    LEVEL_scores = Sigmoid (LEVEL_logits)
    LEVEL_labels = Mod (LEVEL_index, decode_classes)
    LEVEL_row = Div (LEVEL_index, decode_classes)
ANCHOR_OF_ROW

    LEVEL_box_rows = Transpose <perm = [0, 2, 3, 1]> (LEVEL_box_maps)
    LEVEL_every_delta = Reshape (LEVEL_box_rows, decode_by_side)
    LEVEL_anchor_column = Unsqueeze (LEVEL_anchor, decode_last_axis)
    LEVEL_anchor_sides = Expand (LEVEL_anchor_column, decode_side_width)
    LEVEL_deltas = GatherElements <axis = 1> (LEVEL_every_delta, LEVEL_anchor_sides)

    LEVEL_cell = Div (LEVEL_anchor, decode_anchors)
    LEVEL_which = Mod (LEVEL_anchor, decode_anchors)
    LEVEL_y = Div (LEVEL_cell, LEVEL_grid_columns)
    LEVEL_x = Mod (LEVEL_cell, LEVEL_grid_columns)
    LEVEL_cells_y = Unsqueeze (LEVEL_y, decode_last_axis)
    LEVEL_cells_x = Unsqueeze (LEVEL_x, decode_last_axis)
    LEVEL_cells = Concat <axis = 2> (LEVEL_cells_x, LEVEL_cells_y)
    LEVEL_positions = Cast <to = 1> (LEVEL_cells)
    LEVEL_middles = Add (LEVEL_positions, decode_offset)
STRIDE
    LEVEL_stride_pixels = Cast <to = 1> (LEVEL_stride)
    LEVEL_cell_centres = Mul (LEVEL_middles, LEVEL_stride_pixels)
    LEVEL_own = Gather <axis = 0> (LEVEL_base, LEVEL_which)
    LEVEL_own_low, LEVEL_own_high = Split <axis = 2, num_outputs = 2> (LEVEL_own)
    LEVEL_anchor_low = Add (LEVEL_cell_centres, LEVEL_own_low)
    LEVEL_anchor_high = Add (LEVEL_cell_centres, LEVEL_own_high)

    LEVEL_corner_sum = Add (LEVEL_anchor_low, LEVEL_anchor_high)
    LEVEL_anchor_centre = Div (LEVEL_corner_sum, decode_two)
    LEVEL_anchor_size = Sub (LEVEL_anchor_high, LEVEL_anchor_low)
    LEVEL_shift, LEVEL_log_scale = Split <axis = 2, num_outputs = 2> (LEVEL_deltas)
    LEVEL_shift_pixels = Mul (LEVEL_shift, LEVEL_anchor_size)
    LEVEL_centre = Add (LEVEL_shift_pixels, LEVEL_anchor_centre)
    LEVEL_clamped = Min (LEVEL_log_scale, decode_largest_scale)
    LEVEL_scale = Exp (LEVEL_clamped)
    LEVEL_size = Mul (LEVEL_scale, LEVEL_anchor_size)
    LEVEL_half = Div (LEVEL_size, decode_two)
    LEVEL_low = Sub (LEVEL_centre, LEVEL_half)
    LEVEL_high = Add (LEVEL_centre, LEVEL_half)
    LEVEL_boxes = Concat <axis = 2> (LEVEL_low, LEVEL_high)
"""

# Pixels from cell to cell: the level's, or along each side the canvas's over the number of cells.
_STRIDES: Final = {
    "level": "    LEVEL_stride = Identity (LEVEL_pixels)",
    "canvas": """
    LEVEL_stride_y_x = Div (input_canvas, LEVEL_grid)
    LEVEL_stride = Gather (LEVEL_stride_y_x, decode_x_y)
""",
}

_CANDIDATES: Final = """
candidates (int64[2] input_canvas, int64[sizes, 2] input_sizes, MAPS) => (
    float[batch, candidates, 4] candidate_boxes,
    float[batch, candidates] candidate_scores,
    int64[batch, candidates] candidate_labels
)
<
    int64 decode_classes = {CLASSES},
    int64[1] decode_anchors = {ANCHORS},
    int64[1] decode_pairs = {PAIRS},
    int64[1] decode_most = {MOST},
    int64[1] decode_first = {0},
    int64[1] decode_second = {1},
    int64[1] decode_last_axis = {2},
    int64[2] decode_x_y = {1, 0},
    int64[2] decode_flat = {0, -1},
    int64[3] decode_by_class = {0, -1, CLASSES},
    int64[3] decode_class_width = {1, 1, CLASSES},
    int64[3] decode_by_side = {0, -1, 4},
    int64[3] decode_side_width = {1, 1, 4},
    int64[4] decode_sides = {1, 0, 1, 0},
    float decode_zero = {0.0},
    float decode_two = {2.0}
>
{
LEVELS
    decode_boxes = Concat <axis = 1> (ALL_boxes)
    candidate_scores = Concat <axis = 1> (ALL_scores)
    candidate_labels = Concat <axis = 1> (ALL_labels)

    decode_limits = Gather <axis = 1> (input_sizes, decode_sides)
    decode_limit_rows = Unsqueeze (decode_limits, decode_second)
    decode_limit_pixels = Cast <to = 1> (decode_limit_rows)
    decode_not_below = Max (decode_boxes, decode_zero)
    candidate_boxes = Min (decode_not_below, decode_limit_pixels)
}
"""


def map_names() -> list[str]:
    """Return the network's outputs: of each level its class maps, then its box maps."""
    return [f"p{level}_{kind}_maps" for level in LEVELS for kind in ("class", "box")]


def surround(model: onnx.ModelProto, network: RetinaNet, *, classes: int) -> None:
    """Turn a graph from pixels to maps into one from images to the seam."""
    before, behind = (
        onnx.parser.parse_graph(_INPUT),
        onnx.parser.parse_graph(_candidates(network, classes)),
    )
    graph = model.graph
    between = list(graph.node)
    del graph.node[:]
    for nodes in (before.node, between, behind.node):
        graph.node.extend(nodes)
    exact = (
        onnx.numpy_helper.from_array(value, name) for name, value in _constants(network).items()
    )
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(
        each for each in (*before.initializer, *behind.initializer, *exact) if each.name in used
    )
    outputs = {output.name: output for output in behind.output}
    del graph.output[:]
    graph.output.extend(outputs[name] for name in SEAM)


def _candidates(network: RetinaNet, classes: int) -> str:
    which = "all" if classes < MANY_CLASSES else "best"
    body = (
        _LEVEL.replace("LOOKED_AT", _LOOKED_AT[which])
        .replace("ANCHOR_OF_ROW", _ANCHOR_OF_ROW[which])
        .replace("STRIDE", _STRIDES[network.config.anchors.stride])
    )
    names = [f"p{level}" for level in LEVELS]
    maps = (f"float[batch, {name}_channels, {name}_y, {name}_x] {name}" for name in map_names())
    replaced = {
        "LEVELS": "".join(body.replace("LEVEL", name) for name in names),
        "MAPS": ", ".join(maps),
        "CLASSES": str(classes),
        "ANCHORS": str(network.config.anchors.per_cell),
        "PAIRS": str(network.config.anchors.per_cell * classes),
        "MOST": str(TOP_K),
    } | {
        f"ALL_{what}": ", ".join(f"{name}_{what}" for name in names)
        for what in ("boxes", "scores", "labels")
    }
    text = _CANDIDATES
    for word, meaning in replaced.items():
        text = text.replace(word, meaning)
    return text


def _constants(network: RetinaNet) -> dict[str, NDArray[Any]]:
    """Return the constants that must be exact, which the text leaves out."""
    return {
        "input_mean": network.mean.numpy(),
        "input_std": network.std.numpy(),
        "decode_offset": np.array(network.config.anchors.offset, dtype=np.float32),
        "decode_largest_scale": np.array(MAX_LOG_SCALE, dtype=np.float32),
        **dict(_of_levels(network)),
    }


def _of_levels(network: RetinaNet) -> Iterator[tuple[str, NDArray[Any]]]:
    for level in LEVELS:
        yield f"p{level}_base", network.get_buffer(f"anchors_p{level}").numpy()
        yield f"p{level}_pixels", np.array([2**level])
        yield f"p{level}_rest", np.array([2**level - 1])
