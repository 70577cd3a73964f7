"""The least that serving an image can cost: decode, letterbox and session in one plain loop.

    python benchmarks/bare_loop.py MODEL.onnx IMAGES --seconds 20

Prints one JSON object. It uses the service's own imaging and session, with the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from service.imaging.decode import prepare
from service.runtime import devices
from service.runtime.artifact import read_artifact
from service.system.memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, help="folder of JPEG images")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loops", type=int, default=1, help="side by side, with one session")
    arguments = parser.parse_args()

    keep_freed_memory()
    artifact = read_artifact(arguments.model)
    rule = artifact.metadata.canvas
    thresholds = artifact.metadata.thresholds
    detector = devices.open_detector(artifact, devices.resolve(arguments.device).devices[0])
    images = [path.read_bytes() for path in sorted(arguments.images.glob("*.jpg"))]
    score = min([thresholds.score, *thresholds.per_class.values()])

    def one(data: bytes) -> float:
        """Core-seconds of decoding."""
        begun = time.thread_time()
        prepared = prepare(data, rule)
        decoded = time.thread_time()
        detector(
            prepared.canvas[np.newaxis],
            np.array([prepared.letterbox.resized], dtype=np.int64),
            score_threshold=score,
            iou_threshold=thresholds.iou,
        )
        return decoded - begun

    for data in images[:10]:
        one(data)
    started, busy = time.perf_counter(), _cpu_seconds()

    def loop(first: int) -> list[float]:
        decoding = []
        for data in itertools.cycle(images[first:] + images[:first]):
            decoding.append(one(data))
            if time.perf_counter() - started >= arguments.seconds:
                break
        return decoding

    with ThreadPoolExecutor(arguments.loops) as pool:
        decoding = [*itertools.chain(*pool.map(loop, range(arguments.loops)))]
    elapsed, count = time.perf_counter() - started, len(decoding)
    cpu = _cpu_seconds() - busy
    result = {
        "images": count,
        "per_second": count / elapsed,
        "cpu_ms": 1e3 * cpu / count,
        "decode_cpu_ms": 1e3 * sum(decoding) / count,
    }
    print(json.dumps(result))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
