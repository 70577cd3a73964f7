"""Images of rectangles and the model that finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.unit.model_export import random_model, rectangles
from tests.unit.model_export.random_model import RandomModel


@pytest.fixture
def rectangles_model(tmp_path: Path) -> Path:
    """A model file of classes red and green that finds a bright rectangle on black."""
    return rectangles.write_model(tmp_path / "rectangles.onnx")


@pytest.fixture
def rectangles_data(tmp_path: Path) -> Path:
    """Ten images of a red or green rectangle, the last without one."""
    return rectangles.draw_data(tmp_path / "rectangles")


@pytest.fixture(scope="session")
def exported(
    untraced_exporter: None, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> RandomModel:
    """One exported network for all tests and all workers: an export takes long."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder if worker_id == "master" else folder.parent
    with FileLock(shared / "random-model.lock"):
        return random_model.make(shared / "random-model" / "model.onnx")
