"""How inferences share a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.models.registry import open_registry
from service.runtime.cpu_concurrency import CpuConcurrency, cpu_concurrency
from service.runtime.devices import Device
from service.runtime.shared_detector import SharedDetector
from tests import tiny_model

SECONDS = 60.0


@pytest.mark.parametrize(
    ("asked", "cores", "inferences", "threads"),
    [
        (None, 1, 1, None),
        (None, 2, 2, 1),
        (None, 3, 2, 1),
        (None, 4, 2, 2),
        (None, 16, 4, 4),
        (1, 64, 1, None),
        (3, 1, 3, None),
        (2, 16, 2, 8),
        (3, 16, 3, 5),
        (8, 4, 8, 1),
    ],
)
def test_inferences_share_the_cores_by_a_rule_or_as_asked(
    asked: int | None, cores: int, inferences: int, threads: int | None
) -> None:
    assert cpu_concurrency(asked, cores) == CpuConcurrency(inferences, threads)


def test_every_model_has_a_shared_detector_for_each_inference(tmp_path: Path) -> None:
    for version in (1, 2):
        tiny_model.save(tmp_path, version=version)
    registry = open_registry(
        tmp_path,
        devices=(Device("cpu"),),
        default=None,
        batch=1,
        cpu_concurrency=cpu_concurrency(2, 2),
    )
    registry.start()
    try:
        for version in (1, 2):
            registry.load("tiny", version).result(SECONDS)
            detectors = registry.get("tiny", version).detectors
            assert len(detectors) == 2
            (detector,) = set(detectors)
            assert isinstance(detector, SharedDetector)
    finally:
        registry.close(SECONDS)
