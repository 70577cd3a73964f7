"""What smaller precisions cost and save: fp32, fp16 and int8 of one checkpoint, side by side.

    python benchmarks/precision.py service/models/blood-cells/1/checkpoint.safetensors --data bccd

Exports the checkpoint once, writes the other two files from that one, and prints AP, size, time of
the session and CPU time per image. The files take turns, so that what else runs on the machine
slows all of them. On CPUs onnxruntime computes most of fp16 in float32, between casts: there its
time says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from model_export.checkpoints import load_checkpoint
from model_export.data.datasets import Dataset, load
from model_export.export.graph import export
from model_export.export.precision import Precision
from model_export.export.reduced import RANGE_IMAGES, side_by_side, table, write_reduced
from service.runtime import devices

TIMED_IMAGES = 12


def evenly(data: Dataset, count: int) -> list[bytes]:
    step = max(1, len(data.samples) // count)
    return [sample.path.read_bytes() for sample in data.samples[::step][:count]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--split", default="val", help="where AP is measured")
    parser.add_argument("--ranges", default="train", help="where int8 learns its ranges")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    classes = checkpoint.description.classes
    held_out = load(arguments.data, arguments.split, classes=classes)
    ranges = evenly(load(arguments.data, arguments.ranges, classes=classes), RANGE_IMAGES)
    with tempfile.TemporaryDirectory() as scratch:
        files = {each: Path(scratch) / each / "model.onnx" for each in Precision}
        full = files[Precision.FP32]
        export(checkpoint, full, name="fp32")
        for precision in (Precision.FP16, Precision.INT8):
            write_reduced(full, files[precision], precision, ranges)
        rows, _ = side_by_side(files, held_out, evenly(held_out, TIMED_IMAGES))
    device = devices.resolve("auto").devices[0].name
    print(f"{arguments.checkpoint.name}, {len(held_out.samples)} images, on {device}")
    for line in table(rows):
        print(line)


if __name__ == "__main__":
    main()
