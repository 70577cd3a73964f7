"""Test tiers by folder, distribution over workers, and data sets outside the repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from coverage import Coverage
from xdist.remote import Producer
from xdist.scheduler.loadfile import LoadFileScheduling

ROOT = Path(__file__).resolve().parent.parent
TIERS = frozenset({"unit", "api", "e2e", "reliability"})

collect_ignore = ["efficientnet_golden.py", "torchvision_golden.py"]
"""They run in environments of their own."""

_UNIT = "tests/unit/model_export"
ONE_EXPORT = tuple(
    f"{_UNIT}/export/test_{name}.py"
    for name in ("graph", "precision", "pipeline", "verify", "openvino")
)
"""These files share one exported network, so one worker runs them all."""

LONGEST_FIRST = (
    "tests/e2e/test_whole_path.py",
    "tests/e2e/test_tutorials.py",
    f"{_UNIT}/training/test_distributed.py",
    *ONE_EXPORT,
    f"{_UNIT}/commands/test_cli.py",
    "tests/reliability/test_connections.py",
    f"{_UNIT}/training/test_trainer.py",
    f"{_UNIT}/test_study.py",
    "tests/e2e/test_page.py",
    "tests/reliability/test_stop.py",
    f"{_UNIT}/test_torchvision_parity.py",
    "tests/unit/service/http/oip/test_memory.py",
    "tests/reliability/test_load.py",
)
"""These files start first: a long file that started last would leave the other workers idle."""


class FileScheduling(LoadFileScheduling):
    """Send each file, and all files of `ONE_EXPORT` together, to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return ONE_EXPORT[0] if file in ONE_EXPORT else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """Distribute by file for every --dist, so that the fixtures of a module are made once."""
    return FileScheduling(config, log)


def pytest_configure() -> None:
    """Turn the deadlines of property tests off: a busy machine is not a failure."""
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder's tier; skip GPU tests where there is no CUDA device."""
    rank = {file: place for place, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run end-to-end and reliability tests, and their servers, without coverage.

    Tracing takes a fifth of their time; the unit and API tests cover what they run.
    """
    measured = Coverage.current()
    if measured is None or not ({"e2e", "reliability"} & {mark.name for mark in item.own_markers}):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
            patch.delenv(name)
        measured.stop()
        try:
            return (yield)
        finally:
            measured.start()


@pytest.fixture(scope="session")
def untraced_exporter() -> Iterator[None]:
    """torch's exporter runs without the trace function of coverage, which doubles its time.

    Of this project's code it runs a network's forward pass, which other tests run, too.
    """
    import torch.onnx

    def untraced(traced: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tracer = sys.gettrace()
            sys.settrace(None)
            try:
                return traced(*args, **options)
            finally:
                sys.settrace(tracer)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", untraced(torch.onnx.export))
        patch.setattr(torch.onnx.ONNXProgram, "optimize", untraced(torch.onnx.ONNXProgram.optimize))
        yield


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
    """Blood cells, Pascal VOC layout: 205 train and 87 val images of 640x480."""
    return _external("bccd")


@pytest.fixture(scope="session")
def fod_a_mini() -> Path:
    """Objects on runways, Pascal VOC layout: 31 classes, images of 300x300."""
    return _external("fod-a-mini")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """ImageNet MobileNetV2, a tensor dict with torchvision's key names."""
    return _external("weights/mobilenet_v2_imagenet1k.pth")
