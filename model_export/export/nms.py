"""The part of the model file behind the candidate boxes, written in ONNX itself.

Non-maximum suppression and the cut to `max_detections` depend on the data in ways that torch's
exporter can only guess at, so they are ONNX operators from the start. The seam keeps its names,
`candidate_boxes`, `candidate_scores` and `candidate_labels`: an engine may split the file there.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray

from service.runtime.artifact import MAX_DETECTIONS_CAP, Thresholds
from service.runtime.detector import INPUTS, OUTPUTS

# Class-aware by the class axis of NonMaxSuppression: a candidate has its score in its own class's
# row, and -1, which no threshold lets through, in the others. The operator orders its answer by
# image, class and falling score. Two sorts make that image and falling score: the second key,
# image * count + position, has no ties, so nothing hangs on a stable sort. A detection's rank in
# its image is its position minus the number of detections in the images before.
_TEXT: Final = """
selection (
    float[batch, candidates, 4] candidate_boxes,
    float[batch, candidates] candidate_scores,
    int64[batch, candidates] candidate_labels,
    float[1] score_threshold,
    float[1] iou_threshold,
    int64[1] max_detections
) => (
    int64[detections] image_index,
    float[detections, 4] boxes,
    float[detections] scores,
    int64[detections] labels
)
<
    int64 select_classes = {CLASSES},
    int64 select_cap = {CAP},
    int64 select_zero = {0},
    int64 select_one = {1},
    int64[1] select_first = {0},
    int64[1] select_second = {1},
    int64[2] select_image_and_box = {0, 2},
    float select_never = {-1.0}
>
{
    select_limit = Min (max_detections, select_cap)
    select_class_range = Range (select_zero, select_classes, select_one)
    select_class_column = Unsqueeze (select_class_range, select_second)
    select_label_rows = Unsqueeze (candidate_labels, select_second)
    select_own_class = Equal (select_label_rows, select_class_column)
    select_score_rows = Unsqueeze (candidate_scores, select_second)
    select_class_scores = Where (select_own_class, select_score_rows, select_never)
    select_kept = NonMaxSuppression (
        candidate_boxes, select_class_scores, select_limit, iou_threshold, score_threshold
    )
    select_pairs = Gather <axis = 1> (select_kept, select_image_and_box)
    select_kept_scores = GatherND (candidate_scores, select_pairs)
    select_count = Shape <start = 0, end = 1> (select_kept)
    select_count_scalar = Squeeze (select_count, select_first)
    select_positions = Range (select_zero, select_count_scalar, select_one)

    select_sorted_scores, select_by_score =
        TopK <axis = 0, largest = 1, sorted = 1> (select_kept_scores, select_count)
    select_pairs_by_score = Gather <axis = 0> (select_pairs, select_by_score)
    select_images_by_score = Gather <axis = 1> (select_pairs_by_score, select_zero)
    select_image_offset = Mul (select_images_by_score, select_count)
    select_image_key = Add (select_image_offset, select_positions)
    select_sorted_key, select_by_image =
        TopK <axis = 0, largest = 0, sorted = 1> (select_image_key, select_count)
    select_ordered = Gather <axis = 0> (select_pairs_by_score, select_by_image)
    select_images = Gather <axis = 1> (select_ordered, select_zero)

    select_batch = Shape <start = 0, end = 1> (candidate_scores)
    select_no_counts = Expand (select_zero, select_batch)
    select_each_one = Expand (select_one, select_count)
    select_counts = ScatterElements <axis = 0, reduction = "add"> (
        select_no_counts, select_images, select_each_one
    )
    select_starts = CumSum <exclusive = 1> (select_counts, select_zero)
    select_start = Gather <axis = 0> (select_starts, select_images)
    select_rank = Sub (select_positions, select_start)
    select_within = Less (select_rank, select_limit)
    select_final = Compress <axis = 0> (select_ordered, select_within)

    image_index = Gather <axis = 1> (select_final, select_zero)
    boxes = GatherND (candidate_boxes, select_final)
    scores = GatherND (candidate_scores, select_final)
    labels = GatherND (candidate_labels, select_final)
}
"""


def append_selection(model: onnx.ModelProto, *, classes: int) -> None:
    """Turn a graph that ends in the seam into one that ends in detections."""
    graph = onnx.parser.parse_graph(
        _TEXT.replace("CLASSES", str(classes)).replace("CAP", str(MAX_DETECTIONS_CAP))
    )
    model.graph.node.extend(graph.node)
    model.graph.initializer.extend(graph.initializer)
    outputs = {output.name: output for output in graph.output}
    del model.graph.output[:]
    model.graph.output.extend(outputs[name] for name in OUTPUTS)


def declare_inputs(model: onnx.ModelProto) -> None:
    """Give a model the inputs that every model file has; all but `images` have a default."""
    graph = model.graph
    defaults = Thresholds()
    values: dict[str, NDArray[Any]] = {
        "image_sizes": np.zeros((1, 2), dtype=np.int64),
        "score_threshold": np.array([defaults.score], dtype=np.float32),
        "iou_threshold": np.array([defaults.iou], dtype=np.float32),
        "max_detections": np.array([defaults.max_detections], dtype=np.int64),
    }
    kind = onnx.TensorProto
    info = onnx.helper.make_tensor_value_info
    del graph.input[:]
    graph.input.extend(
        [
            info("images", kind.UINT8, ["batch", "height", "width", 3]),
            # Not "batch": the default has length 1, and equal names promise equal lengths.
            info("image_sizes", kind.INT64, ["sizes", 2]),
            info("score_threshold", kind.FLOAT, [1]),
            info("iou_threshold", kind.FLOAT, [1]),
            info("max_detections", kind.INT64, [1]),
        ]
    )
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in values.items()
    )


def require_inputs(model: onnx.ModelProto) -> None:
    """Take the defaults away, for runtimes that make constants of inputs that have one."""
    initializers = model.graph.initializer
    for place in reversed(range(len(initializers))):
        if initializers[place].name in INPUTS:
            del initializers[place]
