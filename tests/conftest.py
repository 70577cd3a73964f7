"""What every test shares: tier markers by folder, and the data sets that live outside."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
TIERS = frozenset({"unit", "api", "e2e", "reliability"})


def pytest_configure() -> None:
    """Let property tests take their time: a busy machine is no failure."""
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder's tier; skip GPU tests where there is no CUDA device."""
    lacks_cuda: bool | None = None
    for item in items:
        parts = item.path.relative_to(ROOT).parts
        item.add_marker(parts[1] if parts[0] == "tests" and parts[1] in TIERS else "unit")
        if item.get_closest_marker("gpu"):
            if lacks_cuda is None:
                lacks_cuda = not _cuda_device_present()
            if lacks_cuda:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _cuda_device_present() -> bool:
    # Imported only when a GPU test is collected: torch takes seconds.
    import torch

    return torch.cuda.is_available()


def _external(relative: str) -> Path:
    """A path of the data that is never part of the repository; its absence is an error in CI."""
    root = Path(os.environ.get("RETINASERVE_TEST_DATA", ROOT.parent / "shared" / "data"))
    path = root / relative
    if path.exists():
        return path
    reason = f"{path} is not there; RETINASERVE_TEST_DATA names the folder that holds {relative}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Blood cells, Pascal VOC layout: 205 train and 87 val pictures of 640x480."""
    return _external("bccd")


@pytest.fixture(scope="session")
def fod_a_mini() -> Path:
    """Objects on runways, Pascal VOC layout: 31 classes, pictures of 300x300."""
    return _external("fod-a-mini")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """ImageNet MobileNetV2, a tensor dict with torchvision's key names."""
    return _external("weights/mobilenet_v2_imagenet1k.pth")
