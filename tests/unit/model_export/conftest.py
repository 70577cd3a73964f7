"""Pictures of rectangles and the model that finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.model_export import rectangles


@pytest.fixture
def rectangles_model(tmp_path: Path) -> Path:
    """A model file of classes red and green that finds a bright rectangle on black."""
    return rectangles.write_model(tmp_path / "rectangles.onnx")


@pytest.fixture
def rectangles_data(tmp_path: Path) -> Path:
    """Ten pictures of a red or green rectangle, the last without one."""
    return rectangles.draw_data(tmp_path / "rectangles")
