import json

import numpy as np
from PIL import Image

from model_export.data.datasets import load


def annotation(number: int, category: int, box: list[float], crowd: int) -> dict:
    return {
        "id": number, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": crowd
    }  # fmt: skip


def test_regions_of_many_objects_are_read_beside_the_objects(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    value = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 9, "name": "speck"}],
        "annotations": [
            annotation(1, 7, [10, 10, 20, 20], 0),
            annotation(2, 7, [100, 0, 150, 50], 1),
            # No single speck is labelled: it is no class, and its region nothing to learn.
            annotation(3, 9, [0, 0, 50, 50], 1),
        ],
    }
    (tmp_path / "val.json").write_text(json.dumps(value))
    (tmp_path / "train.json").write_text(json.dumps(value))
    dataset = load(tmp_path, "val", classes=("cell",))
    (sample,) = dataset.samples
    assert sample.boxes.tolist() == [[10, 10, 30, 30]]
    # Clipped to the image, as every box.
    np.testing.assert_array_equal(sample.crowds, [[100, 0, 200, 50]])
    assert sample.crowd_labels.tolist() == [0]
