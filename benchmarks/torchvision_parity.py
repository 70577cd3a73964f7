"""How far our detections are from torchvision's own, for the networks and canvases of its models.

    python -m benchmarks.torchvision_parity [v1|v1_unpublished|v2 ...]

Imports random weights as `retinaserve import-torchvision` does, exports them, and compares network
and file with the golden numbers that benchmarks/torchvision_golden.py got from torchvision.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from model_export.export.graph import export
from model_export.torchvision_import import convert
from service.imaging.canvas import ShortSide
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.runtime.detector import Detections
from tests.unit.model_export.golden import parity

CASES = ("v1", "v1_unpublished", "v2")


def main() -> None:
    print("| model | canvases | compared | detections | boxes, px | scores | ties | unexplained |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        golden = parity.load(name)
        imported = convert(
            golden.state_dict(),
            path=Path(f"{name}.pth"),
            architecture=None,
            labels=None,
            eps=None,
            canvas=ShortSide(short=800, long=1333),
            provenance={},
        )
        network = imported.checkpoint.build()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export(imported.checkpoint, path, name=name)
            detector = devices.open_detector(read_artifact(path), devices.Device("cpu"))
        for run in golden.runs:
            report(name, "network", run, parity.run_network(network, run))
            found = detector(
                run.canvases,
                run.sizes,
                score_threshold=parity.SCORE,
                iou_threshold=parity.IOU,
                max_detections=run.max_detections,
            )
            report(name, "file", run, found)


def report(name: str, what: str, run: parity.Run, found: list[Detections]) -> None:
    batch, height, width, _ = run.canvases.shape
    each = [
        parity.compare(mine, theirs, max_detections=run.max_detections)
        for mine, theirs in zip(found, run.found, strict=True)
    ]
    boxes, scores = max(e.boxes for e in each), max(e.scores for e in each)
    print(
        f"| {name} | {batch} x {height}x{width} | {what} | {sum(e.pairs for e in each)} "
        f"| {boxes:.4f} | {scores:.1e} | {sum(e.ties for e in each)} "
        f"| {sum(e.unexplained for e in each)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
